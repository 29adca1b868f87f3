"""Which policy played a log, by `verify --policy`: of a training run's folder a checkpoint, or a model's folder.

What training step N logs was played by the policy as it was before that step: the checkpoint of step N - 1, for step 1
the model that training began with.
"""

import dataclasses
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import jax
from jax.sharding import Mesh
from ml_collections import ConfigDict

from rlver_jax.config.foreign_weights import is_run
from rlver_jax.config.validate import ConfigError, validate
from rlver_jax.decoding.cache import LM
from rlver_jax.dialogues.verify_policy import LoggedReplies, Policy, verify_replies
from rlver_jax.dialogues.verify_set import Plan, TrainingPlan
from rlver_jax.dialogues.verify_shape import POLICY, RecordSchema
from rlver_jax.dialogues.verify_tokens import TOLERANCES, TokenReport
from rlver_jax.models.qwen import Params, Qwen2, stack_layers
from rlver_jax.rollout.agents import Agents, check_tokenizers, load_model
from rlver_jax.rollout.policy_turn import build_policy_tables
from rlver_jax.rollout.ready import rollout_model, sampling_copy
from rlver_jax.rollout.spec import RolloutConfig
from rlver_jax.user.prompts import load_prompts

if TYPE_CHECKING:  # it imports all that reads checkpoints: only where a policy is named
    from rlver_jax.training.trained_policy import TrainedPolicy

BASE = 0  # as a step: the model that training began with


class NotKeptError(ConfigError):
    """A training run no longer has the policy that played a step."""


class Choice(NamedTuple):
    """The policy that the command line names.

    Attributes:
        checkpoint: a training run's folder, or a Hugging Face folder.
        step: of a training run: best | last | a number; empty: that which played the log, or as `evaluate` chooses.
        path: of a training run, where to take config and tokenizer from; empty: the run's own.
    """

    checkpoint: str
    step: str = ""
    path: str = ""


@dataclasses.dataclass(frozen=True)
class Player:
    """A policy to be loaded."""

    config: ConfigDict  # its `policy` section holds all but where a checkpoint's weights come from
    trained: "TrainedPolicy | None" = None

    def load(self, spec: RolloutConfig) -> Policy:
        """The policy on the device, as one pass over long rows reads it fastest; rounded where it played so."""
        c = reading(self.config.policy)
        lm, tokenizer = load_model(c, "policy", weights=self._weights if self.trained else None)
        played = rollout_model(self.config, lm.model)
        lm = LM(sampling_copy(played)(lm.params), played) if played != lm.model else lm
        prompts = load_prompts(self.config.data.language, self.config.user.prompts or None)
        tables = build_policy_tables(tokenizer, prompts, lm.model.config.vocab_size, spec)
        return Policy(lm, tokenizer, tables, spec, TOLERANCES[c.dtype])

    def _weights(self, model: Qwen2, mesh: Mesh | None) -> Params:
        """Parameters as a run keeps them, stacked."""
        assert self.trained is not None
        if self.trained.config.policy.scan_layers:
            return self.trained.weights(model, mesh)
        return stack_layers(self.trained.weights(model.clone(scan_layers=False), mesh))


def reading(model: ConfigDict) -> ConfigDict:
    """The section of a model that reads long rows and generates nothing."""
    scanned = model.copy_and_resolve_references()
    scanned.scan_layers = True  # unrolling pays for single tokens; a long row only compiles longer
    if jax.default_backend() == "cpu":  # the scores of so few queries stay in the cores' caches
        scanned.attention, scanned.attention_chunk = "chunked", 32
    return scanned


def step_of(record: Mapping[str, Any], plan: Plan) -> int | None:
    """The training step that a dialogue is of; None: an evaluation."""
    return record["dialogue"] // plan.batch + 1 if isinstance(plan, TrainingPlan) else None


