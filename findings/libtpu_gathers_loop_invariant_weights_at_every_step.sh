#!/usr/bin/env bash
# JAX 0.10.2 with libtpu 0.0.42.1 (TPU v5e): weights that are split over devices are gathered at every step of a loop that never changes
# them; XLA's CPU compiler gathers the same weights once, in front of the loop.
#
# A decode loop multiplies with weights sharded over "fsdp". Their all-gather does not depend on the step, and the TPU's compiler
# leaves it in the body all the same, for weights of 128 KB as for some of 8 MB. A with_sharding_constraint to P() in front of the loop
# moves it there, and costs the memory of whole weights.
#
# Hurt: who decodes on the mesh that they train on: each token moves all weights over the network. Who counts collectives on eight
# virtual CPU devices does not see it. No TPU is needed to see it.
set -euo pipefail
work="$(mktemp -d)"
trap 'rm -rf "$work"' EXIT
"${PYTHON:-python3}" -m venv "$work/venv"
"$work/venv/bin/pip" install -q 'jax==0.10.2' 'libtpu==0.0.42.1'
cd "$work" && JAX_PLATFORMS=cpu JAX_NUM_CPU_DEVICES=8 TPU_SKIP_MDS_QUERY=1 ALLOW_MULTIPLE_LIBTPU_LOAD=1 TPU_ACCELERATOR_TYPE=v5litepod-8 \
  TPU_WORKER_HOSTNAMES=localhost TPU_STDERR_LOG_LEVEL=3 TPU_MIN_LOG_LEVEL=3 venv/bin/python - <<'PY'
import re

import jax
import jax.numpy as jnp
import numpy as np
from jax.experimental import topologies
from jax.sharding import Mesh, NamedSharding, PartitionSpec as P

LAYERS, STEPS = 4, 64
chips = topologies.get_topology_desc("v5e:2x4", "tpu", chip_config_name="default").devices


def gathers(mesh, rows, width, constrain):
    """(all-gathers in the program's loop, all-gathers in front of it)."""

    def decode(weights, x):
        if constrain:
            weights = jax.tree.map(lambda w: jax.lax.with_sharding_constraint(w, NamedSharding(mesh, P())), weights)

        def step(_, x):
            for up, down in weights:
                x = x + jnp.tanh(x @ up) @ down
            return x

        return jax.lax.fori_loop(0, STEPS, step, x)

    split = NamedSharding(mesh, P("fsdp"))
    array = lambda *shape: jax.ShapeDtypeStruct(shape, jnp.bfloat16, sharding=split)
    weights = [(array(width, 4 * width), array(4 * width, width)) for _ in range(LAYERS)]
    text = jax.jit(decode).lower(weights, array(rows, width)).compile().as_text()
    entry = text[text.index("\nENTRY ") :]
    count = lambda part: len(re.findall(r" all-gather(?:-start)?\(", part))
    return count(text) - count(entry), count(entry)


found = {}
for name, devices in (("CPU", jax.devices()), ("TPU", chips)):
    mesh = Mesh(np.array(devices), ("fsdp",))
    for rows, width in ((8, 128), (8, 1024)):
        for constrain in (False, True):
            inside, before = found[name, width, constrain] = gathers(mesh, rows, width, constrain)
            how = "constrained to P() in front of the loop" if constrain else "as they come"
            print(f"{name}, {2 * LAYERS} weights of width {width}, {how}: {inside} all-gathers in the loop, {before} in front of it")
expected = {case: (2 * LAYERS, 0) if case[0] == "TPU" and not case[2] else (0, 2 * LAYERS) for case in found}
raise SystemExit(found != expected)
PY
