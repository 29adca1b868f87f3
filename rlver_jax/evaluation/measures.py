"""Measures beyond the emotion, by a judge model: asked, kept as they come, and summed up."""

import collections
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from rich.console import Console

from rlver_jax.dialogues.log import Record
from rlver_jax.dialogues.trajectory import reactions
from rlver_jax.endpoints.usage import summed
from rlver_jax.evaluation.forms import QUALITIES, STRATEGIES, Forms, measures_of
from rlver_jax.evaluation.judge_folder import WorkFile
from rlver_jax.evaluation.rater import Rater
from rlver_jax.evaluation.score import JudgeMeter
from rlver_jax.evaluation.statistics import mean_with_interval
from rlver_jax.evaluation.transcripts import LazySequence, Transcript

Measures = dict[str, Any]


def measure(
    rater: Rater, forms: Forms, dialogues: Sequence[Transcript], folder: Path | None, console: Console
) -> tuple[Sequence[Record], dict[str, Any]]:
    """(the records of dialogues with `measures`, see `forms.measures_of`; `remote`: what an endpoint was asked)."""
    asked = LazySequence(dialogues, lambda _, dialogue: forms.ask(dialogue))
    settings = rater.settings | {"forms": repr((forms.language, sorted(forms.texts.items())))}
    work = WorkFile(folder, "measures", settings, dialogues)
    missing = [i for i in range(len(dialogues)) if i not in work.done]
    with JudgeMeter(console, f"{rater.name}: forms", sum(len(asked[i].forms) for i in missing)) as meter:
        for some in rater.fill(LazySequence(missing, lambda _, i: asked[i]), meter.work):
            work.add(
                [
                    {"index": missing[i], "measures": measures_of(found.answers, rater.name), "remote": found.remote}
                    for i, found in some
                ]
            )
            depth = [line["measures"]["capabilities"]["empathic_depth"] for line in work.done.values()]
            known = [one for one in depth if one is not None]
            meter.kept(f"empathic depth {sum(known) / len(known):.2f} of 5" if known else "nothing readable yet")
    used = [work.done[i]["remote"] for i in range(len(dialogues)) if work.done[i]["remote"]]
    records = LazySequence(dialogues, lambda i, dialogue: dialogue.record | {"measures": work.done[i]["measures"]})
    return records, ({"remote": summed(used)} if used else {})


def summarize(records: Sequence[Record]) -> dict[str, Any]:
    """Means over dialogues with deviations and intervals, and what became of each strategy."""
    values: dict[str, list[float]] = collections.defaultdict(list)
    profiles: dict[str, list[str]] = collections.defaultdict(list)  # whose dialogue each value is of
    unanswered = 0
    for record in records:
        unanswered += record["measures"]["unanswered"]
        for name, value in _numbers(record["measures"]):
            if value is not None:
                values[name].append(value)
                profiles[name].append(record["profile"])
    means = {name: mean_with_interval(known, profiles[name]) for name, known in values.items()}
    first = {"judge": records[0]["measures"]["judge"], "unanswered": unanswered}
    return first | {"strategies": strategies(records)} | means


def strategies(records: Iterable[Record]) -> dict[str, dict[str, Any]]:
    """Of each strategy: how often it leads in a reply, and how the dialogue's user took it.

    `n` replies; `acceptance`: share of those that the user appraised after which its emotion was meant to rise;
    `change`: their mean change. Both are null where there are none.
    """
    counts: collections.Counter[str] = collections.Counter()
    changes: dict[str, list[int]] = collections.defaultdict(list)
    for one in records:
        led = [reply["strategy"] for reply in one["measures"]["replies"]]
        counts.update(led)
        for turn, _, user in reactions(one):
            changes[led[turn]].append(user["change"])
    return {
        name: {
            "n": counts[name],
            "acceptance": sum(change > 0 for change in ours) / len(ours) if ours else None,
            "change": sum(ours) / len(ours) if ours else None,
        }
        for name in STRATEGIES
        for ours in (changes[name],)
    }


def _numbers(measures: Mapping[str, Any]) -> Iterator[tuple[str, float | None]]:
    """What of a dialogue's measures has a mean, by flat name; the qualities are means over its replies."""
    for name, value in measures["capabilities"].items():
        yield f"capabilities/{name}", value
    yield "relationship/total", measures["relationship"]["total"]
    for name, value in measures["relationship"]["facets"].items():
        yield f"relationship/{name}", value
    for name, value in measures["coordinate"].items():
        yield f"coordinate/{name}", value
    for name, value in measures["person"].items():
        yield f"person/{name}", value
    for name in QUALITIES:
        known = [reply[name] for reply in measures["replies"] if reply[name] is not None]
        yield f"replies/{name}", sum(known) / len(known) if known else None
