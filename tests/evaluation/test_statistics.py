"""Figures of agreement against numbers worked out by hand, and intervals against the normal theory."""

import math

import numpy as np
import pytest
from scipy import stats

from rlver_jax.evaluation.statistics import agreement, interval, mean_with_interval, pearson, spearman


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
    """Of 1500 dialogues 666 resamples are drawn at a time: scipy would draw 2000, which takes memory for long logs."""
    values = np.random.default_rng(3).normal(size=count)
    whole = stats.bootstrap((values,), np.mean, n_resamples=2000, vectorized=False, rng=np.random.default_rng(0))
    expected = np.percentile(whole.bootstrap_distribution, [2.5, 97.5]).tolist()
    assert mean_with_interval(values.tolist())["interval"] == expected


def test_copies_within_a_dialogue_make_nothing_surer():
    draw = np.random.default_rng(4).normal(0, 1, (60, 1, 1))
    once = interval(list(draw), lambda x: float(x.mean()))
    often = interval([np.repeat(one, 9, axis=0) for one in draw], lambda x: float(x.mean()))
    assert often == pytest.approx(once)
    assert interval([draw[0]], lambda x: float(x.mean())) is None


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
