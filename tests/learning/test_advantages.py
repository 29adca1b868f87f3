"""Advantages against hand-computed dialogues and plain loops in float64."""

from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from rlver_jax.learning import advantages
from rlver_jax.learning.advantages import AdvantageConfig, EstimatorInputs, compute_advantages
from rlver_jax.rollout.rewards import Rewards

# Compiled whole, as training does it, which is also faster than op by op.
token_rewards, terminal_on_every_turn, broadcast = map(
    jax.jit, (advantages.token_rewards, advantages.terminal_on_every_turn, advantages.broadcast)
)
gae = jax.jit(advantages.gae)
group_advantages = jax.jit(advantages.group_advantages, static_argnames=("group", "scale", "eps"))
rloo, reinforce_pp = (jax.jit(f, static_argnames="group") for f in (advantages.rloo, advantages.reinforce_pp))

# Three turns with gaps, one turn, no action at all, one action a turn.
MASK = np.array(
    [[0, 1, 1, 0, 1, 0, 1, 1], [0, 0, 1, 1, 1, 0, 0, 0], [0, 0, 0, 0, 0, 0, 0, 0], [1, 0, 1, 0, 0, 0, 0, 1]], bool
)
TURN = np.array(
    [[9, 0, 0, -3, 1, 7, 2, 2], [5, 5, 0, 0, 0, 1, 2, 0], [0, 1, 2, 0, 1, 2, 0, 1], [0, 0, 1, 1, 1, 1, 1, 2]], np.int32
)
LAST = np.array([[0, 0, 1, 0, 1, 0, 0, 1], [0, 0, 0, 0, 1, 0, 0, 0], [0] * 8, [1, 0, 1, 0, 0, 0, 0, 1]], bool)


def close(got, expected, atol=1e-6):
    assert got.dtype == jnp.float32
    np.testing.assert_allclose(got, expected, rtol=0, atol=atol)


def dirty(x, seed=0):
    """x [B, L] with garbage wherever there is no action."""
    garbage = np.random.default_rng(seed).choice([np.nan, np.inf, -np.inf, 3e38, -1.0], MASK.shape)
    return np.where(MASK, x, garbage).astype(np.float32)


def loop_gae(rewards, values, mask, gamma, lam, segment=None):
    """The sum that defines the estimator, A_k = sum_j (gamma lam)^j delta_{k+j}, over the list of a row's actions."""
    advantage = np.zeros(mask.shape)
    for b in range(mask.shape[0]):
        positions = [p for p in range(mask.shape[1]) if mask[b, p]]
        for k, position in enumerate(positions):
            run = [position]
            for later in positions[k + 1 :]:
                if segment is not None and segment[b, later] != segment[b, run[-1]]:
                    break
                run.append(later)
            for j, p in enumerate(run):
                following = values[b, run[j + 1]] if j + 1 < len(run) else 0.0
                delta = rewards[b, p] + gamma * following - values[b, p]
                advantage[b, position] += (gamma * lam) ** j * delta
    return advantage


def test_token_rewards_by_hand():
    rewards = np.array([[0.8, -0.3, 1.1], [0.45, 9, 9], [1, 2, 3], [0.1, 0.2, 0.3]], np.float32)
    close(
        token_rewards(rewards, TURN, MASK),
        [[0, 0, 0.8, 0, -0.3, 0, 0, 1.1], [0, 0, 0, 0, 0.45, 0, 0, 0], [0] * 8, [0.1, 0, 0.2, 0, 0, 0, 0, 0.3]],
    )


def test_rewards_are_floats_even_beside_whole_numbers():
    """A token array that takes the dtype of whole-numbered rewards would later cut 0.45 to 0."""
    whole = token_rewards(np.array([[1, -2, 3]] * 4), TURN, MASK)
    close(whole[0], [0, 0, 1, 0, -2, 0, 0, 3])
    close(whole + np.float32(0.45) * LAST, np.where(LAST, np.asarray(whole) + 0.45, 0))
    close(broadcast(np.array([1, 0, 2, -1]), MASK), np.array([[1], [0], [2], [-1]]) * MASK)
    close(rloo(np.array([1, 0, 1, 1]), 4), [1 / 3, -1, 1 / 3, 1 / 3])
    close(group_advantages(np.array([1, 0, 1, 1]), 4, scale=False), [0.25, -0.75, 0.25, 0.25])
    half = terminal_on_every_turn(jnp.asarray([0.5, 0.25, 0.75, 0.125], jnp.bfloat16), TURN, MASK)
    close(half, np.array([[0.5], [0.25], [0.75], [0.125]]) * LAST)


