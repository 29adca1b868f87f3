#!/usr/bin/env bash
# JAX 0.10.2 on CPU: a bfloat16 product that is summed in float32 compiles, and fails when it runs, if its result is transposed.
#
# jnp.matmul(x, w, preferred_element_type=float32) of two bfloat16 matrices works; with .T behind it the compiled program raises
# "Unsupported element type for DotThunk::Execute: BF16 x BF16 = F32", unless the matrices are tiny (4 x 4). The transpose has become
# part of the product. So does the order of an einsum's result: values read by grouped attention weights as bkgqc,bkcd->bqkgd fail with
# two rows, and work with one; of the 24 orders with b first only bkgqd works. float16 and float32 work, and so does a barrier in between.
#
# Hurt: who tests a bfloat16 model for TPU on CPU, where one row and small shapes pass and the next ones raise UNIMPLEMENTED at run time.
set -euo pipefail
work="$(mktemp -d)"
trap 'rm -rf "$work"' EXIT
"${PYTHON:-python3}" -m venv "$work/venv"
"$work/venv/bin/pip" install -q 'jax==0.10.2'
cd "$work" && JAX_PLATFORMS=cpu venv/bin/python - <<'PY'
import itertools

import jax
import jax.numpy as jnp


def runs(f, *shapes, dtype=jnp.bfloat16):
    """Whether the program runs; that it compiles is taken for granted."""
    arrays = [jnp.ones(shape, dtype) for shape in shapes]
    compiled = jax.jit(f).lower(*arrays).compile()
    try:
        return bool((jax.block_until_ready(compiled(*arrays)) > 0).all())
    except jax.errors.JaxRuntimeError as error:
        assert "BF16 x BF16 = F32" in str(error), error
        return False


def product(x, w):
    return jnp.matmul(x, w, preferred_element_type=jnp.float32)


def read(order):
    return lambda weights, v: jnp.einsum(f"bkgqc,bkcd->{order}", weights, v, preferred_element_type=jnp.float32)


two, four, one_row, rows = [(64, 64)] * 2, [(4, 4)] * 2, [(1, 2, 7, 5, 8), (1, 2, 8, 4)], [(2, 2, 7, 5, 8), (2, 2, 8, 4)]
found = {
    "x @ w, 64 x 64": runs(product, *two),
    "(x @ w).T, 4 x 4": runs(lambda x, w: product(x, w).T, *four),
    "(x @ w).T, 64 x 64": runs(lambda x, w: product(x, w).T, *two),
    "(x @ w).T, 64 x 64, float16": runs(lambda x, w: product(x, w).T, *two, dtype=jnp.float16),
    "(x @ w).T, 64 x 64, barrier": runs(lambda x, w: jax.lax.optimization_barrier(product(x, w)).T, *two),
    "bkgqc,bkcd->bqkgd, one row": runs(read("bqkgd"), *one_row),
    "bkgqc,bkcd->bqkgd, two rows": runs(read("bqkgd"), *rows),
    "bkgqc,bkcd->bqkgd, two rows, float32": runs(read("bqkgd"), *rows, dtype=jnp.float32),
}
for name, works in found.items():
    print(f"{name}: {'works' if works else 'raises'}")
orders = ["b" + "".join(order) for order in itertools.permutations("kgqd")]
work = [order for order in orders if runs(read(order), *rows)]
print(f"bkgqc,bkcd->b…, two rows: {work} of {len(orders)} orders of the result work")
raise SystemExit([*found.values(), work] != [True, True, False, True, True, True, False, True, ["bkgqd"]])
PY
