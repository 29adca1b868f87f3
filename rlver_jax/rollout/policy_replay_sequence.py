"""A finished dialogue as its policy read it, in one packed row: no thought sees an earlier one."""

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np

from rlver_jax.decoding.replay_sequence import DRAWN, GIVEN, Completion, Query, ReplaySequence, States
from rlver_jax.models.attention import BRANCH_RADIX
from rlver_jax.rollout.policy_turn import PolicyTables
from rlver_jax.text.chat import TurnTokens
from rlver_jax.user.turn import KEY_POLICY


class Reply(NamedTuple):
    """What a log says of one turn of the policy."""

    heard: Sequence[int]  # the user's words
    completion: Completion | None  # as sampled; None: not to be replayed, and later turns see the say alone
    say: Sequence[int]  # what the user hears of it


class PolicyPacker:
    """Packs dialogues; holds the policy's tables on the host.

    What the engine keeps in its context (`policy.policy_turn`) is the row's branch 0: plain messages. Where replies
    begin with what later turns don't see (`PolicyTables.branched`: a thought, or an empty one), each reply, thought and
    say, is a branch of its own, and its say is read again as a message.
    """

    def __init__(self, tables: PolicyTables, *, think_tokens: int):
        """`think_tokens`: the limit of a thought, where `tables.grammar.closing` closes it."""
        as_list = lambda x: np.asarray(x).tolist()  # noqa: E731
        self._system, self._think_open = as_list(tables.system), as_list(tables.think_open)
        self._turns = TurnTokens(*map(as_list, (tables.open_user, tables.open_assistant, tables.close)))
        self._states, self._closing = States.of(tables.grammar), np.asarray(tables.grammar.closing).tolist()
        self._branched, self._think_tokens = tables.branched, think_tokens

    def dialogue(self, replies: Sequence[Reply]) -> ReplaySequence:
        """Packs a dialogue; its queries are the tokens of all replies, in their order."""
        packed = ReplaySequence(prefix=len(self._system))
        position, last = packed.add(self._system, 0, 0), list[int]()
        for turn, reply in enumerate(replies):
            position = packed.add([*last, *self._turns.exchange(reply.heard)], 0, position)
            if self._branched or reply.completion is None:
                if reply.completion is not None:
                    branch = (turn + 1) * BRANCH_RADIX
                    self._reply(packed, reply.completion, turn, branch, packed.add(self._think_open, branch, position))
                last = [*reply.say, *self._turns.close]
            else:
                position = self._reply(packed, reply.completion, turn, 0, position)
                last = list(self._turns.close)
        return packed

    def _reply(self, packed: ReplaySequence, completion: Completion, turn: int, branch: int, position: int) -> int:
        """A reply with a query for each of its tokens; returns the position after its text."""
        first = len(packed.queries)
        packed.ask(self._states, completion.tokens, KEY_POLICY, turn, 0, DRAWN)
        packed.queries[first:] = map(self._marked, packed.queries[first:])
        return packed.add(completion.text_tokens, branch, position)

    def _marked(self, query: Query) -> Query:
        """As GIVEN where the sampler put the token: the closing of a thought that reaches its limit."""
        position = query.step - (self._think_tokens - len(self._closing))
        closing = 0 <= position < len(self._closing) and not self._states.matched(query.state)
        return query._replace(source=GIVEN) if closing and query.token == self._closing[position] else query
