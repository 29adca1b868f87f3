"""Losses against hand-computed tokens, plain loops in float64 and finite differences, with garbage off the actions."""

import math
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from rlver_jax.learning import loss_terms

# Compiled whole, as training does it, which is also faster than op by op.
token_weights = jax.jit(loss_terms.token_weights, static_argnames=("kind", "length"))
token_ratio, sequence_ratio, ratio_metrics = map(
    jax.jit, (loss_terms.token_ratio, loss_terms.sequence_ratio, loss_terms.ratio_metrics)
)
clipped_objective = jax.jit(loss_terms.clipped_objective, static_argnames=("clip_low", "clip_high", "dual_clip"))
value_loss = jax.jit(loss_terms.value_loss, static_argnames="clip")
kl_penalty = jax.jit(loss_terms.kl_penalty, static_argnames="estimator")
importance_weights = jax.jit(loss_terms.importance_weights, static_argnames="cap")

MASK = np.array([[0, 1, 1, 0, 1], [1, 0, 0, 0, 0], [0, 0, 0, 0, 0], [1, 1, 1, 1, 0]], bool)
KINDS = ("token_mean", "dialogue_mean", "dr_grpo")
PPO = {"clip_low": 0.2, "clip_high": 0.28, "dual_clip": 3.0}


def close(got, expected, atol=1e-6):
    assert got.dtype == jnp.float32
    np.testing.assert_allclose(got, expected, rtol=0, atol=atol)


def dirty(x, mask=MASK, seed=0):
    """x with garbage wherever there is no action."""
    garbage = np.random.default_rng(seed).choice([np.nan, np.inf, -np.inf, 3e38], mask.shape)
    return np.where(mask, x, garbage).astype(x.dtype)


def draws(count, seed=0, scale=0.5):
    return np.random.default_rng(seed).normal(scale=scale, size=(count, *MASK.shape))


def by_token(function, *arrays):
    """function of each action's numbers, 0 elsewhere."""
    expected = np.zeros(MASK.shape)
    for position in np.argwhere(MASK):
        expected[tuple(position)] = function(*(float(x[tuple(position)]) for x in arrays))
    return expected


def check_gradient(function, x):
    """jax.grad of sum(weights * function(x)) against central differences, both in float64, x clean and dirty."""
    with jax.enable_x64(True):
        weights = draws(1, seed=9)[0]
        total = jax.jit(jax.value_and_grad(lambda x: (weights * function(x)).sum()))
        expected = np.zeros(x.shape)
        for position in map(tuple, np.argwhere(MASK)):
            step = np.zeros(x.shape)
            step[position] = 1e-6
            expected[position] = (float(total(x + step)[0]) - float(total(x - step)[0])) / 2e-6
        got = np.asarray(total(dirty(x))[1])
        assert got.dtype == np.float64
        np.testing.assert_allclose(got, expected, rtol=1e-6, atol=1e-8)
        np.testing.assert_array_equal(got[~MASK], 0)
    return expected


def test_token_weights_by_hand():
    close(token_weights(MASK, "token_mean"), MASK / 8)
    close(token_weights(MASK, "dialogue_mean"), MASK * np.array([[1 / 9], [1 / 3], [0], [1 / 12]]))
    close(token_weights(MASK, "dr_grpo", length=100), MASK / 400)


def test_token_weights_are_the_means_of_their_papers():
    loss = draws(1)[0]
    rows = [[loss[b, p] for p in range(5) if MASK[b, p]] for b in range(4)]
    tokens, means = [x for row in rows for x in row], [sum(row) / len(row) for row in rows if row]
    expected = [sum(tokens) / len(tokens), sum(means) / len(means), sum(tokens) / (4 * 7)]
    for kind, value in zip(KINDS, expected, strict=True):
        close((token_weights(MASK, kind, length=7) * loss.astype(np.float32)).sum(), value)


@pytest.mark.parametrize("kind", KINDS)
def test_no_action_no_weight(kind):
    close(token_weights(np.zeros_like(MASK), kind, length=7), np.zeros(MASK.shape))


@settings(max_examples=25, deadline=None)
@given(st.lists(st.booleans(), min_size=32, max_size=32), st.sampled_from(KINDS))
def test_microbatches_add_up_to_the_minibatch(bits, kind):
    """Whatever the division: the minibatch's weights are made once and cut along with its rows."""
    mask = np.array(bits).reshape(8, 4)
    loss = np.random.default_rng(1).normal(size=mask.shape)
    weights = np.asarray(token_weights(mask, kind, length=6), np.float64)
    whole = (weights * loss).sum()
    for parts in (2, 4, 8):
        cut = zip(np.split(weights, parts), np.split(loss, parts), strict=True)
        np.testing.assert_allclose(sum((w * x).sum() for w, x in cut), whole, atol=1e-6)
    if kind != "dr_grpo":
        np.testing.assert_allclose(weights.sum(), mask.any(), atol=1e-6)


