"""How well two judges agree, and how sure one can be of a mean: figures with bootstrap intervals."""

import warnings
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
from scipy import stats

from rlver_jax.user.emotion import BANDS, SAGE

RESAMPLES = 2000
CONFIDENCE = 0.95
Interval = list[float] | None


def interval(
    groups: Sequence[np.ndarray], figure: Callable[[np.ndarray], float], resamples: int = RESAMPLES
) -> Interval:
    """Percentile bootstrap interval (95 %) of a figure of rows, which come in groups that are drawn whole.

    Turns of one dialogue resemble each other: dialogues are drawn, not turns, or the interval would be too narrow.

    Args:
        groups: float [n_g, C] each, C columns for `figure`, which takes all rows together [n, C].

    Returns:
        [low, high]; None with fewer than two groups, or where hardly any resample has the figure.
    """
    if len(groups) < 2:
        return None

    def of_drawn(drawn: np.ndarray) -> float:
        return figure(np.concatenate([groups[int(i)] for i in drawn]))

    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # resamples in which a judge never varies have no correlation
        result = stats.bootstrap(
            (np.arange(len(groups)),), of_drawn, n_resamples=resamples, vectorized=False, method="percentile",
            rng=np.random.default_rng(0),
        )  # fmt: skip
    values = result.bootstrap_distribution
    values = values[np.isfinite(values)]
    if len(values) < 0.9 * resamples:
        return None
    edge = 100 * (1 - CONFIDENCE) / 2
    return [float(x) for x in np.percentile(values, [edge, 100 - edge])]


def mean_with_interval(values: Sequence[float]) -> dict[str, Any]:
    """`mean`, `std` (of the sample) and the mean's `interval` of values that don't depend on each other."""
    array = np.asarray(values, np.float64)
    return {
        "mean": float(array.mean()),
        "std": float(array.std(ddof=1)) if len(array) > 1 else None,
        "interval": interval(list(array.reshape(-1, 1, 1)), np.mean),  # type: ignore[arg-type]
        "n": len(array),
    }


def spearman(pairs: np.ndarray) -> float:
    """Rank correlation of two columns; NaN where one of them never varies."""
    return _correlation(stats.spearmanr, pairs)


def pearson(pairs: np.ndarray) -> float:
    """Linear correlation of two columns; NaN where one of them never varies."""
    return _correlation(stats.pearsonr, pairs)


def _correlation(of: Callable[..., Any], pairs: np.ndarray) -> float:
    if len(pairs) < 2 or (pairs == pairs[0]).all(axis=0).any():
        return float("nan")
    return float(of(pairs[:, 0], pairs[:, 1]).statistic)


def mean_absolute_error(pairs: np.ndarray) -> float:
    """Mean |a - b| of two columns."""
    return float(np.abs(pairs[:, 0] - pairs[:, 1]).mean())


def sign_agreement(pairs: np.ndarray) -> float:
    """Share of rows whose two numbers rise, fall or stay alike."""
    return float((np.sign(pairs[:, 0]) == np.sign(pairs[:, 1])).mean())


FIGURES: dict[str, Callable[[np.ndarray], float]] = {
    "spearman": spearman,
    "pearson": pearson,
    "mae": mean_absolute_error,
    "sign_agreement": sign_agreement,
}


def agreement(groups: Sequence[np.ndarray]) -> dict[str, Any]:
    """All FIGURES of (own change, recorded change) pairs, each with its interval; null where there is none.

    Args:
        groups: [n_g, 2] of each dialogue.
    """
    pairs = np.concatenate(groups)
    found: dict[str, Any] = {"n": len(pairs), "dialogues": len(groups)}
    for name, figure in FIGURES.items():
        value = figure(pairs)
        defined = bool(np.isfinite(value))
        found[name] = {"value": value if defined else None, "interval": interval(groups, figure) if defined else None}
    # The same error for a judge that knows nothing but the record's median.
    found["mae_of_the_median"] = float(np.abs(pairs[:, 1] - np.median(pairs[:, 1])).mean())
    return found | {"mean_change": {"own": float(pairs[:, 0].mean()), "recorded": float(pairs[:, 1].mean())}}


def band_confusion(own: Sequence[int], recorded: Sequence[int]) -> dict[str, dict[str, int]]:
    """{recorded band: {own band: count}} of emotions after a turn, by SAGE's borders."""
    table = np.zeros((len(BANDS), len(BANDS)), int)
    np.add.at(table, (SAGE.band(np.asarray(recorded, np.int64)), SAGE.band(np.asarray(own, np.int64))), 1)
    return {band: dict(zip(BANDS, map(int, row), strict=True)) for band, row in zip(BANDS, table, strict=True)}
