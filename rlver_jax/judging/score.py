"""Judges at work on finished dialogues: each one's score beside the training user's, and agreement with a record."""

import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import jax.numpy as jnp
import numpy as np
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn

from rlver_jax.judging.finished import Finished, turns_of
from rlver_jax.judging.judge import Judge, Work
from rlver_jax.judging.statistics import agreement, band_confusion, interval, mean_with_interval, spearman
from rlver_jax.judging.work_folder import Line, WorkFile
from rlver_jax.user.emotion import SAGE, change_readout

READOUTS = ("argmax", "mean")  # both are read from one distribution


class Meter:
    """Progress over turns or dialogues: a bar in a terminal, a line each time that results are kept elsewhere."""

    def __init__(self, console: Console, what: str, total: int):
        self._console, self._what, self._total, self._done, self._tokens = console, what, total, 0, 0
        columns = (TextColumn(what), BarColumn(), MofNCompleteColumn(), TextColumn("{task.fields[state]}"))
        times = (TimeElapsedColumn(), TextColumn("ETA"), TimeRemainingColumn())
        self._bar = Progress(*columns, *times, console=console, transient=True, disable=not console.is_terminal)
        self._task = self._bar.add_task("", total=total, state="compiling")
        self._began, self._figure = time.monotonic(), ""

    def __enter__(self) -> "Meter":
        self._bar.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._bar.stop()

    def work(self, work: Work) -> None:
        """Something has been done."""
        self._done, self._tokens = self._done + work.turns, self._tokens + work.tokens
        self._bar.update(self._task, completed=self._done, state=self._state())

    def kept(self, figure: str) -> None:
        """Results have been kept; `figure` says where the judgement stands."""
        self._figure = f" · {figure}"
        self._bar.update(self._task, state=self._state())
        if self._bar.disable:
            self._console.print(f"{self._what} {self._done}/{self._total} · {self._state()}", highlight=False)

    def _state(self) -> str:
        return f"{self._tokens / max(time.monotonic() - self._began, 1e-9):.1f} tokens/s{self._figure}"


def appraised_lines(
    judge: Judge,
    dialogues: Sequence[Finished],
    *,
    own: bool,
    work: WorkFile,
    console: Console,
    figure: Callable[[dict[int, Line]], str],
) -> dict[int, Line]:
    """What a judge makes of dialogues, by their index; those that `work` holds are not appraised again.

    Args:
        own: see `Judge.appraise`.
        figure: where the judgement stands, from the results so far.
    """
    missing = [i for i in range(len(dialogues)) if i not in work.done]
    total = sum(len(turns_of(dialogues[i].record)) for i in missing)
    with Meter(console, judge.name, total) as meter:
        for some in judge.appraise([dialogues[i] for i in missing], own=own, progress=meter.work):
            work.add([_line(missing[i], dialogues[missing[i]], found._asdict()) for i, found in some])
            meter.kept(figure(work.done))
    return work.done


def _line(index: int, dialogue: Finished, found: Line) -> Line:
    return {"index": index, "dialogue": dialogue.record["dialogue"], "profile": dialogue.record["profile"]} | found


def judged(judge: Judge, dialogues: Sequence[Finished], folder: Path | None, console: Console) -> dict[str, Any]:
    """A judge's own score of finished dialogues, and the gap to the score of the user that they were played with.

    A gap above 0 means that the playing user was more pleased than this judge would have been. Its interval is that of
    a mean over dialogues.
    """
    theirs = [dialogue.record["emotion"] for dialogue in dialogues]

    def final(lines: dict[int, Line]) -> list[int]:
        return [lines[i]["emotions"][-1] for i in sorted(lines)]

    def figure(lines: dict[int, Line]) -> str:
        return f"mean emotion {np.mean(final(lines)):.1f}, the user's {np.mean([theirs[i] for i in lines]):.1f}"

    work = WorkFile(folder and folder / "judges", judge.name, judge.settings, dialogues)
    ours = final(appraised_lines(judge, dialogues, own=True, work=work, console=console, figure=figure))
    outcomes = [SAGE.outcome(emotion) for emotion in ours]
    gap = mean_with_interval([a - b for a, b in zip(theirs, ours, strict=True)])
    pairs = np.array([ours, theirs], float).T
    agrees = spearman(pairs)
    return {
        "score": float(np.mean(ours)),
        "success": outcomes.count(1),
        "failure": outcomes.count(-1),
        "n": len(ours),
        "gap": gap["mean"],
        "gap_interval": gap["interval"],
        "spearman_final": agrees if np.isfinite(agrees) else None,
        "settings": judge.settings,
    }


def agreed(judge: Judge, dialogues: Sequence[Finished], folder: Path | None, console: Console) -> dict[str, Any]:
    """How a judge's changes compare with the recorded ones, for both readouts; contexts fixed to the record."""
    recorded = [[turn.change for turn in turns_of(d.record)] for d in dialogues]
    before = [[turn.emotion for turn in turns_of(d.record)] for d in dialogues]

    def pairs(lines: dict[int, Line], how: str) -> list[np.ndarray]:
        found = []
        for i in sorted(lines):
            if recorded[i]:
                own = np.asarray(change_readout(jnp.asarray(lines[i]["change_logprobs"]), how))
                found.append(np.array([own, recorded[i]], float).T)
        return found

    def figure(lines: dict[int, Line]) -> str:
        both = np.concatenate([*pairs(lines, "mean"), np.zeros((0, 2))])
        return f"mean absolute error {np.abs(both[:, 0] - both[:, 1]).mean():.2f}" if len(both) else ""

    work = WorkFile(folder and folder / "agreement", judge.name, judge.settings, dialogues)
    lines = appraised_lines(judge, dialogues, own=False, work=work, console=console, figure=figure)
    found: dict[str, Any] = {}
    starts = np.concatenate([np.asarray(x) for x in before if x])
    for how in READOUTS:
        groups = pairs(lines, how)
        both = np.concatenate(groups).astype(int)
        ends = [SAGE.update(starts, both[:, column]) for column in (0, 1)]
        bands = {"band_confusion": band_confusion(*ends), "band_agreement": _same_band(starts, groups)}
        found[how] = agreement(groups) | bands
    return found | {"n": len(starts), "dialogues": len([x for x in before if x]), "settings": judge.settings}


def _same_band(starts: np.ndarray, groups: Sequence[np.ndarray]) -> dict[str, Any]:
    """Share of turns after which both emotions lie in one band."""
    borders = np.cumsum([len(group) for group in groups])[:-1]
    rows = [np.column_stack([at, group]) for at, group in zip(np.split(starts, borders), groups, strict=True)]

    def share(table: np.ndarray) -> float:
        at, own, recorded = table.astype(int).T
        return float((SAGE.band(SAGE.update(at, own)) == SAGE.band(SAGE.update(at, recorded))).mean())

    return {"value": share(np.concatenate(rows)), "interval": interval(rows, share)}
