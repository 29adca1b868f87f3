"""The folder of an evaluation: what has been played, with which settings, so that it can be taken up again.

`progress.json` is written right before the first dialogues, `dialogues.jsonl` grows by a batch at a time,
`summary.json` comes last.
"""

import dataclasses
import hashlib
import json
import os
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

import jax
from ml_collections import ConfigDict

from rlver_jax.config import endpoint_sides, flatten
from rlver_jax.config_fields import PATHS as CONFIG_PATHS
from rlver_jax.hub import local_folder
from rlver_jax.parallel import distributed
from rlver_jax.paths import check_folder_to_write
from rlver_jax.profiles.schema import Profile
from rlver_jax.runs.dialogue_log import DialogueLogError, Record, read_dialogues, write_dialogues
from rlver_jax.runs.files import write_json
from rlver_jax.runs.logged import Logged
from rlver_jax.user.prompts import load_prompts

PROGRESS, DIALOGUES, SUMMARY = "progress.json", "dialogues.jsonl", "summary.json"
# Sections whose fields decide a score, and the fields in them that don't.
_SECTIONS = ("policy", "user", "data", "rollout", "emotion", "reward", "eval")
_WITHOUT_EFFECT = (
    *("policy.remat", "data.seed", "rollout.batch", "rollout.group", "rollout.max_turns", "rollout.temperature"),
    *("emotion.initial", "eval.batch", "eval.every", "rollout.rows", "eval.rows"),
)
# Where things lie; what lies there is told by fingerprints, so that a moved model is still the same.
PATHS = (*CONFIG_PATHS, "remote.policy.url", "remote.user.url")
# What of a side's fields still matters where its model is behind an endpoint, and the endpoint's fields that matter.
_OF_DEVICE = (
    *("path", "init", "dtype", "param_dtype", "scan_layers", "attention", "attention_chunk"),
    *("readout", "enforce_format"),
)
_OF_ENDPOINT = ("url", "model", "extra")
_SAMPLES, _SAMPLE_BYTES = 64, 65_536


@dataclasses.dataclass
class EvaluationFolder:
    """An evaluation's files; `records` are the dialogues that it held when it was opened."""

    path: Path
    settings: dict[str, Any]
    records: list[Record]
    played: list[dict[str, Any]]  # a batch each: dialogues, and what they cost (`evaluation.Batch`)

    @classmethod
    def open(cls, path: str | os.PathLike[str], settings: dict[str, Any], repeats: int = 1) -> "EvaluationFolder":
        """Makes the folder, or takes up what an evaluation with the same settings left there.

        Of several processes, which all call it, the first one alone reads and writes the files.

        Args:
            repeats: of every profile; may be more than the folder was made with.

        Raises:
            ValueError: the folder holds an evaluation with other settings or more repeats, or dialogues of another
                origin; or processes were given different settings.
        """
        settings = json.loads(json.dumps(settings))  # tuples become lists, as in the file
        distributed.check_same("the settings", {n: value for n, value in settings.items() if n not in PATHS})
        found = distributed.from_main(lambda: _taken_up(Path(path), settings, repeats))
        return cls(Path(path), settings, **found)

    def add(self, records: Sequence[Record], costs: dict[str, float]) -> None:
        """Appends a batch's dialogues, and notes what they cost."""
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
        log = self.path / DIALOGUES
        if read_dialogues(log) != list(records):
            write_dialogues(log, records)
        write_json(self.path / SUMMARY, summary)

    def _save(self) -> None:
        if distributed.is_main():
            write_json(self.path / PROGRESS, {"settings": self.settings, "played": self.played})


def _taken_up(path: Path, settings: dict[str, Any], repeats: int) -> dict[str, Any]:
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
    found = _read_progress(progress)
    _check_same(path, found["settings"], settings)
    log = path / DIALOGUES
    records = read_dialogues(log, unfinished=True) if log.exists() else []
    _check_records(log, records, settings["eval.num_profiles"] * repeats)
    return {"records": records, "played": found["played"]}


def read_evaluation(path: str | os.PathLike[str]) -> tuple[dict[str, Any], Sequence[Record]]:
    """(summary, dialogues) of a finished evaluation; the dialogues are checked now, and read again when asked for.

    Raises:
        ValueError: the folder holds none.
    """
    path = Path(path)
    try:
        return json.loads((path / SUMMARY).read_text(encoding="utf-8")), Logged(path / DIALOGUES)
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
    return flat | weights | {"fingerprint.texts": texts_fingerprint(config, profiles)}


