"""How well a user that is being fitted agrees with the logged one."""

import numpy as np
from jaxtyping import Float, Num
from scipy.special import softmax

from rlver_jax.evaluation.statistics import rank_correlation
from rlver_jax.user.emotion import CHANGES


def expected_change(logprobs: Float[np.ndarray, "*n 21"]) -> Float[np.ndarray, " *n"]:
    """The mean over the options, not rounded: sum_c c p(c), with p normalized over them."""
    return softmax(np.asarray(logprobs, np.float64), axis=-1) @ np.array(CHANGES, np.float64)


def change_agreement(predicted: Num[np.ndarray, " n"], logged: Num[np.ndarray, " n"]) -> dict[str, float]:
    """`spearman`, the rank correlation (NaN where one of them never varies), and `mae`, the mean absolute error."""
    return {
        "spearman": rank_correlation(predicted, logged),
        "mae": float(np.abs(np.asarray(predicted, np.float64) - logged).mean()),
    }
