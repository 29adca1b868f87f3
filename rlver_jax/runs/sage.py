"""Dialogue logs and SAGE's result files (arXiv 2505.02847), one into the other.

SAGE writes one object a profile: the profile, `emo_point` and `emo_state` at the end, and `history`, in which the
user's messages carry `emotion-point`, `thinking` (its considerations) and `planning` (its appraisal). It has no tokens
and no seed: they are null on the way back. It doesn't tell a format violation, nor a reward: that becomes RLVER's own,
final emotion / 100. A last reaction without a reply, which it doesn't have either, becomes one with empty content.
"""

import re
from collections.abc import Iterator
from typing import Any

from rlver_jax.profiles.schema import Profile
from rlver_jax.runs.dialogue_log import SCRIPT_FIELDS, Record
from rlver_jax.user.emotion import SAGE

# SAGE's name of each of our scripts' fields; others keep their own names.
PLANNING = {"activity": "activity", "target": "TargetCompletion", "content": "content", "feeling": "analyse"}
_OURS = {theirs: ours for ours, theirs in PLANNING.items()}
_LINE = re.compile(r"([a-z][a-z0-9_]*): (.*)", re.DOTALL)
_UNKNOWN = ("tokens", "logprobs", "raw_logprobs")


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


def from_sage(obj: dict[str, Any], dialogue: int = 0) -> Record:
    """A dialogue of SAGE's results as a record; what SAGE doesn't say is null.

    Its profile is `Profile.from_json(obj)`. `dialogue` becomes the record's number.

    Raises:
        ValueError: the object is not one of SAGE's results.
    """
    try:
        return _from_sage(obj, dialogue)
    except (KeyError, TypeError, IndexError, AttributeError) as error:
        raise ValueError(
            f"not a result of SAGE ({type(error).__name__}: {error}); expected an object with id, task, emo_point "
            f"and a history that opens with the user's message and its emotion-point"
        ) from error


def _from_sage(obj: dict[str, Any], dialogue: int) -> Record:
    history = obj["history"]
    messages = [_opening(history[0]), *(_from_history(message) for message in history[1:])]
    emotions = list(_emotions(messages))
    if len(emotions) > 1:
        emotions[-1] = obj["emo_point"]
    think = any("think" in message for message in history)
    return {
        "dialogue": dialogue,
        "profile": obj["id"],
        "seed": None,
        "mode": "think" if think else "direct",
        **dict.fromkeys(("language", "style", "scenario", "readout")),
        "initial_emotion": emotions[0],
        "hidden_intention": obj["task"],
        "end_reason": _end_reason(emotions[-1], history[-1]),
        "turns": len(emotions) - 1,
        "violation": False,
        "reward": emotions[-1] / 100,
        "emotion": emotions[-1],
        "emotions": emotions,
        "messages": messages,
    }


def _opening(message: dict[str, Any]) -> Record:
    known = {"role": "user", "content": message["content"], "emotion": message["emotion-point"]}
    return known | {"tokens": None, "generated": None}


def _from_history(message: dict[str, Any]) -> Record:
    unknown = dict.fromkeys((*_UNKNOWN, "stopped"))
    if message["role"] == "assistant":
        said = {"role": "assistant", "thought": message.get("think"), "content": message["content"]}
        return said | unknown | {"say_tokens": None, "violation": False}
    planning = dict(message["planning"])
    change = planning.pop("change")
    return {
        "role": "user",
        "content": message["content"] or None,
        **unknown,
        **dict.fromkeys((*SCRIPT_FIELDS, "all_tokens", "change_logprobs")),
        "appraisal": {_OURS.get(name, name): text for name, text in planning.items() if text},
        "change": change,
        "considerations": _considerations(message.get("thinking") or ""),
        "emotion": message["emotion-point"],
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


def _end_reason(emotion: int, last: dict[str, Any]) -> str:
    if SAGE.outcome(emotion):
        return "success" if SAGE.outcome(emotion) > 0 else "failure"
    return "turn_limit" if last["role"] == "assistant" or not last["content"] else "goodbye"
