"""One training step on packed dialogues: advantages, then epochs x minibatches x microbatches (design 9)."""

import dataclasses
import functools
from collections.abc import Callable
from typing import Any

import flax.struct
import jax
import jax.numpy as jnp
import optax
from jaxtyping import Array, Float, Int, Key

from rlver_jax.decoding.grammar import Grammar
from rlver_jax.learning import advantages, loss_terms
from rlver_jax.learning.float32_moments import in_float32, widened
from rlver_jax.learning.loss import (
    LossInputs,
    Trained,
    TrainedModels,
    action_logprobs,
    as_params,
    forward,
    loss,
    reduce_metrics,
    split_trainables,
    values,
)
from rlver_jax.learning.masked import masked_mean, masked_var, whiten
from rlver_jax.learning.packing import PackingPlan, RowAssignment, pack, unpack
from rlver_jax.learning.sequences import PackedBatch
from rlver_jax.models.precision import accum_dtype
from rlver_jax.models.qwen import Params
from rlver_jax.parallel.rules import constrain, constrain_rows, parts
from rlver_jax.rollout.rewards import Rewards

ESTIMATORS = ("gae", "grpo", "rloo", "reinforce_pp")


@dataclasses.dataclass(frozen=True)
class AdvantageConfig:
    """How rewards become advantages; see `advantages` for the equations."""

    estimator: str = "gae"
    credit: str = "dialogue"  # gae, grpo: over the dialogue | turn (see configs/base.py)
    turn_discount: float = 1.0  # grpo with credit=turn
    gamma: float = 1.0
    lam: float = 1.0
    whiten: bool = True  # gae: to zero mean and unit deviation over the batch's action tokens
    scale: bool = True  # grpo: by the group's standard deviation
    group: int = 1


@dataclasses.dataclass(frozen=True)
class UpdateConfig:
    """How a batch is walked through."""

    epochs: int = 1
    minibatches: int = 1  # optimizer steps an epoch
    microbatches: int = 1  # parts of a minibatch whose gradients are summed, where no plan is given
    critic_warmup: int = 0  # training steps in which only the critic learns
    recompute: bool = False  # ratios start from the trainer's own log-probs rather than the sampler's
    importance_cap: float = 0.0  # with recompute: truncated importance weights; 0: none


@dataclasses.dataclass(frozen=True)
class Optimizers:
    """One for each trained tree; gradients are clipped, and their steps counted, apart."""

    policy: optax.GradientTransformation
    critic: optax.GradientTransformation | None = None

    def of(self, name: str) -> optax.GradientTransformation:
        """That of `policy` or `critic`."""
        return getattr(self, name)


@flax.struct.dataclass
class TrainState:
    """All that changes in training and is needed to go on."""

    step: Int[Array, ""]  # training steps done
    params: Trained
    opt_state: dict[str, Any]  # by the same names as params
    skipped: Int[Array, ""]  # updates left out because a gradient was not finite


@dataclasses.dataclass(frozen=True)
class TrainStepConfig:
    """Everything static that `train_step` is compiled for."""

    learner: TrainedModels
    advantage: AdvantageConfig
    schedule: UpdateConfig
    optimizers: Optimizers


def make_optimizer(
    *,
    learning_rate: float,
    warmup_steps: int,
    grad_clip: float,
    beta1: float,
    beta2: float,
    weight_decay: float,
    moment_dtype: str,
    eps: float = 1e-8,
) -> optax.GradientTransformation:
    """AdamW behind a gradient clip (0: none); the learning rate rises linearly over `warmup_steps` updates and stays.

    The first update already moves: its rate is learning_rate / (warmup_steps + 1). Everything is computed in float32,
    whatever the parameters are kept in, and so is the second moment kept; the first one is rounded to `moment_dtype`
    once an update.
    """
    rise = optax.linear_schedule(learning_rate / (warmup_steps + 1), learning_rate, warmup_steps)
    rate = rise if warmup_steps else learning_rate
    adam = optax.adamw(rate, b1=beta1, b2=beta2, eps=eps, weight_decay=weight_decay, mu_dtype=jnp.dtype(moment_dtype))
    # optax clips to a norm of 0 by 0/0.
    clip = optax.clip_by_global_norm(grad_clip) if grad_clip else optax.identity()
    return in_float32(optax.chain(clip, adam))


def init_state(params: Trained, optimizers: Optimizers) -> TrainState:
    """State before the first step."""
    opt_state = {name: optimizers.of(name).init(tree) for name, tree in params.items()}
    return TrainState(jnp.int32(0), params, opt_state, jnp.int32(0))


