"""The folder of an evaluation: what has been played, with which settings, so that it can be resumed.

`progress.json` is written right before the first dialogues, `dialogues.jsonl` grows by a batch at a time,
`summary.json` comes last.
"""

import dataclasses
import json
import logging
import os
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import jax
from ml_collections import ConfigDict

from rlver_jax.config.fields import PATHS as CONFIG_PATHS
from rlver_jax.config.paths import check_folder_to_write
from rlver_jax.config.validate import endpoint_sides, flatten
from rlver_jax.dialogues.log import DialogueLogError, Record, read_dialogues, write_dialogues
from rlver_jax.dialogues.logged import DialogueLog
from rlver_jax.dialogues.own_functions import OwnFunctions
from rlver_jax.parallel import distributed
from rlver_jax.profiles.schema import Profile
from rlver_jax.runs.files import write_json
from rlver_jax.runs.fingerprints import model_fingerprint, texts_fingerprint
from rlver_jax.runs.settings import check_same, without_secrets

PROGRESS, DIALOGUES, SUMMARY = "progress.json", "dialogues.jsonl", "summary.json"
# Sections whose fields decide a score, and the fields in them that don't.
_SECTIONS = ("policy", "user", "data", "rollout", "emotion", "reward", "eval")
_WITHOUT_EFFECT = (
    *("policy.remat", "data.seed", "rollout.batch", "rollout.group", "rollout.max_turns", "rollout.temperature"),
    *("emotion.initial", "eval.batch", "eval.every", "rollout.rows", "eval.rows", "eval.relationship"),
    *("rollout.param_dtype", "rollout.overlap"),  # of training alone
)
# Where things lie; fingerprints tell what lies there, so that a moved model is still the same.
PATHS = (*CONFIG_PATHS, "remote.policy.url", "remote.user.url")
# What of a side's fields still matters where its model is behind an endpoint, and the endpoint's fields that matter.
_OF_DEVICE = (
    *("path", "adapter", "init", "dtype", "param_dtype", "scan_layers", "attention", "attention_chunk"),
    *("readout", "enforce_format"),
)
_OF_ENDPOINT = ("url", "model", "extra")
_log = logging.getLogger(__name__)


@dataclasses.dataclass
class EvaluationFolder:
    """An evaluation's files; `records` are the dialogues that it held when it was opened."""

    path: Path
    settings: dict[str, Any]
    records: list[Record]
    played: list[dict[str, Any]]  # a batch each: dialogues, and what they cost (`evaluation.Batch`)
    check: Callable[[], None] = lambda: None  # called before anything is written; `Lock.check` of who evaluates here

    @classmethod
    def open(
        cls,
        path: str | os.PathLike[str],
        settings: dict[str, Any],
        repeats: int = 1,
        *,
        check: Callable[[], None] = lambda: None,
        report: Callable[[str], None] = _log.warning,
    ) -> "EvaluationFolder":
        """Makes the folder, or resumes an evaluation with the same settings.

        Of several processes, which all call it, the first one alone reads and writes the files.

        Args:
            repeats: of every profile; may be more than the folder was made with.
            check: the folder's own.
            report: prints what an older version did not write down, and what is taken for it.

        Raises:
            ValueError: the folder holds an evaluation with other settings or more repeats, or dialogues of another
                origin; or processes have different settings.
        """
        settings = json.loads(json.dumps(settings))  # tuples become lists, as in the file
        distributed.check_same("the settings", {n: value for n, value in settings.items() if n not in PATHS})
        held = distributed.from_main(lambda: _resume(Path(path), settings, repeats, report))
        return cls(Path(path), settings, **held, check=check)

    def add(self, records: Sequence[Record], costs: dict[str, float]) -> None:
        """Appends a batch's dialogues, and notes what they cost."""
        self.check()
        if not self.played:
            self._save()  # no dialogue may stand here without what it was made with
        if distributed.is_main():
            write_dialogues(self.path / DIALOGUES, records, append=True)
        self.played.append({"dialogues": [record["dialogue"] for record in records], **costs})
        self._save()

    def spent(self, what: str) -> float:
        """Sum of a cost over the batches, those of interrupted evaluations included; 0 where none has it."""
        return sum(batch.get(what, 0) for batch in self.played)

    def finish(self, records: Sequence[Record], summary: dict[str, Any]) -> None:
        """Puts the dialogues in order, with what judges have added to them, and writes the summary."""
        if not distributed.is_main():
            return
        self.check()
        log = self.path / DIALOGUES
        if read_dialogues(log) != list(records):
            write_dialogues(log, records)
        write_json(self.path / SUMMARY, summary)

    def _save(self) -> None:
        if distributed.is_main():
            write_json(self.path / PROGRESS, {"settings": self.settings, "played": self.played})


