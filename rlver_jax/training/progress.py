"""What one sees while a run trains: a bar with rate, ETA and the emotion's course; elsewhere a line a step."""

import time
from collections.abc import Mapping, Sequence
from datetime import timedelta
from typing import Self

import numpy as np
from rich.console import Console

from rlver_jax.text.progress import Meter

_BARS = "▁▂▃▄▅▆▇█"
_WIDTH = 24  # characters of the sparkline
_RECENT = 8  # steps whose durations foretell the rest: the first one compiles


def sparkline(values: Sequence[float], width: int = _WIDTH) -> str:
    """Values as a row of bars from the least to the greatest; more than `width` of them are averaged in runs."""
    if not len(values):
        return ""
    parts = np.array_split(np.asarray(values, np.float64), min(width, len(values)))
    means = np.array([part.mean() for part in parts])
    low, span = means.min(), np.ptp(means)
    level = (means - low) / span * (len(_BARS) - 1) if span else np.zeros(len(means))
    return "".join(_BARS[round(x)] for x in level)


class TrainingProgress(Meter):
    """Shows how far a run is; a context manager."""

    begins, course = "compiling and playing the first batch", "emotion/final_mean"

    def __init__(self, console: Console, total: int, done: int):
        """Of `total` steps, `done` were done before this process began."""
        super().__init__(console, total, self.begins, completed=done, times=False)
        self._total, self._done = total, done
        self._course: list[float] = []
        self._times = [time.monotonic()]

    def __enter__(self) -> Self:
        super().__enter__()
        # Nothing else is seen for as long as the first step and its compilation take.
        line = "the first step compiles: that takes minutes, in which nothing is printed"
        self.show(self._done, self.begins, line=line if self._done < self._total else "")
        return self

    def update(self, step: int, metrics: Mapping[str, float]) -> None:
        """Metrics of a step have come."""
        self._times.append(time.monotonic())
        self._course.append(metrics[self.course])
        state = f"{self._numbers(metrics, self._times[-1] - self._times[-2])} · ETA {self._eta(step)}"
        self.show(step, f"{sparkline(self._course)} {state}", line=f"step {step}/{self._total} · {state}")

    def _numbers(self, metrics: Mapping[str, float], seconds: float) -> str:
        text = f"emotion {metrics['emotion/final_mean']:.1f} · reward {metrics['reward/mean']:.3f}"
        if "eval/score" in metrics:
            text += f" · eval {metrics['eval/score']:.1f}"
        if metrics.get("train/tied"):
            text += " · all groups tie: no update"
        return f"{text} · {seconds:.1f} s · {metrics['tokens/generated'] / seconds:.0f} tokens/s"

    def _eta(self, step: int) -> str:
        """From the last steps; from the first one, which compiled, while there is no other."""
        recent = self._times[-_RECENT:] if len(self._times) > 2 else self._times
        pace = (recent[-1] - recent[0]) / (len(recent) - 1)
        return str(timedelta(seconds=round(pace * (self._total - step))))


class FittingProgress(TrainingProgress):
    """The same of supervised fine-tuning."""

    begins, course = "compiling", "sft/loss"

    def _numbers(self, metrics: Mapping[str, float], seconds: float) -> str:
        text = f"loss {metrics['sft/loss']:.4f}"
        if "held_out/loss" in metrics:
            text += f" · held out {metrics['held_out/loss']:.4f}"
        return f"{text} · {seconds:.1f} s · {metrics['tokens/packed'] / seconds:.0f} tokens/s"
