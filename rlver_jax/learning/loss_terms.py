"""Losses by token, [B, L]: multiply by `token_weights` and sum. One small pure function each.

B dialogues, L packed tokens. `mask` is true where an action token is predicted; elsewhere every result is 0, and what
stands there, NaN and inf too, reaches no value and no gradient. Only `new` (or `ratio`) and `value` are differentiated;
everything else is a constant of the loss. Log-probs are in nats.
"""

import math
from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int

from rlver_jax.learning.masked import masked_max, masked_mean, zero_outside

# exp is continued along its tangent from here on, so that no log-ratio makes inf: even where the clip doesn't take the
# ratio, inf would be 0 * inf = NaN in the gradient. Clamping instead would stop the gradient of the worst tokens.
_TANGENT = 20.0


class Clipped(NamedTuple):
    """loss: by token; clipped: where the clip decided, that is where the loss doesn't depend on the ratio."""

    loss: Float[Array, "B L"]
    clipped: Bool[Array, "B L"]


class Minibatch(NamedTuple):
    """What a normalization looks at."""

    mask: Bool[Array, "B L"]
    turn: Int[Array, "B L"] | None  # turn of each action, from 0, below `turns`
    turns: int  # of a dialogue, at most
    length: int  # constant tokens of a dialogue
    dialogues: int | Int[Array, ""]  # of the minibatch, those without action included


def token_weights(
    mask: Bool[Array, "B L"],
    kind: str,
    *,
    length: int = 0,
    turn: Int[Array, "B L"] | None = None,
    turns: int = 0,
    dialogues: Int[Array, ""] | None = None,
) -> Float[Array, "B L"]:
    """Weights w such that sum(w * loss) is the loss of a minibatch; float32, 0 without action.

        token_mean     1 / action tokens of the minibatch                              DAPO, arXiv 2503.14476
        turn_mean      1 / (action tokens of the turn * turns with an action)          RLVER's code, with thoughts
        dialogue_mean  1 / (action tokens of the dialogue * dialogues with an action)  GRPO, arXiv 2402.03300
        dr_grpo        1 / (B * length), with a constant length > 0                    Dr. GRPO, arXiv 2503.20783

    Made once for a whole minibatch and cut along with it: the microbatches' losses then add up to the minibatch's,
    however many there are. In dialogue_mean a dialogue without action is not counted; in dr_grpo it is one of the B.
    `dialogues` is B where some of the rows are no part of the minibatch. Raises ValueError for an unknown kind, for
    dr_grpo without a length, and for turn_mean without turns.
    """
    if kind not in NORMALIZATIONS:
        raise ValueError(f"normalization {kind!r} is unknown: use one of {', '.join(NORMALIZATIONS)}")
    return NORMALIZATIONS[kind](Minibatch(mask, turn, turns, length, mask.shape[0] if dialogues is None else dialogues))


def _token_mean(minibatch: Minibatch) -> Float[Array, "B L"]:
    actions = minibatch.mask.astype(jnp.float32)
    return actions / jnp.maximum(actions.sum(), 1)


def _turn_mean(minibatch: Minibatch) -> Float[Array, "B L"]:
    if minibatch.turn is None or minibatch.turns <= 0:
        raise ValueError(f"turn_mean needs the turn of each action and how many there are: turns={minibatch.turns}")
    actions = minibatch.mask.astype(jnp.float32)
    rows = jnp.arange(actions.shape[0])[:, None]
    of_turn = jnp.zeros((actions.shape[0], minibatch.turns), jnp.float32).at[rows, minibatch.turn].add(actions)
    spoken = jnp.maximum((of_turn > 0).sum(), 1)
    return actions / jnp.maximum(jnp.take_along_axis(of_turn, minibatch.turn, axis=1), 1) / spoken


def _dialogue_mean(minibatch: Minibatch) -> Float[Array, "B L"]:
    actions = minibatch.mask.astype(jnp.float32)
    dialogues = jnp.maximum(minibatch.mask.any(axis=1).sum(), 1)
    return actions / jnp.maximum(actions.sum(axis=1, keepdims=True), 1) / dialogues


def _dr_grpo(minibatch: Minibatch) -> Float[Array, "B L"]:
    if minibatch.length <= 0:
        raise ValueError(f"dr_grpo divides by a constant length: length={minibatch.length} must be above 0")
    divisor = minibatch.dialogues * minibatch.length
    return minibatch.mask.astype(jnp.float32) / (
        float(divisor) if isinstance(divisor, int) else divisor.astype(jnp.float32)
    )