def compile_step(setup: TrainStepConfig, state: TrainState) -> Callable[..., tuple[TrainState, dict[str, Array]]]:
    """`train_step` with its setup bound and jitted: the new state lies where the old one did, in its buffers."""
    where = jax.tree.map(lambda x: x.sharding, state)
    return jax.jit(functools.partial(train_step, setup), donate_argnums=0, out_shardings=(where, None))


def train_step(
    setup: TrainStepConfig,
    state: TrainState,
    batch: PackedBatch,
    rewards: Rewards,
    grammar: Grammar,
    key: Key[Array, ""],
    reference: Params | None = None,
    plan: PackingPlan | None = None,
) -> tuple[TrainState, dict[str, Array]]:
    """Updates policy and critic on one batch of B dialogues.

    Args:
        grammar: the policy's, as it was sampled under.
        key: of the run; what is shuffled depends on it and on the step alone.
        reference: parameters of the model that a KL penalty holds the policy to.
        plan: how dialogues share rows, from `plan_packing` for the `minibatch_order` of this step: the result is the
            same. None: one dialogue a row, a minibatch in so many microbatches as the schedule says.

    Returns:
        the new state, and metrics: float32 scalars by the names of metrics.jsonl.
    """
    inputs, metrics = prepare(setup, state, batch, rewards, grammar, reference, plan)
    order = minibatch_order(setup.schedule, key, state.step, batch.count.shape[0])
    state, found = _epochs(setup, state, inputs, grammar, order, plan)
    first = jax.tree.map(lambda x: x[0], found)
    metrics |= {name: x.max() if name.endswith("_max") else x.mean() for name, x in found.items()}
    metrics["policy/ratio_max_first"] = first["policy/ratio_max"]
    metrics["policy/update_kl"] = post_update_kl(setup, state.params["policy"], inputs, grammar, plan)
    metrics["train/skipped_updates"] = state.skipped.astype(jnp.float32)
    return dataclasses.replace(state, step=state.step + 1), metrics


@jax.named_scope("prepare")
def prepare(
    setup: TrainStepConfig,
    state: TrainState,
    batch: PackedBatch,
    rewards: Rewards,
    grammar: Grammar,
    reference: Params | None = None,
    plan: PackingPlan | None = None,
) -> tuple[LossInputs, dict[str, Array]]:
    """All that the loss takes as given: values, log-probs to start from, advantages. Weights are still zero."""
    learner, schedule, mask = setup.learner, setup.schedule, batch.mask
    params = state.params

    def look(part: PackedBatch) -> dict[str, Array]:
        found, hidden = {}, None
        if schedule.recompute or (learner.value_head is not None and learner.trunk is None):
            hidden = forward(learner.model, params["policy"], part)
            if schedule.recompute:
                found["old"] = action_logprobs(learner, params["policy"], hidden, part, grammar).logprob
        if learner.value_head is not None:
            found["value"] = values(learner, params["critic"], hidden, part)
        if reference is not None:
            own = forward(learner.model, reference, part)
            found["reference"] = action_logprobs(learner, reference, own, part, grammar).logprob
        return found

    looked = _of_parts(look, batch, schedule.minibatches * schedule.microbatches, plan)
    importance = None
    if schedule.recompute and schedule.importance_cap:
        importance = loss_terms.importance_weights(looked["old"], batch.logprob, mask, cap=schedule.importance_cap)
    advantage, returns = compute_advantages(setup.advantage, rewards, batch, looked.get("value"))
    zeros = jnp.zeros_like(batch.logprob)
    inputs = LossInputs(
        batch, looked.get("old", batch.logprob), advantage, zeros, zeros, looked.get("reference"), importance,
        looked.get("value"), returns,
    )  # fmt: skip
    return inputs, _given_metrics(inputs)


def _given_metrics(inputs: LossInputs) -> dict[str, Array]:
    mask = inputs.batch.mask
    metrics = {
        "advantage/mean": masked_mean(inputs.advantage, mask),
        "advantage/std": jnp.sqrt(masked_var(inputs.advantage, mask)),
        "tokens/actions": mask.sum().astype(jnp.float32),  # counted in whole numbers: float32 ends at 2^24
        "tokens/packed": inputs.batch.count.sum().astype(jnp.float32),
    }
    if inputs.value is not None and inputs.returns is not None:
        unexplained = masked_var(inputs.returns - inputs.value, mask)
        spread = masked_var(inputs.returns, mask)
        metrics["critic/value_mean"] = masked_mean(inputs.value, mask)
        # Returns that are all equal have nothing to explain.
        metrics["critic/explained_variance"] = jnp.where(
            spread > 0, 1 - unexplained / jnp.where(spread > 0, spread, 1), 0
        )
    return metrics


