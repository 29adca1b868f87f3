"""From rewards to advantages at the positions where action tokens are predicted.

B dialogues, L packed tokens, T turns. `mask` is true where an action token is predicted: only these positions count.
A group is `group` neighbouring dialogues of one profile: whole dialogues, never turns, so long ones weigh no more.

A new estimator is a function and an entry of `ESTIMATORS`, at the end. One with a critic is also named in NO_CRITIC
(config/model_fields.py), or the critic's options are called without effect.
"""

import dataclasses
import functools
from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int, Num

from rlver_jax.learning.masked import whiten, zero_outside
from rlver_jax.rollout.rewards import Rewards

# Rewards nearer to each other than this (relative to the largest, if above 1) differ by float rounding only: eight
# changes summed in another order. Divided by the standard deviation of that they would be advantages of up to 0.4.
_SAME = 1e-5


@dataclasses.dataclass(frozen=True)
class AdvantageConfig:
    """How rewards become advantages: the fields of `config.algorithm`, and `rollout.group`."""

    estimator: str = "gae"  # a name in ESTIMATORS
    credit: str = "dialogue"  # gae, grpo: over the dialogue | turn (see rlver_jax/config/fields.py)
    turn_discount: float = 1.0  # grpo with credit=turn
    gamma: float = 1.0
    lam: float = 1.0
    whiten: bool = True  # gae: to zero mean and unit deviation over the batch's action tokens
    scale: bool = True  # grpo: by the group's standard deviation
    group: int = 1


class Advantages(NamedTuple):
    """advantage: weight of each action's log-prob; returns: the critic's target. Both float32, 0 without action."""

    advantage: Float[Array, "B L"]
    returns: Float[Array, "B L"] | None  # None: an estimator without a critic


class EstimatorInputs(NamedTuple):
    """What an estimator may read of a batch."""

    rewards: Rewards  # by dialogue and by turn
    turn: Int[Array, "B L"]  # of each action
    mask: Bool[Array, "B L"]
    value: Float[Array, "B L"] | None  # the critic's, before the update; None without a critic


class Estimator(NamedTuple):
    """An advantage estimator, by its name in ESTIMATORS."""

    compute: Callable[[AdvantageConfig, EstimatorInputs], Advantages]
    needs_critic: bool = False
    needs_group: bool = False  # compares dialogues of one profile: rollout.group must be 2 or more


def compute_advantages(config: AdvantageConfig, inputs: EstimatorInputs) -> Advantages:
    """Advantages of the action tokens, and the critic's targets where there is a critic.

    Raises:
        ValueError: an unknown estimator or form of credit, or an estimator that lacks its critic.
    """
    if config.credit not in ("dialogue", "turn"):
        raise ValueError(f"credit={config.credit!r}; expected dialogue or turn")
    if config.estimator not in ESTIMATORS:
        raise ValueError(f"estimator={config.estimator!r}; expected one of {', '.join(ESTIMATORS)}")
    estimator = ESTIMATORS[config.estimator]
    if estimator.needs_critic and inputs.value is None:
        raise ValueError(f"estimator={config.estimator!r} needs a critic's values, and there are none")
    return estimator.compute(config, inputs)


def tied_groups(config: AdvantageConfig, advantage: Float[Array, "B L"]) -> Bool[Array, " G"]:
    """Whether a group earned the same throughout, so that it says nothing of which reply was better.

    `config.group` is 1 where dialogues are compared with the whole batch; then a dialogue is tied by itself where its
    advantages are exactly 0.
    """
    return (advantage == 0).reshape(-1, config.group * advantage.shape[1]).all(1)


def token_rewards(
    turn_rewards: Num[Array, "B T"], turn: Int[Array, "B L"], mask: Bool[Array, "B L"]
) -> Float[Array, "B L"]:
    """Each turn's reward at that turn's last action, 0 elsewhere.

    turn[b, l] is the turn, 0..T-1, of the action predicted at l (ignored without action); a turn's actions follow
    each other, with any gaps of no action. A turn without action has no position for its reward, which is left out. An
    index past T gives NaN, so that it is noticed.
    """
    rewards = turn_rewards.astype(jnp.promote_types(turn_rewards.dtype, jnp.float32))
    return at_turns(rewards, turn, _last_of_turn(turn, mask))


