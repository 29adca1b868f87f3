"""Measures beyond the emotion, by a judge model: asked, kept as they come, and summed up."""

import collections
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from rich.console import Console

from rlver_jax.judging.finished import Finished
from rlver_jax.judging.forms import STRATEGIES, Forms, measures_of
from rlver_jax.judging.rater import Rater
from rlver_jax.judging.score import Meter
from rlver_jax.judging.statistics import mean_with_interval
from rlver_jax.judging.work_folder import WorkFile
from rlver_jax.runs.dialogue_log import Record

Measures = dict[str, Any]


def measured(
    rater: Rater, forms: Forms, dialogues: Sequence[Finished], folder: Path | None, console: Console
) -> list[Record]:
    """The records of dialogues with their `measures` (see `forms.measures_of`)."""
    asked = [forms.ask(dialogue) for dialogue in dialogues]
    settings = rater.settings | {"forms": repr((forms.language, sorted(forms.texts.items())))}
    work = WorkFile(folder, "measures", settings, dialogues)
    missing = [i for i in range(len(dialogues)) if i not in work.done]
    with Meter(console, f"{rater.name}: forms", sum(len(asked[i].forms) for i in missing)) as meter:
        for some in rater.fill([asked[i] for i in missing], meter.work):
            work.add([{"index": missing[i], "measures": measures_of(found, rater.name)} for i, found in some])
            depth = [line["measures"]["capabilities"]["empathic_depth"] for line in work.done.values()]
            meter.kept(f"empathic depth {sum(depth) / len(depth):.2f} of 5")
    return [dialogue.record | {"measures": work.done[i]["measures"]} for i, dialogue in enumerate(dialogues)]


def summed_up(records: Sequence[Record]) -> dict[str, Any]:
    """Means with deviations and intervals over dialogues, and how often each strategy leads."""
    found = [record["measures"] for record in records]
    values: dict[str, list[float]] = collections.defaultdict(list)
    for one in found:
        for name, value in _numbers(one):
            values[name].append(value)
    strategies = collections.Counter(reply["strategy"] for one in found for reply in one["replies"])
    means = {name: mean_with_interval(ours) for name, ours in values.items()}
    return {"judge": found[0]["judge"], "strategies": {name: strategies[name] for name in STRATEGIES}} | means


def _numbers(measures: Mapping[str, Any]) -> Iterator[tuple[str, float]]:
    """What of a dialogue's measures has a mean, by flat name; the qualities are means over its replies."""
    for name, value in measures["capabilities"].items():
        yield f"capabilities/{name}", value
    yield "relationship/total", measures["relationship"]["total"]
    for name, value in measures["relationship"]["facets"].items():
        yield f"relationship/{name}", value
    for name, value in measures["coordinate"].items():
        yield f"coordinate/{name}", value
    replies = measures["replies"]
    for name in [key for key in (replies[0] if replies else {}) if key != "strategy"]:
        yield f"replies/{name}", sum(reply[name] for reply in replies) / len(replies)
