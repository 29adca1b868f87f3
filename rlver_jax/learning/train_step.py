"""One training step on packed dialogues: advantages, then epochs x minibatches x microbatches."""

import dataclasses
import functools
from collections.abc import Callable
from typing import Any

import flax.struct
import jax
import jax.numpy as jnp
import optax
from jaxtyping import Array, Int, Key

from rlver_jax.decoding.grammar import Grammar
from rlver_jax.learning import loss_terms
from rlver_jax.learning.advantages import ESTIMATORS, AdvantageConfig, EstimatorInputs, compute_advantages, tied_groups
from rlver_jax.learning.loss import (
    Base,
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
    whole,
)
from rlver_jax.learning.masked import masked_mean, masked_var
from rlver_jax.learning.optimizer import Optimizers, widened
from rlver_jax.learning.packing import PackingPlan, RowAssignment, pack, unpack
from rlver_jax.learning.sequences import PackedBatch
from rlver_jax.models.precision import accum_dtype
from rlver_jax.models.qwen import Params
from rlver_jax.parallel.rules import constrain, constrain_rows, parts
from rlver_jax.rollout.rewards import Rewards


@dataclasses.dataclass(frozen=True)
class UpdateConfig:
    """How a batch is walked through: fields of `config.train` and `config.loss`, and critic.warmup_steps."""

    epochs: int = 1
    minibatches: int = 1  # optimizer steps an epoch
    microbatches: int = 1  # parts of a minibatch whose gradients are summed, without a packing plan
    critic_warmup_steps: int = 0  # training steps in which only the critic learns
    recompute: bool = False  # ratios start from the trainer's own log-probs rather than the sampler's
    importance_cap: float = 0.0  # with recompute: truncated importance weights; 0: none


@flax.struct.dataclass
class TrainState:
    """All that changes in training, and is needed to resume."""

    step: Int[Array, ""]  # training steps done
    params: Trained
    opt_state: dict[str, Any]  # by the same names as params
    skipped: Int[Array, ""]  # updates left out because a gradient was not finite


@dataclasses.dataclass(frozen=True)
class TrainStepConfig:
    """Everything static that `train_step` is compiled for."""

    models: TrainedModels
    advantage: AdvantageConfig
    update: UpdateConfig
    optimizers: Optimizers


def init_state(params: Trained, optimizers: Optimizers) -> TrainState:
    """State before the first step."""
    opt_state = {name: optimizers.of(name).init(tree) for name, tree in params.items()}
    return TrainState(jnp.int32(0), params, opt_state, jnp.int32(0))


def compile_step(setup: TrainStepConfig, state: TrainState) -> Callable[..., tuple[TrainState, dict[str, Array]]]:
    """`train_step` with its setup bound and jitted: the new state lies where the old one did, in its buffers."""
    leaves, structure = jax.tree.flatten(jax.tree.map(lambda x: x.sharding, state))
    named = setup.models.loss
    meanings = (  # part of the key: a registry may give a name another function between two runs of one process
        ESTIMATORS.get(setup.advantage.estimator),
        loss_terms.RATIOS.get(named.ratio),
        loss_terms.NORMALIZATIONS.get(named.normalization),
        loss_terms.KL_ESTIMATORS.get(named.kl_estimator),
    )
    return _program(setup, meanings, structure, tuple(leaves))


@functools.lru_cache(maxsize=8)  # jitted anew, it would be traced anew for each run of a process
def _program(setup: TrainStepConfig, meanings: tuple, structure: Any, leaves: tuple) -> Any:
    shardings = jax.tree.unflatten(structure, leaves)
    return jax.jit(functools.partial(train_step, setup), donate_argnums=0, out_shardings=(shardings, None))


