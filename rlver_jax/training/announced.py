"""Users behind an endpoint in a run of several processes: process 0 asks them, and all processes decode.

Before each round of decoding process 0 announces which rows have been answered, and what they heard; at the end how
every dialogue came out. So all processes make the same calls on the devices, and hold the same dialogues.
"""

import concurrent.futures
import queue
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from rlver_jax.dialogues.device_agents import TextPolicy
from rlver_jax.dialogues.rounds import Waits
from rlver_jax.dialogues.turn_by_turn import Row
from rlver_jax.dialogues.verify_settings import TEXT
from rlver_jax.endpoints.errors import EndpointError
from rlver_jax.parallel.distributed import from_main
from rlver_jax.profiles.schema import Profile
from rlver_jax.rollout.spec import RolloutConfig

PULSE = 5.0  # seconds: users may take minutes to answer, and no process waits so long for another in a collective
_STATE = ("messages", "emotions", "end", "goodbye")  # of a row that has been played
Costs = Mapping[str, float]


class Announcer:
    """Process 0's policy in `rounds.play_rounds`: its rounds are announced, and decoded by the thread in `lead`."""

    def __init__(self, policy: TextPolicy):
        """Of rows that every process has."""
        self._policy = policy
        self._rounds: queue.Queue[tuple[Sequence[Row], concurrent.futures.Future[None]] | None] = queue.Queue()

    def cohorts(self, rows: Sequence[Row]) -> list[list[Row]]:
        """See `TextPolicy.cohorts`."""
        return self._policy.cohorts(rows)

    def speak(self, rows: Sequence[Row]) -> None:
        """See `TextPolicy.speak`."""
        spoken: concurrent.futures.Future[None] = concurrent.futures.Future()
        self._rounds.put((rows, spoken))
        spoken.result()

    def lead(
        self, playing: "concurrent.futures.Future[Waits]", rows: Sequence[Row], costs: Callable[[Sequence[Row]], Costs]
    ) -> Waits:
        """Announces and decodes rounds until the rows have been played in another thread.

        Raises:
            EndpointError: of the play; it is announced as well.
        """
        playing.add_done_callback(lambda _: self._rounds.put(None))
        while (one := self._next_round()) is not None:
            speaking, spoken = one
            _announce(round=[(row.slot, row.aloud[-1]) for row in speaking])
            try:
                self._policy.speak(speaking)
            except BaseException as error:
                spoken.set_exception(error)
            else:
                spoken.set_result(None)
        try:
            waits = playing.result()
        except EndpointError as error:
            _announce(failed=str(error))
            raise
        states = [{name: getattr(row, name) for name in _STATE} for row in rows]
        _announce(rows=states, reasons=list(waits.reasons.items()), costs=dict(costs(rows)))
        return waits

    def _next_round(self) -> tuple[Sequence[Row], "concurrent.futures.Future[None]"] | None:
        while True:
            try:
                return self._rounds.get(timeout=PULSE)
            except queue.Empty:
                _announce()


class AnnouncedUsers:
    """The users of a run on every process but the first: what that one announces."""

    readout = TEXT

    def __init__(self) -> None:
        """Nothing is asked here: no key, no file of answers."""
        self._costs: dict[str, float] = {}

    def of(self, profiles: Sequence[Profile], spec: RolloutConfig) -> "AnnouncedUsers":
        """The same users."""
        return self

    def play(self, rows: Sequence[Row], policy: TextPolicy, spec: RolloutConfig, seed: int) -> Waits:
        """Decodes the rounds that are announced; the rows become those of process 0.

        Raises:
            EndpointError: as there.
        """
        slots = {row.slot: row for row in rows}
        while "rows" not in (told := _announce()):
            if "failed" in told:
                raise EndpointError(told["failed"])
            for slot, text in (heard := told.get("round", [])):
                slots[slot].messages.append({"role": "user", "content": text})
            if heard:
                policy.speak([slots[slot] for slot, _ in heard])
        for row, state in zip(rows, told["rows"], strict=True):
            for name in _STATE:
                setattr(row, name, state[name])
        self._costs = told["costs"]
        return Waits(reasons=dict(told["reasons"]))

    def costs(self, rows: Sequence[Row]) -> dict[str, float]:
        """Of the rows that were played last."""
        return self._costs

    def traffic(self) -> dict[str, float]:
        """None."""
        return {}

    def cancel(self) -> None:
        """Ends with process 0."""

    def close(self) -> None:
        """Holds nothing open."""


def _announce(**told: Any) -> dict[str, Any]:
    """What process 0 has to tell; the others hear it."""
    return from_main(lambda: told)
