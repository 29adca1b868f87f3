"""From a config to everything that a training run holds: agents, profiles, what is trained, the first state."""

import dataclasses
from collections.abc import Callable, Collection, Sequence
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax.sharding import Mesh, NamedSharding, PartitionSpec
from ml_collections import ConfigDict

from rlver_jax.config.sections import keywords
from rlver_jax.config.validate import ConfigError, choice_fault
from rlver_jax.decoding.cache import LM
from rlver_jax.decoding.grammar import Grammar
from rlver_jax.learning.advantages import ESTIMATORS, AdvantageConfig
from rlver_jax.learning.loss import Base, LossConfig, Trained, TrainedModels
from rlver_jax.learning.loss_terms import KL_ESTIMATORS, NORMALIZATIONS, RATIOS
from rlver_jax.learning.optimizer import Optimizers, make_optimizer
from rlver_jax.learning.packing import PackingPlan, group_by_turns, length_ladder, plan_packing, plan_turns
from rlver_jax.learning.sequences import max_length
from rlver_jax.learning.train_step import TrainState, TrainStepConfig, UpdateConfig, compile_step, init_state
from rlver_jax.models.qwen import Params, Qwen2
from rlver_jax.parallel.distributed import replicate
from rlver_jax.parallel.mesh import batch_parts, sampling_mesh
from rlver_jax.profiles.reader import ProfileReader
from rlver_jax.profiles.schema import Profile
from rlver_jax.profiles.sources import open_profiles
from rlver_jax.rollout.agents import Agents, limits_of, load_model, spec_of, tokenizers_differ
from rlver_jax.rollout.profile_tokens import WIDTH_STEP, EncodedProfile, ProfileTokens, measure_profiles, widest_words
from rlver_jax.rollout.sampler import room_needed
from rlver_jax.rollout.spec import RolloutConfig, RolloutLimits, check_context
from rlver_jax.training.learners import (
    LOADED,
    Weights,
    as_trained,
    has_critic,
    learners,
    lora_of,
    reference_is_base,
    reference_params,
    value_head_of,
)
from rlver_jax.user.prompts import load_prompts

# Fields whose values are names in a registry: a new entry there needs no word of it here, nor in the config.
REGISTRIES: dict[str, Collection[str]] = {
    "algorithm.estimator": ESTIMATORS,
    "loss.ratio": RATIOS,
    "loss.normalization": NORMALIZATIONS,
    "loss.kl_estimator": KL_ESTIMATORS,
}


class Learning(NamedTuple):
    """What is trained, and the update that trains it."""

    setup: TrainStepConfig
    state: TrainState  # before the first step
    lengths: tuple[int, ...]  # that packed rows may have, rising
    reference: Params | None  # for the KL penalty; None: there is none, or it is the base
    base: Base | None  # with LoRA: what the state's adapters stand on


@dataclasses.dataclass(frozen=True)
class Run:
    """What stays the same through a run."""

    config: ConfigDict
    mesh: Mesh  # of training; agents.mesh is that of sampling
    agents: Agents  # with the policy that training starts from
    profiles: Sequence[Profile]
    tokens: ProfileTokens  # with users by text, the profiles' first words alone
    reader: ProfileReader
    limits: RolloutLimits
    setup: TrainStepConfig
    learn: Callable[..., tuple[TrainState, dict[str, jax.Array]]]  # `train_step`, jitted
    lengths: tuple[int, ...]  # that packed rows may have, rising
    grammar: Grammar  # the policy's, on the training mesh
    reference: Params | None  # for the KL penalty; None: there is none, or it is the base
    base: Base | None  # with LoRA: what the state's adapters stand on
    widest: int = 0  # users by text: the longest words that the policy hears, in tokens; 0: all play in tokens

    def plan_rows(
        self, lengths: np.ndarray, minibatches: np.ndarray, turns: np.ndarray | None = None
    ) -> tuple[int, PackingPlan | None]:
        """The length of packed rows for a batch, and which dialogue lies where if they share rows.

        Args:
            lengths: [B] tokens of the dialogues.
            minibatches: [U, N] dialogues of each update; with train.turns_per_update [epochs, B], not cut yet.
            turns: [B] of the dialogues, for train.turns_per_update.
        """
        if not self.config.train.share_rows:
            return next(length for length in self.lengths if length >= lengths.max()), None
        options = self.lengths, batch_parts(self.mesh), self.config.train.padding
        if self.config.train.turns_per_update:
            groups = [group for order in minibatches for group in self._updates(order, turns)]
            return plan_turns(lengths, groups, updates_at_most(self.config), *options)
        return plan_packing(lengths, minibatches, *options)

    def _updates(self, order: np.ndarray, turns: np.ndarray | None) -> list[np.ndarray]:
        assert turns is not None
        groups = group_by_turns(turns[order], self.config.train.turns_per_update)
        return [order[group] for group in groups]

    def padded_tokens(self, length: int, plan: PackingPlan | None) -> int:
        """Tokens of all rows that one pass over a batch reads, padding included."""
        if plan is None:
            return length * self.config.rollout.batch
        microbatches = int(np.sum(plan.updates.microbatches)) * batch_parts(self.mesh)
        return microbatches * length // self.config.train.epochs


