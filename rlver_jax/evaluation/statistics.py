"""How well two judges agree, and how sure one can be of a mean: figures with bootstrap intervals."""

import warnings
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
from numpy.typing import ArrayLike
from scipy import stats

from rlver_jax.user.emotion import BANDS, HIGHEST, LOWEST, SAGE

RESAMPLES = 2000
CONFIDENCE = 0.95
DRAWN_AT_ONCE = 1_000_000  # indices, 8 bytes each
Interval = list[float] | None


def interval(
    groups: Sequence[np.ndarray], figure: Callable[[np.ndarray], float], resamples: int = RESAMPLES
) -> Interval:
    """Percentile bootstrap interval (95 %) of a figure of rows, which come in groups that are drawn whole.

    Turns of one dialogue resemble each other: dialogues are drawn, not turns, or the interval would be too narrow.

    Args:
        groups: [n_g, C] each, C columns for `figure`, which takes all rows together [n, C].

    Returns:
        [low, high]; None with fewer than two groups, or where hardly any resample has the figure.
    """
    if len(groups) < 2:
        return None

    rows = np.concatenate(groups)
    alone = len(rows) == len(groups)  # groups of one row each, as those of a mean are

    def of_drawn(drawn: np.ndarray) -> float:
        return figure(rows[drawn] if alone else np.concatenate([groups[int(i)] for i in drawn]))

    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # resamples in which a judge never varies have no correlation
        result = stats.bootstrap(
            (np.arange(len(groups)),), of_drawn, n_resamples=resamples, vectorized=False, method="percentile",
            rng=np.random.default_rng(0), batch=max(DRAWN_AT_ONCE // len(groups), 1),
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
        "interval": interval(list(array.reshape(-1, 1, 1)), np.mean),
        "n": len(array),
    }


def rank_correlation(a: ArrayLike, b: ArrayLike) -> float:
    """Spearman's; NaN where one of them never varies."""
    return _correlation(stats.spearmanr, np.asarray(a), np.asarray(b))


def _correlation(of: Callable[..., Any], a: np.ndarray, b: np.ndarray) -> float:
    if len(a) < 2 or np.ptp(a) == 0 or np.ptp(b) == 0:
        return float("nan")
    return float(of(a, b).statistic)


# Figures of turns: rows of the emotion before, a judge's own change, the recorded change.
Rows = np.ndarray  # int [n, 3]


def spearman(rows: Rows) -> float:
    """Rank correlation of the changes."""
    return rank_correlation(rows[:, 1], rows[:, 2])


def pearson(rows: Rows) -> float:
    """Linear correlation of the changes; NaN where one of them never varies."""
    return _correlation(stats.pearsonr, rows[:, 1], rows[:, 2])


def mean_absolute_error(rows: Rows) -> float:
    """Mean |own - recorded| change."""
    return float(np.abs(rows[:, 1] - rows[:, 2]).mean())


def sign_agreement(rows: Rows) -> float:
    """Share of turns in which both rise, fall or stay."""
    return float((np.sign(rows[:, 1]) == np.sign(rows[:, 2])).mean())


def band_agreement(rows: Rows) -> float:
    """Share of turns after which both emotions lie in one band."""
    own, recorded = _bands(rows)
    return float((own == recorded).mean())


def _bands(rows: Rows) -> tuple[np.ndarray, np.ndarray]:
    # Not by SAGE.update: RLVER's logs hold changes beyond ten.
    own, recorded = (SAGE.band(np.clip(rows[:, 0] + rows[:, column], LOWEST, HIGHEST)) for column in (1, 2))
    return own, recorded


FIGURES: dict[str, Callable[[Rows], float]] = {
    "spearman": spearman,
    "pearson": pearson,
    "mae": mean_absolute_error,
    "sign_agreement": sign_agreement,
    "band_agreement": band_agreement,
}


def agreement(groups: Sequence[Rows]) -> dict[str, Any]:
    """All FIGURES of turns, each with its interval, null where there is none; and the confusion of bands.

    Args:
        groups: int [n_g, 3] of each dialogue: emotion before, own change, recorded change.
    """
    rows = np.concatenate(groups)
    found: dict[str, Any] = {"n": len(rows), "dialogues": len(groups)}
    for name, figure in FIGURES.items():
        value = figure(rows)
        defined = bool(np.isfinite(value))
        found[name] = {"value": value if defined else None, "interval": interval(groups, figure) if defined else None}
    # The same error for a judge that knows nothing but the record's median.
    found["mae_of_the_median"] = float(np.abs(rows[:, 2] - np.median(rows[:, 2])).mean())
    found["mean_change"] = {"own": float(rows[:, 1].mean()), "recorded": float(rows[:, 2].mean())}
    return found | {"band_confusion": band_confusion(*_bands(rows))}


def band_confusion(own: np.ndarray, recorded: np.ndarray) -> dict[str, dict[str, int]]:
    """{recorded band: {own band: count}} of indices into BANDS."""
    table = np.zeros((len(BANDS), len(BANDS)), int)
    np.add.at(table, (recorded, own), 1)
    return {band: dict(zip(BANDS, map(int, row), strict=True)) for band, row in zip(BANDS, table, strict=True)}
