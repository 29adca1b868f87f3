"""Judges at work on finished dialogues: each one's score beside the training user's, its agreement with a record, and
the measures of a judge model.
"""

import time
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import Any

import jax.numpy as jnp
import numpy as np
from rich.console import Console

from rlver_jax.dialogues.log import Record
from rlver_jax.endpoints.usage import summed
from rlver_jax.evaluation.agreement import OWN, Turns, agreement, value_of, without_the_reply
from rlver_jax.evaluation.forms import Forms, Questionnaire
from rlver_jax.evaluation.judge import Judge, Work
from rlver_jax.evaluation.judge_folder import Line, WorkFile
from rlver_jax.evaluation.measures import THOUGHTS, Answers, measures_of, with_thoughts
from rlver_jax.evaluation.rater import Rater
from rlver_jax.evaluation.statistics import mean_with_interval, rank_correlation
from rlver_jax.evaluation.transcripts import LazySequence, Transcript, turns_of
from rlver_jax.text.progress import Meter
from rlver_jax.user.emotion import SAGE, change_readout

TEXT = "text"  # readout of a judge that has no distribution
QUIET_SECONDS = 60  # without a line where there is no bar


class JudgeMeter(Meter):
    """Progress over turns or forms; without a bar a line when results are kept, and now and then."""

    def __init__(self, console: Console, what: str, total: int):
        super().__init__(console, total, "beginning", label=what)
        self._what, self._total, self._done, self._tokens = what, total, 0, 0
        self._began, self._standing = time.monotonic(), ""
        self._printed = self._began

    def work(self, work: Work) -> None:
        """Something has been done."""
        self._done, self._tokens = self._done + work.turns, self._tokens + work.tokens
        self._show(line=time.monotonic() - self._printed > QUIET_SECONDS)

    def saved(self, standing: str) -> None:
        """Results have been kept; `standing` says what the judgement is so far."""
        self._standing = f" · {standing}"
        self._show(line=True)

    def _show(self, *, line: bool) -> None:
        state = f"{self._tokens / max(time.monotonic() - self._began, 1e-9):.1f} tokens/s{self._standing}"
        self.show(self._done, state, line=f"{self._what} {self._done}/{self._total} · {state}" if line else "")
        if line:
            self._printed = time.monotonic()


def appraised_lines(
    judge: Judge,
    dialogues: Sequence[Transcript],
    *,
    own: bool,
    work: WorkFile,
    console: Console,
    standing: Callable[[dict[int, Line]], str],
) -> dict[int, Line]:
    """What a judge makes of dialogues, by their index; those that `work` holds are not appraised again.

    Args:
        own: see `Judge.appraise`.
        standing: where the judgement stands, from the results so far.
    """
    missing = [i for i in range(len(dialogues)) if i not in work.done]
    total = sum(len(turns_of(dialogues[i].record)) for i in missing)
    with JudgeMeter(console, judge.name, total) as meter:
        wanted = LazySequence(missing, lambda _, i: dialogues[i])
        for results in judge.appraise(wanted, own=own, progress=meter.work):
            work.add([_line(missing[i], dialogues[missing[i]], appraised._asdict()) for i, appraised in results])
            meter.saved(standing(work.done))
    return work.done


def _line(index: int, dialogue: Transcript, appraised: Line) -> Line:
    return {"index": index, "dialogue": dialogue.record["dialogue"], "profile": dialogue.record["profile"]} | appraised


