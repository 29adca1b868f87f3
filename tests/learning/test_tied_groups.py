"""Groups that earned the same: they are counted, and a batch of nothing else moves nothing."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from rlver_jax.learning.advantages import ESTIMATORS, AdvantageConfig, tied_groups
from rlver_jax.learning.loss import LossConfig
from rlver_jax.rollout.rewards import Rewards
from tests.learning.test_train_step import problem, run, setup_of, trained  # noqa: F401

GRPO = AdvantageConfig("grpo", group=2)


def rewards_of(*reward):
    reward = jnp.array(reward, jnp.float32)
    return Rewards(reward, jnp.stack([0 * reward, 0 * reward, reward], axis=1))


def same(one, other):
    return all(np.array_equal(a, b) for a, b in zip(*map(jax.tree.leaves, (one, other)), strict=True))


def test_tied_groups_by_hand():
    advantage = jnp.array([[0.0, 0.0], [0.0, 0.0], [0.5, 0.0], [-0.5, 0.0]])
    np.testing.assert_array_equal(tied_groups(GRPO, advantage), [True, False])


@pytest.fixture(scope="module")
def setup(bpe):
    """With an entropy bonus: without rewards it alone would move the policy, as would weight decay."""
    return setup_of(bpe, critic=False, advantage=GRPO, options=LossConfig(entropy=0.01))


def test_a_batch_of_ties_moves_neither_policy_nor_moments(bpe, problem, setup):  # noqa: F811
    rewards = rewards_of(*[0.3] * 4, *[0.7] * 4)  # groups of two differ, but within each both earn the same
    state, metrics = run(bpe, problem, setup, rewards=rewards)
    assert (metrics["advantage/tied_groups"], metrics["train/tied"]) == (4, 1)
    assert same(state.params, trained(bpe, critic=False))
    moments = [x for x in jax.tree.leaves(state.opt_state) if getattr(x, "size", 0)]
    assert not any(np.any(x) for x in moments), "as before the first step"
    assert (int(state.step), int(state.skipped)) == (1, 0)
    assert metrics["policy/grad_norm"] > 0, "the bonus has a gradient"
    assert metrics["policy/update_kl"] == pytest.approx(metrics["policy/approx_kl"], abs=1e-6)


def test_one_group_that_differs_is_enough(bpe, problem, setup):  # noqa: F811
    rewards = rewards_of(*[0.3] * 6, 0.2, 0.4)
    state, metrics = run(bpe, problem, setup, rewards=rewards)
    assert (metrics["advantage/tied_groups"], metrics["train/tied"]) == (3, 0)
    assert not same(state.params, trained(bpe, critic=False))


@pytest.mark.slow
def test_a_critic_learns_from_any_batch(bpe, problem):  # noqa: F811
    state, metrics = run(bpe, problem, setup_of(bpe), rewards=rewards_of(*[0.5] * 8))
    assert not {"advantage/tied_groups", "train/tied"} & metrics.keys()
    assert not same(state.params["critic"], trained(bpe)["critic"])


def test_ppo_is_another_name_of_gae():
    assert ESTIMATORS["ppo"] == ESTIMATORS["gae"]
