"""How well a judge agrees with a record, beside what is reached without a look at the reply.

A dialogue that goes well goes on going well. So the emotion before a reply, and the change before it, predict the next
change: a judge may agree with a record and still be deaf to what it hears. BASELINES say how far that goes; partial
correlations leave it out; and before a first reply there is no such past.
"""

from collections.abc import Callable, Hashable, Iterable, Mapping, Sequence
from typing import Any

import numpy as np
from jaxtyping import Float, Int, Real

from rlver_jax.evaluation.statistics import (
    DRAWN_AT_ONCE,
    Interval,
    Weights,
    bootstrap_interval,
    midranks,
    partial_correlation,
    weighted_mean,
)
from rlver_jax.user.emotion import BANDS, HIGHEST, LOWEST, SAGE

RESAMPLES = 2_000

# Columns of the turns compared: the emotion before, a judge's own change, the recorded change, the recorded change
# before that (0 where there is none), and the number of the turn from 0.
EMOTION, OWN, RECORDED, PREVIOUS, TURN = range(5)
Turns = Real[np.ndarray, "n 5"]
Statistic = Callable[[Turns, Weights], Float[np.ndarray, "R"]]  # its value in each resample


def _rank_correlation(*extra_columns: int) -> Statistic:
    """Spearman's of own and recorded changes with these columns held fixed."""

    def statistic(turns: Turns, weights: Weights) -> Float[np.ndarray, "R"]:
        columns = [midranks(turns[:, column], weights) for column in (OWN, RECORDED, *extra_columns)]
        return partial_correlation(np.stack(columns), weights)

    return statistic


def _correlation(turns: Turns, weights: Weights) -> Float[np.ndarray, "R"]:
    return partial_correlation(turns[:, [OWN, RECORDED]].T[:, None], weights)


def _absolute_error(turns: Turns, weights: Weights) -> Float[np.ndarray, "R"]:
    return weighted_mean(np.abs(turns[:, OWN] - turns[:, RECORDED]), weights)


def _same_sign(turns: Turns, weights: Weights) -> Float[np.ndarray, "R"]:
    return weighted_mean(np.sign(turns[:, OWN]) == np.sign(turns[:, RECORDED]), weights)


def _same_band(turns: Turns, weights: Weights) -> Float[np.ndarray, "R"]:
    own, recorded = _bands(turns)
    return weighted_mean(own == recorded, weights)


def _bands(turns: Turns) -> tuple[np.ndarray, np.ndarray]:
    # Not by SAGE.update: RLVER's logs hold changes beyond ten. Rounded: what a baseline predicts need not be whole.
    after = (np.rint(turns[:, EMOTION] + turns[:, column]).astype(int) for column in (OWN, RECORDED))
    own, recorded = (SAGE.band(np.clip(emotion, LOWEST, HIGHEST)) for emotion in after)
    return own, recorded


STATISTICS: dict[str, Statistic] = {
    "spearman": _rank_correlation(),
    "spearman_given_emotion": _rank_correlation(EMOTION),
    "spearman_given_past": _rank_correlation(EMOTION, PREVIOUS),
    "pearson": _correlation,
    "mae": _absolute_error,  # mean |own - recorded| change
    "sign_agreement": _same_sign,  # share of turns in which both rise, fall or stay
    "band_agreement": _same_band,  # share of turns after which both emotions lie in one band
}


def value_of(statistic: str, turns: Turns) -> float:
    """One of STATISTICS; NaN where it has no value, as a correlation with what never varies."""
    return float(STATISTICS[statistic](turns, np.ones((1, len(turns))))[0])


STATISTICS_OF_PARTS = ("spearman", "spearman_given_emotion", "spearman_given_past", "mae")

# All dialogues of an evaluation begin at one emotion, so that it can't explain what becomes of the first replies.
PARTS: dict[str, Callable[[Turns], np.ndarray]] = {
    "first_replies": lambda turns: turns[:, TURN] == 0,
    "later_replies": lambda turns: turns[:, TURN] > 0,
}


def _line_in_emotion(turns: Turns) -> Float[np.ndarray, "n"]:
    emotion, recorded = turns[:, EMOTION], turns[:, RECORDED]
    slope = np.cov(emotion, recorded)[0, 1] / np.var(emotion, ddof=1) if np.ptp(emotion) else 0.0
    return recorded.mean() + slope * (emotion - emotion.mean())


# What changes are without a look at the reply. Line and median are fitted to the very turns that are compared, so that
# their errors are rather too small than too large.
BASELINES: dict[str, Callable[[Turns], np.ndarray]] = {
    "emotion": _line_in_emotion,
    "previous_change": lambda turns: turns[:, PREVIOUS],
    "constant": lambda turns: np.full(len(turns), np.median(turns[:, RECORDED])),
}