def judge_transcripts(
    judge: Judge, dialogues: Sequence[Transcript], folder: Path | None, console: Console
) -> dict[str, Any]:
    """A judge's own score of finished dialogues, and the gap to the score of the user that they were played with.

    A gap above 0 means that the playing user was more pleased than this judge would have been. Its interval is that of
    a mean over dialogues, those with one profile drawn together.
    """
    theirs = [dialogue.record["emotion"] for dialogue in dialogues]

    def final(lines: dict[int, Line]) -> list[int]:
        return [lines[i]["emotions"][-1] for i in sorted(lines)]

    def standing(lines: dict[int, Line]) -> str:
        return f"mean emotion {np.mean(final(lines)):.1f}, the user's {np.mean([theirs[i] for i in lines]):.1f}"

    work = WorkFile(folder and folder / "judges", judge.name, judge.settings, dialogues)
    lines = appraised_lines(judge, dialogues, own=True, work=work, console=console, standing=standing)
    ours = final(lines)
    outcomes = [SAGE.outcome(emotion) for emotion in ours]
    profiles = [dialogue.record["profile"] for dialogue in dialogues]
    gap = mean_with_interval([a - b for a, b in zip(theirs, ours, strict=True)], profiles)
    agrees = rank_correlation(ours, theirs)
    return {
        "score": float(np.mean(ours)),
        "success": outcomes.count(1),
        "failure": outcomes.count(-1),
        "n": len(ours),
        "gap": gap["mean"],
        "gap_interval": gap["interval"],
        "spearman_final": agrees if np.isfinite(agrees) else None,
        **_usage(lines.values()),
        "settings": judge.settings,
    }


def _usage(lines: Iterable[Line]) -> dict[str, Any]:
    """`unanswered`: appraisals that could not be got; `remote`: the requests to a judge behind an endpoint."""
    lines = list(lines)
    used = [line["remote"] for line in lines if line["remote"]]
    unanswered = sum(len(line["unanswered"]) for line in lines)
    return {"unanswered": unanswered} | ({"remote": summed(used)} if used else {})


def measure_agreement(
    judge: Judge, dialogues: Sequence[Transcript], folder: Path | None, console: Console
) -> dict[str, Any]:
    """How a judge's changes compare with the recorded ones, by each of its readouts; contexts fixed to the record.

    Beside them is what needs no look at the reply, on the turns that the judge has answered.

    Raises:
        ValueError: it answered nowhere.
    """
    recorded = [recorded_turns(dialogue.record) for dialogue in dialogues]

    def compared(lines: dict[int, Line], readout: str) -> dict[int, Turns]:
        """The turns of each dialogue, without those that were not answered."""
        each = {i: _compared(lines[i], recorded[i], readout) for i in sorted(lines)}
        return {i: one for i, one in each.items() if len(one)}

    def standing(lines: dict[int, Line]) -> str:
        known = list(compared(lines, judge.readouts[-1]).values())
        return f"mean absolute error {value_of('mae', np.concatenate(known)):.2f}" if known else ""

    work = WorkFile(folder and folder / "agreement", judge.name, judge.settings, dialogues)
    lines = appraised_lines(judge, dialogues, own=False, work=work, console=console, standing=standing)
    each = {readout: compared(lines, readout) for readout in judge.readouts}
    answered = each[judge.readouts[0]]
    if not answered:
        raise ValueError(f"{judge.name}: not one appraisal could be read; the model is too weak to be a user")
    profiles = [dialogues[i].record["profile"] for i in answered]
    agreements = {readout: agreement(list(ours.values()), profiles) for readout, ours in each.items()}
    return {
        "n": sum(map(len, answered.values())),
        "dialogues": len(answered),
        **agreements,
        "without_the_reply": without_the_reply(list(answered.values()), profiles),
        **_usage(lines.values()),
        "settings": judge.settings,
    }


def measure_record(dialogues: Sequence[Transcript]) -> dict[str, Any]:
    """What `measure_agreement` says without a judge: how far a record can be predicted without a look at the reply."""
    each = [(recorded_turns(dialogue.record), dialogue.record["profile"]) for dialogue in dialogues]
    turns, profiles = zip(*[(one, profile) for one, profile in each if len(one)], strict=True)
    baselines = without_the_reply(turns, profiles)
    return {"n": sum(map(len, turns)), "dialogues": len(turns), "without_the_reply": baselines}


def recorded_turns(record: Record) -> Turns:
    """The turns that a dialogue's own user appraised; until a judge's changes are known, OWN holds recorded ones."""
    turns = turns_of(record)
    before = [0, *(turn.change for turn in turns)]
    rows = [(t.emotion, t.change, t.change, previous, t.turn) for t, previous in zip(turns, before, strict=False)]
    return np.array(rows, int).reshape(-1, 5)