def test_ratios_by_hand():
    new, old = np.log([[9, 0.5, 0.2, 9, 0.9]]), np.log([[9, 0.25, 0.4, 1, 0.3]])
    mask = MASK[:1]
    new, old = (dirty(x.astype(np.float32), mask, i) for i, x in enumerate((new, old)))
    close(token_ratio(new, old, mask), [[0, 2, 0.5, 0, 3]])
    third = 3 ** (1 / 3)  # the geometric mean of 2, 1/2 and 3
    close(sequence_ratio(new, old, mask), [[0, third, third, 0, third]])


def test_ratios_equal_loops():
    new, old = draws(2).astype(np.float32)
    args = (dirty(new), dirty(old, seed=1), MASK)
    close(token_ratio(*args), by_token(lambda n, o: math.exp(n - o), new, old))
    expected = np.zeros(MASK.shape)
    for b in (0, 1, 3):
        positions = [p for p in range(5) if MASK[b, p]]
        mean = sum(float(new[b, p]) - float(old[b, p]) for p in positions) / len(positions)
        expected[b, positions] = math.exp(mean)
    close(sequence_ratio(*args), expected)


@pytest.mark.parametrize("ratio", [token_ratio, sequence_ratio])
def test_gradient_of_ratios(ratio):
    new, old = draws(2)
    check_gradient(lambda x: ratio(x, dirty(old, seed=1), MASK), new)


@pytest.mark.parametrize("ratio", [token_ratio, sequence_ratio])
def test_old_is_a_constant_even_when_it_is_new(ratio):
    """One update a batch takes its own log-probs as old ones: the gradient is then that of the log-prob."""
    new = draws(1)[0].astype(np.float32)
    close(jax.jit(jax.grad(lambda x: ratio(x, x, MASK).sum()))(new), 1.0 * MASK)


def test_wild_ratios_stay_finite_and_keep_their_direction():
    new, old = np.float32([[-0.1, -300.0, -0.1, -20.5]]), np.float32([[-300.0, -0.1, -45.0, -0.1]])
    mask = np.ones((1, 4), bool)

    def loss(new, advantage):
        return clipped_objective(token_ratio(new, old, mask), advantage, mask, clip_low=0.2, clip_high=0.2).loss.sum()

    slope = jax.jit(jax.grad(loss))
    for advantage in (1.0, -1.0):
        gradient = slope(new, np.full((1, 4), advantage, np.float32))
        assert np.isfinite(gradient).all()
        # What has become likelier than the clip allows is only pushed back, what has become rarer only brought back.
        falls = np.asarray(gradient) > 0
        np.testing.assert_array_equal(falls, [[advantage < 0, False, advantage < 0, False]])
    assert np.isfinite(token_ratio(new, old, mask)).all()


def test_clipped_objective_by_hand():
    ratio = np.float32([[0.5, 1.0, 1.25, 1.5, 4.0, 0.5, 0.9, 1.5, 4.0, 4.0]])
    advantage = np.float32([[2, 2, 2, 2, 2, -2, -2, -2, -2, 0]])
    got = clipped_objective(ratio, advantage, ratio > 0, **PPO)
    close(got.loss, [[-1, -2, -2.5, -2.56, -2.56, 1.6, 1.8, 3, 6, 0]])
    np.testing.assert_array_equal(got.clipped, [[0, 0, 0, 1, 1, 1, 0, 0, 1, 0]])
    got = clipped_objective(ratio, advantage, ratio > 0, clip_low=0.2, clip_high=0.28)
    close(got.loss[0, -2:], [8, 0])
    assert not got.clipped[0, -2]
    got = clipped_objective(ratio, advantage, ratio > 0, clip_low=1.0, clip_high=math.inf)
    close(got.loss, -ratio * advantage)
    assert not got.clipped.any()


def loop_ppo(ratio, advantage):
    loss = max(-advantage * ratio, -advantage * min(max(ratio, 1 - 0.2), 1 + 0.28))
    return min(loss, -advantage * 3.0) if advantage < 0 else loss


def test_clipped_objective_equals_a_loop_and_says_where_it_clips():
    ratio, advantage = np.exp(draws(1, seed=2)[0]).astype(np.float32), draws(1, seed=3)[0].astype(np.float32)
    ratio[3, 3], advantage[3, 3] = 3.5, -1.0
    got = clipped_objective(dirty(ratio), dirty(advantage, seed=1), MASK, **PPO)
    close(got.loss, by_token(loop_ppo, ratio, advantage))
    flat = check_gradient(
        lambda x: clipped_objective(x, dirty(advantage, seed=1), MASK, **PPO).loss, ratio.astype(float)
    )
    np.testing.assert_array_equal(got.clipped, (flat == 0) & MASK)
    assert got.clipped[3, 3]
    assert 2 < got.clipped.sum() < 7


