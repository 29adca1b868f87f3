"""Charts over the steps of training runs: lines of metrics, and stacked shares."""

import dataclasses
from collections.abc import Iterable, Mapping, Sequence
from typing import NamedTuple

from rlver_jax.config.validate import shortened
from rlver_jax.dialogues.own_functions import JUDGED, MEASURED
from rlver_jax.reports.sources import Run
from rlver_jax.reports.statistics import OUTCOMES, Group, Point, points
from rlver_jax.reports.svg import Chart, Figure, Key, ticks
from rlver_jax.rollout.end_reason import END_REASONS
from rlver_jax.text.console import plain_line

MOST_POINTS, MOST_BARS = 240, 60
MOST_OWN = 40  # charts of own metrics
OWN = (MEASURED, f"eval/{MEASURED}", f"eval/{JUDGED}")  # how their names begin
MOST_BANDS = 4  # more of them on one chart hide each other


class _Line(NamedTuple):
    run: str
    classes: str  # of chart.css
    points: list[Point]

    @property
    def x(self) -> list[float]:
        return [(point.first + point.last) / 2 for point in self.points]


@dataclasses.dataclass(frozen=True)
class Curve:
    """Metrics over the steps, a colour a run.

    Attributes:
        metrics: keys of metrics.jsonl, each with the class of its line ("early": dashed).
        spread: key of a standard deviation, drawn as a band around the one line.
        y_range: None: that of the values.
        starts_at_zero: the y axis does, where it has no range.
    """

    title: str
    caption: str
    metrics: Mapping[str, str]
    spread: str = ""
    y_range: tuple[float, float] | None = None
    starts_at_zero: bool = False

    def __call__(self, runs: Sequence[Run], groups: Sequence[Group] = (), y_label: str = "") -> list[Figure]:
        """The chart of all runs; none where no run has logged such metrics."""
        lines = self._lines(runs)
        if not lines:
            return []
        everything = [point for line in lines for point in line.points]
        x_range = _widened(min(point.first for point in everything), max(point.last for point in everything))
        y_range = self.y_range or self._range_of(everything)
        keys = dict.fromkeys(Key(line.classes.split()[0], line.run) for line in lines)
        legend = list(keys) if len(runs) > 1 else []
        chart = Chart(self.title, x_range, y_range, labels=("step", y_label), legend=legend)
        chart.y_axis(ticks(*y_range))
        chart.x_axis(ticks(*x_range, whole=True))
        for line in lines if self.spread and len(lines) <= MOST_BANDS else ():
            low, high = ([p.values[0] + sign * p.values[1] for p in line.points] for sign in (-1, 1))
            chart.band(line.x, low, high, line.classes)
        for line in lines:
            chart.line(line.x, [p.values[0] for p in line.points], line.classes, dots=len(line.points) <= 12)
        _add_tips(chart, lines)
        return [Figure(self.title, self.caption, chart)]

    def _lines(self, runs: Sequence[Run]) -> list[_Line]:
        spread = [self.spread] if self.spread else []
        lines = [
            _Line(run.name, f"c{index} {classes}".strip(), points(run.metrics, [key, *spread], MOST_POINTS))
            for index, run in enumerate(runs)
            for key, classes in self.metrics.items()
        ]
        return [line for line in lines if line.points]

    def _range_of(self, everything: Iterable[Point]) -> tuple[float, float]:
        """A range that holds all values, with room around them."""
        ends = [(p.values[0] - p.values[1], p.values[0] + p.values[1]) if self.spread else p.values for p in everything]
        values = [value for pair in ends for value in pair] + [0.0] * self.starts_at_zero
        low, high = min(values), max(values)
        room = 0.06 * (high - low) or 0.5
        return low - room * (low != 0), high + room


def _widened(low: float, high: float) -> tuple[float, float]:
    return (float(low), float(high)) if high > low else (low - 0.5, high + 0.5)


def _add_tips(chart: Chart, lines: Sequence[_Line]) -> None:
    """The text of each step when it is touched: the values of all lines."""
    texts: dict[float, list[str]] = {}
    for line in lines:
        name = line.run + " (dashed)" * ("early" in line.classes) + ": " if len(lines) > 1 else ""
        for point, x in zip(line.points, line.x, strict=True):
            value = " ± ".join(f"{value:.2f}" for value in point.values)
            texts.setdefault(x, [point.steps]).append(name + value)
    chart.tips(sorted(texts), [" · ".join(texts[x]) for x in sorted(texts)])


def own_curves(runs: Sequence[Run], groups: Sequence[Group] = ()) -> list[Figure]:
    """A chart of each metric of a user's own functions: in training, and of held-out dialogues."""
    names = sorted({name for run in runs for name in run.metrics.names if name.startswith(OWN)})
    titles = [shortened(plain_line(name), 60) for name in names[:MOST_OWN]]
    curves = [
        Curve(title, "Mean over the dialogues that have one.", {name: ""})
        for title, name in zip(titles, names, strict=False)
    ]
    return [figure for curve in curves for figure in curve(runs)]


def shares_by_step(runs: Sequence[Run], groups: Sequence[Group] = ()) -> list[Figure]:
    """Success and failure, and why dialogues ended, of each training run: stacked bars over its steps."""
    reasons = {f"dialogue/end_{name}": name for name in END_REASONS[1:]}
    figures: list[Figure] = []
    for run in runs:
        name = f": {run.name}" if len(runs) > 1 else ""
        rates = points(run.metrics, ["dialogue/success_rate", "dialogue/failure_rate"], MOST_BARS)
        outcomes = [
            point._replace(values=(success := point.values[0], 1 - success - point.values[1], point.values[1]))
            for point in rates
        ]
        caption = "Share of a step's dialogues that end at emotion 100 (success) or below 10 (failure)."
        figures += _stacked_bars(f"Success and failure{name}", caption, outcomes, [(o, o) for o in OUTCOMES])
        ends = points(run.metrics, list(reasons), MOST_BARS)
        parts = [(f"e{i}", name.replace("_", " ")) for i, name in enumerate(reasons.values())]
        figures += _stacked_bars(f"How dialogues ended{name}", "Share of a step's dialogues.", ends, parts)
    return figures


def _stacked_bars(title: str, caption: str, bars: Sequence[Point], parts: Sequence[tuple[str, str]]) -> list[Figure]:
    """Bars over steps; `parts` are (class, name), from the bottom; those that never occur aren't in the legend."""
    if not bars:
        return []
    legend = [Key(c, name, "box") for i, (c, name) in enumerate(parts) if any(bar.values[i] > 0 for bar in bars)]
    chart = Chart(title, (0, len(bars)), (0.0, 1.0), labels=("step", ""), legend=legend)
    chart.y_axis([0, 0.5, 1], percent=True)
    texts = []
    for i, bar in enumerate(bars):
        bottom, shares = 0.0, []
        for (classes, name), value in zip(parts, bar.values, strict=True):
            if value > 0:
                chart.bar((i + 0.06, i + 0.94), (bottom, bottom + value), classes)
                shares.append(f"{name} {value:.0%}")
            bottom += value
        texts.append(f"{bar.steps} · {', '.join(shares)}")
    for tick in ticks(1, max(len(bars), 2), whole=True):
        if tick <= len(bars):
            chart.note(tick - 0.5, -0.09, str(bars[int(tick) - 1].first))
    chart.tips([i + 0.5 for i in range(len(bars))], texts)
    return [Figure(title, caption, chart)]