def test_a_turn_beyond_the_rewards_is_noticed():
    got = token_rewards(np.ones((4, 2), np.float32), TURN, MASK)
    np.testing.assert_array_equal(np.isnan(got), (TURN == 2) & LAST)


def test_terminal_on_every_turn_by_hand():
    reward = np.array([0.45, 0.09, np.nan, 1.0], np.float32)  # the third has no action to give it to
    got = terminal_on_every_turn(reward, TURN, MASK)
    close(got, np.where(LAST, np.array([[0.45], [0.09], [0], [1.0]]), 0))


def test_placing_equals_a_loop():
    rng = np.random.default_rng(3)
    turn = np.sort(rng.integers(0, 5, (40, 23)), axis=1)
    mask, rewards = rng.random((40, 23)) < 0.4, rng.normal(size=(40, 5)).astype(np.float32)
    expected = np.zeros((40, 23))
    for b in range(40):
        for t in range(5):
            positions = [p for p in range(23) if mask[b, p] and turn[b, p] == t]
            if positions:
                expected[b, positions[-1]] = rewards[b, t]
    turn = np.where(mask, turn, rng.integers(-9, 99, turn.shape))
    close(token_rewards(rewards, turn, mask), expected)


def test_gae_by_hand():
    """gamma and lam 1/2, so gamma lam = 1/4; deltas from the last action: 1.1-0.4, 0+0.2-0.8, -0.3+0.4-0.2, ..."""
    values = dirty(np.array([[0, 0.6, 1.0, 0, 0.2, 0, 0.8, 0.4], [0] * 8, [0] * 8, [0] * 8]))
    rewards = dirty(np.array([[0, 0, 0.8, 0, -0.3, 0, 0, 1.1], [0] * 8, [0] * 8, [0] * 8]), seed=1)
    got = gae(rewards, values, MASK, gamma=0.5, lam=0.5)
    a5 = 1.1 - 0.4
    a4 = (0 + 0.2 - 0.8) + a5 / 4
    a3 = (-0.3 + 0.4 - 0.2) + a4 / 4
    a2 = (0.8 + 0.1 - 1.0) + a3 / 4
    a1 = (0 + 0.5 - 0.6) + a2 / 4
    close(got.advantage, [[0, a1, a2, 0, a3, 0, a4, a5], [0] * 8, [0] * 8, [0] * 8])
    close(got.returns[0], [0, a1 + 0.6, a2 + 1.0, 0, a3 + 0.2, 0, a4 + 0.8, a5 + 0.4])
    # Cut by turn: the value after each turn is 0.
    got = gae(rewards, values, MASK, gamma=0.5, lam=0.5, segment=TURN)
    b2, b3 = 0.8 - 1.0, -0.3 - 0.2
    close(got.advantage[0], [0, 0.5 - 0.6 + b2 / 4, b2, 0, b3, 0, a4, a5])


@pytest.mark.parametrize(("gamma", "lam"), [(1.0, 1.0), (0.9, 1.0), (1.0, 0.7), (0.95, 0.8), (0.9, 0.0)])
@pytest.mark.parametrize("cut", [False, True])
def test_gae_equals_its_definition(gamma, lam, cut):
    rng = np.random.default_rng(4)
    rewards, values = rng.normal(size=(2, *MASK.shape)).astype(np.float32)
    segment = TURN if cut else None
    expected = loop_gae(rewards.astype(float), values.astype(float), MASK, gamma, lam, segment)
    got = gae(dirty(rewards), dirty(values, 1), MASK, gamma=gamma, lam=lam, segment=segment)
    close(got.advantage, expected)
    close(got.returns, np.where(MASK, expected + values, 0))


def test_gae_depends_on_lambda():
    """A recursion that discounts by gamma alone would give the same for every lam."""
    rewards = np.where(LAST, 1.0, 0).astype(np.float32)
    values = np.full(MASK.shape, 0.5, np.float32)
    one, half = (gae(rewards, values, MASK, gamma=1.0, lam=lam).advantage for lam in (1.0, 0.5))
    close(one[1], [0, 0, 0.5, 0.5, 0.5, 0, 0, 0])
    close(half[1], [0, 0, 0.125, 0.25, 0.5, 0, 0, 0])


