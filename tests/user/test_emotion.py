"""Emotion rules against hand-computed cases and plain loops."""

import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from rlver_jax.user.emotion import BANDS, CHANGES, SAGE, TRAINING, EmotionRules, change_readout

EMOTIONS, ALL_CHANGES = np.arange(101), np.arange(-10, 11)
LOW, NONE = -30.0, -math.inf


def test_update_of_every_emotion_and_change():
    expected = np.empty((101, 21), np.int32)
    for e in range(101):
        for i, change in enumerate(range(-10, 11)):
            new = e + change
            expected[e, i] = 0 if new < 0 else 100 if new > 100 else new
            assert TRAINING.update(e, change) == expected[e, i]
            assert type(TRAINING.update(e, change)) is int
    grid_e, grid_c = np.meshgrid(EMOTIONS.astype(np.int32), ALL_CHANGES.astype(np.int32), indexing="ij")
    from_numpy = TRAINING.update(grid_e, grid_c)
    from_jit = jax.jit(TRAINING.update)(jnp.asarray(grid_e), jnp.asarray(grid_c))
    np.testing.assert_array_equal(from_numpy, expected)
    np.testing.assert_array_equal(from_jit, expected)
    assert from_numpy.dtype == np.int32
    assert from_jit.dtype == jnp.int32


@pytest.mark.parametrize(
    ("emotion", "change", "after"), [(30, 25, 40), (30, -25, 20), (95, 10, 100), (4, -9, 0), (50, 10, 60)]
)
def test_changes_beyond_ten_are_clamped(emotion, change, after):
    assert TRAINING.update(emotion, change) == after
    assert int(TRAINING.update(jnp.int32(emotion), jnp.int32(change))) == after


def test_smaller_max_change():
    assert [EmotionRules(max_change=3).update(50, c) for c in (-10, -3, 0, 2, 10)] == [47, 47, 50, 52, 53]


@pytest.mark.parametrize(
    ("emotion", "name"),
    [(100, "S"), (99, "A"), (70, "A"), (69, "B"), (40, "B"), (39, "C"), (10, "C"), (9, "F"), (0, "F")],
)
def test_bands_at_every_border(emotion, name):
    index = {"S": 0, "A": 1, "B": 2, "C": 3, "F": 4}[name]
    assert TRAINING.band(emotion) == index
    assert TRAINING.band_name(emotion) == name
    assert int(jax.jit(TRAINING.band)(jnp.int32(emotion))) == index
    assert TRAINING.band(np.asarray([emotion], np.int32)).tolist() == [index]


def test_band_of_every_emotion_agrees_between_kinds():
    plain = [TRAINING.band(int(e)) for e in EMOTIONS]
    assert [BANDS[b] for b in plain] == ["F"] * 10 + ["C"] * 30 + ["B"] * 30 + ["A"] * 30 + ["S"]
    traced = jax.jit(TRAINING.band)(jnp.asarray(EMOTIONS, jnp.int32))
    np.testing.assert_array_equal(traced, plain)
    assert traced.dtype == jnp.int32
    assert not traced.weak_type


def test_ends():
    for e in range(101):
        assert TRAINING.succeeded(e) == (e == 100)
        assert TRAINING.failed(e) == (e < 10)
        assert TRAINING.ended(e) is (e == 100 or e < 10)
        assert TRAINING.outcome(e) == (1 if e == 100 else -1 if e < 10 else 0)
    values = jnp.asarray(EMOTIONS, jnp.int32)
    np.testing.assert_array_equal(jax.jit(TRAINING.ended)(values), (EMOTIONS == 100) | (EMOTIONS < 10))
    outcome = jax.jit(TRAINING.outcome)(values)
    assert (int((outcome == 1).sum()), int((outcome == -1).sum()), outcome.dtype) == (1, 10, jnp.int32)


def test_floor_is_inclusive_and_apart_from_the_outcome():
    patient, endless = EmotionRules(floor=0), EmotionRules(floor=-1)
    assert (patient.failed(1), patient.failed(0), endless.failed(0)) == (False, True, False)
    assert patient.outcome(5) == endless.outcome(0) == -1


def test_initial_values():
    assert (TRAINING.initial, SAGE.initial) == (30, 40)


@pytest.mark.parametrize(
    ("changed", "message"),
    [
        ({"initial": 9}, "floor < initial"),
        ({"initial": 100}, "initial < ceiling"),
        ({"ceiling": 102}, "ceiling"),
        ({"floor": -2}, "floor=-2"),
        ({"max_change": 0}, "max_change=0"),
        ({"max_change": 11}, "max_change=11"),
        ({"thresholds": (100, 40, 70, 10)}, "four falling numbers"),
        ({"thresholds": (100, 70, 40)}, "four falling numbers"),
        ({"thresholds": (101, 70, 40, 10)}, "four falling numbers"),
        ({"initial": 30.5}, "Python ints"),
    ],
)
def test_contradicting_rules_are_refused(changed, message):
    with pytest.raises(ValueError, match=message):
        EmotionRules(**changed)


