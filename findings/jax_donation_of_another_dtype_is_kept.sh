#!/usr/bin/env bash
# JAX 0.10.2: a donated array that only an output of another item size could take stays alive, and no warning is given.
#
# jax.jit(f, donate_argnums=0) warns "Some donated buffers were not usable" where no output has the argument's shape. Where one has the
# shape but a narrower dtype (float32 -> int8, as in quantizing weights), there is no warning, and the argument is neither
# reused nor freed: x.is_deleted() is False and its memory counts.
#
# Hurt: who quantizes or casts a large model on the device and counts on donation to make room: both copies stay.
set -euo pipefail
work="$(mktemp -d)"
trap 'rm -rf "$work"' EXIT
"${PYTHON:-python3}" -m venv "$work/venv"
"$work/venv/bin/pip" install -q 'jax==0.10.2'
cd "$work" && JAX_PLATFORMS=cpu venv/bin/python - <<'PY'
import warnings

import jax
import jax.numpy as jnp

found = {}
for name, f in {
    "same shape and dtype": lambda x: x + 1,
    "another shape": lambda x: x[:10] + 1,
    "same shape, int8": lambda x: jnp.round(x).astype(jnp.int8),
}.items():
    x = jnp.zeros((512, 512))
    with warnings.catch_warnings(record=True) as said:
        warnings.simplefilter("always")
        jax.block_until_ready(jax.jit(f, donate_argnums=0)(x))
    found[name] = x.is_deleted(), len(said)
    print(f"{name}: freed {x.is_deleted()}, warnings {len(said)}")
raise SystemExit(found["same shape, int8"] != (False, 0) or found["same shape and dtype"] != (True, 0) or not found["another shape"][1])
PY