def build_run(config: ConfigDict, mesh: Mesh) -> tuple[Run, TrainState]:
    """Loads everything; returns the run and its state before the first step.

    Raises:
        ValueError, OSError: a model or the profiles cannot be loaded, or don't fit together.
    """
    check_attention(config, mesh)
    check_context(config, *models_of(config))
    profiles = open_profiles(config, "data.train")
    reader = ProfileReader(
        profiles,
        seed=config.data.seed,
        batch_size=config.rollout.batch // config.rollout.group,
        shuffle=config.data.shuffle,
    )
    spec = rollout_spec(config)
    widest = 0
    if answers_by_text(config):
        agents = policy_alone(config, spec, sampling_mesh(mesh, config.mesh_sampling), mesh)
        tokens = first_words(agents, profiles)
        widest = widest_words(spec, tokens.first_width)
    else:
        agents = Agents.load(config, spec, sampling_mesh(mesh, config.mesh_sampling), rest=mesh)
        tokens = agents.tokens(profiles)
    limits = agents.replicate(agents.check_limits(limits_of(config, spec, config.rollout.temperature)))
    made = build_learning(config, agents, widest or tokens.first_width, mesh, LOADED)
    grammar, learn = replicate(agents.tables[0].grammar, mesh), compile_step(made.setup, made.state)
    fixed = grammar, made.reference, made.base, widest
    run = Run(config, mesh, agents, profiles, tokens, reader, limits, made.setup, learn, made.lengths, *fixed)
    return run, made.state


def answers_by_text(config: ConfigDict) -> bool:
    """Whether text passes between policy and user: an endpoint, or a model with another tokenizer on the device.

    Raises:
        ValueError: a folder holds no tokenizer that can be used.
    """
    return bool(config.remote.user.url) or tokenizers_differ(config)


def policy_alone(config: ConfigDict, spec: RolloutConfig, mesh: Mesh, rest: Mesh) -> Agents:
    """Agents of a run whose users answer by text: of the user there is no model.

    Raises:
        ValueError, OSError: the policy cannot be loaded, or has no room for a turn in rollout.context.
    """
    policy, tokenizer = load_model(config.policy, "policy", rest)
    prompts = load_prompts(config.data.language, config.user.prompts or None)
    told = {"style": config.user.style, "scenario": config.user.scenario}
    agents = Agents.build(policy, LM({}, policy.model), tokenizer, prompts, spec, mesh, **told)
    limits = limits_of(config, spec, config.rollout.temperature)
    system, room = agents.tables[0].system.shape[0], int(room_needed(agents.tables, spec, limits, WIDTH_STEP)[0])
    if system + room > spec.context:
        raise ConfigError(
            f"the policy's system prompt takes {system} tokens and a turn may take {room} more, but rollout.context is "
            f"{spec.context}; raise it to {system + room} for one turn at least"
        )
    return agents