def _resume(path: Path, settings: dict[str, Any], repeats: int, report: Callable[[str], None]) -> dict[str, Any]:
    """The dialogues that the folder holds, and how they were played; see `EvaluationFolder.open`."""
    check_folder_to_write(path)
    path.mkdir(parents=True, exist_ok=True)
    progress = path / PROGRESS
    if not progress.exists():
        strangers = [name for name in (DIALOGUES, SUMMARY) if (path / name).exists()]
        if strangers:
            raise ValueError(
                f"{path}: holds {' and '.join(strangers)} but no {PROGRESS}, so what they were made with is "
                f"unknown; name another --out, or move them away"
            )
        return {"records": [], "played": []}
    noted = _read_progress(progress)
    check_same(
        path,
        without_secrets(noted["settings"]),
        settings,
        PATHS.__contains__,
        fault="holds an evaluation with other settings",
        remedy="name another --out, or give the same settings to resume it",
        report=report,
    )
    log = path / DIALOGUES
    records = read_dialogues(log, unfinished=True) if log.exists() else []
    _check_records(log, records, settings["eval.num_profiles"] * repeats)
    return {"records": records, "played": noted["played"]}


def read_evaluation(path: str | os.PathLike[str]) -> tuple[dict[str, Any], Sequence[Record]]:
    """(summary, dialogues) of a finished evaluation; the dialogues are checked now, and read again when asked for.

    Raises:
        ValueError: the folder holds none.
    """
    path = Path(path)
    try:
        return json.loads((path / SUMMARY).read_text(encoding="utf-8")), DialogueLog(path / DIALOGUES)
    except OSError as error:
        raise ValueError(f"{path}: holds no finished evaluation ({error}); name the --out of one") from error


def settings_of(config: ConfigDict, profiles: Sequence[Profile], checkpoint: str | None = None) -> dict[str, Any]:
    """Everything that a score depends on: fields of the config, and fingerprints of weights, prompts and profiles.

    Args:
        checkpoint: fingerprint of the checkpoint that the policy's weights come from, if not from policy.path.

    Raises:
        ValueError, OSError: prompts or profiles that cannot be used, or a model's folder without files.
    """
    flat = {name: value for name, value in flatten(config).items() if name.split(".")[0] in _SECTIONS}
    for name in _WITHOUT_EFFECT:
        flat.pop(name, None)
    flat["eval.num_profiles"] = len(profiles)
    remote = endpoint_sides(config)
    for side in remote:
        flat = at_endpoint(flat, config, side)
    flat |= {"backend": jax.default_backend()} if len(remote) < 2 else {}
    weights = {
        f"fingerprint.{side}": (side == "policy" and checkpoint) or model_fingerprint(config[side], side)
        for side in ("policy", "user")
        if side not in remote
    }
    own = {f"fingerprint.{name}": source for name, source in OwnFunctions.of(config).sources().items()}
    return flat | weights | own | {"fingerprint.texts": texts_fingerprint(config, profiles)}


def at_endpoint(flat: dict[str, Any], config: ConfigDict, side: str) -> dict[str, Any]:
    """Settings of a side whose model is behind an endpoint, in place of those that matter on the device only."""
    settings = {name: value for name, value in flat.items() if name not in {f"{side}.{field}" for field in _OF_DEVICE}}
    named = {f"remote.{side}.{name}": config.remote[side][name] for name in _OF_ENDPOINT}
    named = without_secrets(named, [os.environ.get(config.remote[side].key_env, "")])
    return settings | named | {"remote.asks": config.remote.asks}


def _check_records(log: Path, records: Sequence[Record], count: int) -> None:
    numbers = [record["dialogue"] for record in records]
    if len(set(numbers)) < len(numbers) or not all(0 <= number < count for number in numbers):
        raise DialogueLogError(
            f"{log}: dialogues {numbers[:10]} with a number twice or outside 0..{count - 1}, so the file is not this "
            f"evaluation's alone, or of more --repeats; restore it, or name another --out"
        )


def _read_progress(path: Path) -> dict[str, Any]:
    try:
        noted = json.loads(path.read_text(encoding="utf-8"))
        return {"settings": dict(noted["settings"]), "played": list(noted["played"])}
    except (ValueError, KeyError, TypeError) as error:
        raise ValueError(f"{path}: is no progress of an evaluation ({error}); name another --out") from None
