#!/usr/bin/env bash
# JAX 0.10.2: jax.random.key(2**32) is jax.random.key(0): without jax_enable_x64 only the lowest 32 bits of a seed count.
#
# Seeds that differ by a multiple of 2**32 give equal keys, without a warning, and key(-1) is key(2**32 - 1). fold_in is of another mind: it raises
# OverflowError for 2**32 and for -1, unless the number is an np.int64: then 2**32 is 0 again. One would expect all bits to count, as with
# NumPy, or the same error.
#
# Hurt: who makes seeds of several numbers (run << 32 | step, host * 2**40 + i), or compares "independent" runs with such seeds: all runs with an
# equal lower half draw the very same dialogues, and the spread over seeds is too small.
set -euo pipefail
work="$(mktemp -d)"
trap 'rm -rf "$work"' EXIT
"${PYTHON:-python3}" -m venv "$work/venv"
"$work/venv/bin/pip" install -q 'jax==0.10.2' 'numpy==2.4.6'
cd "$work" && JAX_PLATFORMS=cpu venv/bin/python - <<'PY'
import jax
import numpy as np

bits = {}
for seed in (0, 7 << 32, -1, 2**32 - 1):
    bits[seed] = jax.random.key_data(jax.random.key(seed)).tolist()
    print(f"jax.random.key({seed}): {bits[seed]}")
differ = np.random.default_rng(0).integers(2**32) != np.random.default_rng(7 << 32).integers(2**32)
print(f"numpy.random.default_rng of 0 and {7 << 32} draw {'other' if differ else 'the same'} numbers")
folded = {}
for number in (0, 2**32, np.int64(2**32)):
    try:
        folded[type(number).__name__, int(number)] = jax.random.key_data(jax.random.fold_in(jax.random.key(0), number)).tolist()
    except OverflowError as error:
        folded[type(number).__name__, int(number)] = f"OverflowError: {error}"
    print(f"fold_in of {type(number).__name__} {number}: {folded[type(number).__name__, int(number)]}")
same = bits[0] == bits[7 << 32] and bits[-1] == bits[2**32 - 1] and folded["int64", 2**32] == folded["int", 0]
raise SystemExit(not (same and differ and str(folded["int", 2**32]).startswith("OverflowError")))
PY
