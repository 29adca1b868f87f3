#!/usr/bin/env bash
# JAX 0.10.2: on CPU, jax.checkpoint of layers one after the other computes them twice and saves next to no memory.
#
# The second forward pass of a layer depends on its input alone, which is there from the beginning; what delays it is an optimization
# barrier, and XLA's CPU backend drops barriers before it schedules. Its scheduler then runs second forward passes far too early and
# keeps what they compute. jax.checkpoint(prevent_cse=True) is the default; its documentation names no such limit. In lax.scan it works.
# A dependence on the cotangent by values (here: NaN where the cotangent is NaN) makes unrolled layers save as much as scanned ones.
#
# Hurt: who trains on CPU with unrolled layers (which decode faster there) and turns rematerialization on because memory is short.
set -euo pipefail
work="$(mktemp -d)"
trap 'rm -rf "$work"' EXIT
"${PYTHON:-python3}" -m venv "$work/venv"
"$work/venv/bin/pip" install -q 'jax==0.10.2'
cd "$work" && JAX_PLATFORMS=cpu venv/bin/python - <<'PY'
import jax
import jax.numpy as jnp

LAYERS, WIDTH, PLACES = 12, 128, 1024


def layer(w, x):
    y = x * jax.lax.rsqrt(jnp.mean(x * x, -1, keepdims=True) + 1e-6)
    return x + (jax.nn.silu(y @ w[0]) * (y @ w[1])) @ w[2]


late = jax.custom_vjp(layer)


def backward(kept, cotangent):
    w, x = kept
    return jax.vjp(layer, w, jnp.where(jnp.isnan(cotangent), jnp.nan, x))[1](cotangent)


late.defvjp(lambda w, x: (layer(w, x), (w, x)), backward)


def loss_of(one, scan):
    def loss(weights, x):
        if scan:
            x, _ = jax.lax.scan(lambda x, w: (one(w, x), None), x, weights)
        else:
            for i in range(LAYERS):
                x = one(jax.tree.map(lambda w: w[i], weights), x)
        return jnp.mean(x**2)

    return loss


array = lambda *sizes: jax.ShapeDtypeStruct((LAYERS, *sizes), jnp.float32)
weights = (array(WIDTH, 4 * WIDTH), array(WIDTH, 4 * WIDTH), array(4 * WIDTH, WIDTH))
x = jax.ShapeDtypeStruct((PLACES, WIDTH), jnp.float32)
found = {}
for name, one, scan in (
    ("unrolled", layer, False),
    ("unrolled, jax.checkpoint", jax.checkpoint(layer), False),
    ("unrolled, after the cotangent", late, False),
    ("scanned, jax.checkpoint", jax.checkpoint(layer, prevent_cse=False), True),
):
    compiled = jax.jit(jax.grad(loss_of(one, scan))).lower(weights, x).compile()
    found[name] = compiled.memory_analysis().temp_size_in_bytes / 2**20
    print(f"{name}: {found[name]:.1f} MiB of temporaries, {compiled.cost_analysis()['flops'] / 1e9:.2f} GFLOP (a loop counts once)")
plain, again, late_one, scanned = found.values()
raise SystemExit(not (again > 0.8 * plain and late_one < 0.4 * plain and scanned < 0.4 * plain))
PY
