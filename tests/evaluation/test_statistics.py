"""Intervals against the normal theory, and correlations of many resamples against SciPy and a regression of each."""

import numpy as np
import pytest
from scipy import stats

from rlver_jax.evaluation.statistics import (
    mean_interval,
    mean_with_interval,
    midranks,
    partial_correlation,
    weighted_mean,
)


def test_the_interval_of_a_mean_is_the_normal_one():
    values = np.random.default_rng(3).normal(5, 2, 400)
    result = mean_with_interval(list(values))
    assert result["mean"] == pytest.approx(values.mean())
    assert result["std"] == pytest.approx(values.std(ddof=1))
    half = 1.96 * values.std(ddof=1) / 20
    assert result["interval"] == pytest.approx([values.mean() - half, values.mean() + half], abs=0.15 * half)


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


def resamples(count, size):
    """Columns of whole numbers with many ties, and how often each of their values is in each resample."""
    draw = np.random.default_rng(count)
    columns = draw.integers(-3, 4, (4, size))
    columns[1] += columns[0] + columns[2]
    return columns, draw.multinomial(size, np.full(size, 1 / size), count).astype(float)


def drawn(column, weights):
    return np.repeat(column, weights.astype(int))


def test_weighted_means_and_ranks_are_those_of_what_was_drawn():
    columns, weights = resamples(5, 40)
    ranks = midranks(columns[1], weights)
    for i, often in enumerate(weights):
        values = drawn(columns[1], often)
        assert weighted_mean(columns[1], weights)[i] == pytest.approx(np.mean(values))
        np.testing.assert_array_equal(drawn(ranks[i], often), stats.rankdata(values))


def test_correlations_are_scipys():
    columns, weights = resamples(5, 40)
    linear = partial_correlation(columns[:2, None], weights)
    ranks = partial_correlation(np.stack([midranks(one, weights) for one in columns[:2]]), weights)
    for i, often in enumerate(weights):
        a, b = (drawn(one, often) for one in columns[:2])
        assert linear[i] == pytest.approx(stats.pearsonr(a, b).statistic, abs=1e-12)
        assert ranks[i] == pytest.approx(stats.spearmanr(a, b).statistic, abs=1e-12)


def midranks_by_counting(values):
    return np.array([(values < one).sum() + ((values == one).sum() + 1) / 2 for one in values])


def what_is_left(values, controls):
    """Residuals of least squares on `controls` and a constant."""
    known = np.column_stack([np.ones(len(values)), *controls])
    return values - known @ np.linalg.lstsq(known, values, rcond=None)[0]


@pytest.mark.parametrize("held_fixed", [1, 2])
def test_partial_correlations_are_those_of_residuals(held_fixed):
    columns, weights = resamples(6, 50)
    ranks = np.stack([midranks(one, weights) for one in columns[: 2 + held_fixed]])
    actual = partial_correlation(ranks, weights)
    for i, often in enumerate(weights):
        a, b, *controls = (midranks_by_counting(drawn(one, often)) for one in columns[: 2 + held_fixed])
        want = np.corrcoef(what_is_left(a, controls), what_is_left(b, controls))[0, 1]
        assert actual[i] == pytest.approx(want, abs=1e-10)
    assert not np.allclose(actual, partial_correlation(ranks[:2], weights), atol=0.05), "what is held fixed matters"


def test_a_partial_correlation_by_hand():
    """Ranks with r_ab = 1 - 6 * 4 / 120 = 0.8, r_ac = 0.8 and r_bc = 1 - 6 * 14 / 120 = 0.3."""
    ranks = np.array([[1, 2, 3, 4, 5], [2, 1, 4, 3, 5], [1, 3, 2, 5, 4]])[:, None]
    (actual,) = partial_correlation(ranks, np.ones((1, 5)))
    assert actual == pytest.approx((0.8 - 0.8 * 0.3) / np.sqrt((1 - 0.8**2) * (1 - 0.3**2)))


def test_where_nothing_is_left_there_is_no_partial_correlation():
    ones, a, b = np.ones((1, 4)), [1, 2, 4, 3], [3, 1, 2, 4]
    of = lambda *columns: partial_correlation(np.array(columns, float)[:, None], ones)[0]  # noqa: E731
    assert np.isnan(of(a, b, a)), "one of the two is what is held fixed"
    assert np.isnan(of(a, b, -0.1 * np.array(b)))
    assert np.isnan(of(a, [0.1] * 4))
    assert np.isnan(of([0.1] * 4, b, a))
    assert of(a, b, [0.1] * 4) == pytest.approx(np.corrcoef(a, b)[0, 1]), "what never varies explains nothing"
    c = [1, 0, 0, 1]
    assert of(a, b, c, c) == pytest.approx(of(a, b, c)), "nor does the same thing twice"
    only = np.array([[1.0, 0, 0, 2], [1, 1, 1, 1]])
    actual = partial_correlation(np.array([a, [0.1, 7, 7, 0.1]])[:, None], only)
    assert np.isnan(actual[0]), "it never varies in this resample"
    assert np.isfinite(actual[1])