# {name: weights of the tokens of a minibatch}
NORMALIZATIONS: dict[str, Callable[[Minibatch], Float[Array, "B L"]]] = {
    "token_mean": _token_mean,
    "turn_mean": _turn_mean,
    "dialogue_mean": _dialogue_mean,
    "dr_grpo": _dr_grpo,
}


def token_ratio(new: Float[Array, "B L"], old: Float[Array, "B L"], mask: Bool[Array, "B L"]) -> Float[Array, "B L"]:
    """exp(new - old) of each action token (PPO, arXiv 1707.06347); never inf (see `_exp`)."""
    return zero_outside(_exp(_log_ratio(new, old, mask)), mask)


def sequence_ratio(
    new: Float[Array, "B L"],
    old: Float[Array, "B L"],
    mask: Bool[Array, "B L"],
    segment: Int[Array, "B L"] | None = None,
) -> Float[Array, "B L"]:
    """GSPO (arXiv 2507.18071): exp(mean over the dialogue's action tokens of new - old), at each of its actions.

    Every position passes a gradient to all of its dialogue's tokens: with one advantage a dialogue and the weights of
    dialogue_mean, the clipped objective is then GSPO's. Where dialogues share a row, `segment` numbers the dialogue of
    each position, from 0 to L - 1.
    """
    log_ratio = _log_ratio(new, old, mask)
    if segment is None:
        mean = masked_mean(log_ratio, mask, axis=1)[:, None]
    else:
        rows = jnp.arange(mask.shape[0])[:, None]
        total, count = (jnp.zeros_like(log_ratio).at[rows, segment].add(x) for x in (log_ratio, mask))
        mean = jnp.take_along_axis(total / jnp.maximum(count, 1), segment, axis=1)
    return zero_outside(jnp.broadcast_to(_exp(mean), mask.shape), mask)


# {name: ratio by token from new and old log-probs, mask, and segment}
RATIOS: dict[str, Callable[..., Float[Array, "B L"]]] = {
    "token": lambda new, old, mask, segment: token_ratio(new, old, mask),
    "sequence": sequence_ratio,
}


def clipped_objective(
    ratio: Float[Array, "B L"],
    advantage: Float[Array, "B L"],
    mask: Bool[Array, "B L"],
    *,
    clip_low: float,
    clip_high: float,
    dual_clip: float = 0.0,
) -> Clipped:
    """The clipped loss of PPO (arXiv 1707.06347): max(-A r, -A clip(r, 1 - clip_low, 1 + clip_high)).

    clip_high above clip_low is DAPO's clip-higher (2503.14476); clip_low=1, clip_high=inf is no clip. With
    dual_clip = c > 1 (1912.09729) the loss of a negative advantage is at most -A c; 0 turns this off. A ratio on
    a bound is not clipped yet. Raises ValueError for a dual_clip other than 0 or above 1.
    """
    if dual_clip and not dual_clip > 1:
        raise ValueError(f"dual_clip={dual_clip} must be above 1 (a multiple of the old probability), or 0 for none")
    ratio, advantage = zero_outside(ratio, mask), jax.lax.stop_gradient(zero_outside(advantage, mask))
    # The maximum is spelled out as a choice, so that ties have one gradient and `clipped` says what happened.
    gain, loss = advantage > 0, advantage < 0
    limit = jnp.where(gain, 1.0 + clip_high, 1.0 - clip_low)
    clipped = (gain & (ratio > limit)) | (loss & (ratio < limit))
    if dual_clip:
        too_far = loss & (ratio > dual_clip)
        limit, clipped = jnp.where(too_far, dual_clip, limit), clipped | too_far
    clipped = clipped & mask
    return Clipped(zero_outside(-advantage * jnp.where(clipped, limit, ratio), mask), clipped)


def value_loss(
    value: Float[Array, "B L"],
    old_value: Float[Array, "B L"],
    returns: Float[Array, "B L"],
    mask: Bool[Array, "B L"],
    *,
    clip: float,
) -> Float[Array, "B L"]:
    """0.5 max((v - R)^2, (clip(v, old - clip, old + clip) - R)^2), as in OpenAI's PPO; clip 0 turns the clip off.

    A value that has come nearer to R by more than `clip` has no gradient; one that has moved away from R has one.
    """
    value, returns = zero_outside(value, mask), jax.lax.stop_gradient(zero_outside(returns, mask))
    error = (value - returns) ** 2
    if clip:
        old_value = jax.lax.stop_gradient(zero_outside(old_value, mask))
        near = jnp.clip(value, old_value - clip, old_value + clip)
        error = jnp.maximum(error, (near - returns) ** 2)
    return zero_outside(0.5 * error, mask)


