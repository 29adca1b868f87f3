"""Supervised fine-tuning: the loop of updates on logged dialogues, with what it is measured on."""

import contextlib
import dataclasses
import functools
import math
import time
from collections.abc import Mapping, Sequence
from typing import Any

import jax
import numpy as np
from jax.sharding import Mesh, NamedSharding, PartitionSpec
from ml_collections import ConfigDict
from rich.console import Console

from rlver_jax.decoding.choice import Options
from rlver_jax.learning import sft_loss
from rlver_jax.learning.optimizer import Optimizers
from rlver_jax.learning.packing import length_ladder, plan_packing
from rlver_jax.learning.sft_loss import FieldLoss
from rlver_jax.learning.sft_rows import Capacity, Choices, Example, Rows, pack_rows
from rlver_jax.learning.train_step import TrainState
from rlver_jax.models.qwen import Params
from rlver_jax.parallel import distributed
from rlver_jax.parallel.mesh import batch_parts
from rlver_jax.profiles.reader import ProfileReader
from rlver_jax.training.alarms import CollapseError
from rlver_jax.training.progress import FittingProgress
from rlver_jax.training.run_loop import RunLoop
from rlver_jax.training.setup import state_shardings
from rlver_jax.training.sft_data import Dialogues
from rlver_jax.training.sft_examples import CHANGE
from rlver_jax.training.sft_metrics import change_agreement, expected_change
from rlver_jax.training.workdir import RunFolder


@dataclasses.dataclass(frozen=True)
class Fit:
    """What stays the same through a run."""

    mesh: Mesh
    of: FieldLoss
    optimizers: Optimizers
    dialogues: Dialogues
    fields: Sequence[str]
    weights: np.ndarray  # float64 [F]
    options: Options | None  # of a change
    teaches_appraisal: bool  # whether a logged appraisal stands before each logged change
    base: Params | None = None  # that the adapter stands on; None: all parameters are trained

    @functools.cached_property
    def capacity(self) -> Capacity:
        """Of rows of any of the dialogues."""
        return Capacity.of([*self.dialogues.learned, *self.dialogues.held_out])

    def rows(self, examples: Sequence[Example], ladder: Sequence[int], padding: float) -> tuple[Rows, Choices]:
        """Dialogues in shared rows, [reads, width, …], on the host."""
        lengths, width = np.array([len(one) for one in examples]), batch_parts(self.mesh)
        length, plan = plan_packing(lengths, np.arange(len(examples))[None], ladder, width, padding)
        return pack_rows(examples, plan.whole, length, width, self.capacity)

    def counts(self, examples: Sequence[Example]) -> np.ndarray:
        """float64 [F]: N_f of `sft_loss`."""
        field, share = (np.concatenate([getattr(one, name) for one in examples]) for name in ("field", "share"))
        return np.bincount(field, share.astype(np.float64), len(self.fields))

    def losses(self, prefix: str, examples: Sequence[Example], sums: Any) -> dict[str, float]:
        """The loss, and each field's: nats a token, of a change nats a change; those of fields that are there."""
        counts = self.counts(examples)
        total = (self.weights * counts).sum()
        losses = {f"{prefix}loss": float((self.weights * sums).sum() / total) if total else 0.0}
        for name, count, loss in zip(self.fields, counts, sums, strict=True):
            per = sum(len(one.changes) for one in examples) if name == CHANGE and self.options is not None else count
            if count:
                losses[f"{prefix}loss_{name}"] = float(loss / per)
        return losses


@dataclasses.dataclass
class _Pending:
    """A step whose losses have not been fetched yet."""

    number: int
    examples: Sequence[Example]
    sums: list[jax.Array]  # of each read
    metrics: dict[str, jax.Array]
    known: dict[str, float]
    evaluation: dict[str, float] = dataclasses.field(default_factory=dict)


