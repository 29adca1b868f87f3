"""Dialogue logs and SAGE's result files (arXiv 2505.02847), one into the other.

SAGE writes one object a profile: the profile, `emo_point` and `emo_state` at the end, and `history`, in which the
user's messages carry `emotion-point`, `thinking` (its considerations) and `planning` (its appraisal). It has no tokens
and no seed: they are null on the way back. It has no format violation and no reward: that becomes RLVER's own,
final emotion / 100. A last reaction without a reply, which it doesn't have either, becomes one with empty content.

RLVER's simulator (arXiv 2507.03112) logs its dialogues alike. They have no `task`: the scene ends with the intention.
Its appraisal has `reason` for SAGE's `TargetCompletion`, and `change` as text; changes may be beyond ten and emotions
below 0. Both are taken as they are logged, and the reward is max(final emotion, 0) / 100. Such a record has the field
`source`.
"""

import contextlib
import re
from collections.abc import Iterator
from typing import Any

from rlver_jax.config.validate import shown
from rlver_jax.dialogues.log import SCRIPT_FIELDS, TOKEN_FIELDS, Record
from rlver_jax.dialogues.numbers import MOST
from rlver_jax.dialogues.trajectory import RLVER
from rlver_jax.profiles.schema import Profile, intention_at_end
from rlver_jax.user.emotion import SAGE

# SAGE's name of each of our scripts' fields; others keep their own names.
PLANNING = {"activity": "activity", "target": "TargetCompletion", "content": "content", "feeling": "analyse"}
_OURS = {theirs: ours for ours, theirs in PLANNING.items()}
_OURS_OF_RLVER = _OURS | {"reason": "target"}
_FAREWELLS = ("再见", "拜拜")  # by which RLVER's loop knows that the user has left
_LINE = re.compile(r"([a-z][a-z0-9_]*): (.*)", re.DOTALL)


def to_sage(record: Record, profile: Profile) -> dict[str, Any]:
    """A dialogue in SAGE's result schema.

    Raises:
        ValueError: the profile is not the dialogue's.
    """
    if profile.id != record["profile"]:
        raise ValueError(f"dialogue of profile {record['profile']!r} given with profile {profile.id!r}; give its own")
    return {
        "id": record["profile"],
        "emo_point": record["emotion"],
        "emo_state": f"Emotion-{SAGE.band_name(record['emotion'])}",
        "target": "eq",
        "player": profile.persona,
        "scene": profile.scene,
        "character": profile.main_character,
        "topic": profile.topic or "",
        "task": record["hidden_intention"],
        "history": [_to_history(message) for message in record["messages"]],
    }


def _to_history(message: Record) -> dict[str, Any]:
    if message["role"] == "assistant":
        think = {} if message["thought"] is None else {"think": message["thought"]}
        return {"role": "assistant", "content": message["content"], **think}
    history = {"role": "user", "content": message["content"] or ""}
    if "appraisal" not in message:
        return history | {"emotion-point": message["emotion"]}
    appraisal = dict(message["appraisal"])
    planning = {theirs: appraisal.pop(ours, "") for ours, theirs in PLANNING.items()}
    return history | {
        "thinking": _thinking(message["considerations"]),
        "emotion-point": message["emotion"],
        "planning": planning | {"change": message["change"]} | appraisal,
    }


def _thinking(considerations: dict[str, str]) -> str:
    if set(considerations) == {"thinking"}:
        return considerations["thinking"]
    return "\n".join(f"{name}: {text}" for name, text in considerations.items() if text)


def from_sage(obj: Any, dialogue: int = 0) -> Record:
    """A dialogue of SAGE's results, or of RLVER's logs, as a record; what they lack is null.

    Its profile is `Profile.from_json(obj)`. `dialogue` becomes the record's number.

    Raises:
        ValueError: the object is neither.
    """
    try:
        return _record(obj, dialogue)
    except ValueError as error:
        raise ValueError(f"not a result of SAGE or a log of RLVER's simulator: {error}") from error