def _compared(line: Line, recorded: Turns, readout: str) -> Turns:
    """The turns that were answered, with the judge's own changes."""
    answered = [i for i in range(len(recorded)) if i not in line["unanswered"]]
    turns = recorded[answered]
    if not answered:
        return turns
    if readout == TEXT:
        turns[:, OWN] = [line["changes"][i] for i in answered]
    else:
        logprobs = jnp.asarray([line["change_logprobs"][i] for i in answered])
        turns[:, OWN] = np.asarray(change_readout(logprobs, readout))
    return turns


def measure(
    rater: Rater,
    forms: Forms,
    dialogues: Sequence[Transcript],
    folder: Path | None,
    console: Console,
    relationship: str = THOUGHTS,
) -> tuple[Sequence[Record], dict[str, Any]]:
    """(the records of dialogues with `measures`, see `measures_of`; `remote`: the requests to an endpoint).

    Args:
        relationship: what the relationship inventory is filled in from, THOUGHTS or SPEECH.
    """
    settings = rater.settings | {"forms": repr((forms.language, sorted(forms.texts.items())))}
    measures_work = WorkFile(folder, "measures", settings | {"relationship": relationship}, dialogues)
    of_thoughts = relationship == THOUGHTS
    excluded = ("relationship",) if of_thoughts else ()

    def measures(names: Sequence[str], answers: list[Answers]) -> Line:
        return {"measures": measures_of(names, answers, rater.name)}

    _rate(rater, dialogues, lambda one: forms.ask(one, excluded), measures, measures_work, "forms", console)
    works = [measures_work]
    if of_thoughts:
        works.append(WorkFile(folder, "thoughts", settings, dialogues))
        as_line = lambda _, answers: {"answers": answers}  # noqa: E731
        _rate(rater, dialogues, forms.ask_of_thoughts, as_line, works[1], "inner thoughts", console)

    def with_measures(index: int, dialogue: Transcript) -> Record:
        measures = measures_work.done[index]["measures"]
        return dialogue.record | {
            "measures": with_thoughts(measures, works[1].done[index]["answers"]) if of_thoughts else measures
        }

    used = [one for i in range(len(dialogues)) for work in works if (one := work.done[i]["remote"])]
    return LazySequence(dialogues, with_measures), ({"remote": summed(used)} if used else {})


def _rate(
    rater: Rater,
    dialogues: Sequence[Transcript],
    ask: Callable[[Transcript], Questionnaire],
    as_line: Callable[[Sequence[str], list[Answers]], Line],
    work: WorkFile,
    what: str,
    console: Console,
) -> None:
    """Has forms filled in about the dialogues that `work` doesn't hold yet.

    Args:
        as_line: what is kept of the answers to forms of these names.
    """
    missing = [i for i in range(len(dialogues)) if i not in work.done]
    counts = [len(ask(dialogues[i]).forms) for i in missing]
    asked = [i for i, count in zip(missing, counts, strict=True) if count]  # without a form nothing is read either
    work.add([{"index": i} | as_line([], []) | {"remote": None} for i in missing if i not in asked])
    questionnaires = LazySequence(asked, lambda _, i: ask(dialogues[i]))
    with JudgeMeter(console, f"{rater.name}: {what}", sum(counts)) as meter:
        for results in rater.fill(questionnaires, meter.work):
            lines = []
            for position, rated in results:
                names = [form.name for form in questionnaires[position].forms]
                lines.append({"index": asked[position]} | as_line(names, rated.answers) | {"remote": rated.remote})
            work.add(lines)
            meter.saved(_standing(work.done.values()))


def _standing(lines: Iterable[Line]) -> str:
    depth = [line.get("measures", {}).get("capabilities", {}).get("empathic_depth") for line in lines]
    known = [one for one in depth if one is not None]
    return f"empathic depth {sum(known) / len(known):.2f} of 5" if known else f"{len(depth)} dialogues"
