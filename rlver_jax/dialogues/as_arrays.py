"""Dialogues that were played by text, as the sampler's arrays: learning is the same, whoever the user was."""

import dataclasses
from collections.abc import Sequence
from typing import Any

import numpy as np

from rlver_jax.decoding.generate import Generated
from rlver_jax.dialogues.log import ALL_END_REASONS, UNANSWERED
from rlver_jax.dialogues.turn_by_turn import Row
from rlver_jax.rollout.policy_turn import PolicyTurn
from rlver_jax.rollout.profile_tokens import WIDTH_STEP
from rlver_jax.rollout.sampler import Dialogues
from rlver_jax.rollout.spec import RolloutConfig
from rlver_jax.text.padding import longest, pad_rows, round_up
from rlver_jax.text.tokenizer import Tokenizer
from rlver_jax.user.emotion import CHANGES
from rlver_jax.user.turn import UserTurn

END_NAMES = (*ALL_END_REASONS, UNANSWERED)  # by the numbers of `Dialogues.end_reason`


def is_left_out(row: Row) -> bool:
    """Whether nothing is learned from a dialogue, because its user stayed unanswered."""
    return row.end == UNANSWERED


def dialogues_of(
    rows: Sequence[Row], log: PolicyTurn | None, spec: RolloutConfig, tokenizer: Tokenizer, system_tokens: int
) -> Dialogues:
    """Finished rows, as `sampler.sample_dialogues` returns dialogues; NumPy arrays.

    Users' words are in the policy's tokens, as it has read them; what only a user on the device has is 0. A dialogue
    that is left out has no turns.

    Args:
        rows: of all slots, in their order.
        log: what `device_agents.TextPolicy` has kept of the policy's replies; None: it never spoke.
        system_tokens: of the policy's system prompt.
    """
    count, turns = len(rows), spec.max_turns
    log = _no_replies(count, spec) if log is None else log
    played = [0 if is_left_out(row) else row.turns for row in rows]
    at = np.arange(turns)[:, None] < np.array(played)
    emotions = np.array([_emotions(row, turns) for row in rows], np.int32)
    reactions = [row.messages[2::2] for row in rows]
    appraised = at & (np.arange(turns)[:, None] < np.array([len(one) for one in reactions]))
    first, first_count = _words([row.aloud[:1] for row in rows], 1, spec, tokenizer)
    arrays: dict[str, Any] = {
        "turns": np.array(played, np.int32),
        "end_reason": np.array([END_NAMES.index(row.end) for row in rows], np.int32),
        "violation": np.array([row.violation for row in rows]),
        "emotions": emotions,
        "first_talk": first[0],
        "first_count": first_count[0],
        "policy": log,
        "user": _user_turns(reactions, emotions, spec, tokenizer),
        "appraised": appraised,
        "prefix_tokens": np.int32(system_tokens),
        "row_turns": np.int32(1),  # rows are no measure here
        "row_steps": np.int32(1),
    }
    return Dialogues(**arrays)


def _emotions(row: Row, turns: int) -> list[int]:
    known = row.emotions[:1] if is_left_out(row) else row.emotions
    return known + known[-1:] * (turns + 1 - len(known))


def _words(
    texts: Sequence[Sequence[str]], turns: int, spec: RolloutConfig, tokenizer: Tokenizer
) -> tuple[np.ndarray, np.ndarray]:
    """(tokens [T, B, W], their numbers [T, B]) of each row's texts, none where it has fewer."""
    tokens = [[tokenizer.encode(text) for text in row] for row in texts]
    width = max(spec.user_tokens, round_up(max([1, *map(longest, tokens)]), WIDTH_STEP))
    padded = [pad_rows([*row, *[()] * (turns - len(row))], width) for row in tokens]
    return np.stack([x for x, _ in padded], axis=1), np.stack([n for _, n in padded], axis=1)


def _user_turns(reactions: Sequence[Sequence], emotions: np.ndarray, spec: RolloutConfig, tokenizer) -> UserTurn:
    turns, count = spec.max_turns, len(reactions)
    replies, reply_count = _words([[m["content"] or "" for m in row] for row in reactions], turns, spec, tokenizer)
    change = np.zeros((turns, count), np.int32)
    for row, messages in enumerate(reactions):
        change[: len(messages), row] = [message["change"] for message in messages]
    none = np.zeros((turns, count), np.int32)
    silence = _silence(turns, 1, count, replies.shape[2])
    arrays: dict[str, Any] = {
        "appraisal": _silence(turns, 1, count, 1),
        "change_logprobs": np.zeros((turns, count, len(CHANGES)), np.float32),
        "change": change,
        "emotion": emotions[:, 1:].T,
        "reply": dataclasses.replace(silence, tokens=replies[:, None], count=reply_count[:, None]),  # type: ignore[arg-type]
        "goodbye": none > 0,
        "prefilled": none,
    }
    return UserTurn(**arrays)


def _silence(*shape: int) -> Generated:
    """Generations, [*shape] with the last axis in tokens, in which nothing is said."""
    zeros, none = np.zeros(shape, np.float32), np.zeros(shape[:-1], np.int32)
    return Generated(np.zeros(shape, np.int32), none, zeros, zeros, none - 1, none > 0)  # type: ignore[arg-type]


def _no_replies(count: int, spec: RolloutConfig) -> PolicyTurn:
    turns, none = spec.max_turns, np.zeros((spec.max_turns, count), np.int32)
    say = np.zeros((turns, count, spec.say_tokens), np.int32)
    return PolicyTurn(_silence(turns, count, spec.policy_tokens), say, none, none > 0, none)  # type: ignore[arg-type]
