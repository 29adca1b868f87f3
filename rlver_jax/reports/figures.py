"""The numbers behind a report's charts, from metrics and finished dialogues."""

import collections
import dataclasses
from collections.abc import Iterable, Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np

from rlver_jax.config.validate import shortened
from rlver_jax.dialogues.numbers import is_number
from rlver_jax.reports.rows import Rows
from rlver_jax.reports.sources import Outline, Run
from rlver_jax.rollout.end_reason import END_REASONS
from rlver_jax.user.emotion import SAGE

OUTCOMES = ("success", "neither", "failure")  # by SAGE's borders: 100, and below 10
MOST_TURNS = 100  # that charts show
PART = 4  # the first and the last of so many parts of a run's logged steps are compared


@dataclasses.dataclass(frozen=True)
class Group:
    """Dialogues that are looked at together: a training run's first or last logged steps, or an evaluation."""

    name: str
    run: int  # its place among the runs
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
    found = []
    for index, run in enumerate(runs):
        played = [one for one in run.played if one.records]
        part = max(1, len(played) // PART)
        parts = [(False, played)] if len(played) < 2 else [(True, played[:part]), (False, played[-part:])]
        for early, some in parts:
            if some:
                records = [record for one in some for record in one.records]
                found.append(Group(_group_name(run, [one.step for one in some]), index, early, records))
    return found


def _group_name(run: Run, steps: Sequence[int | None]) -> str:
    if steps[0] is None:
        return run.name
    return f"{run.name} · step{'s' * (len(steps) > 1)} {steps[0]}" + f"–{steps[-1]}" * (len(steps) > 1)


def points(rows: Iterable[Mapping[str, Any]], keys: Sequence[str], most: int | None = None) -> list[Point]:
    """Rows that hold all keys, as at most `most` points: beyond that, means of equally many consecutive rows."""
    steps, values = (rows if isinstance(rows, Rows) else Rows(rows)).whole(keys)
    size = (-(-len(steps) // most) if most else 0) or 1
    found = []
    for start in range(0, len(steps), size):
        end = min(start + size, len(steps))
        means = tuple(float(np.mean(column[start:end])) for column in values)
        found.append(Point(int(steps[start]), int(steps[end - 1]), means))
    return found


def trajectory(records: Sequence[Outline]) -> np.ndarray:
    """Float [T + 1, 3]: lower quartile, mean and upper quartile of the emotion after each turn, 0 being the start.

    T is at most MOST_TURNS. A dialogue that has ended keeps its final emotion: otherwise the last turns would show
    those only that never did.
    """
    turns = min(max(len(record["emotions"]) for record in records), MOST_TURNS + 1)
    found = np.empty((turns, 3))
    for turn in range(turns):
        emotions = np.array([r["emotions"][min(turn, len(r["emotions"]) - 1)] for r in records], float)
        found[turn] = np.percentile(emotions, 25), emotions.mean(), np.percentile(emotions, 75)
    return found


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


def lengths(records: Sequence[Outline]) -> tuple[list[int], list[int]]:
    """(turns of each dialogue, characters of each reply of the policy)."""
    return [record["turns"] for record in records], [length for record in records for length in record["replies"]]


def coordinates(records: Sequence[Outline]) -> list[tuple[float, float, Outline]]:
    """(solution, creative, record) of each dialogue whose manner a judge has placed; both -1..1."""
    found = []
    for record in records:
        place = (record.get("measures") or {}).get("coordinate") or {}
        if all(isinstance(place.get(axis), int | float) for axis in ("solution", "creative")):
            found.append((float(place["solution"]), float(place["creative"]), record))
    return found


def table(runs: Sequence[Run], found: Sequence[Group]) -> list[tuple[str, list[str]]]:
    """(what, its value for each run) of the figures that some run has; `→` leads from the first steps to the last."""
    rows: dict[str, list[str]] = {}
    for index, run in enumerate(runs):
        mine = [group for group in found if group.run == index]
        for what, value in _figures(run, mine).items():
            rows.setdefault(what, [""] * len(runs))[index] = value
    return list(rows.items())


def _figures(run: Run, mine: Sequence[Group]) -> dict[str, str]:
    records = [record for one in run.played for record in one.records]
    figures = {"kind": "training run" if run.training else "evaluation"}
    if run.rows:
        figures["steps done"] = str(run.rows[-1]["step"])
    figures["dialogues in its logs"] = str(len(records))
    if mine:
        if run.training:
            figures["logged steps compared"] = _arrow(group.name.rpartition(" · ")[2] for group in mine)
        finals = [np.array([record["emotion"] for record in group.records], float) for group in mine]
        figures["final emotion, mean ± deviation"] = _arrow(f"{x.mean():.1f} ± {x.std():.1f}" for x in finals)
        shares = [outcome_shares(group.records) for group in mine]
        figures["success (emotion 100)"] = _arrow(f"{share['success']:.0%}" for share in shares)
        figures["failure (emotion below 10)"] = _arrow(f"{share['failure']:.0%}" for share in shares)
        sizes = [lengths(group.records) for group in mine]
        figures["turns, mean"] = _arrow(f"{np.mean(turns):.2f}" for turns, _ in sizes)
        figures["reply, mean characters"] = _arrow(f"{np.mean(texts):.0f}" for _, texts in sizes if texts)
    figures |= _held_out(run) if run.training else _summarized(run)
    if times := points(run.rows, ["time/rollout_s", "time/update_s"]):
        figures["seconds a step, median"] = f"{np.median([sum(point.values) for point in times]):.1f}"
    return figures


def _held_out(run: Run) -> dict[str, str]:
    found = {}
    for key, what in (("eval/score", "held-out score"), ("eval/rule_score", "held-out score by the gold judge")):
        scores = points(run.rows, [key])
        if scores:
            best = max(scores, key=lambda point: point.values[0])
            text = _arrow(f"{point.values[0]:.1f}" for point in dict.fromkeys((scores[0], scores[-1])))
            found[what] = f"{text} (best {best.values[0]:.1f}, {best.steps})"
    return found


def _summarized(run: Run) -> dict[str, str]:
    found = {}
    for key, what in (("score", "score"), ("rule_score", "score by the gold judge")):
        if is_number(run.summary.get(key)):
            found[what] = f"{run.summary[key]:.1f}"
    judges = run.summary.get("judges")
    for name, judge in judges.items() if isinstance(judges, dict) else ():
        if isinstance(judge, dict) and is_number(judge.get("score")):
            found[f"score by {shortened(name)}"] = f"{judge['score']:.1f}"
    return found


def _arrow(values: Iterable[str]) -> str:
    return " → ".join(values)


def settings_table(runs: Sequence[Run]) -> list[tuple[str, list[str], bool]]:
    """(name, its value for each run, whether runs that have it differ), those that differ first."""
    rows = []
    for name in sorted({name for run in runs for name in run.settings}):
        values = ["" if name not in run.settings else str(run.settings[name]) for run in runs]
        given = {value for value, run in zip(values, runs, strict=True) if name in run.settings}
        rows.append((shortened(name), [shortened(value) for value in values], len(given) > 1))
    return sorted(rows, key=lambda row: not row[2])
