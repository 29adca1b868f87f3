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

from rlver_jax.reports import statistics
from rlver_jax.reports.browser import Packed, pack
from rlver_jax.reports.charts import CHARTS, EMOTION
from rlver_jax.reports.group_charts import group_keys
from rlver_jax.reports.sources import Run
from rlver_jax.reports.svg import Figure
from rlver_jax.text.console import plain, plain_line
from rlver_jax.training.metrics_file import missing_steps


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
    figures = EMOTION(runs, y_label="emotion at the end of a dialogue, mean ± deviation")
    if not figures:
        raise ValueError("--curve needs a training run with at least one step; evaluations have no curve")
    return figures[0].chart.document(_asset("chart.css"))


def _render(runs: Sequence[Run], packed: Packed) -> str:
    settings: dict[str, Any] = {"undefined": StrictUndefined, "trim_blocks": True, "lstrip_blocks": True}
    environment = Environment(autoescape=True, finalize=_plain, **settings)
    script = _asset("page.js")
    digest = base64.b64encode(hashlib.sha256(script.encode("utf-8")).digest()).decode("ascii")
    groups = statistics.groups(runs)
    return environment.from_string(_asset("page.html.j2")).render(
        title=plain_line(", ".join(run.name for run in runs)),
        names=[plain_line(run.name) for run in runs],
        style=Markup(_asset("chart.css") + _asset("page.css")),
        script=Markup(script),
        script_hash=digest,
        table=statistics.overview(runs, groups),
        settings=statistics.settings_table(runs),
        sections=_sections(runs, groups),
        packed=packed,
    )


def _sections(runs: Sequence[Run], groups: Sequence[statistics.Group]) -> list[dict[str, Any]]:
    """Titles and charts of the sections that have data."""
    notes = {"Learning": _missing_metrics(runs)}
    sections = []
    for title, section in CHARTS.items():
        figures = [_shown(figure) for figure in section.figures(runs, groups)]
        if figures or notes.get(title):
            text, keys = notes.get(title, section.text), group_keys(groups) if section.group_legend else []
            sections.append({"title": title, "text": text, "keys": keys, "figures": figures})
    return sections


def _missing_metrics(runs: Sequence[Run]) -> str:
    """Which steps of which run have no metrics, though they are done."""
    missing = {}
    for run in runs:
        if run.training:
            steps = run.metrics.steps
            last = max([run.done, *steps[-1:]])
            missing[run.name] = missing_steps(
                [{"step": step} for step in steps], last, last and run.settings.get("eval.every")
            )
    return " ".join(f"Of {name} the rows of {steps} were lost." for name, steps in missing.items() if steps)


def _shown(figure: Figure) -> dict[str, Any]:
    return {"title": figure.title, "caption": figure.caption, "svg": Markup(figure.chart.markup())}


def _plain(value: Any) -> Any:
    """What the template writes: our own markup as it is, and every other text without controls."""
    return plain(value) if isinstance(value, str) and not isinstance(value, Markup) else value


def _asset(name: str) -> str:
    return resources.files("rlver_jax.reports").joinpath("assets", name).read_text(encoding="utf-8")
