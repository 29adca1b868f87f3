"""What a judge model has marked, as bars: capabilities of the policy, and how the user saw it."""

from collections.abc import Sequence
from typing import Any, NamedTuple

import numpy as np

from rlver_jax.reports.charts import Figure, classes_of, group_keys
from rlver_jax.reports.figures import Group
from rlver_jax.reports.sources import Outline
from rlver_jax.reports.svg import WIDTH, Chart, ticks

_BAR, _GAP, _EDGES = 11, 9, 52  # heights: a group's bar, the space between two marks, everything else


class Scale(NamedTuple):
    """Marks that are shown together: where a record's `measures` hold them, and between what they lie."""

    title: str
    caption: str
    path: tuple[str, ...]
    low: float
    high: float
    origin: float  # where bars begin


SCALES = (
    Scale("Capabilities", "Means of a judge model's marks, 1 to 5.", ("capabilities",), 1, 5, 1),
    Scale(
        "Relationship",
        "Means of a judge model's answers in the user's place, -3 (quite untrue) to 3.",
        ("relationship", "facets"),
        -3,
        3,
        0,
    ),
)


def marks(records: Sequence[Outline], path: Sequence[str]) -> dict[str, list[float]]:
    """The marks of all records by name, as far as they have any."""
    found: dict[str, list[float]] = {}
    for record in records:
        place: Any = record.get("measures")
        for name in path:
            place = place.get(name) if isinstance(place, dict) else None
        for name, value in (place if isinstance(place, dict) else {}).items():
            if isinstance(value, int | float):
                found.setdefault(name, []).append(float(value))
    return found


def measure_charts(groups: Sequence[Group]) -> list[Figure]:
    """A chart for each scale on which some dialogue has marks: a row a mark, a bar a group."""
    charts = [_chart(scale, groups) for scale in SCALES]
    return [chart for chart in charts if chart]


def _chart(scale: Scale, groups: Sequence[Group]) -> Figure | None:
    found = [(group, marks(group.records, scale.path)) for group in groups]
    found = [(group, ours) for group, ours in found if ours]
    if not found:
        return None
    names = list(dict.fromkeys(name for _, ours in found for name in ours))
    legend = group_keys([group for group, _ in found], "box") if len(found) > 1 else []
    row = _GAP + _BAR * len(found)
    size = (WIDTH, _EDGES + 15 * len(legend) + row * len(names))
    chart = Chart(scale.title, (scale.low, scale.high), (len(names), 0), legend=legend, size=size, left=132)
    chart.x_axis(ticks(scale.low, scale.high, whole=True), grid=True)
    chart.rule(x=scale.origin)
    for place, name in enumerate(names):
        chart.row_name(place + 0.5, name.replace("_", " "))
        for i, (group, ours) in enumerate(found):
            if name in ours:
                mean = float(np.mean(ours[name]))
                top = place + (_GAP / 2 + _BAR * i) / row
                tip = f"{group.name} · {name.replace('_', ' ')} {mean:+.2f}, mean of {len(ours[name])} dialogues"
                span = min(mean, scale.origin), max(mean, scale.origin)
                chart.bar(span, (top + 0.9 * _BAR / row, top), f"box {classes_of(group)}", tip)
    return Figure(scale.title, scale.caption, chart)