def terminal_on_every_turn(
    reward: Num[Array, " B"], turn: Int[Array, "B L"], mask: Bool[Array, "B L"]
) -> Float[Array, "B L"]:
    """The dialogue's reward at the last action of every turn, 0 elsewhere (arguments as in `token_rewards`).

    RLVER's own form (arXiv 2507.03112): each turn is a sample of its own that earns what the dialogue earned. It goes
    with `gae(..., segment=turn)`.
    """
    return broadcast(reward, _last_of_turn(turn, mask))


def gae(
    rewards: Float[Array, "B L"],
    values: Float[Array, "B L"],
    mask: Bool[Array, "B L"],
    *,
    gamma: float,
    lam: float,
    segment: Int[Array, "B L"] | None = None,
) -> Advantages:
    """Generalized advantage estimation (arXiv 1506.02438) from action to action, whatever lies between them.

        delta_k = r_k + gamma V_{k+1} - V_k,    A_k = delta_k + gamma lam A_{k+1},    returns_k = A_k + V_k

    k counts a dialogue's action tokens, which is also what gamma and lam discount. V and A are 0 after the last one
    and, with `segment`, after the last one of each run of equal `segment`: runs are samples of their own.
    """
    rewards, values = zero_outside(rewards, mask), zero_outside(values, mask)
    segment = jnp.zeros(mask.shape, jnp.int32) if segment is None else segment

    def step(following, here):
        reward, value, is_action, label = here
        next_advantage, next_value, next_label = following
        linked = label == next_label
        delta = reward + gamma * jnp.where(linked, next_value, 0.0) - value
        advantage = delta + gamma * lam * jnp.where(linked, next_advantage, 0.0)
        carry = (advantage, value, label)
        return tuple(jnp.where(is_action, x, y) for x, y in zip(carry, following, strict=True)), advantage

    nothing = jnp.zeros_like(rewards[:, 0])
    columns = (rewards.T, values.T, mask.T, segment.T)
    _, advantage = jax.lax.scan(step, (nothing, nothing, segment[:, -1]), columns, reverse=True)
    advantage = zero_outside(advantage.T, mask)
    return Advantages(advantage, advantage + values)


def group_advantages(
    reward: Num[Array, " B"],
    group: int,
    *,
    scale: bool,
    eps: float = 1e-6,
    counted: Bool[Array, " B"] | None = None,
) -> Float[Array, " B"]:
    """GRPO (arXiv 2402.03300): (R - mean) / (std + eps) over the group; scale=False, Dr. GRPO (2503.20783): R - mean.

    std is the sample one (ddof 1), as verl and TRL compute it. Groups of equal rewards give exactly 0, as do
    dialogues that are not `counted`, and one that is left alone. Raises ValueError for a group of one, or one that
    doesn't divide B.
    """
    deviation = _deviation(reward, _of_many(group, "group_advantages"), counted)
    if scale:
        squares = (deviation**2).sum(1, keepdims=True)
        of_subset = lambda there: squares / _others(there)  # noqa: E731
        std = jnp.sqrt(_if_whole(squares / (group - 1), of_subset, group, counted))
        deviation = deviation / (std + eps)
    return deviation.reshape(-1)


def turn_advantages(
    turn_rewards: Num[Array, "B T"],
    played: Bool[Array, "B T"],
    group: int,
    *,
    discount: float,
    scale: bool,
    eps: float = 1e-6,
) -> Float[Array, "B T"]:
    """GRPO with a reward for every turn (process supervision, arXiv 2402.03300 section 4.1.3).

        G_t = r_t + discount G_{t+1},    A_t = (G_t - mean_t) / (std + eps)

    mean_t is taken over those dialogues of the group that played turn t, std (scale only) over all their turns about
    these means, degrees of freedom subtracted. Discount 1 credits a turn with all that follows, 0 with its own reward.
    0 where not played, and for a turn at which the group earned the same. Raises ValueError as `group_advantages` does.
    """
    if _of_many(group, "turn_advantages") < 1 or turn_rewards.shape[0] % group:
        raise ValueError(f"rewards {turn_rewards.shape} can't be cut into groups of {group}: give [B, T], B a multiple")
    rewards = zero_outside(turn_rewards.astype(jnp.promote_types(turn_rewards.dtype, jnp.float32)), played)
    add = lambda later, now: (now + discount * later,) * 2  # noqa: E731
    _, onward = jax.lax.scan(add, jnp.zeros_like(rewards[:, 0]), rewards.T, reverse=True)
    there = played.reshape(-1, group, played.shape[1])
    earned, many = onward.T.reshape(there.shape), there.sum(1, keepdims=True)
    mean = zero_outside(earned, there).sum(1, keepdims=True) / jnp.maximum(many, 1)
    most = jnp.where(there, earned, -jnp.inf).max(1, keepdims=True)
    least = jnp.where(there, earned, jnp.inf).min(1, keepdims=True)
    equal = most - least <= _SAME * jnp.maximum(jnp.maximum(jnp.abs(most), jnp.abs(least)), 1.0)
    deviation = zero_outside(jnp.where(equal, 0.0, earned - mean), there)
    if scale:
        free = (there.sum((1, 2)) - there.any(1).sum(1))[:, None, None]
        deviation /= jnp.sqrt((deviation**2).sum((1, 2), keepdims=True) / jnp.maximum(free, 1)) + eps
    return deviation.reshape(played.shape)


