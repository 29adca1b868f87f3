"""The training loop: rollout, reward, update, log, checkpoint (RLVER, arXiv 2507.03112, section 2)."""

import contextlib
import dataclasses
import functools
import time
from collections.abc import Collection, Iterator, Mapping
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh
from jaxtyping import Array
from ml_collections import ConfigDict
from rich.console import Console

from rlver_jax.config.hub import local_folder
from rlver_jax.config.validate import reward_settings
from rlver_jax.decoding.cache import LM
from rlver_jax.dialogues.log import Record, dialogue_records, write_dialogues
from rlver_jax.dialogues.own_functions import OwnFunctionError, OwnFunctions, means_of
from rlver_jax.endpoints.errors import EndpointError
from rlver_jax.evaluation import play as evaluation
from rlver_jax.evaluation.play import Evaluation
from rlver_jax.learning.train_step import TrainState
from rlver_jax.models.lora import join, same_arrays, split
from rlver_jax.models.qwen import Qwen2
from rlver_jax.parallel import distributed
from rlver_jax.profiles.reader import Batch
from rlver_jax.profiles.sources import open_profiles
from rlver_jax.rollout.agents import Agents
from rlver_jax.rollout.ready import rollout_model, sampling_copy
from rlver_jax.rollout.rewards import Rewards
from rlver_jax.rollout.rollout_metrics import rollout_metrics
from rlver_jax.rollout.sampler import Dialogues
from rlver_jax.rollout.spec import check_context
from rlver_jax.runs.fingerprints import OWN, described, run_fingerprints
from rlver_jax.runs.lock import hold
from rlver_jax.training.alarms import CollapseError, check
from rlver_jax.training.learners import lora_of, playing_copy
from rlver_jax.training.overlap import Overlap
from rlver_jax.training.own_rewards import as_rewards
from rlver_jax.training.programs import order_program, pack_program, score_program
from rlver_jax.training.run_loop import RunLoop
from rlver_jax.training.setup import Run, build_run, check_learning, folders_of, models_of
from rlver_jax.training.stops import Spending, StoppedError
from rlver_jax.training.text_rollout import TextBatch, TextEvaluation, TextRollout, counted_rows
from rlver_jax.training.text_users import check_users, open_text_rollout
from rlver_jax.training.workdir import Contents, RunFolder
from rlver_jax.user.profile_warnings import profile_warnings


@dataclasses.dataclass
class Step:
    """A step whose metrics have not been fetched yet: the device is left alone until the next one is under way."""

    number: int
    batch: Batch
    ids: list[int]
    dialogues: Dialogues
    rewards: Rewards
    metrics: dict[str, Array]
    times: dict[str, float]
    learning_since: float
    text: TextBatch | None  # where users answer by text
    spent: float  # on requests, this step's included
    records: list[Record] | None  # with what a user's own functions say; None: there are none
    evaluated: dict[str, float] = dataclasses.field(default_factory=dict)


