"""The display of a run, in a terminal and in a file."""

import io

import numpy as np
import pytest
from rich.console import Console

from rlver_jax.training import progress
from rlver_jax.training.progress import TrainingProgress, sparkline

ROW = {"emotion/final_mean": 41.26, "reward/mean": 0.4126, "tokens/generated": 900.0}


def test_sparkline_by_hand():
    assert sparkline([]) == ""
    assert sparkline([5]) == "▁"
    assert sparkline([3, 3, 3]) == "▁▁▁"
    assert sparkline(range(8)) == "▁▂▃▄▅▆▇█"
    assert sparkline([10, 0, 10]) == "█▁█"
    assert sparkline([0, 2, 9, 11], width=2) == "▁█", "runs of values are averaged"
    assert len(sparkline(np.random.default_rng(0).random(500))) == 24


@pytest.fixture
def clock(monkeypatch):
    now = [100.0]
    monkeypatch.setattr(progress.time, "monotonic", lambda: now[0])
    return now


def shown(clock, terminal: bool, seconds) -> str:
    text = io.StringIO()
    console = Console(file=text, force_terminal=terminal, width=120)
    with TrainingProgress(console, total=12, done=2) as bar:
        for i, duration in enumerate(seconds):
            clock[0] += duration
            bar.update(3 + i, ROW)
        bar.note("a [note]")
    return text.getvalue()


def test_a_file_gets_a_line_a_step(clock):
    lines = shown(clock, False, [60, 2, 4]).splitlines()
    assert lines == [
        "the first step compiles: that takes minutes, in which nothing is printed",
        "step 3/12 · emotion 41.3 · reward 0.413 · 60.0 s · 15 tokens/s · ETA 0:09:00",
        "step 4/12 · emotion 41.3 · reward 0.413 · 2.0 s · 450 tokens/s · ETA 0:04:08",
        "step 5/12 · emotion 41.3 · reward 0.413 · 4.0 s · 225 tokens/s · ETA 0:02:34",
        "a [note]",
    ]


def test_the_first_step_is_forgotten_once_there_are_enough(clock):
    assert "ETA 0:00:00" in shown(clock, False, [600] + [3] * 9).splitlines()[-2]
    assert "ETA 0:00:03" in shown(clock, False, [600] + [3] * 8).splitlines()[-2]


def test_a_terminal_gets_a_bar_with_the_emotions_course(clock):
    text = shown(clock, True, [3, 3])
    assert "4/12" in text
    assert "▁▁ emotion 41.3 · reward 0.413" in text
    assert "a [note]" in text
