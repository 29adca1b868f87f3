"""What one minibatch is trained for: the policy's and the critic's loss as one function of both parameter trees."""

import dataclasses
from collections.abc import Callable
from typing import Any, NamedTuple

import flax.struct
import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from rlver_jax.decoding.grammar import Grammar
from rlver_jax.learning import loss_terms
from rlver_jax.learning.packing import SharedRows
from rlver_jax.learning.sequences import PackedBatch
from rlver_jax.models.logprobs import Forbidden, TokenLogprobs, token_logprobs
from rlver_jax.models.lora import LoRA, applied, trained_axes
from rlver_jax.models.qwen import Params, Qwen2, head
from rlver_jax.models.value_head import ValueHead
from rlver_jax.parallel import rules

# {"policy": Qwen2 parameters, "critic": {"trunk": Qwen2 parameters, "head": …}}; those that there are. With LoRA their
# adapters stand for the parameters of models.
Trained = dict[str, Any]


@dataclasses.dataclass(frozen=True)
class LossConfig:
    """The fields of `config.loss` by their names; `loss_terms` has the equations, `config.fields` their sources."""

    ratio: str = "token"  # a name in loss_terms.RATIOS
    clip_low: float = 0.2
    clip_high: float = 0.2
    dual_clip: float = 0.0
    normalization: str = "token_mean"  # a name in loss_terms.NORMALIZATIONS
    length: int = 1  # constant of normalization="dr_grpo", in tokens
    turns: int = 0  # of a dialogue at most, for normalization="turn_mean"
    entropy: float = 0.0
    kl: float = 0.0
    kl_estimator: str = "k3"  # a name in loss_terms.KL_ESTIMATORS
    value_weight: float = 1.0  # of the critic's loss beside the policy's
    value_clip: float = 0.5


@dataclasses.dataclass(frozen=True)
class TrainedModels:
    """The models and options that an update is compiled for (static and hashable)."""

    model: Qwen2  # the policy
    trunk: Qwen2 | None  # the critic's own; None: it shares the policy's, or there is no critic
    value_head: ValueHead | None
    loss: LossConfig
    lora: LoRA | None = None  # what is trained of policy and trunk; None: all parameters
    reference_is_base: bool = False  # with lora: the KL penalty holds the policy to its own base
    temperature: float = 1.0  # the policy was sampled at
    vocab_chunk: int = 8192
    vocab_shards: int = 1


@flax.struct.dataclass
class Base:
    """Parameters that adapters stand on, and that nothing changes."""

    policy: Params
    critic: Params | None = None  # of its trunk; None: they are the policy's


@flax.struct.dataclass
class LossInputs:
    """A minibatch, or a part of one, with all constants of its loss; arrays [B, L], 0 where there is no action."""

    batch: PackedBatch
    old: Float[Array, "B L"]  # log-probs that the ratio starts from
    advantage: Float[Array, "B L"]
    weight: Float[Array, "B L"]  # of each token in the policy's loss, over the whole minibatch
    mean: Float[Array, "B L"]  # of each token in a mean over the whole minibatch
    reference: Float[Array, "B L"] | None = None  # log-probs of the reference model
    importance: Float[Array, "B L"] | None = None  # truncated importance weights
    value: Float[Array, "B L"] | None = None  # the critic's before the update
    returns: Float[Array, "B L"] | None = None


def whole(models: TrainedModels, trained: Trained, base: Base | None) -> Trained:
    """Trained trees with all parameters of their models: adapters on their base; without one as they are."""
    if base is None or models.lora is None:
        return trained
    complete = dict(trained)
    if "policy" in trained:
        complete["policy"] = applied(base.policy, trained["policy"], models.lora)
    if "critic" in trained and models.trunk is not None:
        under = base.policy if base.critic is None else base.critic
        complete["critic"] = trained["critic"] | {"trunk": applied(under, trained["critic"]["trunk"], models.lora)}
    return complete


def forward(model: Qwen2, params: Params, batch: PackedBatch) -> Float[Array, "B L D"]:
    """Hidden states of packed rows."""
    tokens = (batch.tokens, batch.positions, batch.branch)
    return model.apply({"params": params}, *tokens, segment=_segment(batch))[0]


def _segment(batch: PackedBatch) -> Int[Array, "B L"] | None:
    return batch.segment if isinstance(batch, SharedRows) else None


def action_logprobs(
    models: TrainedModels, params: Params, hidden: Float[Array, "B L D"], batch: PackedBatch, grammar: Grammar
) -> TokenLogprobs:
    """log p(action) and entropy of the distribution that was sampled from; 0 where there is no action."""
    logprobs = token_logprobs(
        hidden,
        head(params),
        batch.target,
        chunk=models.vocab_chunk,
        temperature=models.temperature,
        vocab_shards=models.vocab_shards,
        forbidden=Forbidden(grammar.forbidden, batch.state),
    )
    return TokenLogprobs(*(jnp.where(batch.mask, x, 0.0) for x in logprobs))


