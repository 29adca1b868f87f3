#!/usr/bin/env bash
# JAX 0.10.2 on CPU: dividing a float32 array by one number is not a division; x / 100 misses for 30 of the integers 0..100.
#
# XLA turns array / number into array * (1 / number), which is rounded twice: the last bit differs from IEEE's quotient, which NumPy
# gives. A guess would be that this takes a fast-math flag, or at least a constant: it is so, too, for a number that comes as an argument
# of the program or is computed in it, and in eager mode. The same argument divides a scalar, or an array of its size, exactly.
#
# Hurt: who computes scores or rewards (emotion / 100, counts / n) on the device and compares them with the host's for equality, by a
# threshold, or as keys; an element of a batch also differs from the same number divided alone.
set -euo pipefail
work="$(mktemp -d)"
trap 'rm -rf "$work"' EXIT
"${PYTHON:-python3}" -m venv "$work/venv"
"$work/venv/bin/pip" install -q 'jax==0.10.2'
cd "$work" && JAX_PLATFORMS=cpu venv/bin/python - <<'PY'
import jax
import jax.numpy as jnp
import numpy as np

whole = np.arange(101, dtype=np.float32)
right = whole / np.float32(100)
by_constant, by_argument = jax.jit(lambda x: x / 100), jax.jit(lambda x, y: x / y)
found = {
    "array / constant": by_constant(whole),
    "array / constant, eager": jnp.asarray(whole) / 100,
    "array / argument": by_argument(whole, np.float32(100)),
    "array / number computed on the device": jax.jit(lambda x: x / (x.sum() / 50.5))(whole),
    "array / array of its size": by_argument(whole, np.full_like(whole, 100)),
    "scalar / argument, one by one": np.array([by_argument(x, np.float32(100)) for x in whole]),
}
misses = {}
for name, value in found.items():
    misses[name] = int((np.asarray(value) != right).sum())
    print(f"{name}: {misses[name]} of {whole.size} differ from NumPy's float32 quotient")
low = [int(x) for x in whole if by_constant(whole)[int(x)] < right[int(x)]]
print(f"fall short of a threshold of their own quotient (x / 100 >= np.float32(x) / 100): {low}")
raise SystemExit(list(misses.values()) != [30, 30, 30, 30, 0, 0])
PY