def train_step(
    setup: TrainStepConfig,
    state: TrainState,
    batch: PackedBatch,
    rewards: Rewards,
    grammar: Grammar,
    key: Key[Array, ""],
    reference: Params | None = None,
    plan: PackingPlan | None = None,
    base: Base | None = None,
) -> tuple[TrainState, dict[str, Array]]:
    """Updates policy and critic on one batch of B dialogues.

    Args:
        grammar: the policy's, as it was sampled under.
        key: of the run; what is shuffled depends on it and on the step alone.
        reference: parameters of the model that a KL penalty holds the policy to.
        plan: how dialogues share rows, from `plan_packing` for the `minibatch_order` of this step: the result is the
            same. None: one dialogue a row, `setup.update.microbatches` for each minibatch.
        base: what the state's adapters stand on, with `setup.models.lora`.

    Returns:
        the new state, and metrics: float32 scalars by the names of metrics.jsonl.
    """
    inputs, metrics = prepare(setup, state, batch, rewards, grammar, reference, plan, base)
    tied = None
    if setup.models.value_head is None:  # a critic learns from any batch
        tie = tied_groups(setup.advantage, inputs.advantage)
        tied = tie.all()
        metrics["train/tied"] = tied.astype(jnp.float32)
        if ESTIMATORS[setup.advantage.estimator].needs_group:
            metrics["advantage/tied_groups"] = tie.sum().astype(jnp.float32)
    order = minibatch_order(setup.update, key, state.step, batch.count.shape[0])
    state, by_update = _epochs(setup, state, inputs, grammar, order, plan, base, tied)
    count = None if plan is None else plan.count
    mean = jnp.mean if count is None else lambda x: x.sum() / count  # beyond the last update all are 0
    metrics |= {name: x.max() if name.endswith("_max") else mean(x) for name, x in by_update.items()}
    if count is not None:
        metrics["train/updates"] = count.astype(jnp.float32)
    metrics["policy/ratio_max_first"] = by_update["policy/ratio_max"][0]
    policy = whole(setup.models, state.params, base)["policy"]
    metrics["policy/update_kl"] = post_update_kl(setup, policy, inputs, grammar, plan)
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
    base: Base | None = None,
) -> tuple[LossInputs, dict[str, Array]]:
    """The constants of the loss: values, log-probs to start from, advantages. Weights are still zero."""
    models, update, params = setup.models, setup.update, whole(setup.models, state.params, base)
    if base is not None and models.reference_is_base:
        reference = base.policy

    def constants(part: PackedBatch) -> dict[str, Array]:
        outputs, hidden = {}, None
        if update.recompute or (models.value_head is not None and models.trunk is None):
            hidden = forward(models.model, params["policy"], part)
            if update.recompute:
                outputs["old"] = action_logprobs(models, params["policy"], hidden, part, grammar).logprob
        if models.value_head is not None:
            outputs["value"] = values(models, params["critic"], hidden, part)
        if reference is not None:
            own = forward(models.model, reference, part)
            outputs["reference"] = action_logprobs(models, reference, own, part, grammar).logprob
        return outputs

    known = _of_parts(constants, batch, update.minibatches * update.microbatches, plan)
    importance = None
    if update.recompute and update.importance_cap:
        importance = loss_terms.importance_weights(known["old"], batch.logprob, batch.mask, cap=update.importance_cap)
    earned = EstimatorInputs(rewards, batch.turn, batch.mask, known.get("value"))
    advantage, returns = compute_advantages(setup.advantage, earned)
    zeros = jnp.zeros_like(batch.logprob)
    inputs = LossInputs(
        batch, known.get("old", batch.logprob), advantage, zeros, zeros, known.get("reference"), importance,
        known.get("value"), returns,
    )  # fmt: skip
    return inputs, _batch_metrics(inputs, update.recompute)


def _batch_metrics(inputs: LossInputs, recomputed: bool) -> dict[str, Array]:
    mask = inputs.batch.mask
    metrics = {
        "advantage/mean": masked_mean(inputs.advantage, mask),
        "advantage/std": jnp.sqrt(masked_var(inputs.advantage, mask)),
        "tokens/actions": mask.sum().astype(jnp.float32),  # counted in whole numbers: float32 ends at 2^24
        "tokens/packed": inputs.batch.count.sum().astype(jnp.float32),
    }
    if recomputed:
        divergence = loss_terms.kl_penalty(inputs.batch.logprob, inputs.old, mask, estimator="k3")
        metrics["policy/rollout_kl"] = masked_mean(divergence, mask)  # from the policy that played to the trainer's
    if inputs.value is not None and inputs.returns is not None:
        unexplained = masked_var(inputs.returns - inputs.value, mask)
        spread = masked_var(inputs.returns, mask)
        metrics["critic/value_mean"] = masked_mean(inputs.value, mask)
        # Returns that are all equal have nothing to explain.
        metrics["critic/explained_variance"] = jnp.where(
            spread > 0, 1 - unexplained / jnp.where(spread > 0, spread, 1), 0
        )
    return metrics