@pytest.mark.parametrize("ratio", [token_ratio, sequence_ratio])
def test_gradient_from_log_prob_to_loss(ratio):
    new, old, advantage = draws(3, seed=4)
    objective = partial(clipped_objective, mask=MASK, **PPO)
    check_gradient(lambda x: objective(ratio(x, dirty(old, seed=1), MASK), dirty(advantage, seed=2)).loss, new)


def test_the_sequence_objective_is_gspo():
    """With dialogue_mean weights: mean over dialogues of -min(s A, clip(s) A)."""
    new, old = draws(2, seed=5).astype(np.float32)
    advantage, expected = [1.0, -0.5, 2.0, 0.3], []
    for b in (0, 1, 3):
        positions = [p for p in range(5) if MASK[b, p]]
        s = math.exp(sum(float(new[b, p] - old[b, p]) for p in positions) / len(positions))
        expected.append(max(-advantage[b] * s, -advantage[b] * min(max(s, 0.9), 1.1)))
    spread = np.broadcast_to(np.float32(advantage)[:, None], MASK.shape)
    got = clipped_objective(sequence_ratio(new, old, MASK), spread, MASK, clip_low=0.1, clip_high=0.1)
    close((token_weights(MASK, "dialogue_mean") * got.loss).sum(), sum(expected) / 3)


@pytest.mark.parametrize("dual_clip", [1.0, 0.5, -3.0])
def test_a_dual_clip_that_forbids_the_old_policy_is_an_error(dual_clip):
    with pytest.raises(ValueError, match=f"dual_clip={dual_clip} must be above 1"):
        clipped_objective(MASK + 0.0, MASK + 0.0, MASK, clip_low=0.2, clip_high=0.2, dual_clip=dual_clip)


def test_value_loss_by_hand():
    value, old = np.float32([[0.5, 0.9, 0.1, 2.0]]), np.float32([[0.4, 0.4, 0.4, 0.4]])
    returns, mask = np.float32([[1, 1, 1, 1]]), np.ones((1, 4), bool)
    # Clipped to 0.2..0.6 they are 0.5, 0.6, 0.2, 0.6; the larger error counts.
    close(value_loss(value, old, returns, mask, clip=0.2), [[0.125, 0.08, 0.405, 0.5]])
    close(value_loss(value, old, returns, mask, clip=0), [[0.125, 0.005, 0.405, 0.5]])
    gradient = jax.jit(jax.grad(lambda v: value_loss(v, old, returns, mask, clip=0.2).sum()))(value)
    close(gradient, [[-0.5, 0, -0.9, 1.0]])


@pytest.mark.parametrize("clip", [0.0, 0.3])
def test_value_loss_equals_a_loop(clip):
    value, old, returns = draws(3, seed=6).astype(np.float32)

    def one(v, o, r):
        near = min(max(v, o - clip), o + clip) if clip else v
        return 0.5 * max((v - r) ** 2, (near - r) ** 2)

    arguments = (dirty(old, seed=1), dirty(returns, seed=2), MASK)
    close(value_loss(dirty(value), *arguments, clip=clip), by_token(one, value, old, returns))
    check_gradient(lambda x: value_loss(x, *arguments, clip=clip), value.astype(float))


def test_kl_by_hand():
    new, ref, mask = np.log(np.float32([[0.5, 0.2]])), np.log(np.float32([[0.25, 0.4]])), np.ones((1, 2), bool)
    two = math.log(2)
    close(kl_penalty(new, ref, mask, estimator="k1"), [[two, -two]])
    close(kl_penalty(new, ref, mask, estimator="k2"), [[two**2 / 2, two**2 / 2]])
    close(kl_penalty(new, ref, mask, estimator="k3"), [[0.5 - 1 + two, 2 - 1 - two]])


KL = {"k1": lambda n, r: n - r, "k2": lambda n, r: 0.5 * (n - r) ** 2, "k3": lambda n, r: math.exp(r - n) - 1 - (r - n)}


@pytest.mark.parametrize("estimator", KL)
def test_kl_equals_a_loop(estimator):
    new, ref = draws(2, seed=7).astype(np.float32)
    args = (dirty(ref, seed=1), MASK)
    close(kl_penalty(dirty(new), *args, estimator=estimator), by_token(KL[estimator], new, ref))
    check_gradient(lambda x: kl_penalty(x, *args, estimator=estimator), new.astype(float))


