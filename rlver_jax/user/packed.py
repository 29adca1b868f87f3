"""A finished dialogue as its simulated user read it, in one packed row (see `models.attention`).

Plain messages are branch 0; what the user reasoned in turn t is branch t * BRANCH_RADIX, and each option of its change
a leaf of its twigs.
"""

import dataclasses
from collections.abc import Callable, Sequence
from typing import NamedTuple

import jax
import numpy as np

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

    place: int  # index of the token before it; queries are in the order of their places
    token: int
    state: int  # of the grammar before it
    part: int  # which key of the turn
    step: int
    turn: int
    field: int  # position in appraisal + reply
    spoken: bool  # sampled at the reply's temperature rather than greedily


class Choice(NamedTuple):
    """Where in a packed dialogue the options of one turn's change lie."""

    turn: int
    first: int  # index of the first option's first token; the token before it predicts that one
    end: int  # behind the last option's last


@dataclasses.dataclass
class Branches:
    """A packed row under construction (host lists)."""

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
class Packed(Branches):
    """One packed dialogue, and what to hold against its user."""

    prefix: int = 0  # tokens of the context before the first turn, which dialogues of a profile share
    queries: list[Query] = dataclasses.field(default_factory=list)
    choices: list[Choice] = dataclasses.field(default_factory=list)


class Packer:
    """Packs dialogues; holds the user's tables as Python lists."""

    def __init__(self, tables: UserTables, band: Callable[[int], int]):
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

    def dialogue(self, prefix: Sequence[int], first_talk: Sequence[int], turns: Sequence[LoggedTurn]) -> Packed:
        """Packs a dialogue, with what its user had read before the first turn."""
        packed, last_reply = Packed(prefix=len(prefix)), list(first_talk)
        position = packed.add(prefix, 0, 0)
        for index, turn in enumerate(turns):
            base = [*last_reply, *self._close, *self._open_user, *turn.say, *self._close, *self._open_assistant]
            position = packed.add(base, 0, position)
            self._branch(packed, turn, (index + 1) * BRANCH_RADIX, position)
            last_reply = list(turn.reply[-1].text_tokens) if turn.reply else []
        return packed

    def _branch(self, packed: Packed, turn: LoggedTurn, branch: int, position: int) -> None:
        """The reasoning of one turn: appraisal, options on their twigs, the chosen one, reply script."""
        literals = self._appraisal[turn.emotion_before]
        for i, said in enumerate(turn.appraisal):
            position = packed.add(literals[i], branch, position)
            position = self._said(packed, said, branch, position, turn.turn, i, KEY_APPRAISAL + i, False)
        position = packed.add(literals[-1], branch, position)
        first = len(packed.tokens)
        for token, twig, offset in self._twigs:
            packed.add([token], branch + twig, position + offset)
        packed.choices.append(Choice(turn.turn, first, len(packed.tokens)))
        if not turn.reply:
            return
        literals = self._reply[turn.emotion_after]
        position = packed.add(self._options[turn.change - CHANGES[0]], branch, position)
        last = len(turn.reply) - 1
        for i, said in enumerate(turn.reply):
            position = packed.add(literals[i], branch, position)
            field = len(turn.appraisal) + i
            position = self._said(packed, said, branch, position, turn.turn, field, KEY_REPLY + i, i == last)

    def _said(self, packed: Packed, said: Said, branch, position, turn, field, part, spoken) -> int:
        """One line: its text tokens, and a query for each token, the ending one included."""
        state = self._begin
        before = len(packed.tokens) - 1
        position = packed.add(list(said.text_tokens), branch, position)
        for step, token in enumerate(said.tokens):
            packed.queries.append(Query(before + step, token, state, part, step, turn, field, spoken))
            state = int(self._grammar[state, token])
        return position


def _literals(script: Script, band: Callable[[int], int]) -> list[list[list[int]]]:
    """A script's literals under each emotion, 0 to 100."""
    fetched = jax.device_get(script)
    return [fetched.literals(emotion, band(emotion)) for emotion in range(HIGHEST + 1)]