def minibatch_order(update: UpdateConfig, key: Key[Array, ""], step: Int[Array, ""], size: int) -> Int[Array, "U N"]:
    """The dialogues of each update of a training step: every epoch goes through all of them, in an order of its own."""
    order = jnp.tile(jnp.arange(size), (update.epochs, 1))
    if update.minibatches > 1:
        key = jax.random.fold_in(key, step)
        keys = jax.vmap(jax.random.fold_in, (None, 0))(key, jnp.arange(update.epochs))
        order = jax.vmap(jax.random.permutation, (0, None))(keys, size)
    return order.reshape(update.epochs * update.minibatches, -1)


def _epochs(
    setup: TrainStepConfig,
    state: TrainState,
    inputs: LossInputs,
    grammar: Grammar,
    order: Array,
    plan: PackingPlan | None,
    base: Base | None,
    tied: Array | None,
):
    """Every minibatch of every epoch, one optimizer step each; metrics [epochs * minibatches]."""

    def one(state: TrainState, minibatch: tuple[Array, RowAssignment | None]) -> tuple[TrainState, dict[str, Array]]:
        rows, assignment = minibatch
        all_of_it = setup.update.minibatches == 1
        picked = inputs if all_of_it else constrain_rows(jax.tree.map(lambda x: x[rows], inputs))
        return _minibatch(setup, state, picked, grammar, assignment, base, tied)

    def members_alone(state: TrainState, minibatch: tuple[Array, RowAssignment]):
        member, assignment = minibatch
        batch = inputs.batch
        batch = dataclasses.replace(batch, mask=batch.mask & member[:, None], count=jnp.where(member, batch.count, 0))
        picked = dataclasses.replace(inputs, batch=batch)
        return _minibatch(setup, state, picked, grammar, assignment, base, tied, member.sum())

    if plan is not None and plan.members is not None:
        return _loop(members_alone, state, (plan.members, plan.updates), plan.count, scope="updates")
    return _loop(one, state, (order, None if plan is None else plan.updates))


def _minibatch(
    setup: TrainStepConfig,
    state: TrainState,
    inputs: LossInputs,
    grammar: Grammar,
    assignment: RowAssignment | None,
    base: Base | None,
    tied: Array | None,
    dialogues: Array | None = None,
):
    """One optimizer step of each tree. Those that share no parameters take turns: one gradient is alive at a time.

    None where all groups of the batch are `tied`: no advantage says where to go, and moments and weight decay, a KL
    penalty or an entropy bonus would move the policy nevertheless.
    """
    config, mask = setup.models.loss, inputs.batch.mask
    sizes: dict[str, Any] = {
        "length": config.length,
        "turn": inputs.batch.turn,
        "turns": config.turns,
        "dialogues": dialogues,
    }
    inputs = dataclasses.replace(
        inputs,
        weight=loss_terms.token_weights(mask, config.normalization, **sizes),
        mean=loss_terms.token_weights(mask, "token_mean"),
    )
    microbatches = _microbatches(inputs, inputs.batch, setup.update.microbatches, assignment)
    frozen = {"policy": state.step < setup.update.critic_warmup_steps, "critic": jnp.bool_(False)}
    params, opt_state, skipped = {}, {}, state.skipped
    metrics: dict[str, Array] = {}
    for trained in split_trainables(setup.models, state.params):
        gradients, more = _gradients(setup, trained, microbatches, grammar, base)
        metrics |= more
        for name, gradient in gradients.items():
            norm = optax.tree.norm(widened(gradient))
            wanted = jnp.isfinite(norm) & ~frozen[name]
            if tied is not None:
                wanted &= ~tied
            params[name], opt_state[name] = apply_gradient(
                setup.optimizers.of(name), gradient, state.opt_state[name], trained[name], wanted
            )
            skipped += ~jnp.isfinite(norm)
            metrics[f"{name}/grad_norm"] = norm
    return TrainState(state.step, params, opt_state, skipped), metrics


