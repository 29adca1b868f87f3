"""What judgements look like in the terminal."""

from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table
from rich.text import Text

from rlver_jax.endpoints.usage import usage_text
from rlver_jax.user.emotion import BANDS

_FIGURES = {
    "spearman": "Spearman",
    "spearman_given_emotion": "given emotion",
    "spearman_given_past": "given both",
    "mae": "mean error",
}
_FURTHER = {"pearson": "Pearson", "sign_agreement": "same sign", "band_agreement": "same band after"}
_BASELINES = {"emotion": "emotion alone", "previous_change": "previous change", "constant": "the median"}
_PARTS = {"": "all replies", "first_replies": "first replies", "later_replies": "later replies"}
_EXPLANATION = """\
Changes compared with the recorded ones; 95 % intervals over profiles. "Emotion alone" (the straight line in the emotion
before the reply that fits these contexts best), "previous change" (the same change again, 0 at first) and "the median"
have not read the reply: a judge that has must do better than they. "Given emotion", "given both": the rank correlation
that is left when what the emotion, or emotion and previous change, explain is taken out. Before first replies there is
no past that could explain the change."""


def number_text(value: float | None, interval: list[float] | None = None, digits: int = 2) -> str:
    """`0.31 [0.12, 0.48]`; a dash where there is no number."""
    if value is None:
        return "–"
    return f"{value:.{digits}f}" + (f" [{interval[0]:.{digits}f}, {interval[1]:.{digits}f}]" if interval else "")


def show_scores(each: Mapping[str, Mapping[str, Any]], console: Console) -> None:
    """A line a file."""
    table = Table("dialogues", "score [95 % interval]", "success", "failure", "n", "turns")
    for name, one in each.items():
        counts = (str(one["success"]), str(one["failure"]), str(one["n"]), f"{one['turns_mean']:.2f}")
        short = Text("/".join(Path(name).parts[-2:]), overflow="fold")
        table.add_row(short, number_text(one["score"], one["score_interval"]), *counts)
    console.print(table, highlight=False)


def show_judges(summary: Mapping[str, Any], console: Console) -> None:
    """The judges' scores beside that of the user that the dialogues were played with, and the measures."""
    if "judges" in summary:
        table = Table("judge", "score", "success", "failure", "gap of the user's score to it", "Spearman of ends")
        table.add_row(
            "the user", number_text(summary["score"]), str(summary["success"]), str(summary["failure"]), "", ""
        )
        for name, one in summary["judges"].items():
            counts = (str(one["success"]), str(one["failure"]))
            gap = number_text(one["gap"], one["gap_interval"])
            table.add_row(Text(name), number_text(one["score"]), *counts, gap, number_text(one["spearman_final"]))
        console.print(table, highlight=False)
        for name, one in summary["judges"].items():
            _show_usage(name, one, console)
    if "measures" in summary:
        table = Table("measure", "mean [95 % interval]")
        source = f" (from {summary['measures']['settings'].get('relationship', 'speech')})"
        for name, one in summary["measures"].items():
            if "/" in name:
                shown = name + source * name.startswith("relationship/")
                table.add_row(shown, number_text(one["mean"], one["interval"]))
        console.print(table, highlight=False)
        table = Table("strategy that leads", "replies", "the emotion was meant to rise after", "mean change")
        used = {name: one for name, one in summary["measures"]["strategies"].items() if one["n"]}
        for name, one in sorted(used.items(), key=lambda item: -item[1]["n"]):
            share = "–" if one["acceptance"] is None else f"{one['acceptance']:.0%}"
            table.add_row(name, str(one["n"]), share, number_text(one["change"]))
        console.print(table, highlight=False)
        _show_usage(summary["measures"]["judge"], summary["measures"], console)


def _show_usage(name: str, result: Mapping[str, Any], console: Console) -> None:
    """What a judge left unanswered, and the requests to an endpoint; a line, where there is something to say."""
    parts = [f"{result['unanswered']} answers could not be read"] * bool(result["unanswered"])
    if "remote" in result:
        parts.append(usage_text(result["remote"]))
    if parts:
        console.print(f"{name}: {' · '.join(parts)}", markup=False, highlight=False, soft_wrap=True)


def show_agreement(name: str, result: Mapping[str, Any], console: Console) -> None:
    """Each readout beside what needs no look at the reply, and the readouts' confusion of bands.

    Args:
        name: of the judge.
        result: of `score.measure_agreement`, or of `score.measure_record`, which has no judge.
    """
    readouts = [key for key in result if isinstance(result[key], dict) and "spearman" in result[key]]
    rows = {f"{name}, {readout}": result[readout] for readout in readouts}
    rows |= {shown: result["without_the_reply"][key] for key, shown in _BASELINES.items()}
    counts = f"{result['n']} contexts of {result['dialogues']} dialogues"
    console.print(f"{name}: {counts}", markup=False, highlight=False, soft_wrap=True)
    table = Table("", *_FIGURES.values())
    for part, what in _PARTS.items():
        _add_part(table, part, what, rows)
    console.print(table, highlight=False)
    console.print(_EXPLANATION, markup=False, highlight=False, soft_wrap=True)
    table = Table("all replies", *_FURTHER.values(), *["mean change"] * bool(readouts))
    for shown, one in rows.items():
        mean = [number_text(one["mean_change"]["own"])] if "mean_change" in one else []
        table.add_row(Text(shown), *_cells(one, _FURTHER), *mean)
    if readouts:
        table.add_row("the record", *[""] * len(_FURTHER), number_text(result[readouts[0]]["mean_change"]["recorded"]))
    console.print(table, highlight=False)
    for readout in readouts:
        bands = Table(f"bands with {readout}: recorded \\ own", *BANDS)
        for band, row in result[readout]["band_confusion"].items():
            bands.add_row(band, *(str(row[other]) for other in BANDS))
        console.print(bands, highlight=False)
    if readouts:
        _show_usage(name, result, console)


def _add_part(table: Table, part: str, what: str, rows: Mapping[str, Mapping[str, Any]]) -> None:
    """The section of a table that is about all replies (part ""), the first or the later ones, where there are any."""
    of_part = {shown: one[part] if part else one for shown, one in rows.items() if not part or part in one}
    if not of_part:
        return
    count = f" ({next(iter(of_part.values()))['n']})" if part else ""
    table.add_section()
    table.add_row(Text(f"{what}{count}", style="bold"))
    for shown, one in of_part.items():
        table.add_row(Text(shown), *_cells(one, _FIGURES))


def _cells(intervals: Mapping[str, Any], names: Iterable[str]) -> list[str]:
    # An interval without a space is not broken where the table is narrow.
    return [number_text(**intervals[name]).replace(", ", ",") for name in names]
