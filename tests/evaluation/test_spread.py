"""Spread over repeats and profiles, against hand-computed values, NumPy's own resampling, and the normal theory."""

import numpy as np
import pytest
from scipy import stats

from rlver_jax.evaluation.spread import spread, spread_text
from rlver_jax.evaluation.statistics import mean_interval, mean_with_interval


def records(*repeats):
    return [{"emotion": emotion} for repeat in repeats for emotion in repeat]


def test_repeats_by_hand():
    """Means 40, 50, 60: standard deviation of the sample 10, of the population 8.16."""
    result = spread(records([0, 80], [0, 100], [40, 80]), 2)
    assert result["repeats"] == {"count": 3, "scores": [40, 50, 60], "mean": 50, "std": pytest.approx(10)}
    assert result["interval"]["success_rate"] == [0, pytest.approx(1 / 3)]
    assert result["interval"]["failure_rate"] == [0, pytest.approx(2 / 3)]
    low, high = result["interval"]["score"]
    assert low == pytest.approx(40 / 3), "both draws may be the first profile, of mean 13.3"
    assert high == pytest.approx(260 / 3)


def test_the_interval_is_that_of_the_mean_over_profiles():
    """Repeats don't narrow it as more profiles would: what is drawn are profiles."""
    draw = np.random.default_rng(3)
    emotions = draw.integers(0, 101, 80)
    low, high = spread(records(emotions), 80)["interval"]["score"]
    assert spread(records(emotions, emotions), 80)["interval"]["score"] == [low, high]
    half = stats.norm.ppf(0.975) * emotions.std() / 80**0.5
    assert low == pytest.approx(emotions.mean() - half, abs=0.5)
    assert high == pytest.approx(emotions.mean() + half, abs=0.5)
    own = np.random.default_rng(4).choice(emotions, (10_000, 80)).mean(axis=1)
    np.testing.assert_allclose([low, high], np.percentile(own, [2.5, 97.5]), atol=0.5)


def test_the_interval_is_scipys():
    """Bit for bit that of `scipy.stats.bootstrap` of the profiles' scores, and the same wherever a mean has one."""
    emotions = np.random.default_rng(5).integers(0, 101, 37)
    expected = stats.bootstrap(
        (emotions,), np.mean, n_resamples=10_000, method="percentile", rng=np.random.default_rng(0), batch=1000
    ).confidence_interval
    assert spread(records(emotions), 37)["interval"]["score"] == [expected.low, expected.high]
    assert mean_with_interval(emotions.tolist())["interval"] == [expected.low, expected.high]


def test_where_there_is_no_spread():
    assert mean_interval(np.array([40.0])) is None
    assert mean_interval(np.full(9, 40.0)) == [40, 40]
    one = spread(records([40]), 1)
    assert one["repeats"]["std"] is None
    assert spread_text(one) == ""
    text = spread_text(spread(records([0, 80], [0, 100]), 2))
    assert text == " (95 % interval 0.00 to 90.00; standard deviation 7.07 over 2 repeats)"