def as_params(models: TrainedModels, gradients: Trained) -> Trained:
    """Shards gradients like their parameters, so that devices sum parts of them and none holds all."""
    sharded = dict(gradients)
    if "policy" in gradients:
        sharded["policy"] = rules.constrain_tree(gradients["policy"], trained_axes(models.model, models.lora))
    if "critic" in gradients and models.trunk is not None:
        trunk = rules.constrain_tree(gradients["critic"]["trunk"], trained_axes(models.trunk, models.lora))
        sharded["critic"] = gradients["critic"] | {"trunk": trunk}
    return sharded


def values(
    models: TrainedModels, critic: Params, hidden: Float[Array, "B L D"] | None, batch: PackedBatch
) -> Float[Array, "B L"]:
    """The critic's values; `hidden` are the policy's, for a critic without a trunk of its own."""
    assert models.value_head is not None
    if models.trunk is not None:
        hidden = forward(models.trunk, critic["trunk"], batch)
    value: Any = models.value_head.apply({"params": critic["head"]}, hidden)
    return jnp.where(batch.mask, value, 0.0)


def loss(
    models: TrainedModels, trained: Trained, inputs: LossInputs, grammar: Grammar, base: Base | None = None
) -> tuple[Array, dict[str, dict]]:
    """The part of a minibatch's loss that these rows make, and its metrics.

    Losses and metrics under "sum" of all parts add up to those of the minibatch; of those under "max" the largest
    counts. So the result doesn't depend on the way in which the minibatch is divided.

    Args:
        trained: trees whose loss is wanted: all, or one of `split_trainables`.
        base: that their adapters stand on.
    """
    trained = whole(models, trained, base)
    total: Array = jnp.float32(0)
    metrics: dict[str, dict] = {"sum": {}, "max": {}}
    hidden = None
    if "policy" in trained:
        hidden = forward(models.model, trained["policy"], inputs.batch)
        total, metrics = _policy_loss(models, trained["policy"], hidden, inputs, grammar)
    if "critic" in trained and inputs.value is not None:
        value_loss = _value_loss(models, trained["critic"], hidden, inputs)
        metrics["sum"]["critic/loss"] = value_loss
        total = total + models.loss.value_weight * value_loss
    return total, metrics


def split_trainables(models: TrainedModels, trained: Trained) -> list[Trained]:
    """Trees whose losses share no parameters, so that one can be differentiated after the other."""
    return [trained] if models.trunk is None else [{name: tree} for name, tree in trained.items()]


class Term(NamedTuple):
    """A term of the policy's loss beside the clipped objective: weight * sum(token weights * per_token).

    weight: of the term, from the options of the loss.
    per_token: [B, L], 0 where there is no action; None: not part of this run.
    """

    weight: Callable[[LossConfig], float]
    per_token: Callable[[LossConfig, LossInputs, TokenLogprobs], Float[Array, "B L"] | None]


def _reference_kl(config: LossConfig, inputs: LossInputs, new: TokenLogprobs) -> Float[Array, "B L"] | None:
    if inputs.reference is None:
        return None
    return loss_terms.kl_penalty(new.logprob, inputs.reference, inputs.batch.mask, estimator=config.kl_estimator)


# {metric, the term's mean over action tokens: the term}
TERMS: dict[str, Term] = {
    "policy/entropy": Term(lambda config: -config.entropy, lambda config, inputs, new: new.entropy),
    "policy/reference_kl": Term(lambda config: config.kl, _reference_kl),
}


def _policy_loss(
    models: TrainedModels, params: Params, hidden: Array, inputs: LossInputs, grammar: Grammar
) -> tuple[Array, dict[str, dict]]:
    batch, mask, config = inputs.batch, inputs.batch.mask, models.loss
    new = action_logprobs(models, params, hidden, batch, grammar)
    ratio = loss_terms.RATIOS[config.ratio](new.logprob, inputs.old, mask, _segment(batch))
    objective = loss_terms.clipped_objective(
        ratio,
        inputs.advantage,
        mask,
        clip_low=config.clip_low,
        clip_high=config.clip_high,
        dual_clip=config.dual_clip,
    )
    importance = 1.0 if inputs.importance is None else inputs.importance
    total = (inputs.weight * importance * objective.loss).sum()
    metrics = loss_terms.ratio_metrics(new.logprob, inputs.old, objective.clipped, mask, inputs.mean)
    metrics["sum"]["policy/loss"] = total
    for metric, term in TERMS.items():
        per_token = term.per_token(config, inputs, new)
        if per_token is not None:
            metrics["sum"][metric] = (inputs.mean * per_token).sum()
            total = total + term.weight(config) * (inputs.weight * per_token).sum()
    return total, metrics


@jax.named_scope("critic")
def _value_loss(models: TrainedModels, critic: Params, hidden: Array | None, inputs: LossInputs) -> Array:
    value = values(models, critic, hidden, inputs.batch)
    clip = models.loss.value_clip
    assert inputs.value is not None
    assert inputs.returns is not None
    per_token = loss_terms.value_loss(value, inputs.value, inputs.returns, inputs.batch.mask, clip=clip)
    return (inputs.mean * per_token).sum()


def reduce_metrics(parts: dict[str, dict]) -> dict[str, Array]:
    """Metrics of a minibatch from those of its parts, stacked on axis 0."""
    return {name: x.sum(0) for name, x in parts["sum"].items()} | {name: x.max(0) for name, x in parts["max"].items()}