def compute_advantages(
    how: AdvantageConfig, rewards: Rewards, batch: PackedBatch, value: Float[Array, "B L"] | None
) -> tuple[Float[Array, "B L"], Float[Array, "B L"] | None]:
    """Advantages of the action tokens, and the critic's targets where there is a critic.

    Raises:
        ValueError: an unknown estimator or form of credit.
    """
    mask = batch.mask
    if how.credit not in ("dialogue", "turn"):
        raise ValueError(f"credit={how.credit!r}; expected dialogue or turn")
    if how.estimator == "gae":
        assert value is not None, "gae needs a critic"
        by_turn = how.credit == "turn"
        place = advantages.terminal_on_every_turn if by_turn else advantages.token_rewards
        given = place(rewards.reward if by_turn else rewards.turns, batch.turn, mask)
        segment = batch.turn if by_turn else None
        found = advantages.gae(given, value, mask, gamma=how.gamma, lam=how.lam, segment=segment)
        return whiten(found.advantage, mask) if how.whiten else found.advantage, found.returns
    if how.estimator == "grpo" and how.credit == "turn":
        played = advantages.turns_played(rewards.turns.shape[1], batch.turn, mask)
        discount, scale = how.turn_discount, how.scale
        earned = advantages.turn_advantages(rewards.turns, played, how.group, discount=discount, scale=scale)
        return advantages.at_turns(earned, batch.turn, mask), None
    if how.estimator == "grpo":
        return advantages.broadcast(advantages.group_advantages(rewards.reward, how.group, scale=how.scale), mask), None
    if how.estimator == "rloo":
        return advantages.broadcast(advantages.rloo(rewards.reward, how.group), mask), None
    if how.estimator == "reinforce_pp":
        return advantages.reinforce_pp(rewards.reward, mask, how.group), None
    raise ValueError(f"estimator={how.estimator!r}; expected one of {', '.join(ESTIMATORS)}")


def minibatch_order(schedule: UpdateConfig, key: Key[Array, ""], step: Int[Array, ""], size: int) -> Int[Array, "U N"]:
    """The dialogues of each update of a training step: every epoch goes through all of them, in an order of its own."""
    order = jnp.tile(jnp.arange(size), (schedule.epochs, 1))
    if schedule.minibatches > 1:
        key = jax.random.fold_in(key, step)
        keys = jax.vmap(jax.random.fold_in, (None, 0))(key, jnp.arange(schedule.epochs))
        order = jax.vmap(jax.random.permutation, (0, None))(keys, size)
    return order.reshape(schedule.epochs * schedule.minibatches, -1)


def _epochs(
    setup: TrainStepConfig,
    state: TrainState,
    inputs: LossInputs,
    grammar: Grammar,
    order: Array,
    plan: PackingPlan | None,
):
    """Every minibatch of every epoch, one optimizer step each; metrics [epochs * minibatches]."""

    def one(state: TrainState, update: tuple[Array, RowAssignment | None]) -> tuple[TrainState, dict[str, Array]]:
        rows, places = update
        whole = setup.schedule.minibatches == 1
        picked = inputs if whole else constrain_rows(jax.tree.map(lambda x: x[rows], inputs))
        return _minibatch(setup, state, picked, grammar, places)

    return _loop(one, state, (order, None if plan is None else plan.updates))


def _minibatch(
    setup: TrainStepConfig, state: TrainState, inputs: LossInputs, grammar: Grammar, places: RowAssignment | None
):
    """One optimizer step of each tree. What has nothing in common is done in turn: one gradient is alive at a time."""
    options, mask = setup.learner.loss, inputs.batch.mask
    inputs = dataclasses.replace(
        inputs,
        weight=loss_terms.token_weights(mask, options.normalization, length=options.length),
        mean=loss_terms.token_weights(mask, "token_mean", length=options.length),
    )
    pieces = _pieces(inputs, inputs.batch, setup.schedule.microbatches, places)
    frozen = {"policy": state.step < setup.schedule.critic_warmup, "critic": jnp.bool_(False)}
    params, opt_state, skipped = {}, {}, state.skipped
    metrics: dict[str, Array] = {}
    for trained in split_trainables(setup.learner, state.params):
        gradients, found = _gradients(setup, trained, pieces, grammar)
        metrics |= found
        for name, gradient in gradients.items():
            norm = optax.tree.norm(widened(gradient))
            wanted = jnp.isfinite(norm) & ~frozen[name]
            params[name], opt_state[name] = _apply(
                setup.optimizers.of(name), gradient, state.opt_state[name], trained[name], wanted
            )
            skipped += ~jnp.isfinite(norm)
            metrics[f"{name}/grad_norm"] = norm
    return TrainState(state.step, params, opt_state, skipped), metrics