def first_words(agents: Agents, profiles: Sequence[Profile]) -> ProfileTokens:
    """What profiles say first, in the policy's tokens."""
    nothing = np.zeros(0, np.int32)

    def encoded(profile: Profile) -> EncodedProfile:
        words = agents.tokenizer.encode((profile.first_talk or "").strip())
        return EncodedProfile(nothing, np.array(words, np.int32))

    return measure_profiles(profiles, encoded, ["first words", agents.tokenizer.fingerprint])[0]


def build_learning(config: ConfigDict, agents: Agents, first_width: int, mesh: Mesh, weights: Weights) -> Learning:
    """What is trained, and the update that trains it, from agents on the training mesh.

    Args:
        first_width: of the profiles' first utterances, in tokens.
        weights: where arrays come from; a plan's are shapes.

    Raises:
        ValueError, OSError: a model cannot be loaded, or has another tokenizer.
    """
    trained, trunk, base = learners(config, agents, mesh, weights)
    setup = _step_config(config, agents, trunk, mesh)
    reference = reference_params(config, agents, mesh, weights)
    state = first_state(trained, setup.optimizers, mesh, weights)
    return Learning(setup, state, row_lengths(config, agents, first_width, mesh), reference, base)


def first_state(trained: Trained, optimizers: Optimizers, mesh: Mesh, weights: Weights = LOADED) -> TrainState:
    """The state before the first step, of parameters on the training mesh."""
    shardings = state_shardings(trained, optimizers, mesh)
    moments = weights.make(lambda p: init_state(p, optimizers).opt_state, shardings.opt_state, trained)
    step, skipped = (weights.make(lambda: jnp.int32(0), shardings.step) for _ in range(2))  # two buffers to donate
    return TrainState(step, trained, moments, skipped)


def check_learning(config: ConfigDict) -> None:
    """Checks names in registries, and what the estimator needs, of a config that is valid otherwise.

    Raises:
        ConfigError: with one line for every fault.
    """
    values = {name: config[name.split(".")[0]][name.split(".")[1]] for name in REGISTRIES}
    faults = [fault for name, value in values.items() if (fault := choice_fault(name, value, REGISTRIES[name]))]
    estimator, group = config.algorithm.estimator, config.rollout.group
    if estimator in ESTIMATORS and ESTIMATORS[estimator].needs_group and group < 2:
        others = " or ".join(name for name, other in ESTIMATORS.items() if not other.needs_group)
        faults.append(
            f"algorithm.estimator={estimator!r} compares dialogues of one profile, but rollout.group={group}; raise "
            f"rollout.group (RLVER: 4 with GRPO), or use {others}"
        )
    if faults:
        raise ConfigError("the config cannot be run:\n" + "\n".join(f"  - {fault}" for fault in faults))


def rollout_spec(config: ConfigDict) -> RolloutConfig:
    """What the sampler is compiled for in training."""
    c = config.rollout
    initial = config.emotion.initial
    return spec_of(config, group=c.group, max_turns=c.max_turns, initial_emotion=initial, rows=c.rows)


def check_attention(config: ConfigDict, mesh: Mesh) -> None:
    """Refuses kernels that the devices don't have; a ValueError."""
    platform = mesh.devices.flat[0].platform
    for name in ("policy", "critic"):
        if config[name].attention == "splash" and platform != "tpu":
            raise ValueError(
                f"{name}.attention='splash' is made of kernels for TPU, but the devices are {platform}; set "
                f"--config.{name}.attention=chunked"
            )


def models_of(config: ConfigDict) -> list[str]:
    """The models that training loads."""
    critic = has_critic(config) and config.critic.kind == "separate"
    user = not config.remote.user.url
    return ["policy", *["user"] * user, *["critic"] * critic, *["reference"] * bool(config.loss.kl)]


def folders_of(config: ConfigDict) -> dict[str, tuple[str, bool]]:
    """{model: (path, whether its weights are read)} of the models that training loads."""
    like = lambda name: config["policy" if name == "reference" else name]  # noqa: E731
    return {name: (config[name].path, like(name).init == "path") for name in models_of(config)}


