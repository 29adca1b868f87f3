"""What a report shows, read from folders: training runs (`--workdir`) and evaluations (`evaluate --out`)."""

import dataclasses
import hashlib
import json
import sys
from array import array
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from rlver_jax.config.validate import shortened, shown
from rlver_jax.dialogues.log import Record, iter_dialogues
from rlver_jax.dialogues.numbers import is_number, number_faults
from rlver_jax.evaluation.folder import DIALOGUES, PROGRESS, SUMMARY
from rlver_jax.evaluation.measures import SPEECH, THOUGHTS
from rlver_jax.profiles.intentions import HIDDEN_INTENTIONS, known_intention
from rlver_jax.reports.dialogue_store import DialogueStore
from rlver_jax.reports.metrics_table import MetricsTable
from rlver_jax.text.console import plain_line
from rlver_jax.training.metrics_file import iter_metrics
from rlver_jax.training.workdir import RunFolder
from rlver_jax.user.prompts import load_prompts

MOST_RUNS = 8  # colours that can be told apart

Outline = dict[str, Any]  # of a dialogue, see `_outline`: without the texts that only the dialogue browser shows
Watch = Callable[[Sequence[Path], str], Iterable[Path]]  # goes through files, showing progress


@dataclasses.dataclass(frozen=True)
class DialogueLog:
    """Finished dialogues of one policy: those of a training step, or an evaluation's."""

    step: int | None  # of training; None: an evaluation
    records: list[Outline]


@dataclasses.dataclass(frozen=True)
class Run:
    """A training run or an evaluation."""

    name: str
    path: Path
    training: bool
    settings: dict[str, Any]  # flat
    metrics: MetricsTable  # an evaluation has none
    summary: dict[str, Any]  # of summary.json; a training run, or an unfinished evaluation, has none
    logs: list[DialogueLog]  # steps rising
    store: DialogueStore  # of their texts
    done: int = 0  # the last step of a training run that is known to be done, whether it has a row or not


def read_runs(paths: Sequence[str | Path], watch: Watch = lambda files, _: files) -> list[Run]:
    """Reads folders in the order given; of a run in progress all that is written so far is read.

    Args:
        watch: wraps the files of one folder while they are read; the second argument is the run's name.

    Raises:
        ValueError, OSError: no folder or too many, one that is named twice or holds neither a run nor an evaluation, or
            a file that cannot be used.
    """
    folders = [Path(path) for path in paths]
    if not 1 <= len(folders) <= MOST_RUNS:
        raise ValueError(f"found {len(folders)} folders, expected 1 to {MOST_RUNS} of runs or evaluations")
    seen: dict[Path, Path] = {}
    for folder in folders:
        if folder.resolve() in seen:
            raise ValueError(f"{folder}: is the same folder as {seen[folder.resolve()]}; name each once")
        seen[folder.resolve()] = folder
    store = DialogueStore()
    return [_read(folder, name, watch, store) for folder, name in zip(folders, _names(folders), strict=True)]


def _names(folders: Sequence[Path]) -> list[str]:
    """The last part of each path, or as many as tell them apart."""
    parts = [folder.resolve().parts for folder in folders]
    for count in range(1, max(map(len, parts)) + 1):
        names = ["/".join(part[-count:]) for part in parts]
        if len(set(names)) == len(names):
            break
    return names


def _read(folder: Path, name: str, watch: Watch, store: DialogueStore) -> Run:
    run = RunFolder(folder)
    if run.metrics.exists():
        done = run.done()  # before the metrics are read: a run in progress writes them first
        files = sorted(run.dialogues(0).parent.glob("step_*.jsonl"), key=_step)
        own = _own_intentions(run.config())
        logs = [DialogueLog(_step(file), _outlines(file, store, own)) for file in watch(files, name)]
        metrics = MetricsTable(iter_metrics(run.metrics))
        if not metrics and not logs:
            raise ValueError(f"{folder}: its {run.metrics.name} holds no step yet; wait for the first one")
        return Run(name, folder, True, run.config(), metrics, {}, logs, store, done)
    log = folder / DIALOGUES
    if not log.exists():
        raise ValueError(
            f"{folder}: holds neither {run.metrics.name} nor {DIALOGUES}; expected the --workdir of a training run or "
            f"the --out of an evaluation"
        )
    summary = _object(folder / SUMMARY)
    settings = (summary or _object(folder / PROGRESS)).get("settings", {})
    own = _own_intentions(settings if isinstance(settings, dict) else {})
    records = [record for file in watch([log], name) for record in _outlines(file, store, own)]
    if not records:
        raise ValueError(f"{log}: holds no dialogue; expected at least one")
    if not isinstance(settings, dict):
        raise ValueError(f"{folder}: its settings are {shown(settings)}, expected a JSON object; evaluate again")
    return Run(name, folder, False, dict(settings), MetricsTable([]), summary, [DialogueLog(None, records)], store)


