"""Dialogues that share rows: laid out without loss; a step computes of them what it computes of each alone."""

import dataclasses
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from jax.sharding import NamedSharding, PartitionSpec

from rlver_jax.decoding.grammar import Grammar
from rlver_jax.learning import loss_terms
from rlver_jax.learning.advantages import AdvantageConfig
from rlver_jax.learning.loss import LossConfig, LossInputs, TrainedModels, loss
from rlver_jax.learning.optimizer import Optimizers
from rlver_jax.learning.packing import RowAssignment, assign_rows, pack, plan_packing, unpack
from rlver_jax.learning.sequences import PackedBatch
from rlver_jax.learning.train_step import TrainStepConfig, UpdateConfig, compile_step, init_state, minibatch_order
from rlver_jax.models.attention import AttentionMask, visible
from rlver_jax.models.value_head import ValueHead
from rlver_jax.parallel.mesh import make_mesh
from rlver_jax.rollout.rewards import Rewards
from tests.learning.conftest import LENGTH, make_world, packed, small_lm
from tests.learning.test_train_step import optimizer, trained

# Where dialogues lie: on the host.


@pytest.mark.parametrize("width", [1, 3, 8])
@pytest.mark.parametrize("most", [100, 35, 9])
def test_every_dialogue_has_its_place(width, most):
    lengths = np.random.default_rng(most).integers(1, most + 1, 41)
    assignment = assign_rows(lengths, 100, width)
    taken = np.zeros((assignment.microbatches * width, 100), int)
    for row, start, length in zip(assignment.row, assignment.start, lengths, strict=True):
        taken[row, start : start + length] += 1
    assert taken.max() == 1, "no two in one place"
    assert taken.sum() == lengths.sum(), "and none beyond a row's end"
    filled = taken.sum(1)
    for row in range(len(filled)):
        assert not (np.diff(taken[row]) > 0).any(), "without gaps, from 0 on"
    if most < 100:
        assert filled.max() - filled.min() <= lengths.max(), "devices have alike to do"


def test_reads_are_as_few_as_first_fit_needs():
    """By hand: six dialogues of 60 and six of 40 fill six rows of 100; with 61 instead of 60 no two fit together."""
    sixty = np.array([60, 40] * 6)
    assert assign_rows(sixty, 100, 1).microbatches == 6
    assert assign_rows(sixty, 100, 2).microbatches == 3
    assert assign_rows(sixty, 100, 4).microbatches == 2
    assert assign_rows(sixty + np.array([1, 0] * 6), 100, 1).microbatches == 9, "two of 40 in a row"
    assert assign_rows(np.array([3]), 100, 8).microbatches == 1
    assert assign_rows(np.array([100, 50, 50, 1]), 100, 1).microbatches == 3


def test_the_shortest_rows_with_little_padding_are_taken():
    """Twelve dialogues of 30 take 12 rows of 32 (384 places, 6 % padding), 6 of 61 (366, 2 %) or 4 of 96 (384)."""
    minibatch_order, lengths, ladder = np.arange(12).reshape(2, 6), np.full(12, 30), [16, 32, 61, 96]
    assert plan_packing(lengths, minibatch_order, ladder, 1, most=0.1)[0] == 32
    length, layout = plan_packing(lengths, minibatch_order, ladder, 1, most=0.05)
    assert (length, layout.updates.microbatches.tolist(), layout.whole.microbatches) == (61, [3, 3], 6)
    assert layout.updates.row.shape == (2, 6)
    assert plan_packing(lengths, minibatch_order, ladder, 1, most=0.0)[0] == 61, "the least there is"
    assert plan_packing(lengths, minibatch_order, ladder, 4, most=0.1)[0] == 61, "one read of four rows, of 32 two"
    with pytest.raises(ValueError, match="a dialogue has 30 tokens, but rows have at most 16"):
        plan_packing(lengths, minibatch_order, [8, 16], 1, most=0.1)


# Laid out: on the device.


def shared(world, batch, width=2, length=None):
    """(rows flattened to [reads * width, L], places) of a packed batch."""
    assignment = assign_rows(np.asarray(batch.count), length or batch.mask.shape[1], width)
    rows = jax.jit(pack, static_argnums=3)(batch, assignment, batch.count, width)
    return jax.tree.map(lambda x: np.asarray(x).reshape(-1, *x.shape[2:]), rows), assignment


def test_rows_hold_the_dialogues_and_nothing_else(world):
    batch = packed(world)
    rows, assignment = shared(world, batch)
    assert assignment.microbatches * 2 < len(batch.count) + 1, "some share a row"
    seen = np.zeros(rows.mask.shape, bool)
    for b, (row, start) in enumerate(zip(assignment.row, assignment.start, strict=True)):
        count = int(batch.count[b])
        at = slice(start, start + count)
        for name in ("tokens", "positions", "branch", "mask", "target", "logprob", "state", "turn"):
            np.testing.assert_array_equal(getattr(rows, name)[row, at], getattr(batch, name)[b, :count])
        assert (rows.segment[row, at] == start).all()
        seen[row, at] = True
    for name in ("tokens", "positions", "branch", "mask", "target", "logprob"):
        assert not getattr(rows, name)[~seen].any()
    np.testing.assert_array_equal(rows.count, seen.sum(1))
    np.testing.assert_array_equal(rows.segment[~seen], np.repeat(rows.count, (~seen).sum(1)))