def row_lengths(config: ConfigDict, agents: Agents, first_width: int, mesh: Mesh) -> tuple[int, ...]:
    """Lengths of packed rows that may be compiled, rising, so many an octave; the last holds the longest dialogues."""
    longest = dialogues_a_row(config, mesh) * max_length(agents.tables[0], agents.spec, first_width)
    return length_ladder(longest, config.train.length_buckets)


def dialogues_a_row(config: ConfigDict, mesh: Mesh) -> int:
    """How many of the longest dialogues fit in the longest row.

    2 where they share rows and each device would have two or more rows of a microbatch otherwise: no more tokens are
    read at a time than it has room for.
    """
    unshared = config.rollout.batch // (config.train.minibatches * config.train.microbatches)
    return 2 if config.train.share_rows and unshared >= 2 * batch_parts(mesh) else 1


def updates_at_most(config: ConfigDict) -> int:
    """Optimizer steps of a training step, at most: with train.turns_per_update dialogues may end sooner."""
    c = config.train
    if not c.turns_per_update:
        return c.epochs * c.minibatches
    return c.epochs * -(-config.rollout.batch * config.rollout.max_turns // c.turns_per_update)


def dialogues_an_update(config: ConfigDict) -> int:
    """Dialogues of an optimizer step; with train.turns_per_update, where all have all their turns."""
    if not config.train.turns_per_update:
        return config.rollout.batch // config.train.minibatches
    return min(-(-config.train.turns_per_update // config.rollout.max_turns), config.rollout.batch)


def microbatches_at_most(config: ConfigDict, mesh: Mesh, dialogues: int) -> int:
    """Microbatches that so many dialogues of the greatest length are read in."""
    if not config.train.share_rows:
        return dialogues * config.train.minibatches * config.train.microbatches // config.rollout.batch
    return -(-dialogues // (dialogues_a_row(config, mesh) * batch_parts(mesh)))


def _step_config(config: ConfigDict, agents: Agents, trunk: Qwen2 | None, mesh: Mesh) -> TrainStepConfig:
    """What the update is compiled for; `trunk` is the module of the critic's own."""
    critic = has_critic(config)
    length = config.rollout.max_turns * agents.spec.policy_tokens
    models = TrainedModels(
        as_trained(agents.policy.model, config.policy),
        trunk,
        value_head_of(config) if critic else None,
        LossConfig(**keywords(LossConfig, config.loss), length=length, turns=config.rollout.max_turns),
        lora_of(config),
        reference_is_base(config),
        **keywords(TrainedModels, config.rollout, config.loss),
        vocab_shards=mesh.shape["tensor"],
    )
    advantage = AdvantageConfig(**keywords(AdvantageConfig, config.algorithm, config.rollout))
    update = UpdateConfig(
        **keywords(UpdateConfig, config.train, config.loss), critic_warmup_steps=config.critic.warmup_steps
    )
    adam = keywords(make_optimizer, config.train)
    critic_adam = adam | {"learning_rate": config.critic.learning_rate}
    if config.critic.rate_warmup_steps >= 0:
        critic_adam["warmup_steps"] = config.critic.rate_warmup_steps
    optimizers = Optimizers(make_optimizer(**adam), make_optimizer(**critic_adam) if critic else None)
    return TrainStepConfig(models, advantage, update, optimizers)


def state_shardings(trained: Trained, optimizers: Optimizers, mesh: Mesh) -> TrainState:
    """Shardings of a state, from its parameters: arrays, or ShapeDtypeStructs with shardings.

    Each of Adam's moments is sharded like its parameter.
    """
    whole = NamedSharding(mesh, PartitionSpec())
    shardings = jax.tree.map(lambda x: x.sharding, trained)
    shapes = jax.eval_shape(lambda p: init_state(p, optimizers), trained)
    opt_state = {
        name: optax.tree.map_params(
            optimizers.of(name),
            lambda _, sharding: sharding,
            shapes.opt_state[name],
            shardings[name],
            transform_non_params=lambda _: whole,
        )
        for name in trained
    }
    return TrainState(whole, shardings, opt_state, whole)  # type: ignore[arg-type]
