"""Dialogues whose policy is on the device and whose users answer by text, each when it can: no row waits for another's.

Rows that have been answered decode together, in a thread of their own, while the users of the others are asked. Who
decodes together depends on how fast answers come; what is said does not (`device_agents.TextPolicy`).
"""

import asyncio
import time
from collections.abc import Callable, Coroutine, Sequence
from concurrent.futures import Executor
from dataclasses import dataclass, field
from typing import Any, Protocol

from rlver_jax.dialogues.log import UNANSWERED
from rlver_jax.dialogues.turn_by_turn import Row, conclude, heard_from
from rlver_jax.endpoints.errors import Refused, Unavailable
from rlver_jax.user.emotion import EmotionRules

# Of what a round of decoding takes: how long the first answer waits for others to decode with. A round takes as long
# whoever speaks in it, so a wait of one round costs at most twice what the best moment would have cost.
LINGER = 1.0
LEAST_LINGER = 0.01  # seconds


class PolicyInRounds(Protocol):
    """Replies in dialogues of one batch, a few of them at a time."""

    def cohorts(self, rows: Sequence[Row]) -> list[list[Row]]:
        """The rows by the caches that they have a place in: a round takes as long for one row as for a whole cohort."""

    def speak(self, rows: Sequence[Row]) -> None:
        """Adds a reply to each of the rows, which may stand at different turns, or ends it. Blocks."""


class UserOfOne(Protocol):
    """The simulated users, each asked alone."""

    async def begin_one(self, row: Row) -> None:
        """Adds the first words to the row, or ends it."""

    async def react_one(self, row: Row, *, may_reply: bool) -> None:
        """Adds a reaction to the row, or ends it; sets `goodbye`."""


@dataclass
class Waits:
    """Where the time of a batch went, in seconds, and why dialogues have been left out.

    Attributes:
        device: in which the policy decoded.
        users: in which it had nothing to decode.
        rounds: of decoding.
        reasons: of dialogues that stayed unanswered, by their numbers.
    """

    device: float = 0.0
    users: float = 0.0
    rounds: int = 0
    reasons: dict[int, str] = field(default_factory=dict)


async def play_rounds(
    rows: Sequence[Row],
    policy: PolicyInRounds,
    user: UserOfOne,
    *,
    rules: EmotionRules,
    max_turns: int,
    thread: Executor | None = None,
) -> Waits:
    """Plays the rows to their ends, each at its own pace.

    The policy's cohorts take turns on the device: while one decodes, the users of the others answer. A dialogue whose
    user gives no answer in time, or is refused one, ends as `unanswered`.

    Args:
        thread: in which the policy speaks; None: one of the event loop's.

    Raises:
        EndpointError: an endpoint refuses whatever it is asked; what has been answered is in its cache.
    """
    waits, device, began = Waits(), asyncio.Lock(), time.monotonic()
    cohorts = [
        _Cohort(subset, policy, user, rules, max_turns, thread, waits, device) for subset in policy.cohorts(rows)
    ]
    playing = [asyncio.ensure_future(cohort.play()) for cohort in cohorts]
    try:
        await asyncio.gather(*playing)
    finally:
        for one in playing:
            one.cancel()
        await asyncio.gather(*playing, *(cohort.settle() for cohort in cohorts), return_exceptions=True)
        waits.users = time.monotonic() - began - waits.device
    return waits


@dataclass
class _Cohort:
    """Rows that decode together; `waits` and `device`, the right to decode, are shared with the other cohorts."""

    rows: Sequence[Row]
    policy: PolicyInRounds
    user: UserOfOne
    rules: EmotionRules
    max_turns: int
    thread: Executor | None
    waits: Waits
    device: asyncio.Lock
    _ready: list[Row] = field(default_factory=list)
    _asked: set[asyncio.Future] = field(default_factory=set)  # tasks of users
    _speaking: asyncio.Future | None = None

    async def play(self) -> None:
        """All rows to their ends."""
        self._ask(self.rows, lambda row: self.user.begin_one(row))
        while self._ready or self._asked or self._speaking:
            if self._ready and self._speaking is None:
                await self._linger()
                self._speaking = asyncio.ensure_future(self._speak())
            waiting = {*self._asked, *([self._speaking] if self._speaking else [])}
            await asyncio.wait(waiting, return_when=asyncio.FIRST_COMPLETED)
            self._collect()

    async def settle(self) -> None:
        """Ends what is still under way; the device is waited for."""
        self._ready = []
        for task in self._asked:
            task.cancel()
        left = [*self._asked, *([self._speaking] if self._speaking else [])]
        await asyncio.gather(*left, return_exceptions=True)

    async def _linger(self) -> None:
        """Gives answers that come at about the same time the chance to decode together."""
        until = time.monotonic() + max(LINGER * self.waits.device / max(self.waits.rounds, 1), LEAST_LINGER)
        while self._asked and (left := until - time.monotonic()) > 0:
            await asyncio.wait(self._asked, timeout=left, return_when=asyncio.FIRST_COMPLETED)
            self._collect()

    def _collect(self) -> None:
        """Takes over what has come; raises what went wrong."""
        done = {task for task in self._asked if task.done()}
        self._asked -= done
        self._ready += [row for task in done if not (row := task.result()).end]
        if self._speaking is not None and self._speaking.done():
            speaking, self._speaking = self._speaking, None
            self._ask(speaking.result(), self._react)

    def _ask(self, rows: Sequence[Row], ask: Callable[[Row], Coroutine[Any, Any, None]]) -> None:
        self._asked |= {asyncio.ensure_future(self._answered(row, ask)) for row in rows}

    async def _answered(self, row: Row, ask: Callable[[Row], Coroutine[Any, Any, None]]) -> Row:
        try:
            await ask(row)
        except (Unavailable, Refused) as error:
            row.end = UNANSWERED
            self.waits.reasons[row.number] = str(error)
        return row

    async def _react(self, row: Row) -> None:
        last = row.turns >= self.max_turns
        await self.user.react_one(row, may_reply=not last)
        conclude(row, self.rules, last=last)

    async def _speak(self) -> list[Row]:
        """A round of decoding, of all who are ready when the device is free; returns the rows whose users react."""
        async with self.device:
            rows, self._ready = self._ready, []
            if not rows:
                return []
            began, before = time.monotonic(), {row: row.turns for row in rows}
            await asyncio.get_running_loop().run_in_executor(self.thread, self.policy.speak, rows)
            self.waits.device += time.monotonic() - began
            self.waits.rounds += 1
        return [heard for row in rows for heard in heard_from([row], before[row])]