def test_without_critic_and_discount_gae_is_what_is_still_to_come():
    rewards = np.array([[0, 0, 0.8, 0, -0.3, 0, 0, 1.1], [0, 0, 0, 0, 0.45, 0, 0, 0], [0] * 8, [0] * 8], np.float32)
    got = gae(rewards, np.zeros_like(rewards), MASK, gamma=1.0, lam=1.0)
    close(got.advantage[0], [0, 1.6, 1.6, 0, 0.8, 0, 1.1, 1.1])
    close(got.advantage[1], [0, 0, 0.45, 0.45, 0.45, 0, 0, 0])


def test_turn_segments_equal_one_row_a_turn():
    """RLVER's own form: every turn a row, with the dialogue's reward at its end."""
    rng = np.random.default_rng(5)
    reward, values = np.array([0.45, 0.09, 0.3, 1.0], np.float32), rng.normal(size=MASK.shape).astype(np.float32)
    options = {"gamma": 0.9, "lam": 0.8}
    whole = gae(terminal_on_every_turn(reward, TURN, MASK), values, MASK, segment=TURN, **options)
    split = np.concatenate([MASK & (t == TURN) for t in range(3)])
    again = (np.tile(TURN, (3, 1)), split)
    rows = gae(terminal_on_every_turn(np.tile(reward, 3), *again), np.tile(values, (3, 1)), split, **options)
    close(whole.advantage, np.asarray(rows.advantage).reshape(3, 4, 8).sum(0))
    close(whole.returns, np.asarray(rows.returns).reshape(3, 4, 8).sum(0))


def test_gae_keeps_garbage_out_of_gradients():
    weight = np.random.default_rng(6).normal(size=MASK.shape).astype(np.float32)

    def total(rewards, values):
        return (weight * gae(rewards, values, MASK, gamma=0.9, lam=0.8, segment=TURN).advantage).sum()

    clean = np.where(MASK, 0.5, 0).astype(np.float32)
    gradient = jax.jit(jax.grad(total, (0, 1)))
    for actual, expected in zip(gradient(dirty(clean), dirty(clean, 1)), gradient(clean, clean), strict=True):
        np.testing.assert_array_equal(np.asarray(actual)[~MASK], 0)
        close(actual, expected)


def test_group_advantages_by_hand():
    reward = np.array([1.0, 0.0, 0.0, 0.0, 0.2, 0.6, 0.5, 0.5], np.float32)
    # First group: mean 1/4, sum of squares 3/4, sample std 1/2. Second: mean 0.45, squares 0.09, std sqrt(0.03).
    first, second = [0.75, -0.25, -0.25, -0.25], [-0.25, 0.15, 0.05, 0.05]
    close(group_advantages(reward, 4, scale=False), first + second)
    got = group_advantages(reward, 4, scale=True)
    close(got, [x / 0.5 for x in first] + [x / 0.03**0.5 for x in second], atol=1e-5)
    close(group_advantages(reward[:2], 2, scale=True), [0.5**0.5, -(0.5**0.5)], atol=1e-5)
    close(group_advantages(reward[:2], 2, scale=True, eps=1.0), np.array([0.5, -0.5]) / (0.5**0.5 + 1))


@settings(max_examples=40, deadline=None)
@given(st.lists(st.integers(0, 100), min_size=12, max_size=12), st.sampled_from([2, 6]))
def test_group_estimators_equal_loops(hundredths, group):
    reward = (np.array(hundredths) / 100).astype(np.float32)
    plain, scaled, others = np.zeros(12), np.zeros(12), np.zeros(12)
    for i in range(12):
        start = i // group * group
        members = [float(reward[j]) for j in range(start, start + group)]
        rest = [float(reward[j]) for j in range(start, start + group) if j != i]
        plain[i] = float(reward[i]) - sum(members) / group
        scaled[i] = plain[i] / (np.std(members, ddof=1) + 1e-6)
        others[i] = float(reward[i]) - sum(rest) / len(rest)
        if len(set(members)) == 1:
            plain[i] = scaled[i] = others[i] = 0
    close(group_advantages(reward, group, scale=False), plain)
    close(group_advantages(reward, group, scale=True), scaled, atol=1e-4)
    close(rloo(reward, group), others)


