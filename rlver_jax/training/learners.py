"""What a run trains: all parameters of policy and critic, or adapters on models that stay (docs/lora.md)."""

import dataclasses
import zlib
from collections.abc import Callable
from typing import Any, NamedTuple

import flax.linen as nn
import jax
import jax.numpy as jnp
from jax.sharding import Mesh, NamedSharding, PartitionSpec
from ml_collections import ConfigDict

from rlver_jax.config.lora_fields import named_targets
from rlver_jax.decoding.cache import LM
from rlver_jax.learning.advantages import ESTIMATORS
from rlver_jax.learning.loss import Base, Trained
from rlver_jax.models.lora import LoRA, abstract_adapter, init_adapter, join
from rlver_jax.models.qwen import Params, Qwen2
from rlver_jax.models.value_head import ValueHead
from rlver_jax.parallel import rules
from rlver_jax.rollout.agents import Agents, check_tokenizers, load_model, same_parameters
from rlver_jax.rollout.ready import adapter_program, sampling_copy
from rlver_jax.text.tokenizer import Tokenizer

HEAD_STD = 0.02  # Qwen2.5's initializer_range, which verl's token classification head starts with


@dataclasses.dataclass(frozen=True)
class Weights:
    """Where the arrays of a run come from: models and initializers (`LOADED`), or nowhere, where shapes are enough.

    Attributes:
        load: (section of the config, its name, mesh) -> model and tokenizer, as `rollout.agents.load_model`.
        make: (function, shardings, *arguments) -> what the function returns, so sharded.
    """

    load: Callable[..., tuple[LM, Tokenizer]]
    make: Callable[..., Any]


LOADED = Weights(load_model, lambda function, shardings, *args: jax.jit(function, out_shardings=shardings)(*args))


class Learners(NamedTuple):
    """What learns, and what it stands on."""

    trained: Trained
    trunk: Qwen2 | None  # module of the critic's own trunk, if it has one
    base: Base | None  # with LoRA


def lora_of(config: ConfigDict) -> LoRA | None:
    """What adapters are made of; None: all parameters are trained."""
    c = config.lora
    return LoRA(c.rank, c.alpha, named_targets(c.targets), c.rank_stabilized) if c.rank else None


def learners(config: ConfigDict, agents: Agents, mesh: Mesh, weights: Weights) -> Learners:
    """All parameters that learn, from agents on the training mesh.

    Raises:
        ValueError, OSError: the critic's model cannot be loaded, or has another tokenizer.
    """
    lora, policy = lora_of(config), agents.policy.params
    base = None if lora is None else Base(policy)
    if lora is not None:
        policy = new_adapter(agents.policy.model, lora, config.train.seed, "policy", mesh, weights)
    elif agents.user.params is policy:  # one folder for both: the update reuses the policy's buffers, the user its own
        shardings = jax.tree.map(lambda x: x.sharding, policy)
        policy = weights.make(lambda params: jax.tree.map(jnp.copy, params), shardings, policy)
    if not has_critic(config):
        return Learners({"policy": policy}, None, base)
    head = value_head_of(config)
    width = agents.policy.model.config.hidden_size
    trunk, critic = None, {}
    if config.critic.kind == "separate":
        lm = critic_model(config, agents, mesh, weights)
        width, trunk = lm.model.config.hidden_size, as_trained(lm.model, config.critic)
        critic["trunk"] = lm.params
        if lora is not None and base is not None:
            base = base if lm.params is base.policy else Base(base.policy, lm.params)
            critic["trunk"] = new_adapter(lm.model, lora, config.train.seed, "critic", mesh, weights)
    init = lambda: nn.unbox(head.init(jax.random.key(config.train.seed), jnp.zeros((1, width))))["params"]  # noqa: E731
    critic["head"] = weights.make(init, NamedSharding(mesh, PartitionSpec()))
    return Learners({"policy": policy, "critic": critic}, trunk, base)


