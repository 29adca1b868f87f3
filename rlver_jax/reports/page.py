"""A report as one HTML file: charts and tables drawn here, a dialogue browser that runs in the page.

The page loads nothing and may load nothing: its policy allows its own script, known by its hash, and its own styles.
"""

import base64
import hashlib
from collections.abc import Sequence
from importlib import resources
from typing import Any

from jinja2 import Environment, StrictUndefined
from markupsafe import Markup

from rlver_jax.reports import charts, figures
from rlver_jax.reports.browser import Packed, pack
from rlver_jax.reports.charts import Figure
from rlver_jax.reports.measures import measure_charts
from rlver_jax.reports.sources import Run
from rlver_jax.text.console import plain, plain_line
from rlver_jax.training.metrics import missing_steps


def render(runs: Sequence[Run], most_bytes: int) -> tuple[str, Packed]:
    """(the page, what of the dialogues is in it).

    Args:
        most_bytes: size of the page; dialogues are cut down or left out to keep it.

    Raises:
        ValueError: even without any dialogue it would be larger.
    """
    empty = _render(runs, Packed("", 0, 0, 0))
    room = most_bytes - len(empty.encode("utf-8")) - 2_000  # for the counts of what is left out
    if room < 0:
        raise ValueError(f"a page without dialogues takes {most_bytes - room} bytes; expected at most {most_bytes}")
    packed = pack(runs, room)
    return _render(runs, packed), packed


def curve(runs: Sequence[Run]) -> str:
    """The emotion curve as an SVG file of its own.

    Raises:
        ValueError: none of the runs has trained.
    """
    figure = charts.emotion_curve(runs, "emotion at the end of a dialogue, mean ± deviation")
    if figure is None:
        raise ValueError("--curve needs a training run with at least one step; evaluations have no curve")
    return figure.chart.document(_asset("chart.css"))


def _render(runs: Sequence[Run], packed: Packed) -> str:
    how: dict[str, Any] = {"undefined": StrictUndefined, "trim_blocks": True, "lstrip_blocks": True}
    environment = Environment(autoescape=True, finalize=_plain, **how)
    script = _asset("page.js")
    digest = base64.b64encode(hashlib.sha256(script.encode("utf-8")).digest()).decode("ascii")
    found = figures.groups(runs)
    return environment.from_string(_asset("page.html.j2")).render(
        title=plain_line(", ".join(run.name for run in runs)),
        names=[plain_line(run.name) for run in runs],
        style=Markup(_asset("chart.css") + _asset("page.css")),
        script=Markup(script),
        script_hash=digest,
        table=figures.table(runs, found),
        settings=figures.settings_table(runs),
        sections=_sections(runs, found),
        packed=packed,
    )


def _sections(runs: Sequence[Run], found: Sequence[figures.Group]) -> list[dict[str, Any]]:
    """Titles and charts, as far as there is something to show."""
    coordinate, lost = charts.coordinate_chart(found), _lost_rows(runs)
    keys = charts.group_keys(found)
    sections: list[tuple[str, str, list[Figure], list[Any]]] = [
        ("Learning", lost, charts.curves(runs), []),
        ("Outcomes by step", "", charts.shares_by_step(runs), []),
        (
            "Emotion over the turns, by hidden intention",
            "Mean emotion after each turn; area: its quartiles (up to four lines). A dialogue that has ended keeps its "
            "final emotion.",
            charts.trajectories(found),
            keys,
        ),
        ("Dialogues in the logs", "", charts.group_charts(found), []),
        ("Manner", "", [*([coordinate] if coordinate else []), *measure_charts(found)], []),
    ]
    return [
        {"title": title, "text": text, "keys": legend, "figures": [_shown(figure) for figure in some]}
        for title, text, some, legend in sections
        if some or (lost and text == lost)
    ]


def _lost_rows(runs: Sequence[Run]) -> str:
    """Which steps of which run have no figures, though they are done."""
    found = {}
    for run in runs:
        last = max(run.done, run.rows[-1]["step"] if run.rows else 0)
        found[run.name] = missing_steps(run.rows, last, last and run.settings.get("eval.every")) if run.training else ""
    return " ".join(f"Of {name} the rows of {steps} were lost." for name, steps in found.items() if steps)


def _shown(figure: Figure) -> dict[str, Any]:
    return {"title": figure.title, "caption": figure.caption, "svg": Markup(figure.chart.markup())}


def _plain(value: Any) -> Any:
    """What the template writes: our own markup as it is, and every other text without controls."""
    return plain(value) if isinstance(value, str) and not isinstance(value, Markup) else value


def _asset(name: str) -> str:
    return resources.files("rlver_jax.reports").joinpath("assets", name).read_text(encoding="utf-8")
