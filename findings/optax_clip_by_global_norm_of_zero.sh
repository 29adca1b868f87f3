#!/usr/bin/env bash
# optax 0.2.8 (JAX 0.10.2): clip_by_global_norm(0.0) makes NaN of gradients that are all zero, and zero of all others.
#
# Where the norm exceeds the limit, gradients are divided by their norm and multiplied by the limit. With the limit 0 no norm lies
# below it, not even 0: 0 / 0. Parameters then become NaN at the first step in which nothing is learned; in all other steps they stay
# where they are. Neither is an error.
#
# Hurt: who writes 0 for "no clipping", as other trainers read it, in reinforcement learning, where groups of equal rewards give zero gradients.
set -euo pipefail
work="$(mktemp -d)"
trap 'rm -rf "$work"' EXIT
"${PYTHON:-python3}" -m venv "$work/venv"
"$work/venv/bin/pip" install -q 'jax==0.10.2' 'optax==0.2.8'
cd "$work" && JAX_PLATFORMS=cpu venv/bin/python - <<'PY'
import jax.numpy as jnp
import optax

clip = optax.clip_by_global_norm(0.0)
found = {value: float(clip.update({"w": jnp.full(3, value)}, optax.EmptyState())[0]["w"][0]) for value in (0.0, 0.5)}
print(f"gradients of 0 become {found[0.0]}, of 0.5 {found[0.5]}")
raise SystemExit(not (found[0.0] != found[0.0] and found[0.5] == 0.0))
PY