def _gradients(setup: TrainStepConfig, trained: Trained, pieces: tuple[LossInputs, Array | None], grammar: Grammar):
    """Sums over the microbatches, and the minibatch's metrics."""

    def part(total: Trained, rows: LossInputs) -> tuple[Trained, dict]:
        gradient, metrics = jax.grad(loss, argnums=1, has_aux=True)(setup.learner, trained, rows, grammar)
        return as_params(setup.learner, jax.tree.map(jnp.add, total, gradient)), metrics

    zeros = jax.tree.map(lambda x: jnp.zeros(x.shape, accum_dtype(x.dtype)), trained)
    gradients, metrics = _loop(part, zeros, *pieces)
    return gradients, reduce_metrics(metrics)


@jax.named_scope("optimizer")
def _apply(optimizer, gradient: Params, opt_state: Any, params: Params, wanted: Array) -> tuple[Params, Any]:
    """The optimizer's step, or everything as it was where it is not wanted."""
    updates, new_state = optimizer.update(gradient, opt_state, params)
    new_params = optax.apply_updates(params, updates)
    keep = lambda new, old: jnp.where(wanted, new, old)  # noqa: E731
    return jax.tree.map(keep, new_params, params), jax.tree.map(keep, new_state, opt_state)


@jax.named_scope("moved")
def post_update_kl(
    setup: TrainStepConfig, params: Params, inputs: LossInputs, grammar: Grammar, plan: PackingPlan | None
) -> Array:
    """KL of the updated policy to the one that acted, estimated on one microbatch.

    With one optimizer step a batch, ratios inside the update are all 1 and say nothing of how far it went.
    """
    parts = setup.schedule.minibatches * setup.schedule.microbatches
    pieces, _ = _pieces(inputs, inputs.batch, parts, None if plan is None else plan.whole)
    some = jax.tree.map(lambda x: x[0], pieces)
    new = action_logprobs(setup.learner, params, forward(setup.learner.model, params, some.batch), some.batch, grammar)
    kl = loss_terms.kl_penalty(some.old, new.logprob, some.batch.mask, estimator="k3")
    return masked_mean(kl, some.batch.mask)


def _pieces(tree: Any, batch: PackedBatch, number: int, places: RowAssignment | None) -> tuple[Any, Array | None]:
    """Microbatches along axis 0, and how many of them hold anything; None: all."""
    if places is None:
        return _split(tree, number), None
    return pack(tree, places, batch.count, parts("batch")), places.reads


def _of_parts(function: Callable, batch: PackedBatch, number: int, plan: PackingPlan | None) -> Any:
    """What a function finds for every token, a microbatch at a time; arrays [B, L]."""
    places = None if plan is None else plan.whole
    pieces, reads = _pieces(batch, batch, number, places)
    _, found = _loop(lambda _, part: (None, function(part)), None, pieces, reads)
    return _together(found) if places is None else unpack(found, places, batch.count)


def _split(tree: Any, parts: int) -> Any:
    """[B, …] -> [parts, B / parts, …]; a device's rows stay on it, because neighbours go to different parts."""
    if parts == 1:
        return jax.tree.map(lambda x: x[None], tree)
    split = jax.tree.map(lambda x: jnp.moveaxis(x.reshape(-1, parts, *x.shape[1:]), 1, 0), tree)
    return jax.tree.map(lambda x: constrain(x, None, "batch", *(None,) * (x.ndim - 2)), split)


def _together(tree: Any) -> Any:
    """Undoes `_split`."""
    return jax.tree.map(lambda x: jnp.moveaxis(x, 0, 1).reshape(-1, *x.shape[2:]), tree)


def _loop(function: Callable, carry: Any, xs: Any, count: Array | None = None) -> tuple[Any, Any]:
    """`lax.scan` of the first `count` of xs (None: all; results of the others are 0).

    A single turn is no loop: XLA then needs no second copy of what is carried.
    """
    at = lambda i: jax.tree.map(lambda x: x[i], xs)  # noqa: E731
    if jax.tree.leaves(xs)[0].shape[0] == 1:
        carry, y = function(carry, at(0))
        return carry, jax.tree.map(lambda x: x[None], y)
    if count is None:
        return jax.lax.scan(function, carry, xs)

    def turn(i: Array, both: tuple[Any, Any]) -> tuple[Any, Any]:
        carry, y = function(both[0], at(i))
        return carry, jax.tree.map(lambda all_, one: all_.at[i].set(one), both[1], y)

    turns = jax.tree.leaves(xs)[0].shape[0]
    _, shapes = jax.eval_shape(function, carry, at(0))
    nothing = jax.tree.map(lambda x: jnp.zeros((turns, *x.shape), x.dtype), shapes)
    with jax.named_scope("reads"):
        return jax.lax.fori_loop(0, count, turn, (carry, nothing))
