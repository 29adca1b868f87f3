"""From a config to everything that a training run holds beside its state: agents, learner, optimizers, profiles."""

import dataclasses
from collections.abc import Sequence
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax.sharding import Mesh, NamedSharding, PartitionSpec
from ml_collections import ConfigDict

from rlver_jax.decoding.grammar import Grammar
from rlver_jax.learning.loss import LossConfig, Trained, TrainedModels
from rlver_jax.learning.packing import PackingPlan, plan_packing
from rlver_jax.learning.sequences import max_length
from rlver_jax.learning.train_step import (
    AdvantageConfig,
    Optimizers,
    TrainState,
    TrainStepConfig,
    UpdateConfig,
    init_state,
    make_optimizer,
)
from rlver_jax.models.qwen import Params, Qwen2
from rlver_jax.models.value_head import ValueHead
from rlver_jax.parallel.distributed import replicate
from rlver_jax.parallel.mesh import batch_parts, sampling_mesh
from rlver_jax.profiles.reader import ProfileReader
from rlver_jax.profiles.schema import Profile
from rlver_jax.profiles.sources import open_profiles
from rlver_jax.rollout.agents import Agents, check_tokenizers, limits_of, load_model, spec_of
from rlver_jax.rollout.profile_tokens import ProfileTokens
from rlver_jax.rollout.spec import RolloutConfig, RolloutLimits, check_context
from rlver_jax.text.padding import round_up

LENGTH_STEP = 64  # packed rows are multiples of it


@dataclasses.dataclass(frozen=True)
class Run:
    """What stays the same through a run."""

    config: ConfigDict
    mesh: Mesh  # of training; agents.mesh is that of sampling
    agents: Agents  # with the policy that training starts from
    profiles: Sequence[Profile]
    tokens: ProfileTokens
    reader: ProfileReader
    limits: RolloutLimits
    setup: TrainStepConfig
    lengths: tuple[int, ...]  # that packed rows may have, rising
    grammar: Grammar  # the policy's, on the training mesh
    reference: Params | None  # for the KL penalty

    def arranged(self, lengths: np.ndarray, orders: np.ndarray) -> tuple[int, PackingPlan | None]:
        """How to read a batch: the length of packed rows, and the dialogues' places where they share rows.

        Args:
            lengths: [B] tokens of the dialogues.
            orders: [U, N] dialogues of each update.
        """
        if not self.config.train.share_rows:
            return next(length for length in self.lengths if length >= lengths.max()), None
        return plan_packing(lengths, orders, self.lengths, batch_parts(self.mesh), self.config.train.padding)

    def places(self, length: int, plan: PackingPlan | None) -> int:
        """Places of all rows that one pass over a batch reads, padding included."""
        if plan is None:
            return length * self.config.rollout.batch
        reads = int(np.sum(plan.updates.reads)) * batch_parts(self.mesh)
        return reads * length // self.config.train.epochs


def build_run(config: ConfigDict, mesh: Mesh) -> tuple[Run, TrainState]:
    """Loads everything; returns the run and its state before the first step.

    Raises:
        ValueError, OSError: a model or the profiles cannot be loaded, or don't fit together.
    """
    _check_attention(config, mesh)
    check_context(config, *models_of(config))
    profiles = open_profiles(config, "data.train")
    reader = ProfileReader(
        profiles,
        seed=config.data.seed,
        batch_size=config.rollout.batch // config.rollout.group,
        shuffle=config.data.shuffle,
    )
    spec = rollout_spec(config)
    agents = Agents.load(config, spec, sampling_mesh(mesh, config.mesh_sampling), rest=mesh)
    tokens = agents.tokens(profiles)
    limits = agents.place(agents.check_limits(limits_of(config, spec, config.rollout.temperature)))
    lengths = row_lengths(config, agents, tokens.first_width, mesh)
    trained, trunk = trained_of(config, agents, mesh)
    setup = setup_of(config, agents, trunk, "critic" in trained, mesh)
    reference = None
    if config.loss.kl:
        reference = _model(config, "reference", config.policy, mesh, agents)[0].params
    grammar = replicate(agents.tables[0].grammar, mesh)
    run = Run(config, mesh, agents, profiles, tokens, reader, limits, setup, lengths, grammar, reference)
    return run, _placed_state(trained, setup.optimizers, mesh)


