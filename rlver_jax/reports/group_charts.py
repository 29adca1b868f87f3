"""Charts of the dialogues themselves, a colour or a row a group: outcomes, lengths, trajectories, judges' marks."""

import dataclasses
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np

from rlver_jax.reports import statistics
from rlver_jax.reports.curves import MOST_BANDS
from rlver_jax.reports.shorten import evenly
from rlver_jax.reports.sources import Outline, Run, intention_label, intention_labels
from rlver_jax.reports.statistics import Group
from rlver_jax.reports.svg import WIDTH, Chart, Figure, Key, ticks

MOST_DOTS = 500  # of a group
MOST_INTENTIONS = 12
_NAME_WIDTH = 132
_BAR, _GAP, _EDGES = 11, 9, 52  # heights: a group's bar, the space between two marks, everything else

Draw = Callable[[Sequence[Run], Sequence[Group]], list[Figure]]


def classes_of(group: Group) -> str:
    """The classes of chart.css that colour a group."""
    return f"c{group.run}" + " early" * group.early


def group_keys(groups: Sequence[Group], shape: str = "line") -> list[Key]:
    """A legend of groups."""
    return [Key(classes_of(group), group.name, shape) for group in groups]


def _row_chart(title: str, x: tuple[float, float], groups: Sequence[Group], legend: Sequence[Key] = ()) -> Chart:
    """A chart with a row for each group, the first one on top."""
    height = _EDGES + 15 * -(-len(legend) // 3) + 24 * len(groups)
    chart = Chart(title, x, (len(groups), 0), legend=legend, size=(WIDTH, height), left=_NAME_WIDTH)
    for i, group in enumerate(groups):
        chart.row_name(i + 0.5, group.name)
    return chart


def stacked_shares(
    title: str, shares_of: Callable[[Sequence[Outline]], Mapping[str, float]], classes: Sequence[str]
) -> Draw:
    """A bar a group, of shares that add up to 1; `classes` of chart.css are those of the shares in their order."""

    def draw(runs: Sequence[Run], groups: Sequence[Group]) -> list[Figure]:
        if not groups:
            return []
        shares = [shares_of(group.records) for group in groups]
        parts = list(zip(classes, shares[0], strict=True))
        legend = [Key(c, name.replace("_", " "), "box") for c, name in parts if any(share[name] for share in shares)]
        chart = _row_chart(title, (0.0, 1.0), groups, legend)
        for i, (group, share) in enumerate(zip(groups, shares, strict=True)):
            left = 0.0
            for part, name in parts:
                if share[name]:
                    tip = f"{group.name} · {name.replace('_', ' ')} {share[name]:.0%} of {len(group.records)}"
                    chart.bar((left, left + share[name]), (i + 0.85, i + 0.15), part, tip)
                left += share[name]
        chart.x_axis([0, 0.5, 1], percent=True)
        return [Figure(title, "Share of the dialogues.", chart)]

    return draw


def boxes(title: str, caption: str, values_of: Callable[[Sequence[Outline]], Sequence[int]]) -> Draw:
    """A box a group: quartiles, the least and the most of whole numbers."""

    def draw(runs: Sequence[Run], groups: Sequence[Group]) -> list[Figure]:
        if not groups:
            return []
        values = [values_of(group.records) for group in groups]
        high = max((max(numbers, default=0) for numbers in values), default=0)
        chart = _row_chart(title, (0, high * 1.04 or 1), groups)
        chart.x_axis(ticks(0, high or 1, whole=True), grid=True)
        for i, (group, numbers) in enumerate(zip(groups, values, strict=True)):
            if numbers:
                _add_box(chart, i, group, numbers)
        return [Figure(title, caption, chart)]

    return draw


def _add_box(chart: Chart, row: int, group: Group, values: Sequence[int]) -> None:
    least, low, middle, upper, most = np.percentile(values, (0, 25, 50, 75, 100)).tolist()
    spread = f"{least:g} to {most:g}, quartiles {low:g}, {middle:g}, {upper:g}; mean {np.mean(values):.1f}"
    chart.line([least, most], [row + 0.5] * 2, classes_of(group))
    width = max(upper - low, chart.x[1] / 150)
    chart.bar((low, low + width), (row + 0.8, row + 0.2), f"box {classes_of(group)}", f"{group.name} · {spread}")
    chart.line([middle, middle], [row + 0.2, row + 0.8], "median")


def trajectories(runs: Sequence[Run], groups: Sequence[Group]) -> list[Figure]:
    """The emotion over the turns by hidden intention: a chart each, a line a group, its quartiles around it."""
    records = [record for group in groups for record in group.records]
    labels = intention_labels(records)[:MOST_INTENTIONS]
    longest = max((len(record["emotions"]) for record in records), default=2) - 1
    beyond = f"; turns after the {statistics.MOST_TURNS}th are not drawn" * (longest > statistics.MOST_TURNS)
    turns = min(max(longest, 1), statistics.MOST_TURNS)
    return [_trajectory(label, groups, turns, beyond) for label in labels]


def _trajectory(label: str, groups: Sequence[Group], turns: int, beyond: str) -> Figure:
    chart = Chart(f"emotion by turn: {label}", (0, turns), (0.0, 100.0), labels=("turn", ""), size=(WIDTH, 190))
    chart.y_axis(ticks(0.0, 100.0))
    chart.x_axis(ticks(0, turns, whole=True))
    tips: list[list[str]] = [[f"turn {turn}" if turn else "before the first turn"] for turn in range(turns + 1)]
    counts: list[str] = []
    for group in groups:
        records = [record for record in group.records if intention_label(record) == label]
        counts.append(f"{len(records)} of {group.name}")
        if not records:
            continue
        path = statistics.trajectory(records)
        path = np.concatenate([path, np.repeat(path[-1:], turns + 1 - len(path), axis=0)])
        low, mean, high = path.T.tolist()
        if len(groups) <= MOST_BANDS:
            chart.band(range(turns + 1), low, high, classes_of(group))
        chart.line(range(turns + 1), mean, classes_of(group))
        for turn, tip in enumerate(tips):
            tip.append(f"{group.name}: {mean[turn]:.1f} ({low[turn]:.0f}–{high[turn]:.0f}), n {len(records)}")
    chart.tips(range(turns + 1), [" · ".join(tip) for tip in tips])
    return Figure(label, f"Dialogues: {', '.join(counts)}{beyond}", chart)


def coordinate(runs: Sequence[Run], groups: Sequence[Group]) -> list[Figure]:
    """Where a judge has put the dialogues, with SAGE's axes: x structured to creative, y solution to empathy."""
    dots = [(group, positions) for group in groups if (positions := statistics.coordinates(group.records))]
    if not dots:
        return []
    title, edge = "Social-cognition coordinate", (-1.05, 1.05)
    chart = Chart(title, edge, edge, legend=group_keys([group for group, _ in dots]), size=(WIDTH, 340), left=10)
    chart.rule(x=0)
    chart.rule(y=0)
    chart.note(-1, 0.04, "structured", "start")
    chart.note(1, 0.04, "creative", "end")
    chart.note(0.03, 0.97, "empathy", "start")
    chart.note(0.03, -1.02, "solution", "start")
    for group, coordinates in dots:
        for x, y, record in evenly(coordinates, MOST_DOTS):
            values = f"creative {x:+.2f}, empathy {y:+.2f}, emotion {record['emotion']}"
            chart.dot(x, y, classes_of(group), 3.5, f"{group.name} · {record['profile']} · {values}")
    for group, coordinates in dots:
        x, y = np.mean([(x, y) for x, y, _ in coordinates], axis=0).tolist()
        mean = f"{group.name} · mean of {len(coordinates)}: {x:+.2f}, {y:+.2f}"
        chart.dot(x, y, f"mean {classes_of(group)}", 7, mean)
    caption = "A dialogue a dot, as a judge model placed it; large: a group's mean. (SAGE draws a dot a model.)"
    if any(len(coordinates) > MOST_DOTS for _, coordinates in dots):
        caption += f" Of more than {MOST_DOTS} dialogues as many are drawn, evenly."
    return [Figure(title, caption, chart)]


@dataclasses.dataclass(frozen=True)
class Marks:
    """Means of a judge model's marks: a row a mark, a bar a group.

    Attributes:
        path: where a record's `measures` hold them.
        low, high: the scale.
        origin: where bars begin.
    """

    title: str
    caption: str
    path: tuple[str, ...]
    low: float
    high: float
    origin: float

    def __call__(self, runs: Sequence[Run], groups: Sequence[Group]) -> list[Figure]:
        """The chart of all groups that have such marks; none where none has."""
        marked = [(group, marks) for group in groups if (marks := self.of(group.records))]
        if not marked:
            return []
        names = list(dict.fromkeys(name for _, marks in marked for name in marks))
        legend = group_keys([group for group, _ in marked], "box") if len(marked) > 1 else []
        row = _GAP + _BAR * len(marked)
        size = (WIDTH, _EDGES + 15 * len(legend) + row * len(names))
        x = (self.low, self.high)
        chart = Chart(self.title, x, (len(names), 0), legend=legend, size=size, left=_NAME_WIDTH)
        chart.x_axis(ticks(*x, whole=True), grid=True)
        chart.rule(x=self.origin)
        for i, name in enumerate(names):
            chart.row_name(i + 0.5, name.replace("_", " "))
            for j, (group, marks) in enumerate(marked):
                if name in marks:
                    mean = float(np.mean(marks[name]))
                    top = i + (_GAP / 2 + _BAR * j) / row
                    tip = f"{group.name} · {name.replace('_', ' ')} {mean:+.2f}, mean of {len(marks[name])} dialogues"
                    bar = min(mean, self.origin), max(mean, self.origin)
                    chart.bar(bar, (top + 0.9 * _BAR / row, top), f"box {classes_of(group)}", tip)
        return [Figure(self.title, self.caption, chart)]

    def of(self, records: Sequence[Outline]) -> dict[str, list[float]]:
        """The marks of all records by name, as far as they have any."""
        marks: dict[str, list[float]] = {}
        for record in records:
            part: Any = record.get("measures")
            for name in self.path:
                part = part.get(name) if isinstance(part, dict) else None
            for name, value in (part if isinstance(part, dict) else {}).items():
                if isinstance(value, int | float):
                    marks.setdefault(name, []).append(float(value))
        return marks
