"""Figures of agreement against numbers worked out by hand, and intervals against the normal theory."""

import math

import numpy as np
import pytest
from scipy import stats

from rlver_jax.evaluation import statistics
from rlver_jax.evaluation.statistics import agreement, mean_interval, mean_with_interval, pearson, spearman


def turns(*pairs):
    """Rows at emotion 50 from (own, recorded) changes."""
    return np.array([(50, *pair) for pair in pairs])


def test_figures_by_hand():
    # own: 1 2 3 4 5; recorded: 2 1 4 3 5. Rank differences 1 1 1 1 0: rho = 1 - 6 * 4 / (5 * 24) = 0.8.
    groups = [turns((1, 2), (2, 1)), turns((3, 4), (4, 3), (5, 5))]
    found = agreement(groups)
    assert (found["n"], found["dialogues"]) == (5, 2)
    assert found["spearman"]["value"] == pytest.approx(0.8)
    assert found["pearson"]["value"] == pytest.approx(0.8)  # ranks are the values
    assert found["mae"]["value"] == pytest.approx(0.8)
    assert found["sign_agreement"]["value"] == 1
    assert found["mae_of_the_median"] == pytest.approx((2 + 1 + 0 + 1 + 2) / 5)  # of 1 2 3 4 5 around 3
    low, high = found["mae"]["interval"]  # drawn groups give 1 (twice the first), 2/3 or 0.8
    assert (low, high) == (pytest.approx(2 / 3), 1)


def test_signs():
    groups = [turns((0, 0), (1, 0)), turns((-2, -7), (3, -3))]
    assert agreement(groups)["sign_agreement"]["value"] == 0.5


def test_ties_share_ranks():
    # own 0 0 1 has ranks 1.5 1.5 3, recorded 1 2 3: covariance 1.5/2, deviations sqrt(1.5/2) and 1.
    assert spearman(turns((0, 1), (0, 2), (1, 3))) == pytest.approx(0.75 / math.sqrt(0.75))


def test_a_judge_that_never_varies_has_no_correlation():
    groups = [turns((3, 1), (3, -2)), turns((3, 4))]
    found = agreement(groups)
    assert found["spearman"] == found["pearson"] == {"value": None, "interval": None}
    assert found["mae"]["value"] == pytest.approx((2 + 5 + 1) / 3)
    assert math.isnan(pearson(turns((1, 2))))


def test_the_interval_of_a_mean_is_the_normal_one():
    values = np.random.default_rng(3).normal(5, 2, 400)
    found = mean_with_interval(list(values))
    assert found["mean"] == pytest.approx(values.mean())
    assert found["std"] == pytest.approx(values.std(ddof=1))
    half = 1.96 * values.std(ddof=1) / 20
    assert found["interval"] == pytest.approx([values.mean() - half, values.mean() + half], abs=0.15 * half)


@pytest.mark.parametrize("count", [2, 7, 1500])
def test_drawing_in_parts_draws_the_same(count):
    """Of 1500 values 666 resamples are drawn at a time: scipy would draw all, which takes memory for long logs."""
    values = np.random.default_rng(3).normal(size=count)
    whole = stats.bootstrap((values,), np.mean, n_resamples=10_000, rng=np.random.default_rng(0), method="percentile")
    expected = np.percentile(whole.bootstrap_distribution, [2.5, 97.5])
    np.testing.assert_allclose(mean_with_interval(values.tolist())["interval"], expected, rtol=1e-13)


def test_clusters_of_different_sizes_are_drawn_whole():
    """Two profiles with 0 (three dialogues) and 8 (one): a resample's mean is 0, 2 or 8, weighted by dialogues."""
    assert mean_interval([0, 0, 0, 8], ["a", "a", "a", "b"]) == [0, 8]
    three = mean_interval([0, 0, 4, 8, 8, 8], "aabccc")
    draws = np.random.default_rng(7).integers(0, 3, (200_000, 3))
    sums, sizes = np.array([0, 4, 24])[draws].sum(1), np.array([2, 1, 3])[draws].sum(1)
    np.testing.assert_allclose(three, np.percentile(sums / sizes, [2.5, 97.5]), atol=0.3)


def test_copies_within_a_profile_make_nothing_surer():
    draw = np.random.default_rng(4).normal(0, 1, 60)
    often = mean_interval(np.repeat(draw, 9), np.repeat(np.arange(60), 9).tolist())
    assert often == pytest.approx(mean_interval(draw))
    assert mean_interval(np.repeat(draw, 9))[1] < often[1], "as if they were independent"
    assert mean_interval(draw, ["one"] * 60) is None


def test_agreement_draws_profiles(monkeypatch):
    """Dialogues with one profile, whether they are one or three, are drawn together."""
    monkeypatch.setattr(statistics, "STATISTICS", {"mae": statistics.mean_absolute_error})  # the others take their time
    draw = np.random.default_rng(6)
    dialogues = [np.stack([np.full(4, 50), *draw.integers(-10, 11, (2, 4))], axis=1) for _ in range(12)]
    profiles = [i // 3 for i in range(12)]
    joined = [np.concatenate(dialogues[i : i + 3]) for i in range(0, 12, 3)]
    found, expected = agreement(dialogues, profiles), agreement(joined)
    assert (found["dialogues"], expected["dialogues"]) == (12, 4)
    assert found["mae"] == expected["mae"]
    assert found["mae"]["interval"] != agreement(dialogues)["mae"]["interval"]


def test_confusion_of_bands():
    """Emotions after the turn, kept within 0 and 100."""
    rows = [(95, 9, 5), (95, 4, 10), (65, 5, 4), (42, -3, -2), (12, -3, -2), (40, 5, 5)]
    found = agreement([np.array(rows), np.array([(3, -10, -5)])])
    table = found["band_confusion"]
    assert table["S"] == {"S": 1, "A": 1, "B": 0, "C": 0, "F": 0}
    assert table["A"] == {"S": 0, "A": 0, "B": 0, "C": 0, "F": 0}
    assert table["B"] == {"S": 0, "A": 1, "B": 1, "C": 1, "F": 0}
    assert table["C"] == {"S": 0, "A": 0, "B": 0, "C": 0, "F": 1}
    assert table["F"] == {"S": 0, "A": 0, "B": 0, "C": 0, "F": 1}
    assert found["band_agreement"]["value"] == pytest.approx(3 / 7)
