"""Updates of so many turns each: which dialogues they have, and that a step makes them as any other."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from rlver_jax.learning.loss_terms import token_weights
from rlver_jax.learning.packing import group_by_turns, plan_turns
from rlver_jax.learning.train_step import compile_step, init_state, minibatch_order
from tests.learning.test_packing import check_same, first_step, problem, setup_of  # noqa: F401  (a fixture)
from tests.learning.test_train_step import trained


def test_dialogues_are_cut_where_their_first_turn_falls():
    """By hand: turns 0-2, 3, 4-8, 9-10, 11-13 of the batch, four an update."""
    groups = group_by_turns(np.array([3, 1, 5, 2, 3]), 4)
    assert [group.tolist() for group in groups] == [[0, 1], [2], [3, 4]]
    assert [group.tolist() for group in group_by_turns(np.array([9, 1]), 4)] == [[0], [1]], "no update is empty"
    assert [group.tolist() for group in group_by_turns(np.array([0, 4, 0, 0]), 4)] == [[0, 1, 2, 3]], (
        "nor without turns"
    )
    assert [group.tolist() for group in group_by_turns(np.zeros(2, int), 4)] == [[0, 1]]
    assert len(group_by_turns(np.full(32, 8), 32)) == 8, "RLVER's: as many updates as turns"


def test_a_plan_has_only_the_updates_there_are():
    length, plan = plan_turns(np.array([30, 40, 50]), [np.array([0, 2]), np.array([1])], 4, [64, 128], 1, most=0.4)
    assert length == 64
    assert plan.count == 2
    assert plan.members.tolist() == [[True, False, True], [False, True, False], [False] * 3, [False] * 3]
    assert plan.updates.microbatches.tolist() == [2, 1, 0, 0]
    with pytest.raises(ValueError, match="2 updates, but the step is compiled for 1"):
        plan_turns(np.array([30, 40]), [np.array([0]), np.array([1])], 1, [64], 1, most=0.1)


def test_turn_mean_by_hand():
    """Five turns: the mean over them of each one's mean."""
    mask = np.array([[1, 1, 0, 1, 1, 1], [1, 0, 1, 1, 0, 0], [0] * 6], bool)
    turn = np.array([[0, 0, 0, 1, 1, 1], [0, 0, 1, 2, 0, 0], [0] * 6])
    expected = np.array([[1 / 2, 1 / 2, 0, 1 / 3, 1 / 3, 1 / 3], [1, 0, 1, 1, 0, 0], [0] * 6]) / 5
    np.testing.assert_allclose(token_weights(mask, "turn_mean", turn=turn, turns=3), expected, rtol=1e-6)
    assert not np.asarray(token_weights(mask & False, "turn_mean", turn=turn, turns=3)).any()
    with pytest.raises(ValueError, match="turn_mean needs the turn of each action"):
        token_weights(mask, "turn_mean")


def test_dr_grpo_counts_the_dialogues_of_the_update():
    mask = np.array([[1, 1], [0, 0], [0, 0]], bool)
    weights = token_weights(mask, "dr_grpo", length=10, dialogues=jnp.int32(2))
    np.testing.assert_allclose(weights, mask / 20, rtol=1e-6)


@pytest.mark.slow
@pytest.mark.parametrize("ppo", [False, True])
def test_a_step_is_that_of_the_same_minibatches(bpe, problem, ppo):  # noqa: F811
    """Two updates with the dialogues of two minibatches, in a program of five."""
    halves = setup_of(bpe, ppo, 2, "dense")
    halves = dataclasses.replace(halves, update=dataclasses.replace(halves.update, epochs=1))
    wanted = first_step(halves, bpe, problem, 1)
    setup = dataclasses.replace(halves, update=dataclasses.replace(halves.update, minibatches=1))
    key, count = jax.random.key(1), np.asarray(problem.batch.count)
    minibatches = np.asarray(minibatch_order(halves.update, key, jnp.int32(0), len(count)))
    _, plan = plan_turns(count, list(minibatches), 5, [256], 1, most=0.1)
    state = init_state(trained(bpe, ppo), setup.optimizers)
    reference = jax.tree.map(jnp.copy, state.params["policy"]) if setup.models.loss.kl else None
    step = compile_step(setup, state)
    actual, compiled = jax.device_get(step(state, *problem, key, reference, plan)), step._cache_size()
    assert actual[1].pop("train/updates") == 2
    check_same(actual, wanted)
    _, plan = plan_turns(count, [np.arange(len(count))], 5, [256], 1, most=0.1)
    step(jax.device_put(actual[0]), *problem, key, reference, plan)
    assert step._cache_size() == compiled, "how many updates there are is data"
