#!/usr/bin/env bash
# JAX 0.10.2 with libtpu 0.0.42.1: in optimized HLO for several TPU slices a sum across slices is no all-reduce.
#
# The compiler splits a psum over all chips into an all-reduce inside each slice and a `send` and a `recv` with is_host_transfer=true,
# which the hosts' runtime (Megascale) carries out; what they are stands in a frontend attribute (_xla_megascale_transfer_type). A psum
# over the slices alone leaves no collective at all. Their channel_id is numbered apart from that of collectives: two
# instructions that have nothing in common have one channel.
#
# Hurt: who reads compiled.as_text() to count communication before paying for a pod: the slowest network of all counts nothing; and
# who tells collectives apart by channel_id loses one. No TPU is needed to see it.
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
import numpy as np
from jax.experimental import topologies
from jax.sharding import Mesh, NamedSharding, PartitionSpec as P

devices = topologies.get_topology_desc("v5e:2x4", "tpu", chip_config_name="default", num_slices=2).devices
devices = sorted(devices, key=lambda device: (device.slice_index, device.id))
mesh = Mesh(np.array(devices).reshape(2, 8), ("slice", "chip"))


def instructions(axes):
    summed = jax.shard_map(lambda x: jax.lax.psum(x, axes), mesh=mesh, in_specs=P(("slice", "chip")), out_specs=P(), check_vma=False)
    x = jax.ShapeDtypeStruct((64, 512), jnp.float32, sharding=NamedSharding(mesh, P(("slice", "chip"))))
    text = jax.jit(summed).lower(x).compile().as_text()
    found = re.findall(r" = .*? (all-[a-z]+|reduce-scatter|send|recv)\(.*?channel_id=(\d+)", text)
    print(axes, found, sorted(set(re.findall(r'_xla_megascale_transfer_type="(\w+)"', text))))
    return found


across = {kind for kind, _ in instructions("slice")}
everywhere = instructions(("slice", "chip"))
channels = [channel for _, channel in everywhere]
raise SystemExit(not (across == {"send", "recv"} and {"send", "recv"} < {k for k, _ in everywhere} and len(set(channels)) < len(channels)))
PY