def players_of(
    logged: Iterable[tuple[Mapping[str, Any], Plan]], config: ConfigDict, choice: Choice
) -> dict[int | None, Player | NotKeptError]:
    """{training step, None for evaluations: the policy that played it}; nothing is loaded.

    A few dialogues of a step that has no checkpoint don't keep the others from being recomputed: their number may be a
    forged one. An error stands for their policy and says why there is none.

    Args:
        logged: dialogues, by their number at least.
        config: of the logs.

    Raises:
        ConfigError: a dialogue's policy was behind an endpoint; a training run that doesn't keep the checkpoint that
            played a whole step of a log, or any of a log's.
        ValueError, OSError: as `take_checkpoint`.
    """
    steps, whole = Counter[int | None](), Counter[int | None]()
    for record, plan in logged:
        if POLICY in plan.endpoints:
            raise ConfigError(
                f"--policy={choice.checkpoint}: the policy of dialogue {record['dialogue']} was behind an endpoint, so "
                f"nothing of it can be recomputed; leave out --policy"
            )
        step = step_of(record, plan)
        steps[step] += 1
        whole[step] = plan.batch if isinstance(plan, TrainingPlan) and not plan.partial else 1
    players: dict[int | None, Player | NotKeptError] = {}
    for step in steps:
        try:
            players[step] = _player(config.copy_and_resolve_references(), choice, step)
        except NotKeptError as error:
            players[step] = error
    absent = {step: one for step, one in players.items() if isinstance(one, NotKeptError)}
    for step, reason in absent.items():
        if len(absent) == len(players) or steps[step] >= whole[step]:
            raise reason
    return players


def _player(config: ConfigDict, choice: Choice, step: int | None) -> Player:
    from rlver_jax.training.trained_policy import take_checkpoint
    from rlver_jax.training.workdir import RunFolder

    chosen, trained = choice.step, None
    if step is None:
        config.rollout.param_dtype = ""  # an evaluation's policy is as it is trained
    elif is_run(choice.checkpoint):
        _check_rounding(config, choice.checkpoint)
    if step == BASE + 1 and is_run(choice.checkpoint) and not chosen:
        began = RunFolder(Path(choice.checkpoint)).typed_config().policy
        config.policy.path, config.policy.init = choice.path or began.path, began.init
        config.policy.adapter = began.adapter
    else:
        if step is not None and is_run(choice.checkpoint) and not chosen:
            _check_retained(choice.checkpoint, step)
            chosen = str(step - 1)
        if is_run(choice.checkpoint):
            config.policy.adapter = ""  # that training began with: a checkpoint holds it
        trained = take_checkpoint(config, choice.checkpoint, chosen, choice.path)
    validate(config, needs=["policy"])
    return Player(config, trained)


def _check_rounding(config: ConfigDict, folder: str) -> None:
    from rlver_jax.training.workdir import RunFolder

    played, asked = RunFolder(Path(folder)).typed_config().rollout.param_dtype, config.rollout.param_dtype
    if played != asked:
        raise ConfigError(
            f"--policy={folder}: its dialogues were played with rollout.param_dtype={played!r}, found {asked!r}; give "
            f"--config.rollout.param_dtype={played}"
        )


def _check_retained(folder: str, step: int) -> None:
    from rlver_jax.training.checkpoints import saved_steps
    from rlver_jax.training.workdir import RunFolder

    steps = saved_steps(RunFolder(Path(folder)).checkpoints)
    if step - 1 not in steps:
        held = ", ".join(map(str, steps)) or "(none)"
        raise NotKeptError(
            f"--policy={folder}: the dialogues of training step {step} were played by the policy as it was after step "
            f"{step - 1}, of which no checkpoint is kept; there are steps {held}, so that dialogues of the steps after "
            f"those can be recomputed (see checkpoint.every and checkpoint.keep_last); or leave out --policy"
        )


def findings(
    policies: Mapping[int | None, Player | NotKeptError],
    agents: Agents,
    logged: Sequence[tuple[str, Mapping[str, Any], Plan]],
) -> Iterator[tuple[str, TokenReport]]:
    """Recomputes what policies said: (where, what was found) of each dialogue, those of one training step together.

    Args:
        policies: of `players_of`; one is on the device at a time.
        agents: whose tokens the log holds.
        logged: a position for messages, the dialogue, and the plan that it was played by. What has not the shape of a
            dialogue is passed over.

    Raises:
        ValueError, OSError: a policy cannot be loaded, or has another tokenizer.
    """
    schemas = {plan: RecordSchema.of(agents, plan.endpoints) for _, _, plan in logged}
    sound = [(position, record, plan) for position, record, plan in logged if not any(schemas[plan].errors(record))]
    for step, player in policies.items():
        played = [one for one in sound if step_of(*one[1:]) == step]
        if isinstance(player, NotKeptError):
            yield from ((position, TokenReport(faults=[str(player)])) for position, _, _ in played)
            continue
        policy = player.load(agents.spec)
        check_tokenizers(policy.tokenizer, agents.tokenizer)
        replies = verify_replies(policy, [LoggedReplies(record, plan.temperature) for _, record, plan in played])
        yield from zip((position for position, _, _ in played), replies, strict=True)
