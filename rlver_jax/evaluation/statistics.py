"""How sure one can be of a mean, and how well two judges agree: statistics with bootstrap intervals."""

import warnings
from collections.abc import Callable, Hashable, Sequence
from typing import Any

import numpy as np
from jaxtyping import Float, Int
from numpy.typing import ArrayLike
from scipy import stats

from rlver_jax.user.emotion import BANDS, HIGHEST, LOWEST, SAGE

RESAMPLES = 10_000
RESAMPLES_OF_AGREEMENT = 2_000  # its correlations cost a hundred times as much as a mean
CONFIDENCE = 0.95
DRAWN_AT_ONCE = 1_000_000  # indices, 8 bytes each
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
    return _correlation(stats.spearmanr, np.asarray(a), np.asarray(b))


def _correlation(of: Callable[..., Any], a: np.ndarray, b: np.ndarray) -> float:
    if len(a) < 2 or np.ptp(a) == 0 or np.ptp(b) == 0:
        return float("nan")
    return float(of(a, b).statistic)


# Of n turns: the emotion before, a judge's own change, the recorded change.
Turns = Int[np.ndarray, "n 3"]


def spearman(turns: Turns) -> float:
    """Rank correlation of the changes."""
    return rank_correlation(turns[:, 1], turns[:, 2])


def pearson(turns: Turns) -> float:
    """Linear correlation of the changes; NaN where one of them never varies."""
    return _correlation(stats.pearsonr, turns[:, 1], turns[:, 2])


def mean_absolute_error(turns: Turns) -> float:
    """Mean |own - recorded| change."""
    return float(np.abs(turns[:, 1] - turns[:, 2]).mean())


def sign_agreement(turns: Turns) -> float:
    """Share of turns in which both rise, fall or stay."""
    return float((np.sign(turns[:, 1]) == np.sign(turns[:, 2])).mean())


def band_agreement(turns: Turns) -> float:
    """Share of turns after which both emotions lie in one band."""
    own, recorded = _bands(turns)
    return float((own == recorded).mean())


def _bands(turns: Turns) -> tuple[np.ndarray, np.ndarray]:
    # Not by SAGE.update: RLVER's logs hold changes beyond ten.
    own, recorded = (SAGE.band(np.clip(turns[:, 0] + turns[:, column], LOWEST, HIGHEST)) for column in (1, 2))
    return own, recorded


STATISTICS: dict[str, Callable[[Turns], float]] = {
    "spearman": spearman,
    "pearson": pearson,
    "mae": mean_absolute_error,
    "sign_agreement": sign_agreement,
    "band_agreement": band_agreement,
}


def agreement(dialogues: Sequence[Turns], profiles: Sequence[Hashable] | None = None) -> dict[str, Any]:
    """All STATISTICS of turns, each with its interval, null where there is none; and the confusion of bands.

    Args:
        dialogues: the turns of each.
        profiles: whose dialogue each is; those of one profile are drawn together. By default all differ.
    """
    turns = np.concatenate(dialogues)
    by_profile: dict[Hashable, list[Turns]] = {}
    for profile, one in zip(profiles or range(len(dialogues)), dialogues, strict=True):
        by_profile.setdefault(profile, []).append(one)
    clusters = [np.concatenate(one) for one in by_profile.values()]
    result: dict[str, Any] = {"n": len(turns), "dialogues": len(dialogues)}
    for name, statistic in STATISTICS.items():
        value = statistic(turns)
        defined = bool(np.isfinite(value))
        interval = _interval_of_turns(clusters, statistic) if defined else None
        result[name] = {"value": value if defined else None, "interval": interval}
    # The same error for a judge that knows nothing but the record's median.
    result["mae_of_the_median"] = float(np.abs(turns[:, 2] - np.median(turns[:, 2])).mean())
    result["mean_change"] = {"own": float(turns[:, 1].mean()), "recorded": float(turns[:, 2].mean())}
    return result | {"band_confusion": band_confusion(*_bands(turns))}


def _interval_of_turns(clusters: Sequence[Turns], statistic: Callable[[Turns], float]) -> Interval:
    def of_drawn(drawn: Int[np.ndarray, "R N"]) -> Float[np.ndarray, "R"]:
        return np.array([statistic(np.concatenate([clusters[i] for i in indices])) for indices in drawn.tolist()])

    return bootstrap_interval(len(clusters), of_drawn, RESAMPLES_OF_AGREEMENT)


def band_confusion(own: np.ndarray, recorded: np.ndarray) -> dict[str, dict[str, int]]:
    """{recorded band: {own band: count}} of indices into BANDS."""
    table = np.zeros((len(BANDS), len(BANDS)), int)
    np.add.at(table, (recorded, own), 1)
    return {band: dict(zip(BANDS, map(int, row), strict=True)) for band, row in zip(BANDS, table, strict=True)}
