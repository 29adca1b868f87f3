#!/usr/bin/env bash
# optax 0.2.8 (JAX 0.10.2): inject_hyperparams(adam) with bfloat16 parameters gives NaN at the first step; adam alone does not.
#
# inject_hyperparams keeps every number of the optimizer in the dtype of the parameters, the decay rates included. In bfloat16 Adam's b2
# of 0.999 is 1.0: the second moment stays 0, and so does its bias correction, 1 - b2. 0 / 0. One wants the learning rate in the state
# and gets other decay rates. hyperparam_dtype=jnp.float32 keeps them. Nothing warns.
#
# Hurt: who trains parameters kept in bfloat16 and wraps Adam to log the learning rate or to change it during a run.
set -euo pipefail
work="$(mktemp -d)"
trap 'rm -rf "$work"' EXIT
"${PYTHON:-python3}" -m venv "$work/venv"
"$work/venv/bin/pip" install -q 'jax==0.10.2' 'optax==0.2.8'
cd "$work" && JAX_PLATFORMS=cpu venv/bin/python - <<'PY'
import jax.numpy as jnp
import optax

found = {}
injected, kept = (optax.inject_hyperparams(optax.adam, hyperparam_dtype=dtype) for dtype in (None, jnp.float32))
for name, make, dtype in (
    ("adam", optax.adam, jnp.bfloat16),
    ("inject_hyperparams(adam)", injected, jnp.bfloat16),
    ("inject_hyperparams(adam)", injected, jnp.float32),
    ("inject_hyperparams(adam, hyperparam_dtype=float32)", kept, jnp.bfloat16),
):
    optimizer, params = make(learning_rate=1e-3), jnp.ones(1, dtype)
    update, state = optimizer.update(jnp.ones(1, dtype), optimizer.init(params), params)
    b2 = f", b2 {float(state.hyperparams['b2']):.4f}" if hasattr(state, "hyperparams") else ""
    found[name, dtype.__name__] = float(update[0])
    print(f"{name}, {dtype.__name__} parameters: first update {float(update[0]):.5f}{b2}")
wrong = [case for case, update in found.items() if not abs(update + 1e-3) < 1e-5]
raise SystemExit(wrong != [("inject_hyperparams(adam)", "bfloat16")])
PY