def test_equal_rewards_teach_exactly_nothing():
    """The mean of equal float32 numbers is often an ulp off."""
    group, values = 7, np.float32([0.3, 0.1, 0.7, 1e-3, -0.9, 7.3, 1e4])
    reward, mask = np.repeat(values, group), np.ones((7 * group, 2), bool)
    for got in (*(group_advantages(reward, group, scale=s) for s in (True, False)), rloo(reward, group)):
        np.testing.assert_array_equal(got, np.zeros(7 * group))
    np.testing.assert_array_equal(reinforce_pp(reward, mask, group), np.zeros(mask.shape))
    for value in values:
        np.testing.assert_array_equal(reinforce_pp(np.full(7 * group, value), mask, 1), np.zeros(mask.shape))


def test_sums_of_the_same_changes_in_another_order_are_equal_rewards():
    tenths = np.float32([-0.6, -0.7, 0.1, -0.4, -0.8, -0.3, -1.0, -0.7])
    reward = np.array([np.cumsum(tenths)[-1], np.cumsum(np.sort(tenths))[-1]], np.float32)
    assert reward[0] != reward[1], "the sums happen to round alike: the test shows nothing"
    np.testing.assert_array_equal(group_advantages(reward, 2, scale=True), np.zeros(2))
    hundredth = group_advantages(np.float32([4.0, 4.01]), 2, scale=True)
    close(hundredth, [-(0.5**0.5), 0.5**0.5], atol=2e-4)  # the least step of a reward is not rounding


@pytest.mark.parametrize("estimator", [partial(group_advantages, scale=True), rloo])
def test_a_group_of_one_is_an_error(estimator):
    with pytest.raises(ValueError, match="group=1 leaves none to compare"):
        estimator(np.ones(4, np.float32), 1)


@pytest.mark.parametrize(
    "estimator", [partial(group_advantages, scale=False), rloo, lambda r, g: reinforce_pp(r, r, g)]
)
@pytest.mark.parametrize("group", [3, 0, -2])
def test_groups_that_do_not_divide_the_batch_are_an_error(estimator, group):
    with pytest.raises(ValueError, match=rf"rewards \(4,\) can't be cut into groups of {group}"):
        estimator(np.ones(4, np.float32), group)


@pytest.mark.parametrize("group", [1, 2, 4])
def test_reinforce_pp_equals_a_loop(group):
    reward = np.array([0.45, 0.09, 0.8, 1.0], np.float32)
    tokens = []  # one number an action token, in order
    for b in range(4):
        start = b // group * group
        baseline = reward[start : start + group].astype(float).mean() if group > 1 else 0.0
        tokens += [float(reward[b]) - baseline] * int(MASK[b].sum())
    expected = np.zeros(MASK.shape)
    expected[MASK] = (np.array(tokens) - np.mean(tokens)) / np.std(tokens)
    close(reinforce_pp(reward, MASK, group), expected)


def test_reinforce_pp_by_hand():
    # Three tokens of +1 and one of -3 about the mean: std sqrt((3 + 9) / 4) = sqrt(3).
    mask = np.array([[1, 1, 0, 1], [0, 0, 1, 0], [0, 0, 0, 0]], bool)
    got = reinforce_pp(np.array([4.0, 0.0, np.nan], np.float32), mask, 1)
    s = 3**0.5
    close(got, [[1 / s, 1 / s, 0, 1 / s], [0, 0, -3 / s, 0], [0, 0, 0, 0]])


def test_nothing_to_learn_from_an_empty_batch():
    none = np.zeros_like(MASK)
    close(reinforce_pp(np.arange(4.0), none, 2), np.zeros(MASK.shape))
    got = gae(np.full(MASK.shape, np.nan), np.full(MASK.shape, np.inf), none, gamma=0.9, lam=0.9)
    close(got.advantage, np.zeros(MASK.shape))
    close(got.returns, np.zeros(MASK.shape))


@pytest.mark.parametrize(("discount", "scale"), [(1.0, True), (0.5, True), (0.0, False)])
def test_turn_advantages_equal_loops(discount, scale):
    rewards = np.random.default_rng(3).integers(-10, 11, (6, 4)).astype(np.float32) / 10
    turns = np.array([4, 2, 4, 1, 3, 3])
    played = np.arange(4) < turns[:, None]
    rewards[~played] = np.nan
    expected = np.zeros((6, 4))
    for start in (0, 3):
        members, deviations, means = range(start, start + 3), [], set()
        earned = {
            (b, t): sum(discount ** (later - t) * float(rewards[b, later]) for later in range(t, turns[b]))
            for b in members
            for t in range(turns[b])
        }
        for (b, t), value in earned.items():
            there = [earned[other, t] for other in members if (other, t) in earned]
            expected[b, t] = value - sum(there) / len(there) if len(there) > 1 else 0.0
            deviations.append(expected[b, t])
            means.add(t)
        if scale:
            std = (sum(d * d for d in deviations) / (len(deviations) - len(means))) ** 0.5
            expected[start : start + 3] /= std + 1e-6
    close(advantages.turn_advantages(rewards, played, 3, discount=discount, scale=scale), expected, atol=1e-5)