def at_turns(values: Float[Array, "B T"], turn: Int[Array, "B L"], mask: Bool[Array, "B L"]) -> Float[Array, "B L"]:
    """Each turn's number at all its actions, 0 elsewhere; an index past T gives NaN, so that it is noticed."""
    return zero_outside(jnp.take_along_axis(values, turn, axis=1, mode="fill", fill_value=jnp.nan), mask)


def turns_played(turns: int, turn: Int[Array, "B L"], mask: Bool[Array, "B L"]) -> Bool[Array, "B T"]:
    """Whether a turn has an action."""
    return (jax.nn.one_hot(turn, turns, dtype=jnp.bool_) & mask[:, :, None]).any(1)


def rloo(reward: Num[Array, " B"], group: int, counted: Bool[Array, " B"] | None = None) -> Float[Array, " B"]:
    """RLOO (arXiv 2402.14740): R minus the mean of the group's others; `counted` as in `group_advantages`.

    Raises ValueError as `group_advantages` does.
    """
    # R - (sum - R) / (n - 1) = (R - mean) n / (n - 1)
    deviation = _deviation(reward, _of_many(group, "rloo"), counted)
    of_subset = lambda there: deviation * (there.sum(1, keepdims=True) / _others(there))  # noqa: E731
    return _if_whole(deviation * (group / (group - 1)), of_subset, group, counted).reshape(-1)


def reinforce_pp(
    reward: Num[Array, " B"],
    mask: Bool[Array, "B L"],
    group: int,
    *,
    eps: float = 1e-8,
    counted: Bool[Array, " B"] | None = None,
) -> Float[Array, "B L"]:
    """REINFORCE++ (arXiv 2501.03262): R, less the group's mean if group > 1, normalized over all action tokens.

    Each dialogue's number stands at all its actions; mean and (population) std are taken over the actions
    of the whole batch, so longer dialogues weigh more in both. Dialogues that are not `counted` have no actions and
    count in no group. Raises ValueError if group doesn't divide B.
    """
    if group != 1:
        reward = _deviation(reward, group, counted).reshape(-1)
    return whiten(broadcast(reward, mask), mask, eps)


def broadcast(advantage: Num[Array, " B"], mask: Bool[Array, "B L"]) -> Float[Array, "B L"]:
    """A dialogue's number at each of its actions, 0 elsewhere."""
    return zero_outside(jnp.broadcast_to(advantage[:, None], (*advantage.shape, mask.shape[1])), mask)


def _last_of_turn(turn: Int[Array, "B L"], mask: Bool[Array, "B L"]) -> Bool[Array, "B L"]:
    length = mask.shape[1]
    position = jnp.where(mask, jnp.arange(length), length)
    onward = jax.lax.cummin(position, axis=1, reverse=True)  # the first action from here on
    following = jnp.pad(onward[:, 1:], ((0, 0), (0, 1)), constant_values=length)
    next_turn = jnp.take_along_axis(turn, jnp.minimum(following, length - 1), axis=1)
    return mask & ((following == length) | (next_turn != turn))


def _of_many(group: int, who: str) -> int:
    if group == 1:
        raise ValueError(f"{who} compares dialogues of one profile, and group=1 leaves none to compare: use 2 or more")
    return group


