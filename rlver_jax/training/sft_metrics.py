"""How well a user that is being fitted agrees with the logged one."""

import numpy as np
from jaxtyping import Float, Num
from scipy.special import softmax

from rlver_jax.evaluation.statistics import midranks, partial_correlation, rank_correlation
from rlver_jax.user.emotion import CHANGES


def expected_change(logprobs: Float[np.ndarray, "*n 21"]) -> Float[np.ndarray, " *n"]:
    """The mean over the options, not rounded: sum_c c p(c), with p normalized over them."""
    return softmax(np.asarray(logprobs, np.float64), axis=-1) @ np.array(CHANGES, np.float64)


def change_agreement(
    predicted: Num[np.ndarray, " n"],
    logged: Num[np.ndarray, " n"],
    emotion: Num[np.ndarray, " n"],
    reply: Num[np.ndarray, " n"],
) -> dict[str, float]:
    """How well changes are predicted; of the correlations those that need the reply are partial and first_replies.

    Args:
        predicted, logged: changes.
        emotion: before each of them.
        reply: number of the reply that each of them is about, from 0.

    Returns:
        `spearman`, the rank correlation; `partial_spearman`, that with the ranks of the emotion held fixed;
        `first_replies_spearman`, that of first replies; `mae`, the mean absolute error. Correlations are NaN where the
        changes of one side never vary.
    """
    ones, first = np.ones((1, len(logged))), reply == 0
    ranks = np.stack([midranks(column, ones) for column in (predicted, logged, emotion)])
    return {
        "spearman": rank_correlation(predicted, logged),
        "partial_spearman": float(partial_correlation(ranks, ones)[0]),
        "first_replies_spearman": rank_correlation(predicted[first], logged[first]),
        "mae": float(np.abs(np.asarray(predicted, np.float64) - logged).mean()),
    }
