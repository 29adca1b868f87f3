"""The loss of supervised fine-tuning: weighted cross-entropy of targets, by field, without a [B, L, V] array.

    loss = sum_f w_f S_f / sum_f w_f N_f        S_f = - sum over the field's targets of share * log p(target)

with N_f the sum of the field's shares: its tokens, so that weights of 1 give the mean over all tokens that are learned.
All log-probs are those of the model itself: no grammar, temperature 1.
"""

import dataclasses

import jax
import jax.numpy as jnp
import optax
from jaxtyping import Array, Float, Int

from rlver_jax.decoding.cache import LM
from rlver_jax.decoding.choice import Options, score_options
from rlver_jax.learning.masked import zero_outside
from rlver_jax.learning.optimizer import Optimizers, widened
from rlver_jax.learning.sft_rows import Rows
from rlver_jax.learning.train_step import TrainState, apply_gradient
from rlver_jax.models.logprobs import token_logprobs
from rlver_jax.models.lora import LoRA, applied, trained_axes
from rlver_jax.models.precision import accum_dtype
from rlver_jax.models.qwen import Params, Qwen2, head
from rlver_jax.parallel import rules


@dataclasses.dataclass(frozen=True)
class FieldLoss:
    """What the losses are compiled for (static and hashable)."""

    model: Qwen2
    fields: int
    vocab_chunk: int = 8192
    vocab_shards: int = 1
    lora: LoRA | None = None  # what is trained; None: all parameters

    def whole(self, params: Params, base: Params | None) -> Params:
        """All parameters of the model, where an adapter of it is trained."""
        return params if base is None or self.lora is None else applied(base, params, self.lora)

    def hidden(self, params: Params, rows: Rows) -> Float[Array, "R L D"]:
        """Hidden states of packed rows."""
        tokens = (rows.tokens, rows.positions, rows.branch)
        return self.model.apply({"params": params}, *tokens, segment=rows.segment)[0]

    def logprobs(self, params: Params, hidden: Float[Array, "R L D"], rows: Rows) -> Float[Array, "R Q"]:
        """log p of each target, float32; 0 in padding."""
        predicting = jnp.take_along_axis(hidden, rows.at[:, :, None], axis=1)
        logprob = token_logprobs(
            predicting, head(params), rows.target, chunk=self.vocab_chunk, vocab_shards=self.vocab_shards
        ).logprob
        return zero_outside(logprob, rows.share > 0)

    def sums(self, params: Params, hidden: Float[Array, "R L D"], rows: Rows) -> Float[Array, " F"]:
        """S_f of these rows; those of parts add up."""
        losses = -rows.share * self.logprobs(params, hidden, rows)
        return jnp.where(rows.field[:, :, None] == jnp.arange(self.fields), losses[:, :, None], 0).sum((0, 1))


def add_gradient(
    of: FieldLoss,
    params: Params,
    total: Params,
    rows: Rows,
    weights: Float[Array, " F"],
    base: Params | None = None,
) -> tuple[Params, Float[Array, " F"]]:
    """`total` with the gradient of sum_f weights_f S_f of these rows in it; and S_f.

    Args:
        total: like `zero_gradient`.
        weights: w_f / sum_f w_f N_f of the whole update.
        base: that the adapter `params` stands on, with `of.lora`.
    """

    def loss(params: Params) -> tuple[Array, Array]:
        params = of.whole(params, base)
        sums = of.sums(params, of.hidden(params, rows), rows)
        return (sums * weights).sum(), sums

    gradient, sums = jax.grad(loss, has_aux=True)(params)
    return as_params(of, jax.tree.map(jnp.add, total, gradient)), sums


def zero_gradient(of: FieldLoss, params: Params) -> Params:
    """What gradients are added to: zeros in float32 or wider, sharded like the parameters."""
    return as_params(of, jax.tree.map(lambda x: jnp.zeros(x.shape, accum_dtype(x.dtype)), params))


def update(optimizers: Optimizers, state: TrainState, gradient: Params) -> tuple[TrainState, dict[str, Array]]:
    """The optimizer's step, and metrics; a gradient that is not finite moves nothing and is counted."""
    norm = optax.tree.norm(widened(gradient))
    wanted = jnp.isfinite(norm)
    params, opt_state = apply_gradient(
        optimizers.policy, gradient, state.opt_state["policy"], state.params["policy"], wanted
    )
    skipped = state.skipped + ~wanted
    metrics = {"policy/grad_norm": norm, "train/skipped_updates": skipped.astype(jnp.float32)}
    return TrainState(state.step + 1, {"policy": params}, {"policy": opt_state}, skipped), metrics


def as_params(of: FieldLoss, gradient: Params) -> Params:
    """Shards a gradient like its parameters, so that devices sum parts of it and none holds all."""
    return rules.constrain_tree(gradient, trained_axes(of.model, of.lora))


def measure(
    of: FieldLoss,
    params: Params,
    rows: Rows,
    options: Options | None,
    first: Int[Array, "R K"],
    base: Params | None = None,
) -> tuple[Float[Array, " F"], Float[Array, "R K O"]]:
    """S_f of held-out rows, and the log-probability of every option of every change in them, as `decoding.choice`.

    Args:
        options: of a change; None: there are none, O is 0.
        first: place of the first option's first token; what is computed for 0, of no change, is no result.
        base: as in `add_gradient`.
    """
    params = of.whole(params, base)
    hidden = of.hidden(params, rows)
    sums = of.sums(params, hidden, rows)
    if options is None:
        return sums, jnp.zeros((*first.shape, 0), jnp.float32)
    contexts = jnp.maximum(first[:, :, None] + options.contexts - 1, 0).reshape(first.shape[0], -1)
    context_hidden = jnp.take_along_axis(hidden, contexts[:, :, None], axis=1)
    context_hidden = context_hidden.reshape(-1, options.contexts.shape[0], context_hidden.shape[-1])
    return sums, score_options(LM(params, of.model), options, context_hidden).reshape(*first.shape, -1)
