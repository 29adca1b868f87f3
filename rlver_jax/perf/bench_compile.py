"""From a command to its first training step, in the miniature: with nothing compiled before, and once more.

A training run of two steps is started as a user starts one, with an empty folder for compiled programs; then another
one with the folder that the first one has filled. A step begins when its dialogues are being played. The first step,
less the second one, is tracing and compilation.
"""

import os
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

from rlver_jax.miniature import assets
from rlver_jax.perf.bench_timing import Tell
from rlver_jax.training.metrics_file import read_metrics

CONFIG, FLAGS = assets.SHIPPED / assets.CONFIG, ("--config.eval.every=0",)
POLL_S = 0.05


def measure(repeats: int, tell: Tell) -> dict[str, Any]:
    """Seconds of cold and warm starts."""
    starts: dict[str, list[dict[str, float]]] = {"cold": [], "warm": []}
    for repeat in range(repeats):
        with tempfile.TemporaryDirectory(prefix="rlver_jax_bench_") as folder:
            for name, timings in starts.items():
                tell(f"a {name} start, {repeat + 1} of {repeats}")
                timings.append(_start(Path(folder), name))
    return {"ways": {name: _medians(timings) | {"all": timings} for name, timings in starts.items()}}


def lines(results: dict[str, Any]) -> list[str]:
    """The results as text."""
    text = [f"{'':5} first step begins s  start s  first step s  second step s  compiling s"]
    for name, start in results["ways"].items():
        steps = f"{start['first_step_s']:12.1f}  {start['second_step_s']:13.1f}  {start['compile_s']:11.1f}"
        text.append(f"{name:5} {start['begins_s']:19.1f}  {start['start_s']:7.1f}  {steps}")
    text.append("begins: from the command until the first dialogues are being played")
    return [*text, "start: from the command to the end of the first step, less the time of the second step"]


def _start(folder: Path, name: str) -> dict[str, float]:
    """One run as a process; its times are read from its metrics."""
    workdir, log = folder / name, folder / f"{name}.log"
    command = [sys.executable, "-m", "rlver_jax.train", f"--config={CONFIG}", "--config.train.steps=2", *FLAGS]
    environment = {**os.environ, "JAX_COMPILATION_CACHE_DIR": str(folder / "compiled")}
    began = time.perf_counter()
    with log.open("wb") as out:
        run = subprocess.Popen([*command, f"--workdir={workdir}"], stdout=out, stderr=out, env=environment)
    try:
        first, second = (_until(run, workdir / "metrics.jsonl", step, log) - began for step in (1, 2))
        if run.wait():
            raise ValueError(_failure(run, log))
    finally:
        run.kill()
        run.wait()
    metrics = read_metrics(workdir / "metrics.jsonl")
    steps = [step["time/rollout_s"] + step["time/update_s"] for step in metrics]
    return {
        "begins_s": first - steps[0] + metrics[0]["time/dispatch_s"],
        "start_s": first - (second - first),
        "first_step_s": steps[0],
        "second_step_s": steps[1],
        "compile_s": steps[0] - steps[1],
    }


def _until(run: subprocess.Popen, metrics: Path, steps: int, log: Path) -> float:
    """When the run has written down so many steps."""
    while not metrics.exists() or metrics.read_bytes().count(b"\n") < steps:
        if run.poll():
            raise ValueError(_failure(run, log))
        time.sleep(POLL_S)
    return time.perf_counter()


def _failure(run: subprocess.Popen, log: Path) -> str:
    output = log.read_text(encoding="utf-8", errors="replace")[-2000:]
    return f"the training run ended with exit status {run.returncode}: {output}"


def _medians(starts: list[dict[str, float]]) -> dict[str, float]:
    return {name: statistics.median(start[name] for start in starts) for name in starts[0]}
