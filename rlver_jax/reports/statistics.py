"""The numbers behind a report's charts and tables, from metrics and finished dialogues."""

import collections
import dataclasses
from collections.abc import Iterable, Sequence
from typing import NamedTuple

import numpy as np

from rlver_jax.config.validate import shortened
from rlver_jax.dialogues.numbers import is_number
from rlver_jax.dialogues.own_functions import of_functions
from rlver_jax.reports.metrics_table import MetricsTable
from rlver_jax.reports.sources import Outline, Run
from rlver_jax.rollout.end_reason import END_REASONS
from rlver_jax.user.emotion import SAGE

OUTCOMES = ("success", "between", "failure")  # by SAGE's borders: 100, and below 10
MOST_TURNS = 100  # that charts show
PART = 4  # the first and the last of so many parts of a run's logged steps are compared


@dataclasses.dataclass(frozen=True)
class Group:
    """Dialogues that are looked at together: a training run's first or last logged steps, or an evaluation."""

    name: str
    run: int  # its index among the runs
    early: bool  # the first steps of a run of which the last ones are another group
    records: list[Outline]


class Point(NamedTuple):
    """Means over consecutive rows of metrics."""

    first: int  # step
    last: int
    values: tuple[float, ...]

    @property
    def steps(self) -> str:
        """`step 7`, or `steps 7–9`."""
        return f"step {self.first}" if self.first == self.last else f"steps {self.first}–{self.last}"