def rollout_spec(config: ConfigDict) -> RolloutConfig:
    """What the sampler is compiled for in training."""
    c = config.rollout
    initial = config.emotion.initial
    return spec_of(config, group=c.group, max_turns=c.max_turns, initial_emotion=initial, rows=c.rows)


def _check_attention(config: ConfigDict, mesh: Mesh) -> None:
    platform = mesh.devices.flat[0].platform
    for name in ("policy", "critic"):
        if config[name].attention == "splash" and platform != "tpu":
            raise ValueError(
                f"{name}.attention='splash' is made of kernels for TPU, but the devices are {platform}; set "
                f"--config.{name}.attention=chunked"
            )


def models_of(config: ConfigDict) -> list[str]:
    """The models that training loads."""
    critic = config.algorithm.estimator == "gae" and config.critic.kind == "separate"
    return ["policy", "user", *["critic"] * critic, *["reference"] * bool(config.loss.kl)]


def folders_of(config: ConfigDict) -> dict[str, tuple[str, bool]]:
    """{model: (path, whether its weights are read)} of the models that training loads."""
    like = lambda name: config["policy" if name == "reference" else name]  # noqa: E731
    return {name: (config[name].path, like(name).init == "path") for name in models_of(config)}


def row_lengths(config: ConfigDict, agents: Agents, first_width: int, mesh: Mesh) -> tuple[int, ...]:
    """Lengths of packed rows that may be compiled, rising, so many an octave; the last holds the longest dialogues."""
    longest = dialogues_a_row(config, mesh) * max_length(agents.tables[0], agents.spec, first_width)
    up = lambda x: round_up(x, LENGTH_STEP)  # noqa: E731
    lengths = [LENGTH_STEP]
    while lengths[-1] < longest:
        octave = 1 << (lengths[-1].bit_length() - 1)
        lengths.append(min(lengths[-1] + up(-(-octave // config.train.length_buckets)), up(longest)))
    return tuple(lengths)


def dialogues_a_row(config: ConfigDict, mesh: Mesh) -> int:
    """How many of the longest dialogues fit in the longest row.

    2 where they share rows and each device would have two or more rows of a microbatch otherwise: no more tokens are
    read at a time than it has room for.
    """
    apart = config.rollout.batch // (config.train.minibatches * config.train.microbatches)
    return 2 if config.train.share_rows and apart >= 2 * batch_parts(mesh) else 1


def reads_at_most(config: ConfigDict, mesh: Mesh, dialogues: int) -> int:
    """Microbatches that so many dialogues of the greatest length are read in."""
    if not config.train.share_rows:
        return dialogues * config.train.minibatches * config.train.microbatches // config.rollout.batch
    return -(-dialogues // (dialogues_a_row(config, mesh) * batch_parts(mesh)))


def _model(config: ConfigDict, name: str, like: ConfigDict, mesh: Mesh, agents: Agents):
    """Model of `config.NAME`; an empty path is the policy's. It must share the policy's tokenizer."""
    settings = like.copy_and_resolve_references()
    settings.path = config[name].path or config.policy.path
    lm, tokenizer = load_model(settings, name, mesh)
    check_tokenizers(agents.tokenizer, tokenizer)
    return lm, tokenizer


def trained_of(config: ConfigDict, agents: Agents, mesh: Mesh) -> tuple[Trained, Any]:
    """All parameters that learn, and the module of the critic's own trunk, if it has one."""
    policy = agents.policy.params
    if agents.user.params is policy:  # one folder for both: the update reuses the policy's buffers, the user keeps its
        policy = jax.tree.map(jnp.copy, policy)
    if config.algorithm.estimator != "gae":
        return {"policy": policy}, None
    head = value_head_of(config)
    width = agents.policy.model.config.hidden_size
    trunk, critic = None, {}
    if config.critic.kind == "separate":
        lm, _ = _model(config, "critic", config.critic, mesh, agents)
        width, trunk = lm.model.config.hidden_size, as_trained(lm.model, config.critic)
        critic["trunk"] = lm.params
    critic["head"] = nn.unbox(head.init(jax.random.key(0), jnp.zeros((1, width))))["params"]  # a constant: no draw
    return {"policy": policy, "critic": critic}, trunk


def as_trained(model: Qwen2, c: ConfigDict) -> Qwen2:
    """A model as the update reads it; `c` is `config.policy` or `config.critic`."""
    return model.clone(remat=c.remat, attention=c.attention)


def value_head_of(config: ConfigDict) -> ValueHead:
    """It starts from what a dialogue would earn if nothing moved the user."""
    return ValueHead(bias_init=config.emotion.initial / 100 if config.reward.kind == "final" else 0.0)


def setup_of(config: ConfigDict, agents: Agents, trunk: Any, has_critic: bool, mesh: Mesh) -> TrainStepConfig:
    """What the update is compiled for; `trunk` is the module of the critic's own."""
    c, t = config.loss, config.train
    loss = LossConfig(
        c.ratio, c.clip_low, c.clip_high, c.dual_clip, c.normalization,
        length=config.rollout.max_turns * agents.spec.policy_tokens,
        entropy=c.entropy, kl=c.kl, kl_estimator=c.kl_estimator, value=c.value_weight, value_clip=c.value_clip,
    )  # fmt: skip
    learner = TrainedModels(
        as_trained(agents.policy.model, config.policy),
        trunk,
        value_head_of(config) if has_critic else None,
        loss,
        temperature=config.rollout.temperature,
        vocab_chunk=c.vocab_chunk,
        vocab_shards=mesh.shape["tensor"],
    )
    a = config.algorithm
    credit = (a.estimator, a.credit, a.turn_discount)
    advantage = AdvantageConfig(*credit, a.gamma, a.lam, a.whiten, a.scale, config.rollout.group)
    schedule = UpdateConfig(
        t.epochs, t.minibatches, t.microbatches, config.critic.warmup_steps, c.recompute, c.importance_cap
    )
    shared = {"warmup_steps": t.warmup_steps, "grad_clip": t.grad_clip, "beta1": t.beta1, "beta2": t.beta2}
    shared |= {"weight_decay": t.weight_decay, "moment_dtype": t.moment_dtype, "eps": t.adam_eps}
    policy = make_optimizer(learning_rate=t.learning_rate, **shared)
    critic = make_optimizer(learning_rate=config.critic.learning_rate, **shared) if has_critic else None
    return TrainStepConfig(learner, advantage, schedule, Optimizers(policy, critic))


def _placed_state(trained: Trained, optimizers: Optimizers, mesh: Mesh) -> TrainState:
    """The first state; each of Adam's moments lies where its parameter does."""
    spread = lambda x: len(x.sharding.device_set) == mesh.size  # noqa: E731
    trained = jax.tree.map(lambda x: x if spread(x) else replicate(x, mesh), trained)
    where = state_shardings(trained, optimizers, mesh)
    made = jax.jit(lambda p: init_state(p, optimizers).opt_state, out_shardings=where.opt_state)(trained)
    zero = replicate(jnp.int32(0), mesh)
    return TrainState(zero, trained, made, jnp.copy(zero))


def state_shardings(trained: Trained, optimizers: Optimizers, mesh: Mesh) -> TrainState:
    """Where all leaves of a state lie, by its parameters: arrays, or ShapeDtypeStructs with shardings."""
    whole = NamedSharding(mesh, PartitionSpec())
    where = jax.tree.map(lambda x: x.sharding, trained)
    shapes = jax.eval_shape(lambda p: init_state(p, optimizers), trained)
    opt_state = {
        name: optax.tree.map_params(
            optimizers.of(name),
            lambda _, place: place,
            shapes.opt_state[name],
            where[name],
            transform_non_params=lambda _: whole,
        )
        for name in trained
    }
    return TrainState(whole, where, opt_state, whole)  # type: ignore[arg-type]