@pytest.mark.parametrize("bad", [30.0, np.float32(3), np.zeros(2), jnp.zeros(2)])
def test_fractions_are_refused(bad):
    with pytest.raises(TypeError, match="integers"):
        TRAINING.update(bad, bad)
    with pytest.raises(TypeError, match="integers"):
        TRAINING.band(bad)


def distribution(**weights: float) -> np.ndarray:
    """Log-probs with the given probabilities; keys are p3 for +3 and m3 for -3."""
    row = np.full(21, NONE, np.float32)
    for name, weight in weights.items():
        row[(1 if name[0] == "p" else -1) * int(name[1:]) + 10] = math.log(weight)
    return row


def test_argmax_readout_and_its_ties():
    assert list(CHANGES) == list(range(-10, 11))
    rows = np.full((21, 21), LOW, np.float32)
    np.fill_diagonal(rows, -0.1)
    np.testing.assert_array_equal(change_readout(jnp.asarray(rows)), ALL_CHANGES)
    tied = jnp.asarray([distribution(p3=0.4, m7=0.4, p0=0.2), np.zeros(21, np.float32)])
    np.testing.assert_array_equal(change_readout(tied, "argmax"), [-7, -10])


@pytest.mark.parametrize(
    ("row", "expected"),
    [
        (distribution(p10=1.0), 10),
        (distribution(m10=0.5, p10=0.5), 0),
        (distribution(p3=0.25, p4=0.75), 4),  # 3.75
        (distribution(p2=0.5, p3=0.5), 2),  # 2.5 goes to the even 2
        (distribution(p3=0.5, p4=0.5), 4),  # 3.5 goes to the even 4
        (distribution(m2=0.5, m3=0.5), -2),
        (distribution(p8=0.2, m8=0.1), 3),  # unnormalized: (1.6 - 0.8) / 0.3 = 2.67
        (np.zeros(21, np.float32), 0),
    ],
)
def test_mean_readout(row, expected):
    result = jax.jit(lambda x: change_readout(x, "mean"))(jnp.asarray(row))
    assert (int(result), result.dtype) == (expected, jnp.int32)


def test_sample_readout_follows_the_distribution():
    probs = {"m10": 0.1, "p0": 0.3, "p3": 0.6}
    rows = jnp.broadcast_to(jnp.asarray(distribution(**probs)), (4000, 21))
    drawn = np.asarray(change_readout(rows, "sample", jax.random.split(jax.random.key(0), 4000)))
    assert set(drawn.tolist()) == {-10, 0, 3}
    for change, p in ((-10, 0.1), (0, 0.3), (3, 0.6)):
        assert abs((drawn == change).mean() - p) < 4 * math.sqrt(p * (1 - p) / 4000)


def test_samples_are_jax_random_categorical():
    rows, keys = jax.random.normal(jax.random.key(3), (50, 21)), jax.random.split(jax.random.key(4), 50)
    expected = [int(jax.random.categorical(key, row)) - 10 for key, row in zip(keys, rows, strict=True)]
    assert change_readout(rows, "sample", keys).tolist() == expected


def test_sample_of_a_row_does_not_depend_on_its_batch():
    rows = jnp.asarray(np.random.default_rng(0).normal(size=(6, 21)), jnp.float32)
    keys = jax.random.split(jax.random.key(3), 6)
    batched = change_readout(rows, "sample", keys)
    order = jnp.asarray([4, 0, 5, 2])
    np.testing.assert_array_equal(change_readout(rows[order], "sample", keys[order]), batched[order])
    assert [int(change_readout(rows[i], "sample", keys[i])) for i in range(6)] == batched.tolist()
    square = change_readout(rows.reshape(2, 3, 21), "sample", keys.reshape(2, 3))
    np.testing.assert_array_equal(square.reshape(6), batched)
    np.testing.assert_array_equal(jax.jit(lambda r, k: change_readout(r, "sample", k))(rows, keys), batched)


@pytest.mark.parametrize(
    ("shape", "mode", "key", "message"),
    [
        ((2, 21), "median", None, "argmax, sample, mean"),
        ((2, 20), "argmax", None, "21 options"),
        ((), "argmax", None, "21 options"),
        ((2, 21), "sample", None, "typed key"),
        ((2, 21), "sample", jax.random.PRNGKey(0), "typed key"),
        ((2, 21), "sample", jax.random.key(0), "one key for each row"),
        ((2, 21), "mean", jax.random.key(0), "takes no key"),
    ],
)
def test_readout_errors(shape, mode, key, message):
    with pytest.raises(ValueError, match=message):
        change_readout(jnp.zeros(shape), mode, key)