class Trainer(RunLoop):
    """One run in its folder: `train` is the loop, the other methods are its steps."""

    def __init__(
        self,
        config: ConfigDict,
        folder: RunFolder,
        run: Run,
        held_out: Evaluation | TextEvaluation | None,
        console: Console,
        text: TextRollout | None = None,
    ):
        """`text`: plays the dialogues of a run whose users answer by text."""
        super().__init__(config, folder, console)
        self.run, self.held_out = run, held_out
        self.text = text
        self.overlap = Overlap(text) if text and config.rollout.overlap else None
        self.spending = Spending(config.remote.budget)
        self.evaluated_model = run.agents.policy.model
        self.rollout_model = rollout_model(config, self.evaluated_model)
        self.copy_policy = functools.cache(
            lambda model: playing_copy(model, lora_of(config), run.base, run.agents.mesh)
        )
        self.copy_user = sampling_copy(run.agents.user.model, run.agents.mesh)
        self.key = distributed.replicate(jax.random.key(config.train.seed), run.mesh)
        self.score, self.pack, self.order = score_program(run.mesh), pack_program(run.mesh), order_program(run.mesh)
        self.reward_settings = tuple(sorted(reward_settings(config).items()))
        self.own = OwnFunctions.of(config)
        self.pending: Step | None = None

    @property
    def evaluates_first(self) -> bool:
        """Whether the untrained policy is evaluated."""
        return bool(self.config.eval.every)

    def train(self, state: TrainState) -> int:
        """Trains to the last step or until SIGTERM; returns the number of steps done.

        Raises:
            CollapseError: an alarm; what was saved before stays.
            StoppedError: requests have cost what they may, or users stay away; the state is saved.
        """
        # 1. Newest whole checkpoint, if there is one  2. the reader's position  3. metrics and dialogues up to there
        state, done = self.resume(state)
        steps = self.config.train.steps
        ahead = contextlib.closing(self.overlap) if self.overlap else contextlib.nullcontext()
        with self.writers(done), distributed.stop_signal(done) as stop, contextlib.closing(self.checkpoints), ahead:
            if not done:
                with self.saved_on_failure(state, done):
                    self.evaluate_untrained(state)
            stopped = stop(done)
            while done < steps and not stopped:
                self.spending.check(done)
                with self.saved_on_failure(state, done):
                    state = self.step(state, done + 1)
                done += 1
                stopped = stop(done) or self.spending.used_up
                every = self.config.eval.every
                due = every and (done % every == 0 or done == steps)
                if due and self.pending:
                    with self.saved_on_failure(state, done):
                        self.pending.evaluated = self.evaluate(state)
                if due or done == steps or stopped or done % self.config.checkpoint.every == 0:
                    self.save(state, done)
        if done >= steps and distributed.is_main():
            self.folder.mark_finished(done)
        elif done < steps:
            self.spending.check(done)
        return done

    def step(self, state: TrainState, number: int) -> TrainState:
        """Plays a batch of dialogues with the policy as it is, and learns from it."""
        run, started = self.run, time.monotonic()
        size, tables, spec = self.config.rollout.batch, run.agents.tables[0], run.agents.spec
        batch, ids, dialogues, text = self.play(state, number)
        dispatched = time.monotonic()
        with jax.transfer_guard("disallow"), jax.set_mesh(run.agents.mesh):
            rewards, lengths, turns = self.score(dialogues, tables, spec, self.reward_settings)
        rewards = self.judge(dialogues, rewards, batch)
        if text:
            rewards = dataclasses.replace(rewards, counted=jax.device_put(text.counted, rewards.reward.sharding))
        self.finish()  # the step before, while this one is being played
        rewards, records = self.call_functions(batch, ids, dialogues, text, rewards)
        updates = self.order(run.setup.update, self.key, state.step, size)
        length, plan = run.plan_rows(*jax.device_get((lengths, updates, turns)))
        plan = distributed.replicate(plan, run.mesh)
        began, played = max(started, self.last_finished), time.monotonic()
        with jax.transfer_guard("disallow"), jax.set_mesh(run.agents.mesh):
            packed = self.pack(dialogues, tables, spec, run.limits, length)
        with jax.transfer_guard("disallow"), jax.set_mesh(run.mesh):
            state, metrics = run.learn(state, packed, rewards, run.grammar, self.key, run.reference, plan, run.base)
        times = {"time/rollout_s": played - began, "time/dispatch_s": dispatched - started}
        metrics["tokens/padded"] = jnp.float32(run.padded_tokens(length, plan))
        spent = self.spending.total
        self.pending = Step(number, batch, ids, dialogues, rewards, metrics, times, played, text, spent, records)
        return state

    def play(self, state: TrainState, number: int) -> tuple[Batch, list[int], Dialogues, TextBatch | None]:
        """Plays a step's batch: profiles, dialogues' numbers and dialogues, and what was said where users give text."""
        run = self.run
        if self.text is None:
            batch, ids = self.next_batch(number)
            profiles = run.tokens.batch([index for index, _ in batch], ids, mesh=run.agents.mesh)
            # The sampler's copies of both models are let go before the update, which has no room for them.
            with jax.transfer_guard("disallow"), jax.set_mesh(run.agents.mesh):
                return batch, ids, self.agents(state).play(profiles, self.key, run.limits), None
        self.finish()  # the step before, whose alarms come before anything else is asked
        ahead = self.overlap.take() if self.overlap else None
        batch, ids = (ahead.batch, ahead.ids) if ahead else self.next_batch(number)
        text = ahead.playing.result() if ahead else self.text.play(self.agents(state).policy, batch, ids)
        self.spending.add(text.cost)
        if self.overlap and not self.due(number) and not self.spending.used_up:
            before = run.reader.state()
            self.overlap.begin(self.agents(state).policy, *self.next_batch(number + 1), before)
        return batch, ids, run.agents.replicate(text.dialogues), text

    def next_batch(self, number: int) -> tuple[Batch, list[int]]:
        """The profiles of a step, and its dialogues' numbers."""
        size = self.config.rollout.batch
        return self.run.reader.next_batch(), [(number - 1) * size + i for i in range(size)]

    def due(self, done: int) -> bool:
        """Whether the state is evaluated or saved after this step, whatever happens."""
        every = (self.config.eval.every, self.config.checkpoint.every, self.config.train.steps)
        return any(n and done % n == 0 for n in every)

    def reader_state(self) -> dict[str, int]:
        """Of the reader after the steps that are done: what is played ahead will be read again."""
        ahead = self.overlap.ahead if self.overlap else None
        return dict(ahead.reader) if ahead else self.run.reader.state()

    @contextlib.contextmanager
    def saved_on_failure(self, state: TrainState, done: int) -> Iterator[None]:
        """Saves what there is when users stay away from a step or an evaluation; the same command resumes with it."""
        reader = self.reader_state()
        try:
            yield
        except (EndpointError, StoppedError) as error:
            self.run.reader.restore(reader)
            self.finish()
            if done and done not in self.checkpoints.steps():
                self.save(state, done)
            raise StoppedError(f"after step {done}: {error}") from error

    def judge(self, dialogues: Dialogues, rewards: Rewards, batch: Batch) -> Rewards:
        """What the policy learns from: the user's own rewards. Experiments override it."""
        return rewards

    def call_functions(
        self, batch: Batch, ids: list[int], dialogues: Dialogues, text: TextBatch | None, rewards: Rewards
    ) -> tuple[Rewards, list[Record] | None]:
        """What a user's own functions make of a step: its rewards, and its dialogues as a log has them.

        Raises:
            StoppedError: a function failed.
        """
        if not (self.own.reward or self.own.metrics):
            return rewards, None
        host, earned = distributed.fetch((dialogues, rewards.reward))
        records = self.records(batch, ids, host, text, earned)
        profiles = [profile for _, profile in batch for _ in range(len(ids) // len(batch))]
        try:
            records = self.own.apply(records, profiles, evaluation=False)
        except OwnFunctionError as error:
            raise StoppedError(f"{error}; docs/extending.md says how to resume") from error
        return as_rewards(records, rewards) if self.own.reward else rewards, records

    def records(
        self, batch: Batch, ids: list[int], dialogues: Dialogues, text: TextBatch | None, rewards: np.ndarray
    ) -> list[Record]:
        """Dialogues on the host as a log has them."""
        if self.text is not None and text is not None:
            return self.text.records(text, rewards)
        profiles, seed = [profile for _, profile in batch], self.config.train.seed
        return dialogue_records(dialogues, self.run.agents, profiles, ids, seed=seed, rewards=rewards)

    def agents(self, state: TrainState, model: Qwen2 | None = None) -> Agents:
        """The run's agents with the policy of this state, both ready to play; users by text have no model here.

        Args:
            model: the policy's module; None: as it plays dialogues of training.
        """
        user, base = self.run.agents.user, self.run.base
        model = model or self.rollout_model
        policy = LM(self.copy_policy(model)(state.params["policy"]), model)
        if self.text is not None:
            return dataclasses.replace(self.run.agents, policy=policy)
        own, adapter = split(user.params)
        if base is not None and same_arrays(own, base.policy):  # one copy serves both
            params = join(split(policy.params)[0], adapter)
        else:
            params = self.copy_user(user.params)
        return dataclasses.replace(self.run.agents, policy=policy, user=LM(params, user.model))

    def finish(self) -> None:
        """Fetches, checks and writes the metrics of the pending step; every process checks, one writes."""
        if self.pending is None:
            return
        step, self.pending = self.pending, None
        metrics, dialogues, rewards = distributed.fetch((step.metrics, step.dialogues, step.rewards))
        self.last_finished = time.monotonic()
        row = self.rollout_metrics(step, dialogues, rewards.reward) | means_of(step.records or ())
        row |= {name: float(value) for name, value in metrics.items()} | step.times | step.evaluated
        row["time/update_s"] = self.last_finished - step.learning_since - row.get("time/eval_s", 0.0)
        row["tokens/padding"] = 1 - row["tokens/packed"] / row["tokens/padded"]
        every = self.config.log.dialogues_every
        problem = check(row, self.config.alarms.to_dict(), step.number)
        if distributed.is_main() and (problem or (every and (step.number % every == 0 or step.number == 1))):
            self.log_dialogues(step, dialogues, rewards.reward)
        self.write(step.number, row)
        self.progress.update(step.number, row)
        if problem:
            raise CollapseError(f"{problem}. The dialogues are in {self.folder.dialogues(step.number)}")

    def rollout_metrics(self, step: Step, dialogues: Dialogues, rewards: np.ndarray) -> dict[str, float]:
        """Metrics of a step's dialogues; those that are left out count in none but their own."""
        agents, text = self.run.agents, step.text
        settings: dict[str, Any] = {"tokenizer": agents.tokenizer, "max_change": agents.spec.rules.max_change}
        if text is None:
            return rollout_metrics(dialogues, rewards, **settings)
        counted = text.counted
        row = rollout_metrics(counted_rows(dialogues, counted), rewards[counted], **settings)
        return text.metrics(row) | {"remote/cost_total": step.spent}

    def log_dialogues(self, step: Step, dialogues: Dialogues, rewards: np.ndarray) -> None:
        """Writes all dialogues of a step, so that `verify` can recompute them."""
        records = step.records or self.records(step.batch, step.ids, dialogues, step.text, rewards)
        self.folder.check()
        write_dialogues(self.folder.dialogues(step.number), records)

    def evaluate(self, state: TrainState) -> dict[str, float]:
        """`eval/…` of the policy on the held-out profiles."""
        assert self.held_out is not None
        jax.block_until_ready(state)  # an update that is under way counts as such
        began = time.monotonic()
        metrics = self.held_out.metrics(self.agents(state, self.evaluated_model))
        self.spending.add(metrics.get("eval/cost", 0.0))
        return metrics | {"time/eval_s": time.monotonic() - began}

    def evaluate_untrained(self, state: TrainState) -> None:
        """Row 0 of the metrics: what the policy scores before any step."""
        if self.evaluates_first:
            self.progress.note("evaluating the untrained policy")
            metrics = self.evaluate(state)
            self.write(0, metrics)
            self.progress.note(f"untrained policy: eval/score {metrics['eval/score']:.2f}")

    def save(self, state: TrainState, done: int) -> None:
        """Saves the state with everything needed to resume; its metrics are written first."""
        scored = self.pending.evaluated.get("eval/score") if self.pending else None
        self.finish()
        distributed.all_or_none(self.folder.check)
        spent = {"spent": self.spending.total} if self.text is not None else {}
        self.checkpoints.save(done, state, {"reader": self.reader_state()} | spent, scored)

    def take_over(self, extra: Mapping[str, Any]) -> None:
        """The reader's position, and what the run has spent."""
        self.run.reader.restore(extra["reader"])
        self.spending.total = extra.get("spent", 0.0)


def train(
    config: ConfigDict,
    workdir: str | Path,
    mesh: Mesh,
    console: Console,
    gold: evaluation.Gold | None = None,
    trainer: type[Trainer] = Trainer,
) -> int:
    """Trains in `workdir`, or resumes there; returns the number of steps done.

    Args:
        gold: judges evaluations beside the user.
        trainer: a subclass for an experiment.

    Raises:
        ValueError, OSError: bad input, before anything is compiled.
        CollapseError: a metric went beyond the limits of config.alarms.
    """
    check_learning(config)
    check_users(config)
    OwnFunctions.of(config)  # tried now, not after minutes of loading
    notify = lambda text: console.print(text, markup=False, highlight=False, soft_wrap=True)  # noqa: E731
    check_context(RunFolder(Path(workdir)).to_load(config), *models_of(config))  # before weights are looked at
    with hold(workdir, "--workdir", notify) as lock:
        contents = Contents(lambda gone: fingerprints_of(config, gone), lambda name: described(name, config))
        folder = RunFolder.open(workdir, config, contents=contents, check=lock.check, report=notify)
        with console.status("loading models and profiles"):
            run, state = build_run(folder.to_load(config), mesh)
            text = open_text_rollout(config, run, folder.path) if run.widest else None
            held_out: Evaluation | TextEvaluation | None = None
            profiles = evaluation.chosen_profiles(config) if config.eval.every else None
            for odd in profile_warnings(config, run.profiles, profiles):
                notify(f"warning: {odd}")
            if profiles is not None:
                of_agents = functools.partial(evaluation.of_agents, config, run.agents)
                held_out = TextEvaluation.of(text, profiles, gold) if text else of_agents(profiles, gold)
        with contextlib.closing(text.users) if text else contextlib.nullcontext():
            return trainer(config, folder, run, held_out, console, text).train(state)


def fingerprints_of(config: ConfigDict, gone: Collection[str] = ()) -> dict[str, str]:
    """Of all that a run reads: profiles, prompts and models; see `runs.fingerprints.run_fingerprints`.

    Args:
        gone: models whose folders are not at hand, nor needed.
    """
    profiles = {"data.train": open_profiles(config, "data.train")}
    if config.eval.every:
        profiles["data.eval"] = evaluation.chosen_profiles(config)
    models = {}
    for name, (path, weights) in folders_of(config).items():
        path = path or (config.policy.path if name in ("critic", "reference") else "")
        if path and name not in gone:  # where none is named the loader says so
            models[name] = (local_folder(path, weights=weights), weights)
    own = {f"{OWN}.{name}": source for name, source in OwnFunctions.of(config).sources().items()}
    return run_fingerprints(config, profiles, models) | own
