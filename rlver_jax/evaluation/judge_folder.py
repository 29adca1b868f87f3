"""Results that come slowly, on disk as they come: an interrupted judgement resumes."""

import hashlib
import json
import logging
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

from rlver_jax.evaluation.folder import PATHS
from rlver_jax.evaluation.transcripts import Transcript
from rlver_jax.runs.files import write_json
from rlver_jax.runs.settings import check_same, without_secrets

_log = logging.getLogger(__name__)
Line = dict[str, Any]


class WorkFile:
    """`NAME.jsonl`, an object for each dialogue, with `NAME.settings.json`, what they depend on, beside it.

    Without a folder nothing is kept.
    """

    def __init__(self, folder: Path | None, name: str, settings: dict[str, Any], dialogues: Sequence[Transcript]):
        """Takes up what an earlier process left with the same settings and dialogues.

        Raises:
            ValueError: the file was made with others.
        """
        self.path = None if folder is None else folder / f"{name}.jsonl"
        self.done: dict[int, Line] = {}  # by index of the dialogue
        if self.path is None:
            return
        self.path.parent.mkdir(parents=True, exist_ok=True)
        settings = json.loads(json.dumps(settings | {"fingerprint.dialogues": dialogues_fingerprint(dialogues)}))
        noted = self.path.with_suffix(".settings.json")
        if noted.exists():
            check_same(
                self.path,
                without_secrets(json.loads(noted.read_text(encoding="utf-8"))),
                settings,
                PATHS.__contains__,
                fault="was made with other settings",
                remedy="name another --out, or remove it",
                report=_log.warning,
            )
            self.done = self._read(len(dialogues))
        else:
            write_json(noted, settings)

    def _read(self, count: int) -> dict[int, Line]:
        assert self.path is not None
        if not self.path.exists():
            return {}
        data = self.path.read_bytes()
        whole = data[: data.rfind(b"\n") + 1]  # an interrupted process may have left half a line
        if len(whole) < len(data):
            self.path.write_bytes(whole)
        try:
            lines = [json.loads(line) for line in whole.decode("utf-8").split("\n") if line]
            return {line["index"]: line for line in lines if line["index"] < count}
        except (ValueError, KeyError, TypeError) as error:
            raise ValueError(
                f"{self.path}: is no work of a judge ({error}); remove it, or name another --out"
            ) from None

    def add(self, lines: Sequence[Line]) -> None:
        """Keeps results; each has the `index` of its dialogue."""
        self.done |= {line["index"]: line for line in lines}
        if self.path is not None:
            with self.path.open("a", encoding="utf-8") as file:
                file.writelines(json.dumps(line, ensure_ascii=False, separators=(",", ":")) + "\n" for line in lines)


def dialogues_fingerprint(dialogues: Iterable[Transcript]) -> str:
    """Of dialogues and profiles, without the measures that a judge may have added."""
    fingerprint = Fingerprint()
    for one in dialogues:
        fingerprint.add(one)
    return fingerprint.text


class Fingerprint:
    """`dialogues_fingerprint`, from one dialogue after another."""

    def __init__(self) -> None:
        """Of none."""
        self._digest = hashlib.sha256()

    def add(self, one: Transcript) -> None:
        """Takes the next dialogue in."""
        record = {name: value for name, value in one.record.items() if name != "measures"}
        profile = one.profile.to_json() if one.profile else None
        self._digest.update(json.dumps([record, profile], sort_keys=True).encode())

    @property
    def text(self) -> str:
        """16 hexadecimal digits."""
        return self._digest.hexdigest()[:16]
