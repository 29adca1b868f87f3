"""What this machine can do at best: bytes copied a second."""

import time
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp

COPIED = 256 * 1024**2  # bytes: far more than any cache of a processor holds


def copied_bytes_per_s(repeats: int) -> float:
    """Bytes of a float32 array that are copied a second (read once, written once), the best of `repeats`."""
    array = jnp.zeros(COPIED // 4, jnp.float32)
    # The sum with an argument: XLA would leave out a copy of nothing but a copy.
    return COPIED / _best(jax.jit(lambda x, y: x + y), repeats, array, jnp.float32(1))


def _best(function: Callable, repeats: int, *args: Any) -> float:
    jax.block_until_ready(function(*args))
    seconds = []
    for _ in range(repeats):
        began = time.perf_counter()
        jax.block_until_ready(function(*args))
        seconds.append(time.perf_counter() - began)
    return min(seconds)
