"""A finished dialogue as its simulated user read it, in one packed row (see `models.attention`).

Plain messages are branch 0; what the user reasoned in turn t is branch t * BRANCH_RADIX, and each option of its change
a twig of that branch.
"""

import dataclasses
from collections.abc import Callable, Sequence
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array

from rlver_jax.models.attention import BRANCH_RADIX
from rlver_jax.sampling.script import Script
from rlver_jax.user.emotion import CHANGES, HIGHEST
from rlver_jax.user.simulated import KEY_APPRAISAL, KEY_REPLY, UserTables


@dataclasses.dataclass(frozen=True)
class Said:
    """One generated line: its tokens, the one that ended it included if `stopped`."""

    tokens: Sequence[int]
    stopped: bool

    @property
    def text_tokens(self) -> Sequence[int]:
        """Without the token that only ended the line."""
        return self.tokens[: len(self.tokens) - self.stopped]


@dataclasses.dataclass(frozen=True)
class LoggedTurn:
    """What a log says of one turn that the user appraised."""

    turn: int
    emotion_before: int
    emotion_after: int
    say: Sequence[int]
    appraisal: Sequence[Said]
    change: int
    reply: Sequence[Said]  # the reply script's fields, the reply last; empty if the dialogue ended before


class Query(NamedTuple):
    """A generated token to hold against the distribution it came from."""

    place: int  # index of the token before it
    token: int
    state: int  # of the grammar before it
    part: int  # which key of the turn
    step: int
    turn: int
    field: int  # position in appraisal + reply
    spoken: bool  # sampled at the reply's temperature rather than greedily


class Span(NamedTuple):
    """Where in a packed dialogue the reasoning of one turn lies."""

    turn: int
    tokens: slice
    queries: slice
    choice: tuple[int, int]  # indices of the last token before the options and of the first option's first


@dataclasses.dataclass
class Branches:
    """A packed row under construction (host lists)."""

    tokens: list[int] = dataclasses.field(default_factory=list)
    positions: list[int] = dataclasses.field(default_factory=list)
    branch: list[int] = dataclasses.field(default_factory=list)

    def add(self, tokens: Sequence[int], branch: int, position: int) -> int:
        """Adds tokens of one branch from `position` on; returns the position after them."""
        self.tokens += tokens
        self.branch += [branch] * len(tokens)
        self.positions += range(position, position + len(tokens))
        return position + len(tokens)


@dataclasses.dataclass
class Packed(Branches):
    """One packed dialogue, and what to hold against its user."""

    queries: list[Query] = dataclasses.field(default_factory=list)
    spans: list[Span] = dataclasses.field(default_factory=list)

    @property
    def history(self) -> list[int]:
        """Tokens of the plain messages."""
        return [token for token, branch in zip(self.tokens, self.branch, strict=True) if branch == 0]


class Packer:
    """Packs what follows a dialogue's prefix; holds the user's tables as Python lists."""

    def __init__(self, tables: UserTables, band: Callable[[Array], Array]):
        """`band` maps an emotion to the index of its band."""
        as_list = lambda x: np.asarray(x).tolist()  # noqa: E731
        self._close, self._open_user = as_list(tables.close), as_list(tables.open_user)
        self._open_assistant = as_list(tables.open_assistant)
        self._appraisal, self._reply = (_literals(script, band) for script in (tables.appraisal, tables.reply))
        options = tables.options
        self._twigs = list(zip(*map(as_list, (options.tokens, options.branch, options.offset)), strict=True))
        counts = as_list(options.counts)
        self._options = [row[:count] for row, count in zip(as_list(options.padded), counts, strict=True)]
        self._grammar, self._begin = np.asarray(tables.grammar.table), int(tables.grammar.begin)

    def dialogue(self, start: int, first_talk: Sequence[int], turns: Sequence[LoggedTurn]) -> Packed:
        """Packs what follows a prefix of `start` tokens."""
        packed, position, last_reply = Packed(), start, list(first_talk)
        for index, turn in enumerate(turns):
            base = [*last_reply, *self._close, *self._open_user, *turn.say, *self._close, *self._open_assistant]
            position = packed.add(base, 0, position)
            tokens, queries = len(packed.tokens), len(packed.queries)
            choice = self._branch(packed, turn, (index + 1) * BRANCH_RADIX, position)
            own, asked = slice(tokens, len(packed.tokens)), slice(queries, len(packed.queries))
            packed.spans.append(Span(turn.turn, own, asked, choice))
            last_reply = list(turn.reply[-1].text_tokens) if turn.reply else []
        return packed

    def _branch(self, packed: Packed, turn: LoggedTurn, branch: int, position: int) -> tuple[int, int]:
        """The reasoning of one turn: appraisal, options on their twigs, the chosen one, reply script."""
        literals = self._appraisal[turn.emotion_before]
        for i, said in enumerate(turn.appraisal):
            position = packed.add(literals[i], branch, position)
            position = self._said(packed, said, branch, position, turn.turn, i, KEY_APPRAISAL + i, False)
        position = packed.add(literals[-1], branch, position)
        choice = len(packed.tokens) - 1, len(packed.tokens)
        for token, twig, offset in self._twigs:
            packed.add([token], branch + twig, position + offset)
        if not turn.reply:
            return choice
        literals = self._reply[turn.emotion_after]
        position = packed.add(self._options[turn.change - CHANGES[0]], branch, position)
        last = len(turn.reply) - 1
        for i, said in enumerate(turn.reply):
            position = packed.add(literals[i], branch, position)
            field = len(turn.appraisal) + i
            position = self._said(packed, said, branch, position, turn.turn, field, KEY_REPLY + i, i == last)
        return choice

    def _said(self, packed: Packed, said: Said, branch, position, turn, field, part, spoken) -> int:
        """One line: its text tokens, and a query for each token, the ending one included."""
        state = self._begin
        before = len(packed.tokens) - 1
        position = packed.add(list(said.text_tokens), branch, position)
        for step, token in enumerate(said.tokens):
            packed.queries.append(Query(before + step, token, state, part, step, turn, field, spoken))
            state = int(self._grammar[state, token])
        return position


def _literals(script: Script, band: Callable[[Array], Array]) -> list[list[list[int]]]:
    """A script's literals under each emotion, 0 to 100."""
    emotions = jnp.arange(HIGHEST + 1)
    tokens, counts = (np.asarray(x).swapaxes(0, 1) for x in _render(script, emotions, band(emotions)))
    return [
        [row[:n].tolist() for row, n in zip(rows, ns, strict=True)] for rows, ns in zip(tokens, counts, strict=True)
    ]


_render = jax.jit(Script.render)


class Row(NamedTuple):
    """What the user reasoned in one turn, behind the last token of the plain messages before it."""

    tokens: list[int]
    positions: list[int]  # the first one is also that token's slot
    branch: list[int]  # 0: the reasoning itself, else a twig
    turn: int
    queries: list[Query]  # `place`: in this row
    choice: tuple[int, int]


def rows_of(packed: Packed) -> list[Row]:
    """The reasoning of every turn, each as a row of its own."""
    rows = []
    for turn, own, asked, (before, option) in packed.spans:
        start = own.start - 1
        row = slice(start, own.stop)
        branch = [branch % BRANCH_RADIX for branch in packed.branch[row]]
        queries = [query._replace(place=query.place - start) for query in packed.queries[asked]]
        choice = before - start, option - start
        rows.append(Row(packed.tokens[row], packed.positions[row], branch, turn, queries, choice))
    return rows