def groups(runs: Sequence[Run]) -> list[Group]:
    """Of each training run its first and last quarter of logged steps (the same number, at least one); evaluations."""
    groups = []
    for index, run in enumerate(runs):
        logs = [log for log in run.logs if log.records]
        size = max(1, len(logs) // PART)
        parts = [(False, logs)] if len(logs) < 2 else [(True, logs[:size]), (False, logs[-size:])]
        for early, part in parts:
            if part:
                records = [record for log in part for record in log.records]
                groups.append(Group(_group_name(run, [log.step for log in part]), index, early, records))
    return groups


def _group_name(run: Run, steps: Sequence[int | None]) -> str:
    if steps[0] is None:
        return run.name
    return f"{run.name} · step{'s' * (len(steps) > 1)} {steps[0]}" + f"–{steps[-1]}" * (len(steps) > 1)


def points(metrics: MetricsTable, keys: Sequence[str], most: int | None = None) -> list[Point]:
    """Table rows that hold all keys, as at most `most` points: beyond that, means of equally many consecutive ones."""
    steps, values = metrics.complete(keys)
    size = (-(-len(steps) // most) if most else 0) or 1
    means = []
    for start in range(0, len(steps), size):
        end = min(start + size, len(steps))
        mean = tuple(float(np.mean(column[start:end])) for column in values)
        means.append(Point(int(steps[start]), int(steps[end - 1]), mean))
    return means


def trajectory(records: Sequence[Outline]) -> np.ndarray:
    """Float [T + 1, 3]: lower quartile, mean and upper quartile of the emotion after each turn, 0 being the start.

    T is at most MOST_TURNS. A dialogue that has ended keeps its final emotion: otherwise the last turns would show
    those only that never did.
    """
    turns = min(max(len(record["emotions"]) for record in records), MOST_TURNS + 1)
    quartiles = np.empty((turns, 3))
    for turn in range(turns):
        emotions = np.array([r["emotions"][min(turn, len(r["emotions"]) - 1)] for r in records], float)
        quartiles[turn] = np.percentile(emotions, 25), emotions.mean(), np.percentile(emotions, 75)
    return quartiles


def outcome(emotion: int) -> str:
    """One of OUTCOMES."""
    return OUTCOMES[1 - SAGE.outcome(emotion)]


def outcome_shares(records: Sequence[Outline]) -> dict[str, float]:
    """Share of each of OUTCOMES."""
    return _shares((outcome(record["emotion"]) for record in records), OUTCOMES)


def end_shares(records: Sequence[Outline]) -> dict[str, float]:
    """Share of each reason to end."""
    return _shares((record["end_reason"] for record in records), END_REASONS[1:])


def _shares(values: Iterable[str], names: Sequence[str]) -> dict[str, float]:
    counts = collections.Counter(values)
    return {name: counts[name] / (counts.total() or 1) for name in names}


def turn_counts(records: Sequence[Outline]) -> list[int]:
    """Turns of each dialogue."""
    return [record["turns"] for record in records]


def reply_lengths(records: Sequence[Outline]) -> list[int]:
    """Characters of each reply of the policy."""
    return [length for record in records for length in record["replies"]]


def coordinates(records: Sequence[Outline]) -> list[tuple[float, float, Outline]]:
    """(creative, empathy, record) of each dialogue to which a judge has given a coordinate; both -1..1.

    Older versions noted `solution`, from feelings to solutions, where `empathy` leads the other way.
    """
    coordinates = []
    for record in records:
        axes = (record.get("measures") or {}).get("coordinate") or {}
        creative, empathy, solution = (axes.get(axis) for axis in ("creative", "empathy", "solution"))
        empathy = -solution if empathy is None and isinstance(solution, int | float) else empathy
        if isinstance(creative, int | float) and isinstance(empathy, int | float):
            coordinates.append((float(creative), float(empathy), record))
    return coordinates


def overview(runs: Sequence[Run], groups: Sequence[Group]) -> list[tuple[str, list[str]]]:
    """(what, its value for each run) of all that some run has; `→` leads from the first steps to the last."""
    rows: dict[str, list[str]] = {}
    for index, run in enumerate(runs):
        for what, value in _overview(run, [group for group in groups if group.run == index]).items():
            rows.setdefault(what, [""] * len(runs))[index] = value
    return list(rows.items())


def _overview(run: Run, groups: Sequence[Group]) -> dict[str, str]:
    values = {"kind": "training run" if run.training else "evaluation"}
    if run.metrics:
        values["steps done"] = str(run.metrics.steps[-1])
    values["dialogues in its logs"] = str(sum(len(log.records) for log in run.logs))
    if groups:
        if run.training:
            played = {frozenset(record["profile"] for record in group.records) for group in groups}
            others = ", of different profiles" if len(played) > 1 else ""
            values["logged steps compared"] = _arrow(group.name.rpartition(" · ")[2] for group in groups) + others
        finals = [np.array([record["emotion"] for record in group.records], float) for group in groups]
        values["final emotion, mean ± deviation"] = _arrow(f"{x.mean():.1f} ± {x.std():.1f}" for x in finals)
        shares = [outcome_shares(group.records) for group in groups]
        values["success (emotion 100)"] = _arrow(f"{share['success']:.0%}" for share in shares)
        values["failure (emotion below 10)"] = _arrow(f"{share['failure']:.0%}" for share in shares)
        turns, replies = ([of(group.records) for group in groups] for of in (turn_counts, reply_lengths))
        values["turns, mean"] = _arrow(f"{np.mean(counts):.2f}" for counts in turns)
        values["reply, mean characters"] = _arrow(f"{np.mean(lengths):.0f}" for lengths in replies if lengths)
    values |= _held_out(run) if run.training else _summarized(run)
    if times := points(run.metrics, ["time/rollout_s", "time/update_s"]):
        values["seconds a step, median"] = f"{np.median([sum(point.values) for point in times]):.1f}"
    return values


def _held_out(run: Run) -> dict[str, str]:
    values = {}
    for key, what in (("eval/score", "held-out score"), ("eval/rule_score", "held-out score by the gold judge")):
        scores = points(run.metrics, [key])
        if scores:
            best = max(scores, key=lambda point: point.values[0])
            text = _arrow(f"{point.values[0]:.1f}" for point in dict.fromkeys((scores[0], scores[-1])))
            values[what] = f"{text} (best {best.values[0]:.1f}, {best.steps})"
    return values


def _summarized(run: Run) -> dict[str, str]:
    values = {}
    for key, what in (("score", "score"), ("rule_score", "score by the gold judge")):
        if is_number(run.summary.get(key)):
            values[what] = f"{run.summary[key]:.1f}"
    for key, value in of_functions(run.summary).items():
        if is_number(value):
            values[shortened(key)] = f"{value:.3g}"
    judges = run.summary.get("judges")
    for name, judge in judges.items() if isinstance(judges, dict) else ():
        if isinstance(judge, dict) and is_number(judge.get("score")):
            values[f"score by {shortened(name)}"] = f"{judge['score']:.1f}"
    return values


def _arrow(values: Iterable[str]) -> str:
    return " → ".join(values)


def settings_table(runs: Sequence[Run]) -> list[tuple[str, list[str], bool]]:
    """(name, its value for each run, whether runs that have it differ), those that differ first."""
    rows = []
    for name in sorted({name for run in runs for name in run.settings}):
        values = ["" if name not in run.settings else str(run.settings[name]) for run in runs]
        distinct = {value for value, run in zip(values, runs, strict=True) if name in run.settings}
        rows.append((shortened(name), [shortened(value) for value in values], len(distinct) > 1))
    return sorted(rows, key=lambda row: not row[2])
