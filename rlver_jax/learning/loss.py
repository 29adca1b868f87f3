"""What one minibatch is trained for: the policy's and the critic's loss as one function of both parameter trees."""

import dataclasses
from typing import Any

import flax.struct
import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from rlver_jax.decoding.grammar import Grammar
from rlver_jax.learning import loss_terms
from rlver_jax.learning.packing import SharedRows
from rlver_jax.learning.sequences import PackedBatch
from rlver_jax.models.logprobs import Forbidden, TokenLogprobs, token_logprobs
from rlver_jax.models.qwen import Params, Qwen2, abstract_params, head
from rlver_jax.models.value_head import ValueHead
from rlver_jax.parallel import rules

Trained = dict[
    str, Any
]  # {"policy": Qwen2 parameters, "critic": {"trunk": Qwen2 parameters, "head": …}}, as far as had


@dataclasses.dataclass(frozen=True)
class LossConfig:
    """Options of the loss; see `losses` for the equations, `configs/base.py` for what they mean and their sources."""

    ratio: str = "token"  # token | sequence
    clip_low: float = 0.2
    clip_high: float = 0.2
    dual_clip: float = 0.0
    normalization: str = "token_mean"
    length: int = 1  # constant of normalization="dr_grpo", in tokens
    entropy: float = 0.0
    kl: float = 0.0
    kl_estimator: str = "k3"
    value: float = 1.0  # weight of the critic's loss beside the policy's
    value_clip: float = 0.5


@dataclasses.dataclass(frozen=True)
class TrainedModels:
    """The models and options that an update is compiled for (static and hashable)."""

    model: Qwen2
    trunk: Qwen2 | None  # the critic's own; None: it shares the policy's, or there is no critic
    value_head: ValueHead | None
    loss: LossConfig
    temperature: float = 1.0  # the policy was sampled at
    vocab_chunk: int = 8192
    vocab_shards: int = 1


@flax.struct.dataclass
class LossInputs:
    """A minibatch, or a part of one, with all that its loss takes as given; arrays [B, L], 0 where no action is."""

    batch: PackedBatch
    old: Float[Array, "B L"]  # log-probs that the ratio starts from
    advantage: Float[Array, "B L"]
    weight: Float[Array, "B L"]  # of each token in the policy's loss, over the whole minibatch
    mean: Float[Array, "B L"]  # of each token in a mean over the whole minibatch
    reference: Float[Array, "B L"] | None = None  # log-probs of the reference model
    importance: Float[Array, "B L"] | None = None  # truncated importance weights
    value: Float[Array, "B L"] | None = None  # the critic's before the update
    returns: Float[Array, "B L"] | None = None


def forward(model: Qwen2, params: Params, batch: PackedBatch) -> Float[Array, "B L D"]:
    """Hidden states of packed rows."""
    tokens = (batch.tokens, batch.positions, batch.branch)
    return model.apply({"params": params}, *tokens, segment=_segment(batch))[0]


def _segment(batch: PackedBatch) -> Int[Array, "B L"] | None:
    return batch.segment if isinstance(batch, SharedRows) else None


def action_logprobs(
    learner: TrainedModels, params: Params, hidden: Float[Array, "B L D"], batch: PackedBatch, grammar: Grammar
) -> TokenLogprobs:
    """log p(action) and entropy of the distribution that was sampled from; 0 where no action is."""
    found = token_logprobs(
        hidden,
        head(params),
        batch.target,
        chunk=learner.vocab_chunk,
        temperature=learner.temperature,
        vocab_shards=learner.vocab_shards,
        forbidden=Forbidden(grammar.forbidden, batch.state),
    )
    return TokenLogprobs(*(jnp.where(batch.mask, x, 0.0) for x in found))


def as_params(learner: TrainedModels, gradients: Trained) -> Trained:
    """Hints that gradients lie where their parameters do, so that devices sum parts of them and none holds all."""
    found = dict(gradients)
    if "policy" in gradients:
        found["policy"] = rules.constrain_tree(gradients["policy"], abstract_params(learner.model)[1])
    if "critic" in gradients and learner.trunk is not None:
        trunk = rules.constrain_tree(gradients["critic"]["trunk"], abstract_params(learner.trunk)[1])
        found["critic"] = gradients["critic"] | {"trunk": trunk}
    return found


