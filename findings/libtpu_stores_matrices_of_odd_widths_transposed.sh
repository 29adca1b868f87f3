#!/usr/bin/env bash
# JAX 0.10.2 with libtpu 0.0.42.1 (TPU v5e): a matrix whose columns don't fill tiles of 128 is stored transposed, and loops copy it whole.
#
# The order in which an argument lies on the chip depends on its size. [8192, 7392] lies column by column, since 8192 rows fill tiles of 128
# and 7392 columns don't (7392 x 4 = 29,568 is the MLP of Qwen2.5-72B, whose matrices are split over four chips); [8192, 7424] lies row by
# row. A scan over layers for two rows, as in decoding, wants its weights row by row. So the program with 7392 columns copies the matrices
# of all layers first, and the copy stays as long as the loop runs; the one with 7424 reads them where they are, without temporaries.
# One would expect a little padding, at the most.
#
# Hurt: who decodes with weights split over chips on TPU (Qwen2.5 0.5B, 1.5B, 3B and 72B over four, 7B and 14B over eight): temporaries as
# large as two of the three matrices of all MLPs, 18 GiB a chip for 72B over four, and more where loops that want either order take turns.
set -euo pipefail
work="$(mktemp -d)"
trap 'rm -rf "$work"' EXIT
"${PYTHON:-python3}" -m venv "$work/venv"
"$work/venv/bin/pip" install -q 'jax==0.10.2' 'libtpu==0.0.42.1'
cd "$work" && JAX_PLATFORMS=cpu TPU_SKIP_MDS_QUERY=1 ALLOW_MULTIPLE_LIBTPU_LOAD=1 TPU_ACCELERATOR_TYPE=v5litepod-8 \
  TPU_WORKER_HOSTNAMES=localhost TPU_STDERR_LOG_LEVEL=3 TPU_MIN_LOG_LEVEL=3 venv/bin/python - <<'PY'
import re

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import topologies
from jax.sharding import SingleDeviceSharding

LAYERS, WIDTH = 4, 8192
chip = topologies.get_topology_desc("v5e:2x4", "tpu", chip_config_name="default").devices[0]
array = lambda *shape, dtype=jnp.bfloat16: jax.ShapeDtypeStruct(shape, dtype, sharding=SingleDeviceSharding(chip))


def layer(x, weights):
    into, out_of = weights
    inner = jax.nn.silu(jnp.dot(x, into, preferred_element_type=jnp.float32)).astype(x.dtype)
    return x + jnp.dot(inner, out_of), None


def play(weights, text, token, times):
    forward = lambda _, x: lax.scan(layer, x, weights)[0]

    def turn(_, state):
        text, token = state
        text = lax.fori_loop(0, times, forward, text)
        return text, lax.fori_loop(0, times, forward, token + text[:2])

    return lax.fori_loop(0, times, turn, (text, token))


seen = {}
for columns in (7392, 7424):
    weights = array(LAYERS, WIDTH, columns), array(LAYERS, columns, WIDTH)
    program = jax.jit(play).lower(weights, array(768, WIDTH), array(2, WIDTH), array(dtype=jnp.int32)).compile()
    order = program.input_formats[0][0][0].layout.major_to_minor
    copies = re.findall(rf"= (bf16\[{LAYERS},{WIDTH},{columns}\])\S* copy\(", program.as_text())
    temporaries = program.memory_analysis().temp_size_in_bytes / 2**20
    size = LAYERS * WIDTH * columns * 2 / 2**20
    seen[columns] = order, len(copies), temporaries > 0.9 * size
    print(f"{columns} columns, {size:.0f} MiB: stored in the order {order}, {len(copies)} copies of all layers, {temporaries:.0f} MiB of temporaries")
raise SystemExit(seen != {7392: ((0, 2, 1), 1, True), 7424: ((0, 1, 2), 0, False)})
PY
