"""A whole training step of the miniature by part, as a run of it measures itself: playing, learning, both.

The first step compiles, so it doesn't count.
"""

import os
import statistics
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

from rlver_jax.miniature import assets
from rlver_jax.perf.bench_timing import Tell
from rlver_jax.training.metrics_file import read_metrics

STEPS = 4
PARTS = {"rollout_s": "time/rollout_s", "update_s": "time/update_s"}


def measure(repeats: int, tell: Tell) -> dict[str, Any]:
    """Medians of all steps of `repeats` runs."""
    rounds = []
    for repeat in range(repeats):
        tell(f"a run of {STEPS} steps, {repeat + 1} of {repeats}")
        rounds.append(figures(None))
    return {name: statistics.median(one[name] for one in rounds) for name in rounds[0]} | {"rounds": rounds}


def lines(results: dict[str, Any]) -> list[str]:
    """The results as text."""
    rollout, update, step = (results[name] for name in (*PARTS, "step_s"))
    return [f"a step takes {step:.2f} s: {rollout:.2f} s of playing, {update:.2f} s of learning"]


def figures(checkout: Path | None) -> dict[str, float]:
    """Medians of one run's steps, in seconds, by this package or by that of a checkout.

    Raises:
        ValueError: the run failed; the message holds the end of what it said.
    """
    config = assets.SHIPPED / assets.CONFIG if checkout is None else checkout / "configs" / "miniature.py"
    flags = [f"--config={config}", f"--config.train.steps={STEPS}", "--config.eval.every=0"]
    with tempfile.TemporaryDirectory(prefix="rlver_jax_bench_") as folder:
        run_in(checkout, ["rlver_jax.train", *flags, f"--workdir={folder}/run"])
        rows = read_metrics(Path(folder) / "run" / "metrics.jsonl")[1:]
    medians = {name: statistics.median(row[metric] for row in rows) for name, metric in PARTS.items()}
    return medians | {"step_s": statistics.median(sum(row[metric] for metric in PARTS.values()) for row in rows)}


def run_in(checkout: Path | None, module: list[str]) -> None:
    """Runs `python -m` with a module and its flags, of this package or of a checkout's.

    Raises:
        ValueError: it failed; the message holds the end of what it said.
    """
    environment = {**os.environ}
    if checkout is not None:
        environment["PYTHONPATH"] = str(checkout)
    run = subprocess.run([sys.executable, "-m", *module], cwd=checkout, env=environment, capture_output=True, text=True)
    if run.returncode:
        where = "" if checkout is None else f" in {checkout}"
        raise ValueError(f"{module[0]}{where} ended with exit status {run.returncode}: {run.stderr[-2000:]}")
