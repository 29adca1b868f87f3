#!/usr/bin/env bash
# JAX 0.10.2 on CPU: weights that a loop only reads are copied; bfloat16 ones all at once, to float32: three times the memory.
#
# A decode loop multiplies one token with the weights of eight layers. float32 weights as separate arrays are read where they lie. Taken
# out of stacked arrays by w[i], all of them are copied; by lax.scan, those of one layer, at every step. bfloat16 weights are converted
# to float32 in front of the loop and kept until it ends, all layers together, scanned or not: temporaries of twice their size.
#
# Hurt: who keeps a model in bfloat16 to fit a CPU's memory, or stacks layers for lax.scan as one does on TPU, and decodes.
set -euo pipefail
work="$(mktemp -d)"
trap 'rm -rf "$work"' EXIT
"${PYTHON:-python3}" -m venv "$work/venv"
"$work/venv/bin/pip" install -q 'jax==0.10.2'
cd "$work" && JAX_PLATFORMS=cpu venv/bin/python - <<'PY'
import jax
import jax.numpy as jnp

LAYERS, WIDTH, ROWS = 8, 256, 8


def layer(x, w):
    return x + jnp.tanh(x @ w[0]) @ w[1]


def separate(weights, x):
    for w in weights:
        x = layer(x, w)
    return x


def indexed(weights, x):
    for i in range(LAYERS):
        x = layer(x, (weights[0][i], weights[1][i]))
    return x


def scanned(weights, x):
    return jax.lax.scan(lambda x, w: (layer(x, w), None), x, weights)[0]


found = {}
for dtype in (jnp.float32, jnp.bfloat16):
    array = lambda *shape, dtype=dtype: jax.ShapeDtypeStruct(shape, dtype)
    one_by_one = [(array(WIDTH, 4 * WIDTH), array(4 * WIDTH, WIDTH)) for _ in range(LAYERS)]
    stacked = array(LAYERS, WIDTH, 4 * WIDTH), array(LAYERS, 4 * WIDTH, WIDTH)
    size = 8 * LAYERS * WIDTH**2 * jnp.dtype(dtype).itemsize
    for model, weights in ((separate, one_by_one), (indexed, stacked), (scanned, stacked)):
        decode = jax.jit(lambda weights, x, steps: jax.lax.fori_loop(0, steps, lambda _, x: model(weights, x), x))
        compiled = decode.lower(weights, array(ROWS, WIDTH), array(dtype=jnp.int32)).compile()
        share = found[jnp.dtype(dtype).name, model.__name__] = compiled.memory_analysis().temp_size_in_bytes / size
        print(f"{jnp.dtype(dtype).name}, {size / 2**20:.0f} MiB of weights, {model.__name__}: temporaries of {share:.2f} times the weights")
expected = dict(zip(found, (0, 1, 1 / LAYERS, 2, 2, 2 + 2 / LAYERS), strict=True))
raise SystemExit(any(abs(found[case] - expected[case]) > 0.05 for case in found))
PY
