#!/usr/bin/env bash
# JAX 0.10.2, CPU: jax.experimental.layout.with_layout_constraint inside a jitted function gathers a sharded array on every device.
#
# The hint names an order of dimensions and nothing else, and asks for the order that the array has already. A matrix split over eight
# devices, multiplied by two and added to, needs no communication; with the hint between the two the program gathers the whole matrix.
# One would expect a hint on memory order to leave the sharding alone, as jax.lax.optimization_barrier does. The same hint inside
# jax.shard_map, for each device's own part, costs nothing. The compiler for TPU does the same as the one for CPU shown here.
#
# Hurt: who pins the layout of weights or of a KV cache against copies on a mesh: each use of a weight then travels whole over the network,
# and takes as many times the memory as it has parts.
set -euo pipefail
work="$(mktemp -d)"
trap 'rm -rf "$work"' EXIT
"${PYTHON:-python3}" -m venv "$work/venv"
"$work/venv/bin/pip" install -q 'jax==0.10.2'
cd "$work" && JAX_PLATFORMS=cpu XLA_FLAGS=--xla_force_host_platform_device_count=8 venv/bin/python - <<'PY'
import jax
import jax.numpy as jnp
from jax.experimental.layout import Layout, with_layout_constraint
from jax.sharding import NamedSharding, PartitionSpec

mesh = jax.make_mesh((8,), ("x",))
rows = NamedSharding(mesh, PartitionSpec("x"))
matrix = jax.ShapeDtypeStruct((1024, 512), jnp.float32, sharding=rows)
hint = lambda x: with_layout_constraint(x, Layout(major_to_minor=(0, 1)))
local = jax.shard_map(hint, mesh=mesh, in_specs=rows.spec, out_specs=rows.spec)
ways = {"nothing": lambda x: x, "optimization_barrier": jax.lax.optimization_barrier, "the hint": hint, "the hint in shard_map": local}
gathers = {}
for name, way in ways.items():
    program = jax.jit(lambda x: way(2 * x) + 1, out_shardings=rows).lower(matrix).compile()
    gathers[name] = sum(" all-gather" in line for line in program.as_text().splitlines())
    temporaries = program.memory_analysis().temp_size_in_bytes
    print(f"{name} in between: {gathers[name]} lines with all-gather, {temporaries / 2**20:.2f} MiB of temporaries for parts of 0.25 MiB")
raise SystemExit([name for name, count in gathers.items() if count] != ["the hint"])
PY