def test_a_dialogue_sees_itself_as_if_alone(world):
    batch = packed(world)
    rows, assignment = shared(world, batch)
    alone = np.asarray(visible(AttentionMask(None, batch.branch, batch.branch), LENGTH))
    mask = AttentionMask(None, rows.branch, rows.branch, None, rows.segment, rows.segment)
    in_rows = np.asarray(visible(mask, LENGTH))
    for b, (row, start) in enumerate(zip(assignment.row, assignment.start, strict=True)):
        count = int(batch.count[b])
        at = slice(start, start + count)
        np.testing.assert_array_equal(in_rows[row, at, at], alone[b, :count, :count])
        assert in_rows[row, at].sum() == alone[b, :count, :count].sum(), "and nothing else"


def test_what_is_laid_out_comes_back(world):
    batch = packed(world)
    assignment = assign_rows(np.asarray(batch.count), LENGTH, 2)
    there = pack({"logprob": batch.logprob, "turn": batch.turn}, assignment, batch.count, 2)
    back = unpack(there, assignment, batch.count)
    np.testing.assert_array_equal(back["logprob"], batch.logprob)
    np.testing.assert_array_equal(back["turn"], batch.turn)
    assert back["turn"].dtype == batch.turn.dtype


def test_empty_dialogues_take_no_place():
    count, x = jnp.array([2, 0, 3]), jnp.array([[1, 2, 0, 0, 0], [0, 0, 0, 0, 0], [3, 4, 5, 0, 0]])
    for row, start in (([0, 0, 0], [3, 3, 0]), ([0, 1, 0], [3, 0, 0])):
        assignment = RowAssignment(np.array(row), np.array(start), np.int32(1))
        assert pack(x, assignment, count, 1)[0].tolist() == [[3, 4, 5, 1, 2]]


# Loss and gradients of shared rows against those of one dialogue a row.


def sample_of(world, options, critic):
    """Numbers that differ from token to token, garbage where no action is."""
    batch, draw = packed(world), np.random.default_rng(7)
    noise = lambda s: jnp.where(batch.mask, draw.normal(0, s, batch.mask.shape), jnp.nan).astype(jnp.float32)  # noqa: E731
    weight = loss_terms.token_weights(batch.mask, options.normalization, length=options.length)
    mean = loss_terms.token_weights(batch.mask, "token_mean")
    old = batch.logprob + noise(0.3)
    critic_inputs = {"value": noise(0.2), "returns": noise(0.5)} if critic else {}
    return LossInputs(batch, old, noise(1.0), weight, mean, old + noise(0.1), 1 + 0.1 * noise(1.0), **critic_inputs)


PPO = LossConfig(clip_high=0.3, dual_clip=3.0, entropy=0.01, kl=0.1)
GRPO = LossConfig(ratio="sequence", normalization="dialogue_mean", entropy=0.01)


@pytest.mark.parametrize(
    ("options", "attention", "scan"),
    [
        (GRPO, "dense", False),
        pytest.param(PPO, "dense", False, marks=pytest.mark.slow),
        pytest.param(PPO, "chunked", True, marks=pytest.mark.slow),
        pytest.param(GRPO, "chunked", True, marks=pytest.mark.slow),
    ],
    ids=["grpo-dense", "ppo-dense", "ppo-chunked", "grpo-chunked"],
)
def test_loss_and_gradients_are_those_of_one_dialogue_a_row(world, bpe, options, attention, scan):
    model_options = {"scan_layers": scan, "attention": attention, "attention_chunk": 32}
    lm, critic = small_lm(bpe, **model_options), small_lm(bpe, seed=4, **model_options)
    head = {"kernel": 0.1 * jnp.ones(32), "bias": jnp.float32(0.2)}
    both = {"policy": lm.params, "critic": {"trunk": critic.params, "head": head}}
    models = TrainedModels(lm.model, critic.model, ValueHead(), options, vocab_chunk=100)
    sample = sample_of(world, options, critic=options is PPO)
    graded = jax.jit(jax.value_and_grad(lambda t, s: loss(models, t, s, world.tables.grammar), has_aux=True))
    (want, metrics), want_gradient = graded(both, sample)
    assignment = assign_rows(np.asarray(sample.batch.count), LENGTH, 1)
    rows = jax.tree.map(lambda x: x[:, 0], pack(sample, assignment, sample.batch.count, 1))
    (actual, mine), gradient = graded(both, jax.tree.map(lambda x: x[: assignment.microbatches], rows))
    assert assignment.microbatches < len(sample.batch.count)
    np.testing.assert_allclose(actual, want, rtol=1e-6)
    for a, b in zip(jax.tree.leaves(mine), jax.tree.leaves(metrics), strict=True):
        np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-7)
    check_gradients(gradient, want_gradient)