def agreement(dialogues: Sequence[Turns], profiles: Sequence[Hashable] | None = None) -> dict[str, Any]:
    """All STATISTICS of turns, each with its interval, null where there is none; and the confusion of bands.

    Args:
        dialogues: the turns of each.
        profiles: whose dialogue each is; those of one profile are drawn together. By default all differ.

    Returns:
        {STATISTIC: {"value", "interval"}, "n", "dialogues", PART: {"n", STATISTIC_OF_PARTS: …}, "mae_of_the_median",
        "mean_change": {"own", "recorded"}, "band_confusion"}
    """
    turns = np.concatenate(dialogues)
    clusters = _by_profile(dialogues, profiles)
    result: dict[str, Any] = {"n": len(turns), "dialogues": len(dialogues)} | _with_intervals(clusters, STATISTICS)
    for part, of_part in _parts(clusters).items():
        result[part] = {"n": sum(map(len, of_part))} | _with_intervals(of_part, STATISTICS_OF_PARTS)
    # The same error for a judge that knows nothing but the record's median.
    result["mae_of_the_median"] = float(np.abs(turns[:, RECORDED] - np.median(turns[:, RECORDED])).mean())
    result["mean_change"] = {"own": float(turns[:, OWN].mean()), "recorded": float(turns[:, RECORDED].mean())}
    return result | {"band_confusion": band_confusion(*_bands(turns))}


def without_the_reply(dialogues: Sequence[Turns], profiles: Sequence[Hashable] | None = None) -> dict[str, Any]:
    """What BASELINES reach on the same turns, whatever the judge's own changes are there.

    A baseline that says the same everywhere, but for the constant, is no prediction and is left out of a part.

    Args:
        dialogues: see `agreement`.
        profiles: see `agreement`.

    Returns:
        {BASELINE: {STATISTIC: {"value", "interval"}, PART: {"n", STATISTIC_OF_PARTS: …}}}
    """
    clusters = _by_profile(dialogues, profiles)
    result: dict[str, Any] = {}
    for name in BASELINES:
        result[name] = _with_intervals(_predicted(clusters, name), STATISTICS)
        for part, of_part in _parts(clusters).items():
            predicted = _predicted(of_part, name)
            if name == "constant" or np.ptp(np.concatenate(predicted)[:, OWN]):
                result[name][part] = {"n": sum(map(len, of_part))} | _with_intervals(predicted, STATISTICS_OF_PARTS)
    return result


def _by_profile(dialogues: Sequence[Turns], profiles: Sequence[Hashable] | None) -> list[Turns]:
    by_profile: dict[Hashable, list[Turns]] = {}
    for profile, one in zip(profiles or range(len(dialogues)), dialogues, strict=True):
        by_profile.setdefault(profile, []).append(one)
    return [np.concatenate(one) for one in by_profile.values()]


def _parts(clusters: Sequence[Turns]) -> Mapping[str, list[Turns]]:
    """The PARTS that have turns, each by profile."""
    each = {name: [one[chosen(one)] for one in clusters if chosen(one).any()] for name, chosen in PARTS.items()}
    return {name: one for name, one in each.items() if one}


def _predicted(clusters: Sequence[Turns], baseline: str) -> list[Turns]:
    """Turns with a baseline's changes as own ones."""
    turns = np.concatenate(clusters).astype(np.float64)
    turns[:, OWN] = BASELINES[baseline](turns)
    return np.split(turns, np.cumsum([len(one) for one in clusters])[:-1])


def _with_intervals(clusters: Sequence[Turns], names: Iterable[str]) -> dict[str, Any]:
    result = {}
    for name in names:
        value = value_of(name, np.concatenate(clusters))
        defined = bool(np.isfinite(value))
        interval = _interval_of_turns(clusters, STATISTICS[name]) if defined else None
        result[name] = {"value": value if defined else None, "interval": interval}
    return result


def _interval_of_turns(clusters: Sequence[Turns], statistic: Statistic) -> Interval:
    turns = np.concatenate(clusters)
    cluster_of = np.repeat(np.arange(len(clusters)), [len(one) for one in clusters])

    def of_drawn(drawn: Int[np.ndarray, "R N"]) -> Float[np.ndarray, "R"]:
        values = []
        for block in np.array_split(drawn, -(-drawn.shape[0] * len(turns) // DRAWN_AT_ONCE)):
            often = np.apply_along_axis(np.bincount, 1, block, minlength=len(clusters))
            values.append(statistic(turns, often[:, cluster_of].astype(np.float64)))
        return np.concatenate(values)

    return bootstrap_interval(len(clusters), of_drawn, RESAMPLES)


def band_confusion(own: np.ndarray, recorded: np.ndarray) -> dict[str, dict[str, int]]:
    """{recorded band: {own band: count}} of indices into BANDS."""
    table = np.zeros((len(BANDS), len(BANDS)), int)
    np.add.at(table, (recorded, own), 1)
    return {band: dict(zip(BANDS, map(int, row), strict=True)) for band, row in zip(BANDS, table, strict=True)}
