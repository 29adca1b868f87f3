"""Weights from a Hugging Face folder onto the device: as a run loads them, against the file as it is.

A model of the size of Qwen2.5-0.5B with random weights, in bfloat16 as published, is written to a temporary folder, and
read from there while the file is still in memory: what is measured is the work, not the disk.
"""

import statistics
import tempfile
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
from safetensors.flax import load_file

from rlver_jax.models.families import preset
from rlver_jax.models.hf_weights import load_params, save_params
from rlver_jax.models.qwen import Qwen2, init_params
from rlver_jax.perf.bench_timing import Tell, alternate, copied_bytes_per_s, ratios

MODEL = preset("0.5b")


def measure(repeats: int, tell: Tell) -> dict[str, Any]:
    """Seconds of loading the weights, as float32 and as they are, and of `safetensors` alone."""
    model = Qwen2(MODEL)
    with tempfile.TemporaryDirectory(prefix="rlver_jax_bench_") as parent:
        folder = Path(parent) / "model"
        tell("writing weights")
        save_params(folder, init_params(model, jax.random.key(0)), MODEL, dtype=jnp.bfloat16)
        files = list(folder.glob("*.safetensors"))
        ways = {
            "float32": lambda: load_params(folder, model, dtype=jnp.float32),
            "bfloat16": lambda: load_params(folder, model, dtype=jnp.bfloat16),
            "safetensors": lambda: [load_file(file) for file in files],
        }
        for name, way in ways.items():
            tell(f"{name}, the first time")
            jax.block_until_ready(way())
        seconds = alternate(ways, repeats, tell)
        size = sum(file.stat().st_size for file in files)
    tell("copying")
    copied = copied_bytes_per_s(max(repeats, 5))
    return {
        "bytes": size,
        "ways": {
            name: {
                "seconds": statistics.median(times),
                "all_seconds": times,
                "bytes_per_s": size / statistics.median(times),
            }
            for name, times in seconds.items()
        },
        "over_safetensors": {name: ratios(seconds[name], seconds["safetensors"]) for name in ("float32", "bfloat16")},
        "copied_bytes_per_s": copied,
    }


def lines(results: dict[str, Any]) -> list[str]:
    """The results as text."""
    copied = f"memory copies {results['copied_bytes_per_s'] / 1e9:.2f} GB/s"
    text = [f"{results['bytes'] / 1e6:.0f} MB of weights, float32 twice as much; {copied}"]
    for name, way in results["ways"].items():
        text.append(f"{name:11} {way['seconds']:6.2f} s  {way['bytes_per_s'] / 1e9:5.2f} GB/s of the file")
    for name, r in results["over_safetensors"].items():
        text.append(f"{name} takes {r['median']:.2f} x as long as safetensors ({r['least']:.2f} to {r['most']:.2f})")
    return text
