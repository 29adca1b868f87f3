"""How sure one can be of an evaluation's score: its spread over repeats, and a bootstrap interval over profiles."""

import statistics
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np

from rlver_jax.dialogues.log import Record
from rlver_jax.evaluation.statistics import CONFIDENCE, RESAMPLES, mean_interval
from rlver_jax.user.emotion import SAGE

_OUTCOMES: dict[str, Callable[[int], float]] = {
    "score": float,
    "success_rate": lambda emotion: float(SAGE.outcome(emotion) == 1),
    "failure_rate": lambda emotion: float(SAGE.outcome(emotion) == -1),
}


def spread(records: Sequence[Record], profiles: int) -> dict[str, Any]:
    """`repeats` and `interval` of a summary; records are those of whole repeats, in the order of their numbers.

    Repeats differ in everything that is drawn, so their standard deviation (of the sample) says what another run of the
    same evaluation may score. The interval says what other profiles of the same kind may score: profiles are drawn
    with replacement, each with all its repeats.

    Args:
        profiles: N, of one repeat; record i is of profile i mod N.

    Returns:
        {"repeats": {"count", "scores", "mean", "std"}, "interval": {"confidence", "resamples", "score": [low, high],
        "success_rate", "failure_rate"}}; std is None with one repeat, an interval None with one profile.
    """
    emotions = [record["emotion"] for record in records]
    means = np.reshape(emotions, (-1, profiles)).mean(axis=1).tolist()
    profile_of = [number % profiles for number in range(len(emotions))]
    return {
        "repeats": {
            "count": len(means),
            "scores": means,
            "mean": statistics.fmean(means),
            "std": statistics.stdev(means) if len(means) > 1 else None,
        },
        "interval": {"confidence": CONFIDENCE, "resamples": RESAMPLES}
        | {name: mean_interval([of(emotion) for emotion in emotions], profile_of) for name, of in _OUTCOMES.items()},
    }


def spread_text(summary: Mapping[str, Any]) -> str:
    """The result of `spread` in parentheses behind a score; empty where there is none."""
    interval, repeats = summary["interval"]["score"], summary["repeats"]
    parts = [f"95 % interval {interval[0]:.2f} to {interval[1]:.2f}"] if interval else []
    if repeats["std"] is not None:
        parts.append(f"standard deviation {repeats['std']:.2f} over {repeats['count']} repeats")
    return f" ({'; '.join(parts)})" if parts else ""
