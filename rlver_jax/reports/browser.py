"""The dialogues of a page's browser: compressed JSON, as many as the page may weigh.

Compressed and in base 64, what models wrote cannot close the element that it lies in; the page's script unpacks it and
shows it as text only.
"""

import base64
import gzip
import json
from collections.abc import Sequence
from typing import Any, NamedTuple

from rlver_jax.reports.figures import OUTCOMES, outcome
from rlver_jax.reports.sources import Run, intention_label, intention_labels
from rlver_jax.runs.dialogue_log import Record
from rlver_jax.runs.render import plain


class Packed(NamedTuple):
    """Dialogues ready for the page."""

    text: str  # base 64 of gzip of JSON
    kept: int
    all: int


def pack(runs: Sequence[Run], most_bytes: int) -> Packed:
    """Packs the dialogues of all runs in at most `most_bytes` characters.

    Where they don't fit, profiles are left out, evenly over their first appearances: a profile's dialogues stay
    together, so that before and after can be compared.
    """
    everything = [(i, played.step, r) for i, run in enumerate(runs) for played in run.played for r in played.records]
    profiles = list(dict.fromkeys(_who(record) for _, _, record in everything))
    keep = len(profiles)
    while True:
        chosen = {
            name for i, name in enumerate(profiles) if (i + 1) * keep // len(profiles) > i * keep // len(profiles)
        }
        some = [one for one in everything if _who(one[2]) in chosen]
        text = _compressed(_payload(runs, some))
        if len(text) <= most_bytes or keep == 0:
            return Packed(text, len(some), len(everything))
        keep = min(keep - 1, int(keep * most_bytes / len(text) * 0.97))


def _who(record: Record) -> tuple[str, str, str | None]:
    """What tells profiles apart: held-out and training profiles may share their ids."""
    first = record["messages"][0]
    return record["profile"], record["hidden_intention"], None if first["generated"] else first["content"]


def _compressed(value: Any) -> str:
    data = json.dumps(value, ensure_ascii=False, separators=(",", ":")).encode("utf-8")
    return base64.b64encode(gzip.compress(data, 9, mtime=0)).decode("ascii")


def _payload(runs: Sequence[Run], some: Sequence[tuple[int, int | None, Record]]) -> dict[str, Any]:
    labels = intention_labels(record for _, _, record in some)
    people = {who: number for number, who in enumerate(dict.fromkeys(_who(record) for _, _, record in some))}
    return {
        "runs": [plain(run.name) for run in runs],
        "intentions": [plain(label) for label in labels],
        "outcomes": OUTCOMES,
        "dialogues": [
            {
                "run": run,
                "step": step,
                "number": record["dialogue"],
                "profile": plain(record["profile"]),
                "who": people[_who(record)],
                "intention": labels.index(intention_label(record["hidden_intention"])),
                "hidden": plain(record["hidden_intention"]),
                "outcome": OUTCOMES.index(outcome(record["emotion"])),
                "end": record["end_reason"],
                "reward": round(record["reward"], 4),
                "emotions": record["emotions"],
                "messages": [_message(message) for message in record["messages"]],
            }
            for run, step, record in some
        ],
    }


def _message(message: Record) -> dict[str, Any]:
    """What the page shows of a message: a reply has `say`, the user's words are `user`."""
    if message["role"] == "assistant":
        shown = {"thought": message["thought"], "say": message["content"], "violation": message["violation"]}
        return _present(shown)
    spoke = message["content"] is not None  # else its considerations are of a reply that there was no need for
    return _present(
        {
            "user": message["content"] or "",
            "emotion": message["emotion"],
            "change": message.get("change"),
            "appraisal": _notes(message.get("appraisal")),
            "considered": _notes(message.get("considerations") if spoke else None),
        }
    )


def _notes(fields: dict[str, Any] | None) -> list[list[str]] | None:
    return [[plain(name), plain(str(text))] for name, text in fields.items()] if fields else None


def _present(fields: dict[str, Any]) -> dict[str, Any]:
    """Without what is null; texts as text."""
    return {k: plain(v) if isinstance(v, str) else v for k, v in fields.items() if v is not None}
