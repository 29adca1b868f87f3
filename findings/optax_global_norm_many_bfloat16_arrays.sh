#!/usr/bin/env bash
# optax 0.2.8 (JAX 0.10.2): the global norm of many bfloat16 arrays stops growing at 16.
#
# optax.tree.norm (optax.global_norm) sums the squares of each array in float32, rounds each sum to the array's dtype, and adds these
# sums in that dtype. In bfloat16, 256 + 1 is 256: the norm of 1,000 arrays of one 1 is 16.0 instead of 31.6. The same 1,000 ones in
# one array give 31.6. optax.clip_by_global_norm(1.0) then leaves gradients of norm 2.0 in place of 1.0. Nothing warns.
#
# Hurt: who trains parameters that are kept in bfloat16, with layers that are not stacked, and clips or logs the gradient's norm.
set -euo pipefail
work="$(mktemp -d)"
trap 'rm -rf "$work"' EXIT
"${PYTHON:-python3}" -m venv "$work/venv"
"$work/venv/bin/pip" install -q 'jax==0.10.2' 'optax==0.2.8'
cd "$work" && JAX_PLATFORMS=cpu venv/bin/python - <<'PY'
import jax.numpy as jnp
import optax

many = {str(i): jnp.ones((), jnp.bfloat16) for i in range(1000)}
norm, one = float(optax.tree.norm(many)), float(optax.tree.norm(jnp.ones(1000, jnp.bfloat16)))
clipped, _ = optax.clip_by_global_norm(1.0).update(many, optax.EmptyState())
left = sum(float(x) ** 2 for x in clipped.values()) ** 0.5
print(f"norm of 1,000 arrays of one 1: {norm}; of one array of 1,000: {one}; right: {1000 ** 0.5:.3f}")
print(f"norm after clip_by_global_norm(1.0): {left:.3f}")
raise SystemExit(not (norm == 16.0 and abs(one - 31.6) < 0.1 and left > 1.9))
PY
