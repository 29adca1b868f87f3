"""The charts of a report, from its figures: each function gives those that its runs have something to show for."""

import dataclasses
from collections.abc import Iterable, Mapping, Sequence

import numpy as np

from rlver_jax.reports import figures
from rlver_jax.reports.figures import OUTCOMES, Group, Point
from rlver_jax.reports.shorten import evenly
from rlver_jax.reports.sources import Run, intention_label, intention_labels
from rlver_jax.reports.svg import WIDTH, Chart, Key, ticks
from rlver_jax.rollout.end_reason import END_REASONS

MOST_POINTS, MOST_BARS, MOST_DOTS = 240, 60, 500
MOST_INTENTIONS = 12
MOST_BANDS = 4  # more of them on one chart hide each other
_EMOTION, _SHARE = (0.0, 100.0), (0.0, 1.0)


@dataclasses.dataclass(frozen=True)
class Figure:
    """A chart with what is said around it."""

    title: str
    caption: str
    chart: Chart


def curves(runs: Sequence[Run]) -> list[Figure]:
    """Emotion and reward with their spread, held-out scores, lengths: lines over the steps, a colour a run."""
    spread = "Mean over a step's dialogues, and one standard deviation around it."
    found = [
        emotion_curve(runs),
        _curve(runs, "Reward", spread, {"reward/mean": ""}, spread="reward/std"),
        _curve(
            runs,
            "Held-out score",
            "Mean final emotion of held-out profiles; dashed: by the gold judge, which training never sees.",
            {"eval/score": "", "eval/rule_score": "early"},
            y=_EMOTION,
        ),
        _curve(runs, "Turns", "Replies of the policy in a dialogue, mean.", {"dialogue/turns_mean": ""}, zero=True),
        _curve(
            runs,
            "Length of a reply",
            "Tokens, mean; dashed: with its thought.",
            {"reply/tokens_mean": "", "reply/all_tokens_mean": "early"},
            zero=True,
        ),
    ]
    return [figure for figure in found if figure]


def emotion_curve(runs: Sequence[Run], label: str = "") -> Figure | None:
    """The final emotion of training dialogues over the steps, its axis labelled; None where no run has trained."""
    caption = "Mean over a step's dialogues, and one standard deviation around it."
    lines = {"emotion/final_mean": ""}
    title, spread = "Emotion at the end of a dialogue", "emotion/final_std"
    return _curve(runs, title, caption, lines, spread=spread, y=_EMOTION, label=label)


def _curve(
    runs: Sequence[Run],
    title: str,
    caption: str,
    lines: Mapping[str, str],
    *,
    spread: str = "",
    y: tuple[float, float] | None = None,
    zero: bool = False,
    label: str = "",
) -> Figure | None:
    """Lines of metrics over the steps.

    Args:
        lines: metric -> class of its line.
        spread: metric of a deviation, drawn as a band around the one line.
        y: range; None: that of the values.
        zero: without a range, begin it at 0.
        label: of the y axis.
    """
    drawn: list[tuple[str, str, list[Point]]] = []
    for index, run in enumerate(runs):
        for key, classes in lines.items():
            some = figures.points(run.rows, [key, spread] if spread else [key], MOST_POINTS)
            drawn += [(run.name, f"c{index} {classes}".strip(), some)] if some else []
    if not drawn:
        return None
    everything = [point for _, _, some in drawn for point in some]
    x = _widened(min(p.first for p in everything), max(p.last for p in everything))
    y = y or _around([0.0] * zero + [value for p in everything for value in _extent(p, bool(spread))])
    named = dict.fromkeys(Key(classes.split()[0], name) for name, classes, _ in drawn)
    legend = list(named) if len(runs) > 1 else []
    chart = Chart(title, x, y, labels=("step", label), legend=legend)
    chart.y_axis(ticks(*y))
    chart.x_axis(ticks(*x, whole=True))
    for _, classes, some in drawn:
        if spread and len(drawn) <= MOST_BANDS:
            low, high = ([p.values[0] + sign * p.values[1] for p in some] for sign in (-1, 1))
            chart.band(_middles(some), low, high, classes)
    for _, classes, some in drawn:
        chart.line(_middles(some), [p.values[0] for p in some], classes, dots=len(some) <= 12)
    _curve_tips(chart, drawn, named=len(drawn) > 1)
    return Figure(title, caption, chart)


def _curve_tips(chart: Chart, drawn: Sequence[tuple[str, str, list[Point]]], named: bool) -> None:
    texts: dict[float, tuple[str, list[str]]] = {}
    for name, classes, some in drawn:
        for point, x in zip(some, _middles(some), strict=True):
            value = " ± ".join(f"{value:.2f}" for value in point.values)
            who = name + " (dashed)" * ("early" in classes) + ": " if named else ""
            texts.setdefault(x, (point.steps, []))[1].append(who + value)
    xs = sorted(texts)
    chart.tips(xs, [f"{texts[x][0]} · {' · '.join(texts[x][1])}" for x in xs])


def _middles(some: Iterable[Point]) -> list[float]:
    return [(point.first + point.last) / 2 for point in some]