def kl_penalty(
    new: Float[Array, "B L"], reference: Float[Array, "B L"], mask: Bool[Array, "B L"], *, estimator: str
) -> Float[Array, "B L"]:
    """Estimates of KL(new || reference) from tokens that `new` sampled (J. Schulman, "Approximating KL divergence").

    With d = reference - new:  k1 = -d (unbiased),  k2 = d^2 / 2,  k3 = exp(d) - 1 - d (unbiased, never negative).

    As a loss k1 teaches nothing: the mean gradient of a log-prob is 0. It belongs into rewards. k3 never overflows (see
    `_exp`). Raises ValueError for an unknown estimator.
    """
    if estimator not in KL_ESTIMATORS:
        raise ValueError(f"KL estimator {estimator!r} is unknown: use one of {', '.join(KL_ESTIMATORS)}")
    return KL_ESTIMATORS[estimator](-_log_ratio(new, reference, mask))


def importance_weights(
    old: Float[Array, "B L"], behaviour: Float[Array, "B L"], mask: Bool[Array, "B L"], *, cap: float
) -> Float[Array, "B L"]:
    """min(exp(old - behaviour), cap): truncated importance weights for a sampler that isn't quite the trainer's policy.

    `behaviour` holds the sampler's log-probs, `old` the trainer's of the same weights. Multiply the policy loss by it;
    no gradient flows. cap 0 turns it off: all weights are 1.
    """
    if not cap:
        return zero_outside(jnp.ones(mask.shape, jnp.float32), mask)
    return jax.lax.stop_gradient(zero_outside(jnp.minimum(_exp(_log_ratio(old, behaviour, mask)), cap), mask))


def ratio_metrics(
    new: Float[Array, "B L"],
    old: Float[Array, "B L"],
    clipped: Bool[Array, "B L"],
    mask: Bool[Array, "B L"],
    mean: Float[Array, "B L"],
) -> dict[str, dict[str, Float[Array, ""]]]:
    """How far the policy has moved: {"sum": approx_kl and clip_fraction, "max": ratio_max}; no gradient flows.

    `clipped` is `clipped_objective`'s, `mean` the minibatch's `token_weights(..., "token_mean")`: sums of microbatches
    add up to the minibatch's means, and the largest maximum is the minibatch's. approx_kl is k3 of KL(old || new);
    ratio_max the largest factor by which an action's probability rose or fell, 1 if there is no action.
    """
    log_ratio = jax.lax.stop_gradient(_log_ratio(new, old, mask))
    sums = {"policy/approx_kl": (mean * _k3(log_ratio)).sum(), "policy/clip_fraction": (mean * clipped).sum()}
    return {"sum": sums, "max": {"policy/ratio_max": _exp(masked_max(jnp.abs(log_ratio), mask, empty=0.0))}}


def _log_ratio(new: Float[Array, "B L"], old: Float[Array, "B L"], mask: Bool[Array, "B L"]) -> Float[Array, "B L"]:
    # A constant `old` also makes the on-policy call with old = new right: ratio 1, gradient that of the log-prob.
    return zero_outside(new, mask) - jax.lax.stop_gradient(zero_outside(old, mask))


def _exp(x: Float[Array, "*s"]) -> Float[Array, "*s"]:
    """exp up to _TANGENT, its tangent from there on: positive, rising, with a gradient, and never inf."""
    return jnp.exp(jnp.minimum(x, _TANGENT)) * (1.0 + jnp.maximum(x - _TANGENT, 0.0))


def _k3(d: Float[Array, "*s"]) -> Float[Array, "*s"]:
    """exp(d) - 1 - d, exact for small d (expm1), with exp as in `_exp`; 0 at d = 0."""
    return jnp.expm1(jnp.minimum(d, _TANGENT)) + math.exp(_TANGENT) * jnp.maximum(d - _TANGENT, 0.0) - d


# {name: estimate from d = reference - new}
KL_ESTIMATORS: dict[str, Callable[[Float[Array, "*s"]], Float[Array, "*s"]]] = {
    "k1": lambda d: -d,
    "k2": lambda d: 0.5 * d**2,
    "k3": _k3,
}
