"""Compares logged tokens and their log-probabilities with a replay (`decoding.replay`), for the user or the policy."""

import dataclasses
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import NamedTuple, Protocol

import numpy as np

from rlver_jax.decoding.replay_sequence import DRAWN, OPENING, Query, ReplaySequence
from rlver_jax.dialogues.trajectory import Message
from rlver_jax.rollout.agents import Agents


class Tolerance(NamedTuple):
    """How far rounding may move the results of many decode steps from those of one forward pass, in nats."""

    tie: float  # of two candidates against each other
    logprob: float


# By the model's dtype. Errors of bfloat16 have no bound; docs/results.md has what was measured on an accelerator.
TOLERANCES = {"float32": Tolerance(1e-4, 1e-3), "bfloat16": Tolerance(0.5, 1.0)}


class ReplayedTokens(Protocol):
    """The part of `decoding.replay.Replayed` that is compared."""

    @property
    def margin(self) -> np.ndarray:
        """[Q]."""

    @property
    def logprob(self) -> np.ndarray:
        """[Q]."""

    @property
    def sampled(self) -> np.ndarray:
        """[Q, 2]."""


class LoggedLogprobs(NamedTuple):
    """Log-probabilities of one token in a log; None: the log has none."""

    logprob: float | None  # of the model itself
    sampled: float | None = None  # of the distribution really sampled


@dataclasses.dataclass
class TokenReport:
    """The result of comparing one dialogue."""

    tokens: int = 0
    logprob_error: float = 0.0  # the largest difference of a token's log-probability to the log's, in nats
    ties: list[str] = dataclasses.field(default_factory=list)
    faults: list[str] = dataclasses.field(default_factory=list)


class Speaker(NamedTuple):
    """The model that generated the tokens.

    Attributes:
        name: for messages.
        fields: names of the turn's generations, by `Query.field`.
        temperature: of what was drawn; 0: greedy.
        tolerance: what is allowed for the model's dtype.
    """

    name: str
    fields: Sequence[str]
    temperature: float
    tolerance: Tolerance


def check_tokens(
    speaker: Speaker, sequence: ReplaySequence, replayed: ReplayedTokens, logged: Callable[[Query], LoggedLogprobs]
) -> TokenReport:
    """Checks that each generated token is the model's own choice, with the log-probabilities in the log."""
    report = TokenReport(tokens=len(sequence.queries))
    for query, margin, logprob, sampled in zip(
        sequence.queries, replayed.margin.tolist(), replayed.logprob.tolist(), replayed.sampled.tolist(), strict=True
    ):
        where = _where(speaker, query)
        if not margin <= speaker.tolerance.tie:  # NaN is a fault
            report.faults.append(f"{where}: not the {speaker.name}'s own choice, which lies {margin:.4g} nats above it")
        elif margin > 0:
            report.ties.append(f"{where}: {margin:.2g} nats")
        for fault in _logprob_faults(speaker, query, logged(query), logprob, sampled, report):
            report.faults.append(f"{where}: {fault}")
    return report


def _where(speaker: Speaker, query: Query) -> str:
    if query.turn == OPENING:
        return f"opening, token {query.step + 1}"
    return f"turn {query.turn + 1}, {speaker.fields[query.field]!r}, token {query.step + 1}"


def _logprob_faults(
    speaker: Speaker, query: Query, logged: LoggedLogprobs, logprob, sampled, report: TokenReport
) -> Iterator[str]:
    if logged.logprob is not None:
        error = abs(logged.logprob - logprob)
        report.logprob_error = max(report.logprob_error, error)
        if not error <= speaker.tolerance.logprob:
            yield f"logged log-probability {logged.logprob:.5f}, recomputed {logprob:.5f}"
    if logged.sampled is None:
        return
    drawn, (low, high) = query.source == DRAWN and speaker.temperature > 0, sampled
    # A temperature below 1 widens rounding errors; what was not drawn has exactly 0.
    scale = min(speaker.temperature, 1.0) if drawn else 1.0
    error = max((low - logged.sampled) * scale, (logged.sampled - high) * scale, 0.0, key=lambda x: (x != x, x))
    report.logprob_error = max(report.logprob_error, error)
    if not error <= (speaker.tolerance.logprob if drawn else 0.0):
        yield f"logged log-probability {logged.sampled:.5f} where it was sampled, recomputed {high:.5f}"


def user_fields(agents: Agents) -> list[str]:
    """Names of a user's generations in a turn, the reply last."""
    return [*agents.tables[1].appraisal.names[:-1], *agents.tables[1].reply.names]


def user_logprobs(fields: Sequence[str], users: Mapping[int, Message], query: Query) -> LoggedLogprobs:
    """Log-probabilities in a log of a token of the user: both of the reply's, none of the first words.

    Args:
        users: the reactions by their turns.
    """
    if query.turn == OPENING:
        return LoggedLogprobs(None)
    name, user = fields[query.field], users[query.turn]
    if name == fields[-1]:
        return LoggedLogprobs(user["raw_logprobs"][query.step], user["logprobs"][query.step])
    kind = "appraisal" if name in user["appraisal_logprobs"] else "consideration"
    return LoggedLogprobs(user[f"{kind}_logprobs"][name][query.step])
