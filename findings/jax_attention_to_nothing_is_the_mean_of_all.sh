#!/usr/bin/env bash
# JAX 0.10.2: jax.nn.dot_product_attention gives a query that may see no key the mean of all values, masked ones included.
#
# With a mask row that is all False, or with key_value_seq_lengths of 0, the scores are all the same large negative number, of which
# softmax makes equal weights. One would expect zeros, which the same function gives beyond query_seq_lengths, or NaN, as a softmax of
# minus infinities gives: both show that nothing was seen.
#
# Hurt: who packs or pads rows and lets padding attend to nothing. Its outputs are finite and depend on every other sequence of the row, so
# that later layers, a mean over positions or a test for NaN notice nothing; and two implementations of one mask disagree there.
set -euo pipefail
work="$(mktemp -d)"
trap 'rm -rf "$work"' EXIT
"${PYTHON:-python3}" -m venv "$work/venv"
"$work/venv/bin/pip" install -q 'jax==0.10.2'
cd "$work" && JAX_PLATFORMS=cpu venv/bin/python - <<'PY'
import jax
import jax.numpy as jnp
import numpy as np

query, key = jax.random.normal(jax.random.key(0), (2, 1, 5, 2, 8))  # [1, T, N, H]
value = jax.random.normal(jax.random.key(1), (1, 5, 2, 8))
mean = np.broadcast_to(np.asarray(value).mean(axis=1, keepdims=True), value.shape)
seen = {
    "mask of False": {"mask": jnp.zeros((1, 1, 5, 5), bool)},
    "key_value_seq_lengths=[0]": {"key_value_seq_lengths": jnp.array([0])},
}
far = {}
for name, options in seen.items():
    out = np.asarray(jax.nn.dot_product_attention(query, key, value, **options))
    far[name] = abs(out - mean).max()
    print(f"{name}: the largest output is {abs(out).max():.3f}, and {far[name]:.1e} from the mean of all values")
zeros = jax.nn.dot_product_attention(query, key, value, query_seq_lengths=jnp.array([0]))
print(f"query_seq_lengths=[0]: the largest output is {abs(zeros).max():.3f}")
raise SystemExit(zeros.any() or not all(distance < 1e-6 for distance in far.values()))
PY
