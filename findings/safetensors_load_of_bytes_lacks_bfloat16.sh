#!/usr/bin/env bash
# safetensors 0.8.0: safetensors.flax.load can't read the bfloat16 arrays that safetensors.flax.save wrote; load_file reads them.
#
# save and save_file write the same bytes, and load_file gives bfloat16 arrays back. load, which takes the bytes, raises KeyError: 'BF16',
# in safetensors.flax and in safetensors.numpy: it has a table of dtypes of its own, without bfloat16. float16 and float32 work both ways.
#
# Hurt: who reads weights from memory (an archive, an object store, another process) instead of a file, in the dtype that most models have.
set -euo pipefail
work="$(mktemp -d)"
trap 'rm -rf "$work"' EXIT
"${PYTHON:-python3}" -m venv "$work/venv"
"$work/venv/bin/pip" install -q 'jax==0.10.2' 'safetensors==0.8.0'
cd "$work" && JAX_PLATFORMS=cpu venv/bin/python - <<'PY'
from pathlib import Path

import jax.numpy as jnp
from safetensors import flax
from safetensors import numpy as plain

found = {}
for dtype in (jnp.float32, jnp.float16, jnp.bfloat16):
    arrays, file = {"w": jnp.arange(3, dtype=dtype)}, Path("w.safetensors")
    flax.save_file(arrays, file)
    assert flax.save(arrays) == file.read_bytes()
    for name, load in {
        "flax.load_file": lambda: flax.load_file(file),
        "flax.load": lambda: flax.load(file.read_bytes()),
        "numpy.load": lambda: plain.load(file.read_bytes()),
    }.items():
        try:
            found[dtype.__name__, name] = str(load()["w"].dtype)
        except KeyError as error:
            found[dtype.__name__, name] = f"KeyError: {error}"
        print(f"{dtype.__name__}, safetensors.{name}: {found[dtype.__name__, name]}")
failed = {case for case, result in found.items() if result != case[0]}
raise SystemExit(failed != {("bfloat16", "flax.load"), ("bfloat16", "numpy.load")})
PY