def values(
    learner: TrainedModels, critic: Params, hidden: Float[Array, "B L D"] | None, batch: PackedBatch
) -> Float[Array, "B L"]:
    """The critic's values; `hidden` are the policy's, for a critic without a trunk of its own."""
    assert learner.value_head is not None
    if learner.trunk is not None:
        hidden = forward(learner.trunk, critic["trunk"], batch)
    found: Any = learner.value_head.apply({"params": critic["head"]}, hidden)
    return jnp.where(batch.mask, found, 0.0)


def loss(
    learner: TrainedModels, trained: Trained, inputs: LossInputs, grammar: Grammar
) -> tuple[Array, dict[str, dict]]:
    """The part of a minibatch's loss that these rows make, and its metrics.

    Losses and metrics under "sum" of all parts add up to those of the minibatch; of those under "max" the largest
    counts. So the result doesn't depend on how the minibatch is divided.

    Args:
        trained: trees whose loss is wanted: all, or one of `split_trainables`.
    """
    total: Array = jnp.float32(0)
    metrics: dict[str, dict] = {"sum": {}, "max": {}}
    hidden = None
    if "policy" in trained:
        hidden = forward(learner.model, trained["policy"], inputs.batch)
        total, metrics = _policy_loss(learner, trained["policy"], hidden, inputs, grammar)
    if "critic" in trained and inputs.value is not None:
        value_loss = _value_loss(learner, trained["critic"], hidden, inputs)
        metrics["sum"]["critic/loss"] = value_loss
        total = total + learner.loss.value * value_loss
    return total, metrics


def split_trainables(learner: TrainedModels, trained: Trained) -> list[Trained]:
    """Trees whose losses have nothing in common, so that one can be differentiated after the other."""
    return [trained] if learner.trunk is None else [{name: tree} for name, tree in trained.items()]


def _policy_loss(
    learner: TrainedModels, params: Params, hidden: Array, inputs: LossInputs, grammar: Grammar
) -> tuple[Array, dict[str, dict]]:
    batch, mask, options = inputs.batch, inputs.batch.mask, learner.loss
    new, entropy = action_logprobs(learner, params, hidden, batch, grammar)
    if options.ratio == "sequence":
        ratio = loss_terms.sequence_ratio(new, inputs.old, mask, _segment(batch))
    else:
        ratio = loss_terms.token_ratio(new, inputs.old, mask)
    objective = loss_terms.clipped_objective(
        ratio,
        inputs.advantage,
        mask,
        clip_low=options.clip_low,
        clip_high=options.clip_high,
        dual_clip=options.dual_clip,
    )
    importance = 1.0 if inputs.importance is None else inputs.importance
    policy_loss = (inputs.weight * importance * objective.loss).sum()
    metrics = loss_terms.ratio_metrics(new, inputs.old, objective.clipped, mask, inputs.mean)
    metrics["sum"] |= {"policy/loss": policy_loss, "policy/entropy": (inputs.mean * entropy).sum()}
    total = policy_loss - options.entropy * (inputs.weight * entropy).sum()
    if inputs.reference is not None:
        penalty = loss_terms.kl_penalty(new, inputs.reference, mask, estimator=options.kl_estimator)
        metrics["sum"]["policy/reference_kl"] = (inputs.mean * penalty).sum()
        total = total + options.kl * (inputs.weight * penalty).sum()
    return total, metrics


@jax.named_scope("critic")
def _value_loss(learner: TrainedModels, critic: Params, hidden: Array | None, inputs: LossInputs) -> Array:
    value = values(learner, critic, hidden, inputs.batch)
    clip = learner.loss.value_clip
    assert inputs.value is not None
    assert inputs.returns is not None
    per_token = loss_terms.value_loss(value, inputs.value, inputs.returns, inputs.batch.mask, clip=clip)
    return (inputs.mean * per_token).sum()


def reduce_metrics(parts: dict[str, dict]) -> dict[str, Array]:
    """Metrics of a minibatch from those of its parts, stacked on axis 0."""
    return {name: x.sum(0) for name, x in parts["sum"].items()} | {name: x.max(0) for name, x in parts["max"].items()}
