"""Rewards against hand-computed dialogues and a plain Python loop in float64."""

from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from rlver_jax.rollout.rewards import REWARDS, final, mixed, per_turn, reward

# Four dialogues of T = 3: played out, ended after 2 turns (garbage behind), violated at turn 3, no turns.
EMOTIONS = jnp.asarray([[30, 38, 35, 45], [30, 20, 9, 77], [30, 40, 33, 33], [30, 99, 99, 99]], jnp.int32)
TURNS = jnp.asarray([3, 2, 3, 0], jnp.int32)
VIOLATION = jnp.asarray([False, False, True, False])
BATCH = (EMOTIONS, TURNS, VIOLATION)


def close(got, expected):
    assert got.dtype == jnp.float32
    np.testing.assert_allclose(got, expected, rtol=0, atol=1e-6)


def test_final_by_hand():
    got = final(*BATCH)
    close(got.reward, [0.45, 0.09, 0.0, 0.30])
    close(got.turns, [[0, 0, 0.45], [0, 0.09, 0], [0, 0, 0], [0, 0, 0]])


def test_per_turn_by_hand():
    got = per_turn(*BATCH)
    close(got.turns, [[0.8, -0.3, 1.0], [-1.0, -1.1, 0], [1.0, -0.7, -3.3], [0, 0, 0]])
    close(got.reward, [1.5, -2.1, -3.0, 0.0])


def test_mixed_by_hand():
    got = mixed(*BATCH, gamma=0.5, weight=0.25)
    # Turn t is worth 0.5^(t-1); terminal parts are 0.75 * e_n / 100; changes count a quarter.
    first = [0.25 * 0.8, 0.5 * 0.25 * -0.3, 0.25 * (0.75 * 0.45 + 0.25 * 1.0)]
    second = [0.25 * -1.0, 0.5 * (0.75 * 0.09 + 0.25 * -1.1), 0]
    third = [0.25 * 1.0, 0.5 * 0.25 * -0.7, 0.25 * 0.25 * -3.3]
    close(got.turns, [first, second, third, [0, 0, 0]])
    close(got.reward, [sum(first), sum(second), sum(third), 0.75 * 0.30])


def test_fractions_survive_for_every_emotion_and_jit_gives_the_same_bits():
    emotions = jnp.stack([jnp.full(101, 30, jnp.int32), jnp.arange(101, dtype=jnp.int32)], axis=1)
    args = (emotions, jnp.ones(101, jnp.int32), jnp.zeros(101, bool))
    expected = np.asarray([np.float32(e / 100) for e in range(101)])
    np.testing.assert_array_equal(final(*args).reward, expected)
    np.testing.assert_array_equal(jax.jit(final)(*args).reward, expected)
    steps = np.asarray([np.float32((e - 30) / 10) for e in range(101)])
    np.testing.assert_array_equal(jax.jit(per_turn)(*args).reward, steps)


def test_breaking_the_format_never_pays():
    """Whatever came before, a violation now earns no more than a last reply that changes nothing."""
    rng = np.random.default_rng(0)
    emotions = jnp.asarray(rng.integers(0, 101, (200, 6)), jnp.int32)
    turns = jnp.full(200, 5, jnp.int32)
    emotions = emotions.at[:, 5].set(emotions[:, 4])
    for name in REWARDS:
        broken = reward(name, emotions, turns, jnp.ones(200, bool))
        whole = reward(name, emotions, turns, jnp.zeros(200, bool))
        assert bool((broken.reward <= whole.reward + 1e-6).all()), name
        assert bool((broken.reward <= 0).all()), name


def by_loop(name, emotions, n, violated, gamma, weight):
    """One dialogue in float64."""
    fraction = 0.0 if violated else max(emotions[n] / 100, 0.0)
    after = [*emotions[1:n], 0 if violated else emotions[n]] if n else []
    changes = [(after[t] - emotions[t]) / 10 for t in range(n)]
    turns = [0.0] * (len(emotions) - 1)
    for t in range(n):
        end = fraction if t == n - 1 else 0.0
        mix = gamma**t * ((1 - weight) * end + weight * changes[t])
        turns[t] = {"final": end, "per_turn": changes[t], "mixed": mix}[name]
    empty = {"final": fraction, "per_turn": 0.0, "mixed": (1 - weight) * fraction}[name]
    return (sum(turns) if n else empty), turns


@settings(max_examples=60, deadline=None)
@given(st.data(), st.sampled_from(list(REWARDS)), st.floats(0.01, 1), st.floats(0, 1))
def test_against_a_loop(data, name, gamma, weight):
    shape = (3, 5)
    emotions = np.asarray(data.draw(st.lists(st.integers(0, 100), min_size=15, max_size=15))).reshape(shape)
    n_turns = np.asarray(data.draw(st.lists(st.integers(0, 4), min_size=3, max_size=3)))
    violation = np.asarray(data.draw(st.lists(st.booleans(), min_size=3, max_size=3)))
    got = reward(
        name,
        jnp.asarray(emotions, jnp.int32),
        jnp.asarray(n_turns, jnp.int32),
        jnp.asarray(violation),
        gamma=gamma,
        weight=weight,
    )
    for row in range(3):
        total, turns = by_loop(name, emotions[row].tolist(), int(n_turns[row]), bool(violation[row]), gamma, weight)
        np.testing.assert_allclose(got.turns[row], turns, atol=2e-5)
        np.testing.assert_allclose(got.reward[row], total, atol=2e-5)


@pytest.mark.parametrize("name", REWARDS)
def test_jit_and_a_batch_without_turns(name):
    plain = reward(name, *BATCH, gamma=0.9, weight=0.3)
    traced = jax.jit(partial(reward, name, gamma=0.9, weight=0.3))(*BATCH)
    np.testing.assert_allclose(traced.turns, plain.turns, atol=1e-6)
    np.testing.assert_allclose(traced.reward, plain.reward, atol=1e-6)
    ended_at_once = reward(name, EMOTIONS[:, :1], jnp.zeros(4, jnp.int32), jnp.zeros(4, bool), weight=0.0)
    assert ended_at_once.turns.shape == (4, 0)
    close(ended_at_once.reward, [0.0 if name == "per_turn" else 0.3] * 4)


def test_mixed_has_final_and_per_turn_as_its_ends():
    for weight, other in ((0.0, final), (1.0, per_turn)):
        got = mixed(*BATCH, gamma=1.0, weight=weight)
        close(got.turns, other(*BATCH).turns)
        close(got.reward, other(*BATCH).reward)


def test_errors():
    with pytest.raises(ValueError, match=r"'best' is unknown: use one of final, per_turn, mixed"):
        reward("best", *BATCH)
    with pytest.raises(ValueError, match=r"expected \[B, T\+1\]"):
        final(EMOTIONS, TURNS[:2], VIOLATION)
    with pytest.raises(ValueError, match="integer arrays"):
        final(EMOTIONS.astype(jnp.float32), TURNS, VIOLATION)
    with pytest.raises(ValueError, match="bool array"):
        per_turn(EMOTIONS, TURNS, TURNS)
    with pytest.raises(ValueError, match=r"gamma=0\.0"):
        mixed(*BATCH, gamma=0.0)
    with pytest.raises(ValueError, match=r"weight=1\.5"):
        mixed(*BATCH, weight=1.5)
