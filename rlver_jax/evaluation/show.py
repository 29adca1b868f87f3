"""What judgements look like in the terminal."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.markup import escape
from rich.table import Table
from rich.text import Text

from rlver_jax.endpoints.usage import usage_text
from rlver_jax.user.emotion import BANDS

_STATISTICS = {
    "spearman": "Spearman correlation of change",
    "pearson": "Pearson correlation of change",
    "mae": "mean absolute error of change",
    "sign_agreement": "share with the same sign",
    "band_agreement": "share that ends in the same band",
}


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
        reads = f" (from {summary['measures']['settings'].get('relationship', 'speech')})"
        for name, one in summary["measures"].items():
            if "/" in name:
                shown = name + reads * name.startswith("relationship/")
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
    """Both readouts side by side, and their confusion of bands."""
    readouts = [key for key in result if isinstance(result[key], dict) and "spearman" in result[key]]
    table = Table(escape(f"{name}: {result['n']} contexts of {result['dialogues']} dialogues"), *readouts)
    for key, what in _STATISTICS.items():
        table.add_row(
            what,
            *(number_text(result[readout][key]["value"], result[readout][key]["interval"]) for readout in readouts),
        )
    table.add_row(
        "error of always saying the record's median", *(number_text(result[r]["mae_of_the_median"]) for r in readouts)
    )
    for who in ("own", "recorded"):
        table.add_row(
            f"mean change, {who}", *(number_text(result[readout]["mean_change"][who]) for readout in readouts)
        )
    console.print(table, highlight=False)
    for readout in readouts:
        bands = Table(f"bands with {readout}: recorded \\ own", *BANDS)
        for band, row in result[readout]["band_confusion"].items():
            bands.add_row(band, *(str(row[other]) for other in BANDS))
        console.print(bands, highlight=False)
    _show_usage(name, result, console)