def _gradients(
    setup: TrainStepConfig,
    trained: Trained,
    microbatches: tuple[LossInputs, Array | None],
    grammar: Grammar,
    base: Base | None,
):
    """Sums over the microbatches, and the minibatch's metrics."""

    def part(total: Trained, inputs: LossInputs) -> tuple[Trained, dict]:
        gradient, metrics = jax.grad(loss, argnums=1, has_aux=True)(setup.models, trained, inputs, grammar, base)
        return as_params(setup.models, jax.tree.map(jnp.add, total, gradient)), metrics

    zeros = jax.tree.map(lambda x: jnp.zeros(x.shape, accum_dtype(x.dtype)), trained)
    gradients, metrics = _loop(part, zeros, *microbatches)
    return gradients, reduce_metrics(metrics)


@jax.named_scope("optimizer")
def apply_gradient(optimizer, gradient: Params, opt_state: Any, params: Params, wanted: Array) -> tuple[Params, Any]:
    """The optimizer's step, or everything as it was where it is not wanted."""
    updates, new_state = optimizer.update(gradient, opt_state, params)
    new_params = optax.apply_updates(params, updates)
    select = lambda new, old: jnp.where(wanted, new, old)  # noqa: E731
    return jax.tree.map(select, new_params, params), jax.tree.map(select, new_state, opt_state)


@jax.named_scope("moved")
def post_update_kl(
    setup: TrainStepConfig, params: Params, inputs: LossInputs, grammar: Grammar, plan: PackingPlan | None
) -> Array:
    """KL of the updated policy to the one that acted, estimated on one microbatch.

    With one optimizer step a batch, ratios inside the update are all 1 and don't tell how far it went.
    """
    number = setup.update.minibatches * setup.update.microbatches
    microbatches, _ = _microbatches(inputs, inputs.batch, number, None if plan is None else plan.whole)
    first = jax.tree.map(lambda x: x[0], microbatches)
    hidden = forward(setup.models.model, params, first.batch)
    new = action_logprobs(setup.models, params, hidden, first.batch, grammar)
    kl = loss_terms.kl_penalty(first.old, new.logprob, first.batch.mask, estimator="k3")
    return masked_mean(kl, first.batch.mask)


def _microbatches(
    tree: Any, batch: PackedBatch, number: int, assignment: RowAssignment | None
) -> tuple[Any, Array | None]:
    """Microbatches along axis 0, and how many of them hold anything; None: all."""
    if assignment is None:
        return _split(tree, number), None
    return pack(tree, assignment, batch.count, parts("batch")), assignment.microbatches


def _of_parts(function: Callable, batch: PackedBatch, number: int, plan: PackingPlan | None) -> Any:
    """A function of tokens, a microbatch at a time; arrays [B, L]."""
    assignment = None if plan is None else plan.whole
    microbatches, used = _microbatches(batch, batch, number, assignment)
    _, outputs = _loop(lambda _, part: (None, function(part)), None, microbatches, used)
    return _merge(outputs) if assignment is None else unpack(outputs, assignment, batch.count)


def _split(tree: Any, parts: int) -> Any:
    """[B, …] -> [parts, B / parts, …]; a device's rows stay on it, because neighbours go to different parts."""
    if parts == 1:
        return jax.tree.map(lambda x: x[None], tree)
    split = jax.tree.map(lambda x: jnp.moveaxis(x.reshape(-1, parts, *x.shape[1:]), 1, 0), tree)
    return jax.tree.map(lambda x: constrain(x, None, "batch", *(None,) * (x.ndim - 2)), split)


def _merge(tree: Any) -> Any:
    """Undoes `_split`."""
    return jax.tree.map(lambda x: jnp.moveaxis(x, 0, 1).reshape(-1, *x.shape[2:]), tree)


def _loop(function: Callable, carry: Any, xs: Any, count: Array | None = None, scope: str = "reads") -> tuple[Any, Any]:
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
    with jax.named_scope(scope):
        return jax.lax.fori_loop(0, count, turn, (carry, nothing))
