"""What the loops of `rlver train` and `rlver sft` share: checkpoints, metrics, progress, and how a run resumes."""

import contextlib
import time
from collections.abc import Callable, Iterator, Mapping
from typing import Any

import jax
from ml_collections import ConfigDict
from rich.console import Console

from rlver_jax.config.validate import flatten
from rlver_jax.learning.train_step import TrainState
from rlver_jax.parallel import distributed
from rlver_jax.runs.settings import without_secrets
from rlver_jax.training.checkpoints import Checkpoints
from rlver_jax.training.metrics_file import MetricsWriter
from rlver_jax.training.progress import TrainingProgress
from rlver_jax.training.workdir import RunFolder


class RunLoop:
    """A run in its folder."""

    progress_type = TrainingProgress

    def __init__(self, config: ConfigDict, folder: RunFolder, console: Console):
        """Opens the checkpoints."""
        self.config, self.folder, self.console = config, folder, console
        self.checkpoints = Checkpoints(
            folder.checkpoints, keep_last=config.checkpoint.keep_last, keep_best=config.checkpoint.keep_best
        )
        self.last_finished = time.monotonic()
        # Opened by `writers`, when it is known after which step the run resumes.
        self.writer: MetricsWriter | None = None
        self.progress = self.progress_type(console, config.train.steps, 0)

    @property
    def evaluates_first(self) -> bool:
        """Whether the metrics have a row of step 0."""
        raise NotImplementedError

    def take_over(self, extra: Mapping[str, Any]) -> None:
        """Sets what a checkpoint holds beside the state: at least the reader's position."""
        raise NotImplementedError

    def resume(self, state: TrainState) -> tuple[TrainState, int]:
        """The newest state saved, in place of this one, whose buffers are freed; and its number of steps.

        Without one this state stays, and the run begins anew, as does what its folder holds.
        """
        like = state
        if self.checkpoints.steps():
            like = _free_buffers(state)  # two states at once may not fit the devices
        distributed.all_or_none(self.folder.check)
        restored = self.checkpoints.restore(like, report=self.notify)
        if restored is None:
            if distributed.is_main():
                self.folder.drop_after(0)
                if self.folder.has_rows():
                    self.notify("no checkpoint is there to resume from: begins again at step 1, and so do the metrics")
            return state, 0
        self.take_over(restored.extra)  # before anything is dropped: it may not fit
        if distributed.is_main():
            self.folder.drop_after(restored.step)
        self.notify(f"resuming after step {restored.step} of {self.config.train.steps}")
        return restored.state, restored.step

    def write(self, step: int, row: dict[str, float]) -> None:
        """Appends a step's row to the metrics."""
        if self.writer is not None:
            self.folder.check()
            self.writer.write(step, row)

    def notify(self, text: str) -> None:
        """A line on the console."""
        self.console.print(text, markup=False, highlight=False, soft_wrap=True)

    @contextlib.contextmanager
    def writers(self, done: int) -> Iterator[None]:
        """Metrics and progress, open; metrics on process 0 alone."""
        self.writer = self._open_metrics(done)
        closing: Callable[..., Any] = contextlib.closing if self.writer else contextlib.nullcontext
        with closing(self.writer), self.progress_type(self.console, self.config.train.steps, done) as progress:
            self.progress, self.last_finished = progress, time.monotonic()
            yield

    def _open_metrics(self, done: int) -> MetricsWriter | None:
        settings = {
            "tensorboard": self.config.log.tensorboard,
            "wandb": self.config.log.wandb,
            "config": without_secrets(flatten(self.config)),
            "resume_step": done,
            "report": self.notify,
            "evaluates_first": self.evaluates_first,
        }
        main = distributed.is_main()
        return distributed.all_or_none(lambda: MetricsWriter(self.folder.path, **settings) if main else None)


def _free_buffers(state: TrainState) -> TrainState:
    """Frees a state's arrays; returns their shapes, dtypes and shardings, for another state to be read into."""
    like = jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=x.sharding), state)
    for leaf in jax.tree.leaves(state):
        leaf.delete()
    return like
