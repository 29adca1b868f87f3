"""How training ends before its last step: where nothing is wrong with a run it saves, and can be resumed."""

import dataclasses

from rlver_jax.runs.lock import LostLockError
from rlver_jax.text.command import Ending
from rlver_jax.training.alarms import CollapseError


class StoppedError(RuntimeError):
    """The run has saved its state and stops; the message says why, and what lets the same command resume."""


# Of the commands that train.
ENDINGS = {
    CollapseError: Ending(1, "stopped by an alarm at {error}. Its checkpoints stay in {output}"),
    StoppedError: Ending(1, "stopped {error}. What was done is saved in {output}"),
    LostLockError: Ending(1),
    KeyboardInterrupt: Ending(
        130, "interrupted; the same command resumes in {output} after the last checkpoint, if there is one"
    ),
}


@dataclasses.dataclass
class Spending:
    """What the requests of a run have cost, and may cost (`remote.budget`; 0: anything)."""

    budget: float
    total: float = 0.0

    def add(self, cost: float) -> None:
        """Counts the cost of a step's or an evaluation's dialogues."""
        self.total += cost

    @property
    def used_up(self) -> bool:
        """Whether the budget is."""
        return bool(self.budget) and self.total >= self.budget

    def check(self, done: int) -> None:
        """Raises StoppedError: the budget is used up after step `done`."""
        if self.used_up:
            raise StoppedError(
                f"after step {done}: requests have cost {self.total:.4f}, and remote.budget={self.budget:g}; the same "
                f"command with a larger --config.remote.budget resumes it"
            )
