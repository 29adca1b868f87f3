#!/usr/bin/env bash
# JAX 0.10.2, CPU: jnp.cumsum of numbers that are not negative falls in places, by a last bit in float32, by 0.004 in bfloat16.
#
# The sums of a long array are combined from those of its parts, each rounded by itself. Of the running sums of 151,936 sorted
# probabilities some hundred are smaller than the one before, in float32; numpy.cumsum adds in order, so that its sums never fall. One
# would expect rounding to make a cumulative sum inexact, but still sorted.
#
# Hurt: who draws by inverse transform or cuts top-p with jnp.searchsorted on a cumulative sum, which takes a sorted array for granted:
# near such a place its methods may answer differently, and a token of probability > 0 gets an interval of negative length.
set -euo pipefail
work="$(mktemp -d)"
trap 'rm -rf "$work"' EXIT
"${PYTHON:-python3}" -m venv "$work/venv"
"$work/venv/bin/pip" install -q 'jax==0.10.2'
cd "$work" && JAX_PLATFORMS=cpu venv/bin/python - <<'PY'
import jax
import jax.numpy as jnp
import numpy as np

VOCABULARY = 151_936  # Qwen2.5's
probabilities = jnp.sort(jax.nn.softmax(3 * jax.random.normal(jax.random.key(0), (VOCABULARY,))))[::-1]
assert probabilities.min() > 0
falls = {}
for dtype in (jnp.float32, jnp.bfloat16):
    steps = np.diff(np.asarray(jnp.cumsum(probabilities.astype(dtype)), np.float64))
    falls[jnp.dtype(dtype).name] = (steps < 0).sum()
    print(f"jnp.cumsum, {jnp.dtype(dtype).name}: {(steps < 0).sum()} of {len(steps)} sums are below the one before, the lowest by {-steps.min():.1e}")
plain = int((np.diff(np.cumsum(np.asarray(probabilities))) < 0).sum())
print(f"numpy.cumsum, float32: {plain}")
raise SystemExit(not (falls["float32"] > 100 and falls["bfloat16"] > 0 and plain == 0))
PY
