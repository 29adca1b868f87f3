"""Times of several ways to do one thing, measured so that a busy machine slows them alike."""

import functools
import os
import platform
import statistics
import time
from collections.abc import Callable, Mapping
from typing import Any

import jax
import jax.numpy as jnp

COPIED = 256 * 1024**2  # bytes: far more than any cache of a processor holds
Tell = Callable[[str], None]  # shows progress


def alternate(ways: Mapping[str, Callable[[], Any]], repeats: int, tell: Tell) -> dict[str, list[float]]:
    """Seconds of each way, `repeats` times: all of them in turn, so that what slows the machine slows them all.

    Each must have run before, so that nothing is compiled, and return arrays, which are waited for.
    """
    seconds: dict[str, list[float]] = {name: [] for name in ways}
    for repeat in range(repeats):
        for name, run in ways.items():
            tell(f"{name}, {repeat + 1} of {repeats}")
            began = time.perf_counter()
            jax.block_until_ready(run())
            seconds[name].append(time.perf_counter() - began)
    return seconds


def ratios(slow: list[float], fast: list[float]) -> dict[str, float]:
    """How many times as fast `fast` is, by pairs of one round: the median pair, the worst and the best."""
    pairs = [a / b for a, b in zip(slow, fast, strict=True)]
    return {"median": statistics.median(pairs), "least": min(pairs), "most": max(pairs)}


def difference(tree: Any, other: Any) -> float:
    """The largest difference of any array in two trees of arrays, as a share of the array's largest value."""
    pairs = zip(jax.tree.leaves(tree), jax.tree.leaves(other), strict=True)
    return max(float(jnp.abs(a - b).max() / jnp.abs(b).max()) for a, b in pairs)


def machine() -> dict[str, Any]:
    """What times depend on beside the program; `load` is the mean number of processes that want a core."""
    return {
        "backend": jax.default_backend(),
        "device": jax.devices()[0].device_kind,
        "devices": jax.device_count(),
        "processor": platform.processor() or platform.machine(),
        "cores": len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count(),
        "load": os.getloadavg()[0],
        "jax": jax.__version__,
    }


def copied_bytes_per_s(repeats: int) -> float:
    """Bytes of a float32 array that are copied a second (read once, written once), the best of `repeats`."""
    # The sum with an argument: XLA would leave out a copy of nothing but a copy.
    copy = functools.partial(jax.jit(lambda x, y: x + y), jnp.zeros(COPIED // 4, jnp.float32), jnp.float32(1))
    jax.block_until_ready(copy())
    return COPIED / min(alternate({"copy": copy}, repeats, lambda _: None)["copy"])
