#!/usr/bin/env bash
# flax 0.12.8: flax.serialization.from_bytes(target, data) puts arrays of any shape and dtype in the place of the target's.
#
# A target with a float32 matrix [2, 3] and data that hold five int8 numbers by the same name give the five int8 numbers, without an
# error. Names are compared, shapes are not. One would expect what Orbax and Module.apply do: an error that names both shapes.
#
# Hurt: who resumes or evaluates with another config than the one that was saved (an embedding of 151,936 rows and one of 152,064, adapters of
# another rank, moments in another dtype). What depends on the shape fails later, somewhere in a jitted step, or not at all: an
# optimizer's moments broadcast, a longer table is read in its first rows, and every step is compiled anew for the other shapes.
set -euo pipefail
work="$(mktemp -d)"
trap 'rm -rf "$work"' EXIT
"${PYTHON:-python3}" -m venv "$work/venv"
"$work/venv/bin/pip" install -q 'flax==0.12.8' 'jax==0.10.2' 'numpy==2.4.6'
cd "$work" && JAX_PLATFORMS=cpu venv/bin/python - <<'PY'
import numpy as np
from flax import serialization

target = {"kernel": np.zeros((2, 3), np.float32)}
saved = {"kernel": np.ones(5, np.int8)}
read = serialization.from_bytes(target, serialization.to_bytes(saved))["kernel"]
print(f"the target has {target['kernel'].dtype}{list(target['kernel'].shape)}, what is read {read.dtype}{list(read.shape)}")
try:
    serialization.from_bytes(target, serialization.to_bytes({"weight": saved["kernel"]}))
    refused = False
except ValueError as error:
    refused = True
    print(f"another name: ValueError: {str(error).splitlines()[0]}")
raise SystemExit(not (read.shape == (5,) and read.dtype == np.int8 and refused))
PY