def test_turn_advantages_with_one_turn_are_group_advantages_and_equal_turns_teach_nothing():
    reward = np.array([1.0, 0.0, 0.0, 0.0, 0.2, 0.6, 0.5, 0.5], np.float32)
    there = np.ones((8, 1), bool)
    got = advantages.turn_advantages(reward[:, None], there, 4, discount=1.0, scale=True)[:, 0]
    close(got, group_advantages(reward, 4, scale=True))
    same = np.tile(np.float32([[0.3, 0.1, -0.7]]), (8, 1))
    got = advantages.turn_advantages(same, np.ones((8, 3), bool), 4, discount=0.9, scale=True)
    np.testing.assert_array_equal(got, np.zeros((8, 3)))
    with pytest.raises(ValueError, match="group=1 leaves none"):
        advantages.turn_advantages(same, np.ones((8, 3), bool), 1, discount=1.0, scale=True)


def test_turns_get_their_numbers_at_their_actions():
    turn, mask = np.array([[0, 0, 1, 1, 2], [0, 1, 1, 0, 0]]), np.array([[1, 0, 1, 1, 0], [1, 1, 1, 0, 0]], bool)
    numbers = np.array([[1.0, 2.0, 3.0], [4.0, 5.0, 6.0]], np.float32)
    np.testing.assert_array_equal(advantages.at_turns(numbers, turn, mask), [[1, 0, 2, 2, 0], [4, 5, 5, 0, 0]])
    np.testing.assert_array_equal(advantages.turns_played(3, turn, mask), [[True, True, False], [True, True, False]])


@pytest.mark.parametrize("estimator", ["grpo", "dr_grpo", "rloo", "reinforce_pp", "turns"])
def test_what_is_left_out_might_as_well_not_be_there(estimator):
    """Groups of 4 of which 4, 3, 2, 1 and 0 are counted: those that are have what groups of as many give."""
    rng = np.random.default_rng(5)
    reward = rng.integers(0, 101, 20).astype(np.float32) / 100
    counted = np.array([True] * 4 + [True, False, True, True] + [False, True, False, True] + [True] + [False] * 7)
    mask = (rng.random((20, 30)) < 0.5) & counted[:, None]
    mask[counted, 0] = True
    turns, turn = rng.normal(size=(20, 3)).astype(np.float32), rng.integers(0, 3, (20, 30))

    def estimate(rows, group, counted=None):
        config = AdvantageConfig(
            "grpo" if estimator in ("dr_grpo", "turns") else estimator,
            credit="turn" if estimator == "turns" else "dialogue",
            scale=estimator != "dr_grpo",
            group=group,
        )
        rewards = Rewards(reward[rows], turns[rows], None if counted is None else jnp.asarray(counted[rows]))
        return np.asarray(compute_advantages(config, EstimatorInputs(rewards, turn[rows], mask[rows], None)).advantage)

    actual = estimate(np.arange(20), 4, counted)
    assert not actual[~counted].any()
    alone = counted & (np.arange(20) == 12)
    if estimator != "reinforce_pp":
        assert not actual[alone].any(), "nobody is left to compare it with"
        for start, size in ((0, 4), (4, 3), (8, 2)):
            rows = np.arange(start, start + 4)[counted[start : start + 4]]
            close(actual[rows], estimate(rows, size))
        whole = np.ones(20, bool)
        assert (estimate(np.arange(20), 4, whole) == estimate(np.arange(20), 4)).all(), "to the bit"
    else:
        centred = [reward[i] - reward[i // 4 * 4 : i // 4 * 4 + 4][counted[i // 4 * 4 : i // 4 * 4 + 4]].mean()
                   for i in np.flatnonzero(counted)]  # fmt: skip
        values = np.where(mask, np.zeros(20, np.float32)[:, None], 0)
        values[counted] = np.array(centred)[:, None] * mask[counted]
        mean, std = values[mask].mean(), values[mask].std()
        close(actual, np.where(mask, (values - mean) / std, 0), 1e-4)