def _widened(low: float, high: float) -> tuple[float, float]:
    return (float(low), float(high)) if high > low else (low - 0.5, high + 0.5)


def _extent(point: Point, spread: bool) -> tuple[float, ...]:
    return (point.values[0] - point.values[1], point.values[0] + point.values[1]) if spread else point.values


def _around(values: Sequence[float]) -> tuple[float, float]:
    """A range that holds all values, with some room."""
    low, high = min(values), max(values)
    room = 0.06 * (high - low) or 0.5
    return low - room * (low != 0), high + room


def shares_by_step(runs: Sequence[Run]) -> list[Figure]:
    """Success and failure, and why dialogues ended, of each training run: stacked bars over its steps."""
    reasons = {f"dialogue/end_{name}": name for name in END_REASONS[1:]}
    found = []
    for run in runs:
        name = f": {run.name}" if len(runs) > 1 else ""
        some = figures.points(run.rows, ["dialogue/success_rate", "dialogue/failure_rate"], MOST_BARS)
        outcomes = [
            point._replace(values=(good := point.values[0], 1 - good - point.values[1], point.values[1]))
            for point in some
        ]
        caption = "Share of a step's dialogues that end at emotion 100 (success) or below 10 (failure)."
        found += _stacks(f"Success and failure{name}", caption, outcomes, [(o, o) for o in OUTCOMES])
        ends = figures.points(run.rows, list(reasons), MOST_BARS)
        keys = [(f"e{i}", name.replace("_", " ")) for i, name in enumerate(reasons.values())]
        found += _stacks(f"How dialogues ended{name}", "Share of a step's dialogues.", ends, keys)
    return found


def _stacks(title: str, caption: str, some: Sequence[Point], keys: Sequence[tuple[str, str]]) -> list[Figure]:
    """Bars over steps; `keys` are (class, name) of the parts, from the bottom; parts that never occur have no key."""
    if not some:
        return []
    legend = [Key(c, n, "box") for i, (c, n) in enumerate(keys) if any(p.values[i] > 0 for p in some)]
    chart = Chart(title, (0, len(some)), _SHARE, labels=("step", ""), legend=legend)
    chart.y_axis([0, 0.5, 1], percent=True)
    for place, point in enumerate(some):
        bottom = 0.0
        for (classes, _), value in zip(keys, point.values, strict=True):
            if value > 0:
                chart.bar((place + 0.06, place + 0.94), (bottom, bottom + value), classes)
            bottom += value
    for tick in ticks(1, max(len(some), 2), whole=True):
        if tick <= len(some):
            chart.note(tick - 0.5, -0.09, str(some[int(tick) - 1].first))
    shown = [", ".join(f"{n} {v:.0%}" for (_, n), v in zip(keys, p.values, strict=True) if v > 0) for p in some]
    texts = [f"{point.steps} · {text}" for point, text in zip(some, shown, strict=True)]
    chart.tips([place + 0.5 for place in range(len(some))], texts)
    return [Figure(title, caption, chart)]


def group_charts(groups: Sequence[Group]) -> list[Figure]:
    """What the dialogues themselves show, a row a group: outcomes, ends, lengths."""
    if not groups:
        return []
    outcomes = [figures.outcome_shares(group.records) for group in groups]
    ends = [figures.end_shares(group.records) for group in groups]
    sizes = [figures.lengths(group.records) for group in groups]
    box = "Half of the dialogues lie in the box; line: the median; whiskers: the shortest and the longest."
    return [
        _rows("Outcomes", "Share of the dialogues.", groups, outcomes, list(OUTCOMES)),
        _rows("Ends", "Share of the dialogues.", groups, ends, [f"e{i}" for i in range(len(END_REASONS) - 1)]),
        _boxes("Turns", box, groups, [turns for turns, _ in sizes]),
        _boxes("Characters of a reply", box.replace("dialogues", "replies"), groups, [texts for _, texts in sizes]),
    ]