def check_gradients(actual, wanted):
    assert optax.global_norm(wanted) > 0.01
    for (path, mine), theirs in zip(jax.tree_util.tree_leaves_with_path(actual), jax.tree.leaves(wanted), strict=True):
        scale = float(jnp.abs(theirs).max()) + 1e-12
        np.testing.assert_allclose(mine / scale, theirs / scale, atol=1e-5, err_msg=jax.tree_util.keystr(path))


# Whole steps.


class Problem(NamedTuple):
    batch: PackedBatch
    rewards: Rewards
    grammar: Grammar


@pytest.fixture(scope="module")
def problem(bpe, prompts):
    """Sixteen dialogues of up to three turns."""
    world = make_world(bpe, prompts, "think", batch=16, turns=3, seed=2)
    turns = np.random.default_rng(0).integers(-10, 11, (16, 3)).astype(np.float32) / 10
    return Problem(packed(world, 256), Rewards(turns.sum(1), turns), world.tables.grammar)


def setup_of(bpe, ppo, minibatches, attention):
    model = small_lm(bpe, layers=1, scan_layers=False, attention=attention, attention_chunk=64).model
    options = PPO if ppo else dataclasses.replace(GRPO, normalization="token_mean")
    models = TrainedModels(model, model if ppo else None, ValueHead(0.3) if ppo else None, options, vocab_chunk=128)
    advantage = AdvantageConfig(lam=0.9) if ppo else AdvantageConfig("grpo", group=4)
    update = UpdateConfig(epochs=minibatches, minibatches=minibatches, recompute=not ppo)
    return TrainStepConfig(models, advantage, update, Optimizers(optimizer(1e-3), optimizer(1e-3) if ppo else None))


def first_step(setup, bpe, problem, width, mesh=None):
    """State and metrics after a step that reads `width` shared rows at a time; 0: one dialogue a row."""
    state = init_state(trained(bpe, setup.models.value_head is not None), setup.optimizers)
    where = jax.devices()[0] if mesh is None else NamedSharding(mesh, PartitionSpec())
    state, inputs, key = jax.device_put((state, problem, jax.random.key(1)), where)
    reference = jax.tree.map(jnp.copy, state.params["policy"]) if setup.models.loss.kl else None
    step, number = compile_step(setup, state), problem.batch.count.shape[0]

    def layout(done):
        order = np.asarray(minibatch_order(setup.update, key, jnp.int32(done), number))
        length, plan = plan_packing(np.asarray(problem.batch.count), order, [256], width, most=0.1)
        assert length == 256
        assert plan.updates.microbatches.max() * width < number // setup.update.minibatches, "they do share rows"
        return jax.device_put(plan, where)

    after = step(state, *inputs, key, reference, layout(0) if width else None)
    result, compiled = jax.device_get(after), step._cache_size()
    if width:  # lengths, orders and the number of reads are data
        step(after[0], *inputs, key, reference, layout(1))
        assert step._cache_size() == compiled
    return result


def check_same(actual, wanted):
    for name, value in wanted[1].items():
        if name != "policy/update_kl":  # measured on one microbatch
            np.testing.assert_allclose(actual[1][name], value, rtol=1e-4, atol=1e-6, err_msg=name)
    for kind in wanted[0].params:
        mine, theirs = (s[0].opt_state[kind][1][0].mu for s in (actual, wanted))  # a mean of clipped gradients
        for a, b in zip(jax.tree.leaves(mine), jax.tree.leaves(theirs), strict=True):
            np.testing.assert_allclose(a, b, atol=2e-6)


@pytest.mark.parametrize(
    ("ppo", "minibatches", "attention", "shape"),
    [
        (False, 1, "dense", None),
        pytest.param(True, 2, "dense", (1, 2, 4), marks=pytest.mark.slow),
        pytest.param(False, 1, "chunked", (2, 2, 2), marks=pytest.mark.long),
        pytest.param(True, 1, "chunked", (1, 4, 2), marks=pytest.mark.long),
        pytest.param(False, 2, "dense", (1, 4, 2), marks=pytest.mark.long),
    ],
    ids=["grpo", "ppo-2-eight", "grpo-1-eight", "ppo-1-eight", "grpo-2-eight"],
)
def test_a_step_is_that_of_one_dialogue_a_row(bpe, problem, ppo, minibatches, attention, shape):
    """On one device, and on a mesh of eight."""
    setup = setup_of(bpe, ppo, minibatches, attention)
    alone = first_step(setup, bpe, problem, 0)
    check_same(first_step(setup, bpe, problem, 1), alone)
    if shape:
        mesh = make_mesh(*shape)
        with jax.set_mesh(mesh):
            check_same(first_step(setup, bpe, problem, shape[0] * shape[1], mesh), alone)
