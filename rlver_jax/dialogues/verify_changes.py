"""Compares the change of emotion that a log gives a turn with the readout of the replayed distribution."""

from collections.abc import Sequence
from typing import Any

import jax
import numpy as np

from rlver_jax.dialogues.trajectory import Message
from rlver_jax.dialogues.verify_tokens import TokenReport, Tolerance
from rlver_jax.user.emotion import CHANGES, EmotionRules


def compare_change(
    user: Message, replayed: Sequence[Any], rules: EmotionRules, readout: str, tolerance: Tolerance
) -> TokenReport:
    """Checks that the change is the readout of the user's distribution over the options, clipped to the rules.

    Args:
        user: the reaction in the log.
        replayed: log-probabilities [21] of the options, their readout, and the noise [21] that it was drawn with.
        readout: as in `user.readout`.
    """
    report, change = TokenReport(), user["change"]
    logprobs, own, noise = replayed
    with np.errstate(over="ignore"):  # of a number that no float32 holds
        error = float(np.abs(np.asarray(user["change_logprobs"], np.float32) - logprobs).max())
    if not error <= tolerance.logprob:
        report.faults.append(f"change: logged log-probabilities differ from the recomputed ones by {error:.4g}")
    if rules.clamp(own) == change:
        return report
    same = [option for option in CHANGES if rules.clamp(option) == change]
    if any(is_tie(readout, logprobs + noise, own, option, tolerance.tie) for option in same):
        report.ties.append(f"change: rounding decides between {change:+d} and {rules.clamp(own):+d}")
    else:
        report.faults.append(f"change: logged {change:+d}, but the user's {readout} is {own:+d}")
    return report


def is_tie(readout: str, scores: np.ndarray, replayed: int, logged: int, tie: float) -> bool:
    """Whether `logged` would be the readout of log-probabilities (with noise) within `tie` of the replayed."""
    if readout != "mean":
        return bool(scores[replayed - CHANGES[0]] - scores[logged - CHANGES[0]] <= tie)
    p, values = np.asarray(jax.nn.softmax(scores)), np.array(CHANGES)
    mean = float((p * values).sum())
    reach = tie * float((p * np.abs(values - mean)).sum())  # d mean / d log p(c) = p(c) (c - mean)
    return abs(mean - logged) <= 0.5 + reach