def _step(file: Path) -> int:
    number = file.stem.removeprefix("step_")
    if not (number.isascii() and number.isdigit()):
        raise ValueError(f"{file}: is not named after a step, such as step_000010.jsonl; move it away")
    return int(number)


def _object(path: Path) -> dict[str, Any]:
    """A JSON object from a file; empty where there is no file."""
    try:
        return dict(json.loads(path.read_text(encoding="utf-8")))
    except FileNotFoundError:
        return {}
    except (ValueError, TypeError, RecursionError) as error:
        raise ValueError(f"{path}: is no JSON object ({error}); restore it, or evaluate again") from error


def _own_intentions(settings: Mapping[str, Any]) -> Callable[[str], str]:
    """The id of a sentence in a run's own hidden_intentions.json; empty where it has none, or it is not at hand."""
    try:
        prompts = load_prompts(str(settings.get("data.language")), str(settings.get("user.prompts") or "") or None)
    except (OSError, ValueError):
        return lambda sentence: ""
    if not Path(prompts.origins["hidden_intentions.json"]).is_file():  # ours
        return lambda sentence: ""
    return lambda sentence: known.key.replace("_", " ") if (known := prompts.intention(sentence)) else ""


def _outlines(path: Path, store: DialogueStore, own: Callable[[str], str]) -> list[Outline]:
    return [_outline(record, store, own) for record in iter_dialogues(path, unfinished=True, check=number_faults)]


def _outline(record: Record, store: DialogueStore, own: Callable[[str], str] = lambda sentence: "") -> Outline:
    """What tables and charts show of a dialogue, small: there may be a hundred thousand of them."""
    first = record["messages"][0]
    profile_key = record["profile"], record["hidden_intention"], None if first["generated"] else first["content"]
    replies = [len(message["content"]) for message in record["messages"] if message["role"] == "assistant"]
    outline = {
        "dialogue": record["dialogue"],
        "profile": sys.intern(shortened(plain_line(record["profile"]), 100)),
        "hidden_intention": sys.intern(shortened(record["hidden_intention"], 300)),
        "intention": sys.intern(shortened(plain_line(own(record["hidden_intention"])), 28)),
        "end_reason": sys.intern(record["end_reason"]),
        "turns": record["turns"],
        "emotion": record["emotion"],
        "emotions": record["emotions"],
        "replies": array("Q", replies),
        "profile_key": hashlib.blake2b(repr(profile_key).encode(), digest_size=8).digest(),
        "text": store.add(record),
    }
    measures = _shown_measures(record.get("measures"))
    return outline | ({"measures": measures} if measures else {})


def _shown_measures(measures: Any) -> dict[str, Any]:
    """Of a judge model's marks those that charts show."""
    if not isinstance(measures, dict):
        return {}
    relationship = measures.get("relationship")
    facets = relationship.get("facets") if isinstance(relationship, dict) else None
    # What it was filled in from; older versions knew only what was said.
    source = THOUGHTS if isinstance(relationship, dict) and relationship.get("from") == THOUGHTS else SPEECH
    marks = {name: _marks(measures.get(name)) for name in ("capabilities", "coordinate")}
    return marks | {"relationship": {source: _marks(facets)}}


def _marks(part: Any) -> dict[str, float]:
    named = part.items() if isinstance(part, dict) else ()
    return {sys.intern(plain_line(name)[:100]): float(value) for name, value in named if is_number(value)}


def intention_label(outline: Mapping[str, Any]) -> str:
    """A short name of a hidden intention: its id in the run's own file, a published one's, or its first words."""
    sentence = outline["hidden_intention"]
    if own := outline.get("intention"):
        return own
    known = known_intention(sentence)
    if known:
        return known.key.replace("_", " ")
    words = " ".join(plain_line(sentence).split())
    return words if len(words) <= 28 else words[:27] + "…"


def intention_labels(records: Iterable[Mapping[str, Any]]) -> list[str]:
    """The labels that occur: the published ones in their order, then others by name."""
    labels = {intention_label(record) for record in records}
    published = [one.key.replace("_", " ") for one in HIDDEN_INTENTIONS]
    return [label for label in published if label in labels] + sorted(labels - set(published))
