#!/usr/bin/env bash
# optax 0.2.8: warmup_constant_schedule with warmup_steps=0 is a learning rate of zero for ever; warmup_cosine_decay_schedule is not.
#
# The first one is a linear schedule from init_value to peak_value, and one without steps stays at its first value: init_value, usually 0.
# The second one, with the same arguments, begins at peak_value. One would expect a warm-up of no steps to be left out by both.
#
# Hurt: who switches the warm-up off (a short run, an ablation, warmup_steps=int(0.05 * 10)). Nothing is learned, the loss curve is flat,
# and the only sign is a line of the log at level INFO. Join schedules only where there are steps to join, or pass init_value=peak_value.
set -euo pipefail
work="$(mktemp -d)"
trap 'rm -rf "$work"' EXIT
"${PYTHON:-python3}" -m venv "$work/venv"
"$work/venv/bin/pip" install -q 'optax==0.2.8' 'jax==0.10.2'
cd "$work" && JAX_PLATFORMS=cpu venv/bin/python - <<'PY'
import jax.numpy as jnp
import optax

PEAK = 1e-3
schedules = {
    "warmup_constant_schedule": optax.warmup_constant_schedule(0.0, PEAK, 0),
    "warmup_cosine_decay_schedule": optax.warmup_cosine_decay_schedule(0.0, PEAK, 0, 1_000_000),
}
moved = {}
for name, schedule in schedules.items():
    optimizer, weight = optax.sgd(schedule), jnp.float32(1.0)
    state = optimizer.init(weight)
    for _ in range(100):
        update, state = optimizer.update(jnp.float32(1.0), state)
        weight = optax.apply_updates(weight, update)
    moved[name] = 1.0 - float(weight)
    print(f"{name}, 0 steps of warm-up: rates {[float(schedule(step)) for step in (0, 1, 100)]}; 100 updates move a weight by {moved[name]:.4f}")
raise SystemExit(not (moved["warmup_constant_schedule"] == 0 and abs(moved["warmup_cosine_decay_schedule"] - 100 * PEAK) < 1e-3))
PY
