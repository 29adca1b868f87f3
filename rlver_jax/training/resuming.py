"""How a run goes on where it stopped: its newest state, and its metrics up to there."""

from collections.abc import Callable

import jax
from ml_collections import ConfigDict

from rlver_jax.config.validate import flatten
from rlver_jax.learning.train_step import TrainState
from rlver_jax.parallel import distributed
from rlver_jax.runs.settings import without_secrets
from rlver_jax.training.checkpoints import Checkpoints, Restored
from rlver_jax.training.metrics import MetricsWriter
from rlver_jax.training.workdir import RunFolder

Notify = Callable[[str], None]


def newest(folder: RunFolder, checkpoints: Checkpoints, state: TrainState, notify: Notify) -> Restored | None:
    """The newest state that was saved, in place of `state`, whose buffers are freed.

    None where there is none: `state` stays, and the run begins anew, as does what its folder holds.
    """
    like = state
    if checkpoints.steps():
        like = free_buffers(state)  # two states at once may not fit the devices
    distributed.all_or_none(folder.check)
    restored = checkpoints.restore(like, report=notify)
    if restored is None and distributed.is_main():
        folder.drop_after(0)
        if folder.has_rows():
            notify("no checkpoint is there to resume from: begins again at step 1, and so do the metrics")
    return restored


def begin_after(step: int, steps: int, folder: RunFolder, notify: Notify) -> None:
    """Drops what was played after the step that a run goes on from."""
    if distributed.is_main():
        folder.drop_after(step)
    notify(f"resuming after step {step} of {steps}")


def open_metrics(
    config: ConfigDict, folder: RunFolder, done: int, notify: Notify, *, measured_first: bool | None = None
) -> MetricsWriter | None:
    """The writer of a run's metrics after so many steps; None on all processes but the first.

    Args:
        measured_first: whether there is a row of step 0; by default where eval.every is set.
    """
    settings = {
        "tensorboard": config.log.tensorboard,
        "wandb": config.log.wandb,
        "config": without_secrets(flatten(config)),
        "resume_step": done,
        "report": notify,
        "measured_first": measured_first,
    }
    return distributed.all_or_none(lambda: MetricsWriter(folder.path, **settings) if distributed.is_main() else None)


def free_buffers(state: TrainState) -> TrainState:
    """Frees a state's arrays; returns their shapes, dtypes and shardings, for another state to be read into."""
    like = jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=x.sharding), state)
    for leaf in jax.tree.leaves(state):
        leaf.delete()
    return like