def _deviation(reward: Num[Array, " B"], group: int, counted: Bool[Array, " B"] | None = None) -> Float[Array, "G n"]:
    """R - mean of its group, exactly 0 where all of a group are equal (up to rounding), and for what isn't counted."""
    if reward.ndim != 1 or group < 1 or reward.shape[0] % group:
        raise ValueError(f"rewards {reward.shape} can't be cut into groups of {group}: give [B], B a multiple of it")
    rewards = reward.astype(jnp.promote_types(reward.dtype, jnp.float32)).reshape(-1, group)
    spread = jnp.ptp(rewards, axis=1, keepdims=True)
    size = jnp.abs(rewards).max(axis=1, keepdims=True)
    equal = spread <= _SAME * jnp.maximum(size, 1.0)
    whole = jnp.where(equal, 0.0, rewards - rewards.mean(axis=1, keepdims=True))
    return _if_whole(whole, functools.partial(_deviation_of_subset, rewards), group, counted)


def _deviation_of_subset(rewards: Float[Array, "G n"], there: Bool[Array, "G n"]) -> Float[Array, "G n"]:
    known = zero_outside(rewards, there)
    spread = jnp.where(there, rewards, -jnp.inf).max(1, keepdims=True)
    spread -= jnp.where(there, rewards, jnp.inf).min(1, keepdims=True)  # -inf where none is there
    equal = spread <= _SAME * jnp.maximum(jnp.abs(known).max(1, keepdims=True), 1.0)
    mean = known.sum(1, keepdims=True) / jnp.maximum(there.sum(1, keepdims=True), 1)
    return zero_outside(jnp.where(equal, 0.0, rewards - mean), there)


def _others(there: Bool[Array, "G n"]) -> Int[Array, "G 1"]:
    """How many others each of a group is compared with; 1 where there are none."""
    return jnp.maximum(there.sum(1, keepdims=True) - 1, 1)


def _if_whole(
    whole: Float[Array, "G _"], of_subset: Callable, group: int, counted: Bool[Array, " B"] | None
) -> Float[Array, "G _"]:
    """`whole` for groups of which all are counted, to the bit; for the others `of_subset` of who is ([G, n])."""
    if counted is None:
        return whole
    there = counted.reshape(-1, group)
    return jnp.where(there.all(1, keepdims=True), whole, of_subset(there))


def _gae(config: AdvantageConfig, inputs: EstimatorInputs) -> Advantages:
    """PPO's: rewards by turn, or with credit=turn each turn a sample of its own that earns the dialogue's reward."""
    rewards, turn, mask, value = inputs
    assert value is not None
    if config.credit == "turn":
        per_token, segment = terminal_on_every_turn(rewards.reward, turn, mask), turn
    else:
        per_token, segment = token_rewards(rewards.turns, turn, mask), None
    estimate = gae(per_token, value, mask, gamma=config.gamma, lam=config.lam, segment=segment)
    return estimate._replace(advantage=whiten(estimate.advantage, mask)) if config.whiten else estimate


def _grpo(config: AdvantageConfig, inputs: EstimatorInputs) -> Advantages:
    rewards, turn, mask, _ = inputs
    if config.credit == "turn":
        played = turns_played(rewards.turns.shape[1], turn, mask)
        by_turn = turn_advantages(
            rewards.turns, played, config.group, discount=config.turn_discount, scale=config.scale
        )
        return Advantages(at_turns(by_turn, turn, mask), None)
    by_dialogue = group_advantages(rewards.reward, config.group, scale=config.scale, counted=rewards.counted)
    return Advantages(broadcast(by_dialogue, mask), None)


def _rloo(config: AdvantageConfig, inputs: EstimatorInputs) -> Advantages:
    rewards = inputs.rewards
    return Advantages(broadcast(rloo(rewards.reward, config.group, rewards.counted), inputs.mask), None)


def _reinforce_pp(config: AdvantageConfig, inputs: EstimatorInputs) -> Advantages:
    rewards = inputs.rewards
    return Advantages(reinforce_pp(rewards.reward, inputs.mask, config.group, counted=rewards.counted), None)


ESTIMATORS: dict[str, Estimator] = {
    "gae": Estimator(_gae, needs_critic=True),
    "grpo": Estimator(_grpo, needs_group=True),
    "rloo": Estimator(_rloo, needs_group=True),
    "reinforce_pp": Estimator(_reinforce_pp),
    "ppo": Estimator(_gae, needs_critic=True),  # as `gae` is mostly called
}
