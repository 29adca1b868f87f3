"""From a dialogue's emotions to its reward (RLVER, arXiv 2507.03112, section 2).

Notation: e_0 is the initial emotion, e_t the emotion after turn t, n the number of turns played.

    final:    R = max(e_n / 100, 0), earned at turn n
    per_turn: r_t = (e_t - e_{t-1}) / 10
    mixed:    r_t = gamma^(t-1) * ((1 - weight) * [t = n] * e_n / 100 + weight * (e_t - e_{t-1}) / 10)

In each, the dialogue's reward is the sum of its turns' rewards. (Only a dialogue of no turns has nowhere to
put its reward: there the scalar keeps what e_0 alone earns, and there are no turns to train on.)

A think-format violation earns nothing: the dialogue counts as one that ended with emotion 0. The terminal part is
0, and the turn that broke the format loses all emotion there was. If it only ended the dialogue, breaking the format
would be the way out of one that goes badly, which a policy whose replies cost more than they earn finds in few steps.
"""

from collections.abc import Callable

import jax.numpy as jnp
import numpy as np
from flax import struct
from jaxtyping import Array, Bool, Float, Int

# Divided once, on the host, and looked up: XLA compiles x / 100 as x * (1 / 100), which is another float32
# for 30 of the 101 emotions, and a reward has to be the same number in a log, under jit and in a check.
_HUNDREDTHS = np.asarray(np.arange(101) / 100, np.float32)
_TENTHS = np.asarray(np.arange(-100, 101) / 10, np.float32)


@struct.dataclass
class Rewards:
    """reward: [B] float32, one number a dialogue; turns: [B, T] float32, by turn, 0 after the last.

    counted: [B] bool, whether a dialogue is learned from: where False it has no actions, and no statistics of its group
    or its batch know of it. None: all are.
    """

    reward: Float[Array, " B"]
    turns: Float[Array, "B T"]
    counted: Bool[Array, " B"] | None = None


def final(emotions: Int[Array, "B T+1"], n_turns: Int[Array, " B"], violation: Bool[Array, " B"]) -> Rewards:
    """Reward = final emotion / 100, clipped at 0, placed on the last turn; 0 after a violation.

    emotions: initial first, entries after the last turn are ignored; n_turns: 0..T, limited to that range.
    Raises ValueError for arrays whose shapes or dtypes don't fit. The same holds for the other rewards.
    """
    _check(emotions, n_turns, violation)
    last = jnp.clip(n_turns, 0, emotions.shape[1] - 1)
    reward = jnp.where(violation, 0.0, _final_fraction(emotions, last))
    return Rewards(reward=reward, turns=jnp.where(_is_last(emotions, last), reward[:, None], 0.0))


def per_turn(emotions: Int[Array, "B T+1"], n_turns: Int[Array, " B"], violation: Bool[Array, " B"]) -> Rewards:
    """Reward of a turn = its change of emotion / 10, as it happened after clipping to 0..100.

    A dialogue's reward is the sum, (e_n - e_0) / 10, and may be negative. A turn that violates the format changes the
    emotion to 0, so that the sum is -e_0 / 10. A dialogue of no turns earns 0.
    """
    _check(emotions, n_turns, violation)
    last = jnp.clip(n_turns, 0, emotions.shape[1] - 1)
    turns = _change_tenths(emotions, last, violation)
    return Rewards(reward=turns.sum(axis=1), turns=turns)