def test_kl_estimates_the_divergence():
    """In expectation over `new`'s tokens k1 and k3 are KL(new || reference) exactly."""
    p, q = np.array([0.5, 0.3, 0.15, 0.05]), np.array([0.25, 0.25, 0.4, 0.1])
    kl = sum(a * math.log(a / b) for a, b in zip(p, q, strict=True))
    new, ref = (np.log(x)[None].astype(np.float32) for x in (p, q))
    for estimator in ("k1", "k3"):
        tokens = kl_penalty(new, ref, np.ones((1, 4), bool), estimator=estimator)
        np.testing.assert_allclose((p * np.asarray(tokens)).sum(), kl, atol=1e-7)


def test_k3_is_exact_near_zero_and_finite_far_away():
    mask = np.ones((1, 4), bool)
    new, ref = np.float32([[-1e-4, -200.0, -0.1, -21.0]]), np.float32([[0, -0.1, -200.0, 0]])

    def total(x):
        return kl_penalty(x, ref, mask, estimator="k3")

    got, gradient = np.asarray(total(new)), np.asarray(jax.jit(jax.grad(lambda x: total(x).sum()))(new))
    d = float(-new[0, 0])
    np.testing.assert_allclose(got[0, 0], d**2 / 2 + d**3 / 6, rtol=5e-3)  # exp(d) - 1 would have lost it
    np.testing.assert_allclose(got[0, 2], 199.9 - 1, rtol=1e-6)
    np.testing.assert_allclose(got[0, 3], math.exp(20) * 2 - 22, rtol=1e-6)  # the tangent of exp at 20, a step on
    assert np.isfinite(got).all()
    assert np.isfinite(gradient).all()
    assert gradient[0, 1] < 0 < gradient[0, 2]  # towards the reference, from both sides


def test_importance_weights_by_hand():
    old, behaviour = np.log(np.float32([[0.4, 0.2, 0.9, 0.3, 0.3]])), np.log(np.float32([[0.2, 0.4, 0.1, 0.3, 0.3]]))
    mask = np.array([[1, 1, 1, 1, 0]], bool)
    old = dirty(old, mask)
    close(importance_weights(old, behaviour, mask, cap=2.5), [[2, 0.5, 2.5, 1, 0]])
    close(importance_weights(old, behaviour, mask, cap=0), [[1, 1, 1, 1, 0]])
    assert np.isfinite(importance_weights(old + 500, behaviour, mask, cap=2.5)).all()
    gradient = jax.jit(jax.grad(lambda x: importance_weights(x, behaviour, mask, cap=9.5).sum()))(old)
    close(gradient, np.zeros((1, 5)))


def test_ratio_metrics_equal_loops_however_the_batch_is_cut():
    new, old = draws(2, seed=8).astype(np.float32)
    clipped = MASK & (new > old)
    kl = by_token(lambda n, o: math.exp(n - o) - 1 - (n - o), new, old)
    factor = by_token(lambda n, o: math.exp(abs(n - o)), new, old)
    args = (dirty(new), dirty(old, seed=1), clipped, MASK, np.asarray(token_weights(MASK, "token_mean")))
    for parts in (1, 4):  # the third row, alone at last, has no action
        cut = [ratio_metrics(*x) for x in zip(*(np.split(a, parts) for a in args), strict=True)]
        sums = {name: sum(float(part["sum"][name]) for part in cut) for name in cut[0]["sum"]}
        largest = max(float(part["max"]["policy/ratio_max"]) for part in cut)
        assert sums == pytest.approx({"policy/approx_kl": kl.sum() / 8, "policy/clip_fraction": clipped.sum() / 8})
        assert largest == pytest.approx(factor.max())
    assert ratio_metrics(*(a[2:3] for a in args))["max"]["policy/ratio_max"] == 1


def test_unknown_names_are_errors_while_tracing():
    normalizations, estimators = map(", ".join, (loss_terms.NORMALIZATIONS, loss_terms.KL_ESTIMATORS))
    with pytest.raises(ValueError, match=f"normalization 'mean' is unknown: use one of {normalizations}"):
        token_weights(MASK, "mean")
    with pytest.raises(ValueError, match=f"KL estimator 'k4' is unknown: use one of {estimators}"):
        kl_penalty(MASK + 0.0, MASK + 0.0, MASK, estimator="k4")
    with pytest.raises(ValueError, match="length=0 must be above 0"):
        token_weights(MASK, "dr_grpo")


def test_results_are_float32_from_half_precision():
    half = jnp.zeros(MASK.shape, jnp.bfloat16)
    for function, count in (
        (token_ratio, 2),
        (sequence_ratio, 2),
        (lambda *x: clipped_objective(*x, **PPO).loss, 2),
        (partial(value_loss, clip=0.2), 3),
        (partial(kl_penalty, estimator="k3"), 2),
        (partial(importance_weights, cap=2.0), 2),
    ):
        assert jax.eval_shape(function, *[half] * count, MASK).dtype == jnp.float32
