"""The next batch is played while the update runs (`rollout.overlap=1`): by the policy as it was before that update.

So its dialogues are one step off-policy, which truncated importance weights correct (`loss.recompute` and
`loss.importance_cap`). After a checkpoint or an evaluation the next batch is played by the newest policy: a run that
resumes there has nothing to play again by an older one.
"""

import concurrent.futures
import dataclasses
from collections.abc import Mapping

import jax
import jax.numpy as jnp

from rlver_jax.decoding.cache import LM
from rlver_jax.profiles.reader import Batch
from rlver_jax.training.text_rollout import TextBatch, TextRollout


@dataclasses.dataclass(frozen=True)
class Ahead:
    """A batch that is being played."""

    batch: Batch
    ids: list[int]
    reader: Mapping[str, int]  # state of the reader before the batch
    playing: "concurrent.futures.Future[TextBatch]"


class Overlap:
    """Plays one batch ahead, in a thread."""

    def __init__(self, text: TextRollout):
        """Plays nothing yet."""
        self._text = text
        self._thread = concurrent.futures.ThreadPoolExecutor(1)
        self.ahead: Ahead | None = None
        self._playing: concurrent.futures.Future[TextBatch] | None = None

    def begin(self, policy: LM, batch: Batch, ids: list[int], reader: Mapping[str, int]) -> None:
        """Begins to play a batch with a copy of the policy: the update reuses the buffers of its parameters."""
        own = LM(jax.tree.map(jnp.copy, policy.params), policy.model)
        self._playing = self._thread.submit(self._text.play, own, batch, ids)
        self.ahead = Ahead(batch, ids, reader, self._playing)

    def take(self) -> Ahead | None:
        """The batch that is being played, if any."""
        ahead, self.ahead = self.ahead, None
        return ahead

    def close(self) -> None:
        """Ends what is being played; what has been answered is kept."""
        if self._playing is not None and not self._playing.done():
            self._text.users.cancel()
        self._thread.shutdown(wait=True)
