#!/usr/bin/env bash
# JAX 0.10.2: jnp.asarray of a NumPy array compiles a program for each new shape; with dtype= the array's own dtype it compiles none.
#
# Moving an array to the device is no computation, so one expects a mere transfer. jnp.asarray(x) and jnp.array(x) run a jitted
# function named `stage` instead, which XLA compiles anew for each length and dtype. jnp.asarray(x, dtype=x.dtype) and jax.device_put(x)
# give the same array without a compiler.
#
# Hurt: servers and samplers that take prompts of changing lengths: each new length waits for the compiler before its own program does,
# and buckets of padded shapes do not help where the arrays are moved first and padded on the device.
set -euo pipefail
work="$(mktemp -d)"
trap 'rm -rf "$work"' EXIT
"${PYTHON:-python3}" -m venv "$work/venv"
"$work/venv/bin/pip" install -q 'jax==0.10.2'
cd "$work" && JAX_PLATFORMS=cpu venv/bin/python - <<'PY'
import time

import jax
import jax.numpy as jnp
import numpy as np

LENGTHS = range(1, 21)
compiled = []


def listen(event, _, **about):
    if event == "/jax/core/compile/backend_compile_duration":
        compiled.append(about.get("fun_name"))


jax.monitoring.register_event_duration_secs_listener(listen)
tokens = np.arange(100, dtype=np.int32)
found = {}
for name, move in {
    "jnp.asarray(x)": jnp.asarray,
    "jnp.array(x)": jnp.array,
    "jnp.asarray(x, dtype=x.dtype)": lambda x: jnp.asarray(x, dtype=x.dtype),
    "jax.device_put(x)": jax.device_put,
}.items():
    jax.clear_caches()
    compiled.clear()
    began = time.perf_counter()
    moved = [jax.block_until_ready(move(tokens[:length])) for length in LENGTHS]
    took = time.perf_counter() - began
    assert all(x.dtype == np.int32 and np.array_equal(x, tokens[: x.size]) for x in moved)
    found[name] = len(compiled)
    print(f"{name}: {len(compiled)} programs {set(compiled) or ''} for {len(LENGTHS)} lengths, {took / len(LENGTHS) * 1e3:.2f} ms each")
raise SystemExit(list(found.values()) != [20, 20, 0, 0])
PY
