"""A finished dialogue as one model read and generated it, in one packed sequence (see `models.attention`).

Plain messages are branch 0; the reasoning of turn t is branch (t + 1) * BRANCH_RADIX.
"""

import dataclasses
from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
from jaxtyping import Int

from rlver_jax.decoding.grammar import Grammar

GREEDY, DRAWN, GIVEN = range(3)  # where a token comes from: the likeliest; drawn with its key; forced by the sampler
ANY_END = -1  # as a token: whichever ends the generation
OPENING = -1  # as a turn: the words before the first one


@dataclasses.dataclass(frozen=True)
class Completion:
    """One generated line: its tokens, the one that ended it included if `stopped`."""

    tokens: Sequence[int]
    stopped: bool

    @property
    def text_tokens(self) -> Sequence[int]:
        """Without the token that only ended the line."""
        return self.tokens[: len(self.tokens) - self.stopped]


class Query(NamedTuple):
    """A generated token to compare with the distribution it came from."""

    previous: int  # index of the token before it; queries are ordered by it, and no two share one
    token: int  # an id or ANY_END
    state: int  # of the grammar before it
    part: int  # which key of the turn
    step: int
    turn: int  # from 0, or OPENING
    field: int  # which of the turn's generations, for messages
    source: int  # GREEDY | DRAWN | GIVEN


class Choice(NamedTuple):
    """Where in a packed dialogue the options of one turn's choice lie."""

    turn: int
    first: int  # index of the first option's first token; the token before it predicts that one
    end: int  # behind the last option's last


class States(NamedTuple):
    """A grammar's states on the host."""

    table: Int[np.ndarray, "N V"]
    first_found: int
    begin: int

    @classmethod
    def of(cls, grammar: Grammar) -> "States":
        """Those of a grammar on the device."""
        return cls(np.asarray(grammar.table), grammar.first_found, grammar.begin)

    def matched(self, state: int) -> bool:
        """Whether the pattern has been found; see `Grammar.matched`."""
        return self.first_found <= state < self.begin


@dataclasses.dataclass
class Branches:
    """A packed sequence under construction (host lists)."""

    tokens: list[int] = dataclasses.field(default_factory=list)
    positions: list[int] = dataclasses.field(default_factory=list)
    branch: list[int] = dataclasses.field(default_factory=list)

    def add(self, tokens: Sequence[int], branch: int, position: int) -> int:
        """Adds tokens of one branch from `position` on; returns the position after them."""
        self.tokens.extend(tokens)
        self.branch += [branch] * len(tokens)
        self.positions += range(position, position + len(tokens))
        return position + len(tokens)


@dataclasses.dataclass
class ReplaySequence(Branches):
    """One packed dialogue, and the tokens and choices to compare with the model that read it."""

    prefix: int = 0  # tokens of the context before the first turn, which dialogues share
    queries: list[Query] = dataclasses.field(default_factory=list)
    choices: list[Choice] = dataclasses.field(default_factory=list)

    @property
    def shared(self) -> int:
        """Tokens of the prefix before the first query."""
        return min(self.prefix, self.queries[0].previous if self.queries else self.prefix)

    def ask(self, states: States, tokens: Sequence[int], part: int, turn: int, field: int, source: int) -> None:
        """Adds a query for each token of a generation that follows what is packed."""
        state, before = states.begin, len(self.tokens) - 1
        for step, token in enumerate(tokens):
            self.queries.append(Query(before + step, token, state, part, step, turn, field, source))
            state = int(states.table[state, token])
