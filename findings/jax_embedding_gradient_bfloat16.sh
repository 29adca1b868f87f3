#!/usr/bin/env bash
# JAX 0.10.2: the gradient of rows looked up in a bfloat16 table is summed in bfloat16, and stops growing.
#
# table[tokens] is differentiated into a scatter-add in the table's dtype. A token that stands at 5,000 places, each with a cotangent of
# 0.01, gets a gradient of 4 instead of 50. Products and reductions of the same dtype are summed in float32, so that one
# expects it here, too. flax.linen.Embed looks rows up in this way.
#
# Hurt: who trains an embedding that is kept in bfloat16: rows of frequent tokens (a comma, a newline) learn too little.
set -euo pipefail
work="$(mktemp -d)"
trap 'rm -rf "$work"' EXIT
"${PYTHON:-python3}" -m venv "$work/venv"
"$work/venv/bin/pip" install -q 'jax==0.10.2'
cd "$work" && JAX_PLATFORMS=cpu venv/bin/python - <<'PY'
import jax
import jax.numpy as jnp

tokens, weight = jnp.zeros(5000, jnp.int32), jnp.full((5000, 1), 0.01, jnp.bfloat16)
table = jnp.zeros((4, 8), jnp.bfloat16)
looked_up = jax.jit(jax.grad(lambda t: (weight * t[tokens]).sum(dtype=jnp.float32)))(table)[0, 0]
onehot = jax.nn.one_hot(tokens, 4, dtype=jnp.bfloat16)
product = jax.jit(jax.grad(lambda t: (weight * (onehot @ t)).sum(dtype=jnp.float32)))(table)[0, 0]
print(f"gradient of a row looked up 5,000 times: {looked_up}; by a product with one-hot rows: {product}; right: 50")
raise SystemExit(not (float(looked_up) < 10 and abs(float(product) - 50) < 1))
PY
