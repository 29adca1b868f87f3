"""What a report shows, read from folders: training runs (`--workdir`) and evaluations (`evaluate --out`)."""

import dataclasses
import json
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import Any

from rlver_jax.profiles.schema import HIDDEN_INTENTIONS, known_intention
from rlver_jax.runs.dialogue_log import Record, read_dialogues
from rlver_jax.runs.evaluation_folder import DIALOGUES, PROGRESS, SUMMARY
from rlver_jax.runs.metrics import read_metrics
from rlver_jax.runs.workdir import RunFolder

MOST_RUNS = 8  # colours that can be told apart

Watch = Callable[[Sequence[Path], str], Iterable[Path]]  # goes through files, showing progress


@dataclasses.dataclass(frozen=True)
class Dialogues:
    """Finished dialogues of one policy: those of a training step, or an evaluation's."""

    step: int | None  # of training; None: an evaluation
    records: list[Record]  # without tokens and log-probabilities


@dataclasses.dataclass(frozen=True)
class Run:
    """A training run or an evaluation."""

    name: str
    path: Path
    training: bool
    settings: dict[str, Any]  # flat
    rows: list[dict[str, Any]]  # of metrics.jsonl, steps rising; an evaluation has none
    summary: dict[str, Any]  # of summary.json; a training run, or an unfinished evaluation, has none
    played: list[Dialogues]  # steps rising


def read_runs(paths: Sequence[str | Path], watch: Watch = lambda files, _: files) -> list[Run]:
    """Reads folders in the order given; a run that is being written is read up to where it is.

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
    return [_read(folder, name, watch) for folder, name in zip(folders, _names(folders), strict=True)]


def _names(folders: Sequence[Path]) -> list[str]:
    """The last part of each path, or as many as tell them apart."""
    parts = [folder.resolve().parts for folder in folders]
    for count in range(1, max(map(len, parts)) + 1):
        names = ["/".join(part[-count:]) for part in parts]
        if len(set(names)) == len(names):
            break
    return names


def _read(folder: Path, name: str, watch: Watch) -> Run:
    run = RunFolder(folder)
    if run.metrics.exists():
        files = sorted(run.dialogues(0).parent.glob("step_*.jsonl"))
        played = [Dialogues(int(file.stem.removeprefix("step_")), _slim(file)) for file in watch(files, name)]
        rows = read_metrics(run.metrics)
        if not rows and not played:
            raise ValueError(f"{folder}: its {run.metrics.name} holds no step yet; wait for the first one")
        return Run(name, folder, True, run.config(), rows, {}, played)
    log = folder / DIALOGUES
    if not log.exists():
        raise ValueError(
            f"{folder}: holds neither {run.metrics.name} nor {DIALOGUES}; expected the --workdir of a training run or "
            f"the --out of an evaluation"
        )
    records = [record for file in watch([log], name) for record in _slim(file)]
    if not records:
        raise ValueError(f"{log}: holds no dialogue; expected at least one")
    summary = _object(folder / SUMMARY)
    settings = (summary or _object(folder / PROGRESS)).get("settings", {})
    return Run(name, folder, False, dict(settings), [], summary, [Dialogues(None, records)])


def _object(path: Path) -> dict[str, Any]:
    """A JSON object from a file; empty where there is no file."""
    try:
        return dict(json.loads(path.read_text(encoding="utf-8")))
    except FileNotFoundError:
        return {}
    except (ValueError, TypeError) as error:
        raise ValueError(f"{path}: is no JSON object ({error}); restore it, or evaluate again") from error


def _slim(path: Path) -> list[Record]:
    """A log's records without what only a derivation needs, which is nine tenths of it."""
    return [
        {**record, "messages": [{k: v for k, v in m.items() if not _bulky(k)} for m in record["messages"]]}
        for record in read_dialogues(path, unfinished=True)
    ]


def _bulky(field: str) -> bool:
    return field.endswith(("tokens", "logprobs", "stopped"))


def intention_label(sentence: str) -> str:
    """A short name of a hidden intention: of the eight published ones theirs, of another its first words."""
    known = known_intention(sentence)
    if known:
        return known.key.replace("_", " ")
    words = " ".join(sentence.split())
    return words if len(words) <= 28 else words[:27] + "…"


def intention_labels(records: Iterable[Record]) -> list[str]:
    """The labels that occur: the published ones in their order, then others by name."""
    found = {intention_label(record["hidden_intention"]) for record in records}
    published = [one.key.replace("_", " ") for one in HIDDEN_INTENTIONS]
    return [label for label in published if label in found] + sorted(found - set(published))
