"""Short made-up dialogues, on which functions of a user's own are tried before anything is compiled.

The first ends in a goodbye of the user; the second breaks the think format, so that no reaction follows its last reply;
the third ends at the turn limit, where the user says nothing more.
"""

from typing import Any

from rlver_jax.dialogues.log import REACTION_FIELDS, Record
from rlver_jax.profiles.schema import Profile
from rlver_jax.user.emotion import CHANGES

_PROFILE = Profile("sample", "You are a nurse of 34.", "The shift was long.", "listening", "tired", first_talk="Hello.")


def sample_dialogues() -> list[tuple[Record, Profile]]:
    """Dialogues as a log has them, each with its profile."""
    goodbye = [_reply("You stayed when others left."), _reaction("Thank you, goodbye.", 6, 40)]
    broken = [_reply("", violation=True)]
    silent = [_reply("You stayed when others left."), _reaction(None, 6, 40)]
    return [
        (_record([*_begin(), *goodbye], [30, 34, 40], "goodbye"), _PROFILE),
        (_record([*_begin(), *broken], [30, 34, 34], "format", violation=True), _PROFILE),
        (_record([*_begin(), *silent], [30, 34, 40], "turn_limit"), _PROFILE),
    ]


def _begin() -> list[Record]:
    first = {"role": "user", "content": "Hello.", "tokens": [5, 6], "emotion": 30, "generated": False}
    return [first, _reply("Tell me more."), _reaction("It was too much today.", 4, 34)]


def _record(messages: list[Record], emotions: list[int], end: str, *, violation: bool = False) -> Record:
    return {
        "dialogue": 0,
        "profile": _PROFILE.id,
        "seed": 0,
        "mode": "think",
        "language": "en",
        "style": "vanilla",
        "scenario": "heart_to_heart",
        "readout": "argmax",
        "initial_emotion": emotions[0],
        "hidden_intention": _PROFILE.hidden_intention,
        "end_reason": end,
        "turns": len(emotions) - 1,
        "violation": violation,
        "reward": 0.0 if violation else emotions[-1] / 100,
        "emotion": emotions[-1],
        "emotions": emotions,
        "messages": messages,
    }


def _reply(content: str, *, violation: bool = False) -> Record:
    tokens = {"tokens": [7, 8, 9], "say_tokens": [8], "logprobs": [-1.0] * 3, "raw_logprobs": [-1.0] * 3}
    message = {"role": "assistant", "thought": "She is tired.", "content": content, **tokens}
    return message | {"stopped": True, "violation": violation}


def _reaction(content: str | None, change: int, emotion: int) -> Record:
    """`content`: what the user says; None: nothing, and considers nothing."""
    fields: dict[str, Any] = {name: {} for name in REACTION_FIELDS}
    numbers = {"tokens": [5], "all_tokens": [5, 4], "logprobs": [-1.0] * 2, "raw_logprobs": [-1.0] * 2}
    numbers = numbers if content else {name: [] for name in numbers}
    told = {"appraisal": {"content": "It asks."}, "considerations": {"tone": "open"} if content else {}}
    message = {"role": "user", "content": content, "change": change, "emotion": emotion, **told}
    return message | fields | numbers | {"stopped": content is not None, "change_logprobs": [-3.0] * len(CHANGES)}
