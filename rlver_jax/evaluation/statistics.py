"""How sure one can be: bootstrap intervals, of means and of anything else; and rank correlations."""

import warnings
from collections.abc import Callable, Hashable, Sequence
from typing import Any

import numpy as np
from jaxtyping import Float, Int, Real
from numpy.typing import ArrayLike
from scipy import stats

RESAMPLES = 10_000
CONFIDENCE = 0.95
DRAWN_AT_ONCE = 1_000_000  # indices or weights, 8 bytes each
NOTHING = 1e-9  # share of a variance that is rounding errors and no variance
Interval = list[float] | None


def bootstrap_interval(
    count: int, statistic: Callable[[Int[np.ndarray, "R N"]], Float[np.ndarray, "R"]], resamples: int = RESAMPLES
) -> Interval:
    """Percentile bootstrap interval (95 %): the only one, by `scipy.stats.bootstrap` with a fixed seed.

    Args:
        count: N, of what is drawn with replacement: clusters that don't depend on each other. Dialogues with one
            profile resemble each other, and turns of one dialogue still more. To draw those one by one would make the
            interval too narrow.
        statistic: its value in each resample, given the indices of the clusters drawn.

    Returns:
        [low, high]; None with fewer than two clusters, or where hardly any resample has the statistic (NaN).
    """
    if count < 2:
        return None
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # resamples in which a judge never varies have no correlation
        result = stats.bootstrap(
            (np.arange(count),), lambda drawn, axis: statistic(drawn), n_resamples=resamples, vectorized=True,
            confidence_level=CONFIDENCE,
            method="percentile", rng=np.random.default_rng(0), batch=max(DRAWN_AT_ONCE // count, 1),
        )  # fmt: skip
    values = result.bootstrap_distribution
    defined = values[np.isfinite(values)]
    if len(defined) < 0.9 * resamples:
        return None
    if len(defined) == resamples:
        low, high = result.confidence_interval
    else:
        tail = 50 * (1 - CONFIDENCE)
        low, high = np.percentile(defined, [tail, 100 - tail])
    return [float(low), float(high)]


def mean_interval(values: ArrayLike, clusters: Sequence[Hashable] | None = None) -> Interval:
    """`bootstrap_interval` of a mean.

    Args:
        values: [n], one at least.
        clusters: which cluster each value is of, such as its profile; by default each is one of its own.
    """
    values = np.asarray(values, np.float64)
    labels: Sequence[Hashable] = range(len(values)) if clusters is None else clusters
    number = {label: i for i, label in enumerate(dict.fromkeys(labels))}
    cluster = np.array([number[label] for label in labels])
    sums, sizes = np.bincount(cluster, values), np.bincount(cluster)
    return bootstrap_interval(len(number), lambda drawn: sums[drawn].sum(axis=-1) / sizes[drawn].sum(axis=-1))


def mean_with_interval(values: Sequence[float], clusters: Sequence[Hashable] | None = None) -> dict[str, Any]:
    """`mean`, `std` (of the sample) and the mean's `interval`; see `mean_interval`."""
    array = np.asarray(values, np.float64)
    return {
        "mean": float(array.mean()),
        "std": float(array.std(ddof=1)) if len(array) > 1 else None,
        "interval": mean_interval(array, clusters),
        "n": len(array),
    }


def rank_correlation(a: ArrayLike, b: ArrayLike) -> float:
    """Spearman's; NaN where one of them never varies."""
    a, b = np.asarray(a), np.asarray(b)
    if len(a) < 2 or np.ptp(a) == 0 or np.ptp(b) == 0:
        return float("nan")
    return float(stats.spearmanr(a, b).statistic)


# How often each of n values is in each of R resamples: whole numbers, 0 where it wasn't drawn. Statistics of all
# resamples at once are a hundred times as fast as one after another.
Weights = Float[np.ndarray, "R n"]


def weighted_mean(values: Real[np.ndarray, "n"], weights: Weights) -> Float[np.ndarray, "R"]:
    """The mean in each resample."""
    return weights @ values / weights.sum(axis=-1)


def midranks(values: Real[np.ndarray, "n"], weights: Weights) -> Float[np.ndarray, "R n"]:
    """Ranks from 1 in each resample, where equal values share the mean of theirs: `scipy.stats.rankdata` of each."""
    _, codes = np.unique(values, return_inverse=True)
    counts = weights @ np.eye(codes.max() + 1)[codes]
    return (np.cumsum(counts, axis=-1) - (counts - 1) / 2)[:, codes]


def partial_correlation(columns: Real[np.ndarray, "k #R n"], weights: Weights) -> Float[np.ndarray, "R"]:
    """Correlation of the first two columns with the others held fixed, in each resample.

    It is the correlation of what is left of the two after a linear regression on the others. With one other, c, it is
    (r_ab - r_ac r_bc) / sqrt((1 - r_ac^2) (1 - r_bc^2)), where r are plain correlations; of ranks it is Spearman's
    partial correlation. With more, S = R_xx - R_xg R_gg^-1 R_gx, the correlations R of a and b (x) less what the others
    (g) explain, gives S_ab / sqrt(S_aa S_bb). See Kim 2015, ppcor, doi:10.5351/CSAM.2015.22.6.665.

    Args:
        columns: k at least 2; with 2 nothing is held fixed. One of the others that never varies explains nothing.

    Returns:
        NaN where one of the two never varies, or the others explain all of it.
    """
    total = weights.sum(axis=-1, keepdims=True)
    centred = columns - (columns * weights).sum(axis=-1, keepdims=True) / total
    covariance = np.einsum("arn,brn->rab", centred * weights, centred)
    variance = np.einsum("raa->ra", covariance)
    varies = variance > NOTHING * (columns**2 * weights).sum(axis=-1).T
    both = varies[:, :, None] & varies[:, None, :]
    r = np.broadcast_to(np.eye(len(columns)), covariance.shape).copy()
    np.divide(covariance, np.sqrt(variance[:, :, None] * variance[:, None, :]), out=r, where=both)
    left = r[:, :2, :2] - r[:, :2, 2:] @ np.linalg.pinv(r[:, 2:, 2:], hermitian=True) @ r[:, 2:, :2]
    unexplained = np.einsum("raa->ra", left)
    defined = both[:, 0, 1] & (unexplained.min(axis=1) > NOTHING)
    scale = np.sqrt(unexplained.prod(axis=1), out=np.ones(len(left)), where=defined)
    return np.where(defined, left[:, 0, 1] / scale, np.nan)
