"""Why a dialogue ends: one rule for the device's arrays, for a dialogue on the host, and for the check of a log."""

from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from rlver_jax.user.emotion import EmotionRules

END_REASONS = ("running", "success", "failure", "goodbye", "turn_limit", "format", "context")  # numbered from 0
RUNNING, SUCCESS, FAILURE, GOODBYE, TURN_LIMIT, FORMAT, CONTEXT = range(7)


def end_reason(
    emotion: Any, rules: EmotionRules, *, goodbye: Any, last: Any, violation: Any = False, fits: Any = True
) -> Any:
    """The index into END_REASONS with which a turn ends its dialogue; RUNNING if it goes on.

    Of several reasons the first counts: the turn had no room in the context; the policy broke the think format; the
    emotion reached the ceiling; it fell to the floor; the user took leave; it was the last turn.

    Args:
        emotion: after the turn. It and the conditions are Python's, NumPy's or JAX's; arrays broadcast.
        goodbye: whether the user's reply takes leave.
        last: whether it was the last turn that a dialogue may have.
        violation: whether the policy broke the think format; no reaction counts then.
        fits: whether the turn had room in both contexts; else it was not played.

    Returns:
        A Python int if everything is Python's, else int32 of the same kind.
    """
    conditions = (
        (rules.succeeded(emotion), SUCCESS),
        (rules.failed(emotion), FAILURE),
        (goodbye, GOODBYE),
        (last, TURN_LIMIT),
    )
    return _first(((_not(fits), CONTEXT), (violation, FORMAT), *conditions))


def _first(conditions: Sequence[tuple[Any, int]]) -> Any:
    """The reason of the first condition that holds, RUNNING if none does; elementwise for arrays."""

    def any_of(*kinds: type) -> bool:
        return any(isinstance(holds, kinds) for holds, _ in conditions)

    if not any_of(jax.Array, np.ndarray, np.generic):
        return next((reason for holds, reason in conditions if holds), RUNNING)
    where = jnp.where if any_of(jax.Array) else np.where
    reason: Any = np.int32(RUNNING)
    for holds, name in reversed(conditions):
        reason = where(holds, np.int32(name), reason)
    return reason


def _not(condition: Any) -> Any:
    return not condition if isinstance(condition, bool) else ~condition