def at_endpoint(flat: dict[str, Any], config: ConfigDict, side: str) -> dict[str, Any]:
    """Settings of a side whose model is behind an endpoint, in place of those that matter on the device only."""
    kept = {name: value for name, value in flat.items() if name not in {f"{side}.{field}" for field in _OF_DEVICE}}
    named = {f"remote.{side}.{name}": config.remote[side][name] for name in _OF_ENDPOINT}
    return kept | named | {"remote.asks": config.remote.asks}


def texts_fingerprint(config: ConfigDict, profiles: Sequence[Profile]) -> str:
    """Of all prompts as the models read them, and of the profiles in their order."""
    prompts = load_prompts(config.data.language, config.user.prompts or None)
    how = {"style": config.user.style, "scenario": config.user.scenario}
    texts = [prompts.policy_system(config.policy.mode), prompts.opening, repr(prompts.appraisal), repr(prompts.reply)]
    if config.remote.user.url:
        texts += [prompts.form("", say=""), *(prompts.form("", missing=missing) for missing in ("change", "reply"))]
    for p in profiles:
        texts += [p.id, p.first_talk or "", prompts.user_system(p.persona, p.background, p.hidden_intention, **how)]
    return _digest(json.dumps(texts).encode())


def model_fingerprint(config: ConfigDict, name: str) -> str:
    """Of a model's config, tokenizer and weights: of these 64 evenly spread pieces of each file, which is quick.

    Args:
        config: `config.policy` or `config.user`; with init="random" there may be no weights.

    Raises:
        ValueError: no folder is named, or it holds no model.
    """
    folder = config.path
    if not folder:
        raise ValueError(f"{name}.path is empty; set --config.{name}.path to a Hugging Face folder of a Qwen2.5 model")
    held = local_folder(folder, weights=config.init != "random")
    files = sorted(file for kind in ("*.safetensors", "*.model", "*.json") for file in held.glob(kind))
    if config.init == "random":
        files = [file for file in files if file.suffix != ".safetensors"]
    elif not any(file.suffix == ".safetensors" for file in files):
        raise ValueError(f"{name}.path={folder!r} holds no *.safetensors; expected a Hugging Face folder of a model")
    return _digest(*(piece for file in files for piece in (file.name.encode(), *_pieces(file))))


def _pieces(file: Path) -> Iterable[bytes]:
    size = file.stat().st_size
    yield str(size).encode()
    with file.open("rb") as stream:
        if size <= _SAMPLES * _SAMPLE_BYTES:
            yield stream.read()
            return
        for i in range(_SAMPLES):
            stream.seek((size - _SAMPLE_BYTES) * i // (_SAMPLES - 1))
            yield stream.read(_SAMPLE_BYTES)


def _digest(*pieces: bytes) -> str:
    digest = hashlib.sha256()
    for piece in pieces:
        digest.update(len(piece).to_bytes(8, "big") + piece)
    return digest.hexdigest()[:16]


def _check_same(path: Path, found: dict[str, Any], settings: dict[str, Any]) -> None:
    names = [name for name in {**found, **settings} if name not in PATHS and found.get(name) != settings.get(name)]
    if names:
        shown = "; ".join(f"{name} was {found.get(name)!r}, is {settings.get(name)!r}" for name in names[:5])
        more = f"; and {len(names) - 5} more" if len(names) > 5 else ""
        raise ValueError(
            f"{path}: holds an evaluation with other settings ({shown}{more}); name another --out, or give the same "
            f"settings to go on with it"
        )


def _check_records(log: Path, records: Sequence[Record], count: int) -> None:
    numbers = [record["dialogue"] for record in records]
    if len(set(numbers)) < len(numbers) or not all(0 <= number < count for number in numbers):
        raise DialogueLogError(
            f"{log}: dialogues {numbers[:10]} with a number twice or outside 0..{count - 1}, so the file is not this "
            f"evaluation's alone, or of more --repeats; restore it, or name another --out"
        )


def _read_progress(path: Path) -> dict[str, Any]:
    try:
        found = json.loads(path.read_text(encoding="utf-8"))
        return {"settings": dict(found["settings"]), "played": list(found["played"])}
    except (ValueError, KeyError, TypeError) as error:
        raise ValueError(f"{path}: is no progress of an evaluation ({error}); name another --out") from None