class Fitter(RunLoop):
    """One run in its folder: `train` is the loop, the other methods are its steps."""

    progress_type = FittingProgress

    def __init__(self, config: ConfigDict, folder: RunFolder, fit: Fit, state: TrainState, console: Console):
        """`state`: before the first step; of it only shapes and shardings are looked at."""
        super().__init__(config, folder, console)
        self.fit = fit
        learned, held_out = fit.dialogues.learned, fit.dialogues.held_out
        longest = max(len(one) for one in (*learned, *held_out))
        self.ladder = length_ladder(longest, config.train.length_buckets)
        self.reader: Any = ProfileReader(learned, seed=config.data.seed, batch_size=config.sft.batch)  # type: ignore[arg-type]
        self.held_out = fit.rows(held_out, self.ladder, config.train.padding) if held_out else None
        shardings = state_shardings(state.params, fit.optimizers, fit.mesh)
        whole = NamedSharding(fit.mesh, PartitionSpec())
        params = shardings.params["policy"]
        jit = lambda function, of, **options: jax.jit(functools.partial(function, of), **options)  # noqa: E731
        self.zero = jit(sft_loss.zero_gradient, fit.of, out_shardings=params)
        self.add = jit(sft_loss.add_gradient, fit.of, donate_argnums=1, out_shardings=(params, whole))
        self.update = jit(sft_loss.update, fit.optimizers, donate_argnums=0, out_shardings=(shardings, whole))
        self.measure = jit(sft_loss.measure, fit.of, out_shardings=whole)
        self.pending: _Pending | None = None

    @property
    def evaluates_first(self) -> bool:
        """Whether held-out dialogues are measured before the first step."""
        return self.held_out is not None

    def train(self, state: TrainState) -> int:
        """Trains to the last step or until SIGTERM; returns the number of steps done.

        Raises:
            CollapseError: a loss or a gradient is no number; what was saved before stays.
        """
        state, done = self.resume(state)
        steps = self.config.train.steps
        with self.writers(done), distributed.stop_signal(done) as stop, contextlib.closing(self.checkpoints):
            if not done and self.evaluates_first:
                self.write(0, self.evaluate(state))
            stopped = stop(done)
            while done < steps and not stopped:
                state = self.step(state, done + 1)
                done += 1
                stopped = stop(done)
                due = self.held_out is not None and (done % self.config.sft.eval_every == 0 or done == steps)
                if due and self.pending:
                    self.pending.evaluation = self.evaluate(state)
                if due or done == steps or stopped or done % self.config.checkpoint.every == 0:
                    self.save(state, done)
        if done >= steps and distributed.is_main():
            self.folder.mark_finished(done)
        return done

    def step(self, state: TrainState, number: int) -> TrainState:
        """One update on the next dialogues."""
        examples: list[Any] = [one for _, one in self.reader.next_batch()]
        rows, _ = self.fit.rows(examples, self.ladder, self.config.train.padding)
        weighted = self.fit.weights * self.fit.counts(examples)
        weights = self.on_device(np.float32(self.fit.weights / (weighted.sum() or 1.0)))
        sums, microbatches = [], rows.tokens.shape[0]
        parts = [self.microbatch(rows, i) for i in range(microbatches)]
        with jax.transfer_guard("disallow"), jax.set_mesh(self.fit.mesh):
            params = state.params["policy"]
            total = self.zero(params)
            for part in parts:
                total, part_sums = self.add(params, total, part, weights, self.fit.base)
                sums.append(part_sums)
            state, metrics = self.update(state, total)
        self.finish()  # the step before, while this one is computed
        packed, padded = sum(map(len, examples)), rows.tokens.size
        known = {"tokens/packed": packed, "tokens/padded": padded, "tokens/padding": 1 - packed / padded}
        known |= {"tokens/learned": sum(len(one.at) for one in examples)}
        known["data/epoch"] = number * self.config.sft.batch / len(self.fit.dialogues.learned)
        self.pending = _Pending(number, examples, sums, metrics, {name: float(x) for name, x in known.items()})
        return state

    def microbatch(self, rows: Any, index: int) -> Any:
        """One read of rows, spread over the mesh."""
        width = batch_parts(self.fit.mesh)
        return jax.tree.map(lambda x: distributed.rows_on(self.fit.mesh, width, lambda part: x[index][part]), rows)

    def on_device(self, tree: Any) -> Any:
        """Small arrays, whole on every device."""
        return distributed.replicate(tree, self.fit.mesh)

    def evaluate(self, state: TrainState) -> dict[str, float]:
        """`held_out/…`: losses, and how well the expected change agrees with the logged one.

        Where a logged appraisal stands before the change, it gives away what the user felt: such figures are named so.
        """
        assert self.held_out is not None
        jax.block_until_ready(state)
        began, (rows, choices) = time.monotonic(), self.held_out
        parts = []
        for i in range(rows.tokens.shape[0]):
            part, first = self.microbatch(rows, i), self.microbatch(choices.first, i)
            with jax.transfer_guard("disallow"), jax.set_mesh(self.fit.mesh):
                policy = state.params["policy"]
                parts.append(self.measure(policy, part, self.fit.options, first, self.fit.base))
        fetched = distributed.fetch(parts)
        sums = np.sum([sums for sums, _ in fetched], axis=0, dtype=np.float64)
        metrics = self.fit.losses("held_out/", self.fit.dialogues.held_out, sums)
        real = choices.first > 0
        if self.fit.options is not None and real.any():
            logprobs = np.stack([logprobs for _, logprobs in fetched])
            logged = (choices.change[real], choices.emotion[real], choices.reply[real])
            agreement = change_agreement(expected_change(logprobs[real]), *logged)
            suffix = "_given_appraisal" if self.fit.teaches_appraisal else ""
            metrics |= {f"held_out/change_{name}{suffix}": value for name, value in agreement.items()}
        return metrics | {"time/held_out_s": time.monotonic() - began}

    def finish(self) -> None:
        """Fetches, checks and writes the metrics of the pending step; every process checks, one writes."""
        if self.pending is None:
            return
        step, self.pending = self.pending, None
        sums, metrics = distributed.fetch((step.sums, step.metrics))
        now = time.monotonic()
        row = self.fit.losses("sft/", step.examples, np.sum(sums, axis=0, dtype=np.float64))
        row |= {name: float(value) for name, value in metrics.items()} | step.known | step.evaluation
        row["time/step_s"] = now - self.last_finished - step.evaluation.get("time/held_out_s", 0.0)
        self.last_finished = now
        self.write(step.number, row)
        for name in ("sft/loss", "policy/grad_norm"):
            if not math.isfinite(row[name]):
                raise CollapseError(
                    f"step {step.number}: {name} is {row[name]}, so this update was left out. Lower "
                    f"train.learning_rate, raise train.warmup_steps, or keep the weights in float32 (param_dtype)"
                )
        self.progress.update(step.number, row)

    def save(self, state: TrainState, done: int) -> None:
        """Saves the state with everything needed to resume; its metrics are written first. The best has least loss."""
        loss = self.pending.evaluation.get("held_out/loss") if self.pending else None
        self.finish()
        distributed.all_or_none(self.folder.check)
        self.checkpoints.save(done, state, {"reader": self.reader.state()}, None if loss is None else -loss)

    def take_over(self, extra: Mapping[str, Any]) -> None:
        """The reader's position."""
        self.reader.restore(extra["reader"])