def _record(obj: Any, dialogue: int) -> Record:
    history = obj.get("history") if isinstance(obj, dict) else None
    if not isinstance(history, list) or not history:
        raise ValueError("expected an object with id, emo_point and a history that opens with the user's message")
    rlver = obj.get("task") is None
    intention = intention_at_end(obj.get("scene")) if rlver else obj["task"]
    if intention is None:
        raise ValueError("no field task, nor a scene that ends with the hidden intention")
    messages = [_message(message, index, rlver) for index, message in enumerate(history)]
    emotions = list(_emotions(messages))
    if len(emotions) > 1:
        emotions[-1] = _whole(obj, "emo_point")
    think = any(message.get("thought") is not None for message in messages)
    record = {
        "dialogue": dialogue,
        "profile": obj.get("id"),
        "seed": None,
        "mode": "think" if think else "direct",
        **dict.fromkeys(("language", "style", "scenario", "readout")),
        "initial_emotion": emotions[0],
        "hidden_intention": intention,
        "end_reason": _end_reason(emotions[-1], messages[-1], rlver),
        "turns": len(emotions) - 1,
        "violation": False,
        "reward": max(emotions[-1], 0) / 100,
        "emotion": emotions[-1],
        "emotions": emotions,
        "messages": messages,
    }
    return record | ({"source": RLVER} if rlver else {})


def _whole(obj: dict[str, Any], name: str, where: str = "") -> int:
    """A whole number, also one that is written as text, such as "+5"."""
    value = obj.get(name)
    if isinstance(value, str):
        with contextlib.suppress(ValueError):
            value = int(value)
    if not isinstance(value, int) or isinstance(value, bool) or abs(value) > MOST:
        raise ValueError(f"{where}{name} is {shown(value)}, expected a whole number")
    return value


def _text(obj: dict[str, Any], name: str, where: str) -> str:
    """A text, the empty one where the field is absent or null."""
    value = obj.get(name)
    if value is not None and not isinstance(value, str):
        raise ValueError(f"{where}{name} is {shown(value)}, expected a text")
    return value or ""


def _message(message: Any, index: int, rlver: bool) -> Record:
    where, role = f"history[{index}]", ("user", "assistant")[index % 2]
    if not isinstance(message, dict) or message.get("role") != role:
        raise ValueError(f"{where} is not a message of {role}; user and assistant take turns, and the user opens")
    if not isinstance(message.get("content"), str):
        raise ValueError(f"{where}.content is {shown(message.get('content'))}, expected a text")
    if role == "assistant":
        reply = {"role": "assistant", "thought": message.get("think"), "content": message["content"]}
        return reply | dict.fromkeys((*TOKEN_FIELDS, "stopped")) | {"say_tokens": None, "violation": False}
    emotion = _whole(message, "emotion-point", f"{where}.")
    if index == 0:
        opening = {"role": "user", "content": message["content"], "emotion": emotion}
        return opening | {"tokens": None, "generated": None}
    planning = message.get("planning")
    if not isinstance(planning, dict):
        raise ValueError(f"{where}.planning is {shown(planning)}, expected an object with an appraisal and its change")
    ours = _OURS_OF_RLVER if rlver else _OURS
    appraisal = {
        ours.get(name, name): _text(planning, name, f"{where}.planning.") for name in planning if name != "change"
    }
    return {
        "role": "user",
        "content": message["content"] or None,
        **dict.fromkeys((*TOKEN_FIELDS, "stopped")),
        **dict.fromkeys((*SCRIPT_FIELDS, "all_tokens", "change_logprobs")),
        "appraisal": {name: text for name, text in appraisal.items() if text},
        "change": _whole(planning, "change", f"{where}.planning."),
        "considerations": _considerations(_text(message, "thinking", f"{where}.")),
        "emotion": emotion,
    }


def _considerations(thinking: str) -> dict[str, str]:
    """Ours, where each line names one; else the whole text as one."""
    lines = [_LINE.fullmatch(line) for line in thinking.split("\n")]
    if thinking and all(lines):
        return {line[1]: line[2] for line in lines if line}
    return {"thinking": thinking} if thinking else {}


def _emotions(messages: list[Record]) -> Iterator[int]:
    """The initial emotion and the one after each turn; SAGE doesn't appraise a last reply at the turn limit."""
    emotion = messages[0]["emotion"]
    yield emotion
    for index, message in enumerate(messages):
        if message["role"] == "assistant":
            emotion = messages[index + 1]["emotion"] if index + 1 < len(messages) else emotion
            yield emotion


def _end_reason(emotion: int, last: Record, rlver: bool) -> str:
    if SAGE.outcome(emotion):
        return "success" if SAGE.outcome(emotion) > 0 else "failure"
    if last["role"] == "assistant" or not last["content"]:
        return "turn_limit"
    # RLVER's user answers the last reply too.
    return "turn_limit" if rlver and not any(word in last["content"] for word in _FAREWELLS) else "goodbye"