def mixed(
    emotions: Int[Array, "B T+1"],
    n_turns: Int[Array, " B"],
    violation: Bool[Array, " B"],
    *,
    gamma: float = 1.0,
    weight: float = 0.5,
) -> Rewards:
    """Discounted mix: share `weight` of `per_turn` and 1 - weight of `final`, turn t worth gamma^(t-1).

    The discount is already in the turns' rewards: an advantage estimator on top must not discount turns
    again. gamma 1 with weight 0 is `final`, with weight 1 `per_turn`. A dialogue of no turns earns
    (1 - weight) * e_0 / 100. Raises ValueError also for gamma outside (0, 1] or weight outside [0, 1].
    """
    if not 0.0 < gamma <= 1.0 or not 0.0 <= weight <= 1.0:
        raise ValueError(f"gamma={gamma} must lie in (0, 1] and weight={weight} in [0, 1]")
    _check(emotions, n_turns, violation)
    last = jnp.clip(n_turns, 0, emotions.shape[1] - 1)
    ending = jnp.where(violation, 0.0, _final_fraction(emotions, last)) * jnp.float32(1.0 - weight)
    raw = jnp.where(_is_last(emotions, last), ending[:, None], 0.0)
    raw = raw + jnp.float32(weight) * _change_tenths(emotions, last, violation)
    discount = np.asarray(gamma ** np.arange(emotions.shape[1] - 1), np.float32)
    turns = raw * discount
    return Rewards(reward=jnp.where(last > 0, turns.sum(axis=1), ending), turns=turns)


def reward(
    name: str,
    emotions: Int[Array, "B T+1"],
    n_turns: Int[Array, " B"],
    violation: Bool[Array, " B"],
    *,
    gamma: float = 1.0,
    weight: float = 0.5,
) -> Rewards:
    """Compute the reward called `name` (one of REWARDS); gamma and weight matter to `mixed` only.

    Raises ValueError for an unknown name, and as `final` and `mixed` do.
    """
    if name not in REWARDS:
        raise ValueError(f"reward {name!r} is unknown: use one of {', '.join(REWARDS)}")
    return REWARDS[name](emotions, n_turns, violation, gamma, weight)


# {name: reward from emotions, number of turns, violation, gamma and weight}
REWARDS: dict[str, Callable[..., Rewards]] = {
    "final": lambda emotions, n_turns, violation, gamma, weight: final(emotions, n_turns, violation),
    "per_turn": lambda emotions, n_turns, violation, gamma, weight: per_turn(emotions, n_turns, violation),
    "mixed": lambda emotions, n_turns, violation, gamma, weight: mixed(
        emotions, n_turns, violation, gamma=gamma, weight=weight
    ),
}


def _final_fraction(emotions: Int[Array, "B T+1"], last: Int[Array, " B"]) -> Float[Array, " B"]:
    emotion = jnp.take_along_axis(emotions, last[:, None], axis=1)[:, 0]
    return jnp.asarray(_HUNDREDTHS)[jnp.clip(emotion, 0, 100)]


def _change_tenths(
    emotions: Int[Array, "B T+1"], last: Int[Array, " B"], violation: Bool[Array, " B"]
) -> Float[Array, "B T"]:
    emotions = emotions.astype(jnp.int32)
    broken = violation[:, None] & (jnp.arange(emotions.shape[1]) == last[:, None])
    change = jnp.clip(jnp.diff(jnp.where(broken, 0, emotions), axis=1), -100, 100)
    tenths = jnp.asarray(_TENTHS)[change + 100]
    played = jnp.arange(change.shape[1]) < last[:, None]
    return jnp.where(played, tenths, 0.0)


def _is_last(emotions: Int[Array, "B T+1"], last: Int[Array, " B"]) -> Bool[Array, "B T"]:
    return jnp.arange(1, emotions.shape[1]) == last[:, None]


def _check(emotions: Array, n_turns: Array, violation: Array) -> None:
    # Shapes and dtypes only, so that it runs at trace time and costs nothing under jit.
    shapes = f"emotions {emotions.shape}, n_turns {n_turns.shape}, violation {violation.shape}"
    rows = emotions.shape[:1]
    if emotions.ndim != 2 or emotions.shape[1] < 1 or n_turns.shape != rows or violation.shape != rows:
        raise ValueError(f"got {shapes}; expected [B, T+1] (initial emotion first), [B] and [B]")
    if not jnp.issubdtype(emotions.dtype, jnp.integer) or not jnp.issubdtype(n_turns.dtype, jnp.integer):
        raise ValueError(f"emotions ({emotions.dtype}) and n_turns ({n_turns.dtype}) must be integer arrays")
    if violation.dtype != jnp.bool_:
        raise ValueError(f"violation must be a bool array, got {violation.dtype}: pass `violation != 0`")
