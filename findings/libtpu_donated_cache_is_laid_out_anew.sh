#!/usr/bin/env bash
# JAX 0.10.2 with libtpu 0.0.42.1 (TPU v5e): one token a row, written into a donated cache, may cost temporaries of twice the cache.
#
# A bfloat16 cache [rows, heads, slots, 64] lies in memory with slots last (64 would be padded to the 128 lanes). A scatter at each row's
# own length, and a fori_loop of dynamic_update_slice over the rows, want those 64 last: the donated cache is copied into a padded
# layout and back, for a few KB. The same updates written out one after the other, or jax.vmap of dynamic_update_slice (a scatter, too,
# that names all indices), are done in place. With a head dimension of 128 the scatter is in place, and the loop still copies.
#
# Hurt: who decodes small Qwen2.5 models (head dimension 64) on TPU with rows of different lengths and counts on donation: memory for the
# cache three times, and all of it moved at every call. No TPU is needed to see it.
set -euo pipefail
work="$(mktemp -d)"
trap 'rm -rf "$work"' EXIT
"${PYTHON:-python3}" -m venv "$work/venv"
"$work/venv/bin/pip" install -q 'jax==0.10.2' 'libtpu==0.0.42.1'
cd "$work" && JAX_PLATFORMS=cpu TPU_SKIP_MDS_QUERY=1 ALLOW_MULTIPLE_LIBTPU_LOAD=1 TPU_ACCELERATOR_TYPE=v5litepod-8 \
  TPU_WORKER_HOSTNAMES=localhost TPU_STDERR_LOG_LEVEL=3 TPU_MIN_LOG_LEVEL=3 venv/bin/python - <<'PY'
import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import topologies
from jax.sharding import SingleDeviceSharding

ROWS, HEADS, SLOTS = 16, 8, 8192
chip = topologies.get_topology_desc("v5e:2x4", "tpu", chip_config_name="default").devices[0]
array = lambda *shape, dtype=jnp.bfloat16: jax.ShapeDtypeStruct(shape, dtype, sharding=SingleDeviceSharding(chip))


def scatter(cache, new, lengths):
    return cache.at[jnp.arange(ROWS), :, lengths].set(new)


def one_row(row, cache, new, lengths):
    update = lax.dynamic_slice_in_dim(new, row, 1)[:, :, None]
    return lax.dynamic_update_slice(cache, update, (row, 0, lengths[row], 0))


def unrolled(cache, new, lengths):
    for row in range(ROWS):
        cache = one_row(row, cache, new, lengths)
    return cache


def loop(cache, new, lengths):
    return lax.fori_loop(0, ROWS, lambda row, cache: one_row(row, cache, new, lengths), cache)


def batched(cache, new, lengths):
    return jax.vmap(lambda row, x, at: lax.dynamic_update_slice(row, x[:, None], (0, at, 0)))(cache, new, lengths)


found = {}
for dim in (64, 128):
    size = ROWS * HEADS * SLOTS * dim * 2 / 2**20
    for write in (scatter, unrolled, loop, batched):
        lowered = jax.jit(write, donate_argnums=0).lower(
            array(ROWS, HEADS, SLOTS, dim), array(ROWS, HEADS, dim), array(ROWS, dtype=jnp.int32)
        )
        compiled = lowered.compile()
        temporaries = compiled.memory_analysis().temp_size_in_bytes / 2**20
        moved = f"{compiled.cost_analysis()['bytes accessed'] / 2**20:.1f} MiB moved (a loop counts once)"
        found[dim, write.__name__] = temporaries / size
        print(f"head dimension {dim}, cache {size:.0f} MiB, {write.__name__}: {temporaries:.1f} MiB of temporaries, {moved}")
copied = {case for case, share in found.items() if share > 0.9}
in_place = {case for case, share in found.items() if share < 0.1}
raise SystemExit(copied != {(64, "scatter"), (64, "loop"), (128, "loop")} or len(in_place) != 5)
PY