def _frame(title: str, x: tuple[float, float], groups: Sequence[Group], legend: Sequence[Key] = ()) -> Chart:
    """A chart with a row for each group, the first one on top."""
    height = 52 + 15 * -(-len(legend) // 3) + 24 * len(groups)
    chart = Chart(title, x, (len(groups), 0), legend=legend, size=(WIDTH, height), left=132)
    for place, group in enumerate(groups):
        chart.row_name(place + 0.5, group.name)
    return chart


def _rows(
    title: str, caption: str, groups: Sequence[Group], shares: Sequence[Mapping[str, float]], classes: Sequence[str]
) -> Figure:
    keys = list(zip(classes, shares[0], strict=True))
    chart = _frame(
        title, _SHARE, groups, [Key(c, n.replace("_", " "), "box") for c, n in keys if any(s[n] for s in shares)]
    )
    for place, (group, share) in enumerate(zip(groups, shares, strict=True)):
        left = 0.0
        for part, name in keys:
            if share[name]:
                tip = f"{group.name} · {name.replace('_', ' ')} {share[name]:.0%} of {len(group.records)}"
                chart.bar((left, left + share[name]), (place + 0.85, place + 0.15), part, tip)
            left += share[name]
    chart.x_axis([0, 0.5, 1], percent=True)
    return Figure(title, caption, chart)


def _boxes(title: str, caption: str, groups: Sequence[Group], values: Sequence[Sequence[int]]) -> Figure:
    high = max((max(some, default=0) for some in values), default=0)
    chart = _frame(title, (0, high * 1.04 or 1), groups)
    chart.x_axis(ticks(0, high or 1, whole=True), grid=True)
    for place, (group, some) in enumerate(zip(groups, values, strict=True)):
        if not some:
            continue
        least, low, middle, upper, most = np.percentile(some, (0, 25, 50, 75, 100)).tolist()
        tip = (
            f"{group.name} · {least:g} to {most:g}, quartiles {low:g}, {middle:g}, {upper:g}; mean {np.mean(some):.1f}"
        )
        classes = classes_of(group)
        chart.line([least, most], [place + 0.5] * 2, classes)
        width = max(upper - low, chart.x[1] / 150)
        chart.bar((low, low + width), (place + 0.8, place + 0.2), f"box {classes}", tip)
        chart.line([middle, middle], [place + 0.2, place + 0.8], "median")
    return Figure(title, caption, chart)


def classes_of(group: Group) -> str:
    """The classes of chart.css that colour a group."""
    return f"c{group.run}" + " early" * group.early


def group_keys(groups: Sequence[Group], shape: str = "line") -> list[Key]:
    """A legend of groups."""
    return [Key(classes_of(group), group.name, shape) for group in groups]


def trajectories(groups: Sequence[Group]) -> list[Figure]:
    """The emotion over the turns by hidden intention: a chart each, a line a group, its quartiles around it."""
    records = [record for group in groups for record in group.records]
    labels = intention_labels(records)[:MOST_INTENTIONS]
    longest = max((len(record["emotions"]) for record in records), default=2) - 1
    beyond = f"; turns after the {figures.MOST_TURNS}th are not drawn" * (longest > figures.MOST_TURNS)
    turns = min(max(longest, 1), figures.MOST_TURNS)
    return [_trajectory(label, groups, turns, beyond) for label in labels]


def _trajectory(label: str, groups: Sequence[Group], turns: int, beyond: str) -> Figure:
    chart = Chart(f"emotion by turn: {label}", (0, turns), _EMOTION, labels=("turn", ""), size=(WIDTH, 190))
    chart.y_axis(ticks(*_EMOTION))
    chart.x_axis(ticks(0, turns, whole=True))
    texts: list[list[str]] = [[f"turn {turn}" if turn else "before the first turn"] for turn in range(turns + 1)]
    counts = []
    for group in groups:
        some = [record for record in group.records if intention_label(record["hidden_intention"]) == label]
        counts.append(len(some))
        if not some:
            continue
        path = figures.trajectory(some)
        path = np.concatenate([path, np.repeat(path[-1:], turns + 1 - len(path), axis=0)])
        low, mean, high = path.T.tolist()
        if len(groups) <= MOST_BANDS:
            chart.band(range(turns + 1), low, high, classes_of(group))
        chart.line(range(turns + 1), mean, classes_of(group))
        for turn, text in enumerate(texts):
            text.append(f"{group.name}: {mean[turn]:.1f} ({low[turn]:.0f}–{high[turn]:.0f}), n {len(some)}")
    chart.tips(range(turns + 1), [" · ".join(text) for text in texts])
    return Figure(label, f"dialogues: {', '.join(map(str, counts))}{beyond}", chart)


def coordinate_chart(groups: Sequence[Group]) -> Figure | None:
    """Where a judge has placed the dialogues between empathy and solutions, structured and creative; None: nowhere."""
    placed = [(group, figures.coordinates(group.records)) for group in groups]
    if not any(some for _, some in placed):
        return None
    title = "Social-cognition coordinate"
    with_some = [group for group, some in placed if some]
    chart = Chart(title, (-1.05, 1.05), (-1.05, 1.05), legend=group_keys(with_some), size=(WIDTH, 340), left=10)
    chart.rule(x=0)
    chart.rule(y=0)
    chart.note(-1, 0.04, "empathy", "start")
    chart.note(1, 0.04, "solution", "end")
    chart.note(0.03, 0.97, "creative", "start")
    chart.note(0.03, -1.02, "structured", "start")
    for group, some in placed:
        for x, y, record in evenly(some, MOST_DOTS):
            place = f"solution {x:+.2f}, creative {y:+.2f}, emotion {record['emotion']}"
            chart.dot(x, y, classes_of(group), 3.5, f"{group.name} · {record['profile']} · {place}")
    for group, some in placed:
        if some:
            x, y = np.mean([(x, y) for x, y, _ in some], axis=0).tolist()
            chart.dot(x, y, f"mean {classes_of(group)}", 7, f"{group.name} · mean of {len(some)}: {x:+.2f}, {y:+.2f}")
    caption = "A dialogue a dot, as a judge model placed it; large: a group's mean."
    if any(len(some) > MOST_DOTS for _, some in placed):
        caption += f" Of more than {MOST_DOTS} dialogues as many are drawn, evenly."
    return Figure(title, caption, chart)