def new_adapter(model: Qwen2, lora: LoRA, seed: int, name: str, mesh: Mesh, weights: Weights = LOADED) -> Params:
    """A model's untrained adapter on the training mesh; those of policy and critic differ by `name`."""
    shapes, axes = abstract_adapter(model, lora)
    make = lambda: init_adapter(  # noqa: E731
        model, lora, jax.random.fold_in(jax.random.key(seed), zlib.crc32(name.encode()))
    )
    return weights.make(make, rules.tree_shardings(axes, shapes, mesh))


def critic_model(config: ConfigDict, agents: Agents, mesh: Mesh, weights: Weights) -> LM:
    """The critic's trunk before training; with LoRA the policy's own parameters, where they are the same."""
    if lora_of(config) is not None and shares_base(config):
        model = agents.policy.model.clone(attention_chunk=config.critic.attention_chunk)
        return LM(agents.policy.params, model)
    return beside_policy(config, "critic", config.critic, mesh, agents, weights)


def shares_base(config: ConfigDict) -> bool:
    """Whether critic and policy are adapters on one model: the same folder, read in the same way."""
    critic = config.critic.copy_and_resolve_references()
    critic.size = critic.size or config.policy.size
    critic.path, critic.adapter = folders_beside_policy(config, "critic")
    return same_parameters(config.policy, critic)


def reference_is_base(config: ConfigDict) -> bool:
    """Whether the KL penalty's reference is what the policy's adapter stands on: no further model is loaded."""
    of_policy = config.policy.path, config.policy.adapter
    return bool(config.loss.kl and config.lora.rank and folders_beside_policy(config, "reference") == of_policy)


def reference_params(config: ConfigDict, agents: Agents, mesh: Mesh, weights: Weights) -> Params | None:
    """Of the model for the KL penalty; None: there is none, or it is the policy's base."""
    if not config.loss.kl or reference_is_base(config):
        return None
    return beside_policy(config, "reference", config.policy, mesh, agents, weights).params


def folders_beside_policy(config: ConfigDict, name: str) -> tuple[str, str]:
    """(path, adapter) of critic or reference: the policy's where they have no path."""
    own, policy = config[name], config.policy
    inherits = not own.path or (name == "reference" and own.path == policy.path)
    return own.path or policy.path, own.get("adapter") or (policy.adapter if inherits else "")


def beside_policy(config: ConfigDict, name: str, like: ConfigDict, mesh: Mesh, agents: Agents, weights: Weights) -> LM:
    """Model of `config.NAME`; an empty path is the policy's. It must share the policy's tokenizer."""
    settings = like.copy_and_resolve_references()
    settings.path, settings.adapter = folders_beside_policy(config, name)
    lm, tokenizer = weights.load(settings, name, mesh)
    check_tokenizers(agents.tokenizer, tokenizer)
    return lm


def has_critic(config: ConfigDict) -> bool:
    """Whether the config's estimator needs a critic."""
    return ESTIMATORS[config.algorithm.estimator].needs_critic


def as_trained(model: Qwen2, c: ConfigDict) -> Qwen2:
    """A model as the update reads it; `c` is `config.policy` or `config.critic`."""
    return model.clone(remat=c.remat, attention=c.attention)


def value_head_of(config: ConfigDict) -> ValueHead:
    """It starts from what a dialogue would earn if nothing moved the user, or at random."""
    if config.critic.head_init == "random":
        return ValueHead(kernel_std=HEAD_STD)
    final = config.reward.kind == "final" and not config.reward.function
    return ValueHead(bias_init=config.emotion.initial / 100 if final else 0.0)


def playing_copy(model: Qwen2, lora: LoRA | None, base: Base | None, mesh: Mesh | None) -> Callable[[Params], Params]:
    """What makes the policy's trained parameters ready for the sampler, as `rollout.ready.sampling_copy`.

    An adapter goes beside its base, unmerged: a base that is ready for the sampler is read where it lies.
    """
    copy = sampling_copy(model, mesh)
    if lora is None or base is None:
        return copy
    program = adapter_program(model, lora, mesh)
    return lambda adapter: join(copy(base.policy), program(adapter))
