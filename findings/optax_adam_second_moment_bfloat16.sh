#!/usr/bin/env bash
# optax 0.2.8 (JAX 0.10.2): Adam's second moment of bfloat16 parameters rises but never falls, and no argument changes its dtype.
#
# optax.scale_by_adam keeps the second moment in the parameters' dtype; mu_dtype is of the first one alone. With the usual b2 of 0.999 a
# step takes off a thousandth, less than half of the distance between two bfloat16 numbers, and is rounded away. After one gradient
# of 0.4 and 5,000 of 0.004 it is 1.6e-4, as after the first; float64 has 1.7e-5. Steps are a third of what they should be, for ever.
#
# Hurt: who trains parameters kept in bfloat16: one large gradient (a warm-up, an outlier) lowers the learning rate of a weight for good.
set -euo pipefail
work="$(mktemp -d)"
trap 'rm -rf "$work"' EXIT
"${PYTHON:-python3}" -m venv "$work/venv"
"$work/venv/bin/pip" install -q 'jax==0.10.2' 'optax==0.2.8'
cd "$work" && JAX_PLATFORMS=cpu venv/bin/python - <<'PY'
import jax
import jax.numpy as jnp
import optax

found = {}
for dtype in (jnp.bfloat16, jnp.float32):
    optimizer, params = optax.adam(1e-3, mu_dtype=jnp.float32), jnp.zeros(1, dtype)
    update, state = jax.jit(optimizer.update), optimizer.init(params)
    for step in range(5001):
        updates, state = update(jnp.full(1, 0.004 if step else 0.4, dtype), state)
    found[dtype.__name__] = float(state[0].nu[0]), float(updates[0])
right = 0.001 * 0.4**2 * 0.999**5000 + 0.004**2 * (1 - 0.999**5000)
for name, (second, step) in found.items():
    print(f"{name}: second moment {second:.3g}, right {right:.3g}; step {step:.3g}")
raise SystemExit(not (found["bfloat16"][0] > 1.5e-4 and abs(found["float32"][0] / right - 1) < 0.01))
PY
