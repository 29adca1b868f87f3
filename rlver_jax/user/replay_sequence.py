"""A finished dialogue as its simulated user read it, in one packed row (see `models.attention`).

The options of a change are children of the turn's branch, siblings of each other.
"""

import dataclasses
from collections.abc import Callable, Sequence

import jax
import numpy as np

from rlver_jax.decoding.replay_sequence import (
    ANY_END,
    DRAWN,
    GREEDY,
    OPENING,
    Choice,
    Completion,
    ReplaySequence,
    States,
)
from rlver_jax.decoding.script import Script
from rlver_jax.models.attention import BRANCH_RADIX
from rlver_jax.text.chat import TurnTokens
from rlver_jax.user.emotion import CHANGES, HIGHEST
from rlver_jax.user.turn import KEY_APPRAISAL, KEY_REPLY, UserTables


@dataclasses.dataclass(frozen=True)
class LoggedTurn:
    """What a log says of one turn that the user appraised.

    Where its scripts are not to be replayed, or not to their end, its words stand for them: no later turn sees more.
    """

    turn: int
    emotion_before: int
    emotion_after: int
    say: Sequence[int]
    appraisal: Sequence[Completion] | None  # None: neither script is replayed
    change: int
    reply: Sequence[Completion]  # the reply script's fields, the reply last; empty if the dialogue ended before
    words: Sequence[int] = ()  # what it said, where `reply` is empty and the dialogue went on


class Packer:
    """Packs dialogues; holds the user's tables as Python lists."""

    def __init__(self, tables: UserTables, band: Callable[[int], int]):
        """`band` maps an emotion to the index of its band."""
        as_list = lambda x: np.asarray(x).tolist()  # noqa: E731
        self._turns = TurnTokens(*map(as_list, (tables.open_user, tables.open_assistant, tables.close)))
        self._opened = as_list(tables.opening)
        self._appraisal, self._reply = (_literals(script, band) for script in (tables.appraisal, tables.reply))
        options = tables.options
        self._option_tree = list(zip(*map(as_list, (options.tokens, options.branch, options.offset)), strict=True))
        counts = as_list(options.counts)
        self._options = [row[:count] for row, count in zip(as_list(options.padded), counts, strict=True)]
        self._grammar = States.of(tables.grammar)

    def dialogue(
        self,
        prefix: Sequence[int],
        first_talk: Sequence[int],
        turns: Sequence[LoggedTurn],
        made_up: int = 0,
    ) -> ReplaySequence:
        """Packs a dialogue, with what its user had read before the first turn.

        Args:
            made_up: most tokens of first words that the user made up itself; 0: they are the profile's.
        """
        packed, last_reply = ReplaySequence(prefix=len(prefix)), list(first_talk)
        position = packed.add(prefix, 0, 0)
        if made_up:
            self._opening(packed, first_talk, made_up, (len(turns) + 1) * BRANCH_RADIX, position)
        if not turns:
            packed.add(first_talk, 0, position)
        for index, turn in enumerate(turns):
            messages = [*last_reply, *self._turns.close, *self._turns.exchange(turn.say)]
            position = packed.add(messages, 0, position)
            if turn.appraisal is not None:
                self._branch(packed, turn, turn.appraisal, (index + 1) * BRANCH_RADIX, position)
            last_reply = list(turn.reply[-1].text_tokens if turn.reply else turn.words)
        return packed

    def _opening(self, packed: ReplaySequence, tokens: Sequence[int], most: int, branch: int, position: int) -> None:
        """Queries for first words that are about to be read, and for their end, whose token no log holds.

        Where a reply begins with what later turns don't see, they are read in a branch first.
        """
        position = packed.add(self._opened, branch, position)
        ends = [ANY_END] * (len(tokens) < most)
        packed.ask(self._grammar, [*tokens, *ends], 0, OPENING, 0, DRAWN)
        if self._opened:
            packed.add(tokens, branch, position)

    def _branch(
        self, packed: ReplaySequence, turn: LoggedTurn, appraisal: Sequence[Completion], branch: int, position: int
    ) -> None:
        """The reasoning of one turn: appraisal, options as sibling branches, the chosen one, reply script."""
        literals = self._appraisal[turn.emotion_before]
        for i, line in enumerate(appraisal):
            position = packed.add(literals[i], branch, position)
            position = self._line(packed, line, branch, position, turn.turn, i, KEY_APPRAISAL + i, GREEDY)
        position = packed.add(literals[-1], branch, position)
        first = len(packed.tokens)
        for token, child, offset in self._option_tree:
            packed.add([token], branch + child, position + offset)
        packed.choices.append(Choice(turn.turn, first, len(packed.tokens)))
        if not turn.reply:
            return
        literals = self._reply[turn.emotion_after]
        position = packed.add(self._options[turn.change - CHANGES[0]], branch, position)
        last = len(turn.reply) - 1
        for i, line in enumerate(turn.reply):
            position = packed.add(literals[i], branch, position)
            field = len(appraisal) + i
            origin = DRAWN if i == last else GREEDY
            position = self._line(packed, line, branch, position, turn.turn, field, KEY_REPLY + i, origin)

    def _line(self, packed: ReplaySequence, line: Completion, branch, position, turn, field, part, origin) -> int:
        """One line: its text tokens, and a query for each token, the ending one included."""
        packed.ask(self._grammar, line.tokens, part, turn, field, origin)
        return packed.add(list(line.text_tokens), branch, position)


def _literals(script: Script, band: Callable[[int], int]) -> list[list[list[int]]]:
    """A script's literals under each emotion, 0 to 100."""
    fetched = jax.device_get(script)
    return [fetched.literals(emotion, band(emotion)) for emotion in range(HIGHEST + 1)]
