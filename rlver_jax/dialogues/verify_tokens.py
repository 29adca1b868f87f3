"""Holds logged tokens and their log-probabilities against a derivation (`sampling.replay`), for either side."""

import dataclasses
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import NamedTuple, Protocol

import numpy as np

from rlver_jax.decoding.replay_sequence import DRAWN, OPENING, Query, ReplaySequence
from rlver_jax.dialogues.trajectory import Message
from rlver_jax.rollout.agents import Agents


class Allowed(NamedTuple):
    """How far rounding may move what many steps have computed from what one pass computes, in nats."""

    tie: float  # of two candidates against each other
    logprob: float


# By the model's dtype. What bfloat16 moves has no bound; docs/training.md says what an accelerator was seen to.
ALLOWED = {"float32": Allowed(1e-4, 1e-3), "bfloat16": Allowed(0.5, 1.0)}


class Derived(Protocol):
    """What is read of a derivation; see `sampling.replay.Replayed`."""

    @property
    def margin(self) -> np.ndarray:
        """[Q]."""

    @property
    def logprob(self) -> np.ndarray:
        """[Q]."""

    @property
    def sampled(self) -> np.ndarray:
        """[Q, 2]."""


class Claim(NamedTuple):
    """What a log says of one token; None: it says nothing."""

    logprob: float | None  # of the model itself
    sampled: float | None = None  # of the distribution really sampled


@dataclasses.dataclass
class Found:
    """What was found in one dialogue."""

    tokens: int = 0
    moved: float = 0.0  # the largest difference of a token's log-probability to the log's, in nats
    ties: list[str] = dataclasses.field(default_factory=list)
    faults: list[str] = dataclasses.field(default_factory=list)


class Speaker(NamedTuple):
    """Whose tokens they are.

    Attributes:
        name: for messages.
        fields: names of the turn's generations, by `Query.field`.
        temperature: of what was drawn; 0: greedy.
        allowed: for the model's dtype.
    """

    name: str
    fields: Sequence[str]
    temperature: float
    allowed: Allowed


def hold(speaker: Speaker, packed: ReplaySequence, derived: Derived, claim: Callable[[Query], Claim]) -> Found:
    """Every generated token is the side's own choice, with the log-probabilities that the log gives it."""
    found = Found(tokens=len(packed.queries))
    for query, margin, logprob, sampled in zip(
        packed.queries, derived.margin.tolist(), derived.logprob.tolist(), derived.sampled.tolist(), strict=True
    ):
        where = _where(speaker, query)
        if not margin <= speaker.allowed.tie:  # NaN is a fault
            found.faults.append(f"{where}: not the {speaker.name}'s own choice, which lies {margin:.4g} nats above it")
        elif margin > 0:
            found.ties.append(f"{where}: {margin:.2g} nats")
        for fault in _claim_faults(speaker, query, claim(query), logprob, sampled, found):
            found.faults.append(f"{where}: {fault}")
    return found


def _where(speaker: Speaker, query: Query) -> str:
    if query.turn == OPENING:
        return f"opening, token {query.step + 1}"
    return f"turn {query.turn + 1}, {speaker.fields[query.field]!r}, token {query.step + 1}"


def _claim_faults(speaker: Speaker, query: Query, claim: Claim, logprob, sampled, found: Found) -> Iterator[str]:
    if claim.logprob is not None:
        moved = abs(claim.logprob - logprob)
        found.moved = max(found.moved, moved)
        if not moved <= speaker.allowed.logprob:
            yield f"logged log-probability {claim.logprob:.5f}, derived {logprob:.5f}"
    if claim.sampled is None:
        return
    drawn, (low, high) = query.how == DRAWN and speaker.temperature > 0, sampled
    # A temperature below 1 widens what rounding moves; what was not drawn has 0 and nothing is rounded.
    scale = min(speaker.temperature, 1.0) if drawn else 1.0
    moved = max((low - claim.sampled) * scale, (claim.sampled - high) * scale, 0.0, key=lambda x: (x != x, x))
    found.moved = max(found.moved, moved)
    if not moved <= (speaker.allowed.logprob if drawn else 0.0):
        yield f"logged log-probability {claim.sampled:.5f} where it was sampled, derived {high:.5f}"


def users_fields(agents: Agents) -> list[str]:
    """Names of a user's generations in a turn, the reply last."""
    return [*agents.tables[1].appraisal.names[:-1], *agents.tables[1].reply.names]


def users_claim(fields: Sequence[str], users: Mapping[int, Message], query: Query) -> Claim:
    """What a log says of a token of the user: of the reply's also where it was sampled, of first words nothing.

    Args:
        users: the reactions by their turns.
    """
    if query.turn == OPENING:
        return Claim(None)
    name, user = fields[query.field], users[query.turn]
    if name == fields[-1]:
        return Claim(user["raw_logprobs"][query.step], user["logprobs"][query.step])
    kind = "appraisal" if name in user["appraisal_logprobs"] else "consideration"
    return Claim(user[f"{kind}_logprobs"][name][query.step])
