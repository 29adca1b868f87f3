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
from rlver_jax.judging.statistics import agreement, mean_absolute_error, mean_with_interval, rank_correlation
from rlver_jax.judging.work_folder import Line, WorkFile
from rlver_jax.user.emotion import SAGE, change_readout

READOUTS = ("argmax", "mean")  # both are read from one distribution
QUIET_SECONDS = 60  # without a line where there is no bar


class Meter:
    """Progress over turns or forms: a bar in a terminal; elsewhere a line when results are kept, and now and then."""

    def __init__(self, console: Console, what: str, total: int):
        self._console, self._what, self._total, self._done, self._tokens = console, what, total, 0, 0
        columns = (TextColumn(what), BarColumn(), MofNCompleteColumn(), TextColumn("{task.fields[state]}"))
        times = (TimeElapsedColumn(), TextColumn("ETA"), TimeRemainingColumn())
        self._bar = Progress(*columns, *times, console=console, transient=True, disable=not console.is_terminal)
        self._task = self._bar.add_task("", total=total, state="compiling")
        self._began, self._figure = time.monotonic(), ""
        self._printed = self._began

    def __enter__(self) -> "Meter":
        self._bar.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._bar.stop()

    def work(self, work: Work) -> None:
        """Something has been done."""
        self._done, self._tokens = self._done + work.turns, self._tokens + work.tokens
        self._bar.update(self._task, completed=self._done, state=self._state())
        if time.monotonic() - self._printed > QUIET_SECONDS:
            self._print()

    def kept(self, figure: str) -> None:
        """Results have been kept; `figure` says where the judgement stands."""
        self._figure = f" · {figure}"
        self._bar.update(self._task, state=self._state())
        self._print()

    def _print(self) -> None:
        self._printed = time.monotonic()
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
    agrees = rank_correlation(ours, theirs)
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
    turns = [turns_of(dialogue.record) for dialogue in dialogues]

    def rows(lines: dict[int, Line], how: str) -> list[np.ndarray]:
        """(emotion before, own change, recorded change) of each dialogue's turns."""
        own = {i: np.asarray(change_readout(jnp.asarray(lines[i]["change_logprobs"]), how)) for i in lines if turns[i]}
        return [np.array([(t.emotion, mine, t.change) for t, mine in zip(turns[i], own[i], strict=True)]) for i in own]

    def figure(lines: dict[int, Line]) -> str:
        found = rows(lines, "mean")
        return f"mean absolute error {mean_absolute_error(np.concatenate(found)):.2f}" if found else ""

    work = WorkFile(folder and folder / "agreement", judge.name, judge.settings, dialogues)
    lines = appraised_lines(judge, dialogues, own=False, work=work, console=console, figure=figure)
    compared = {how: agreement(rows(dict(sorted(lines.items())), how)) for how in READOUTS}
    counts = [len(one) for one in turns if one]
    return {"n": sum(counts), "dialogues": len(counts)} | compared | {"settings": judge.settings}
