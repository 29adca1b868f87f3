"""Why a dialogue ends: each reason, their order, and the same answer for host ints, NumPy and JAX."""

import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from rlver_jax.rollout.end_reason import END_REASONS, end_reason
from rlver_jax.user.emotion import EmotionRules

RULES = EmotionRules(initial=50, floor=20, ceiling=80)

# emotion, goodbye, last, violation, fits: the reason
CASES = [
    (50, False, False, False, True, "running"),
    (80, False, False, False, True, "success"),
    (79, False, False, False, True, "running"),
    (20, False, False, False, True, "failure"),
    (21, False, False, False, True, "running"),
    (50, True, False, False, True, "goodbye"),
    (50, False, True, False, True, "turn_limit"),
    (50, False, False, True, True, "format"),
    (50, False, False, False, False, "context"),
    (100, True, True, False, True, "success"),
    (0, True, True, False, True, "failure"),
    (50, True, True, False, True, "goodbye"),
    (100, True, True, True, True, "format"),  # what the user would have felt doesn't count
    (0, True, True, True, False, "context"),  # nor does anything of a turn that was not played
]


@pytest.mark.parametrize(("emotion", "goodbye", "last", "violation", "fits", "reason"), CASES)
def test_a_dialogue_on_the_host(emotion, goodbye, last, violation, fits, reason):
    reason_index = end_reason(emotion, RULES, goodbye=goodbye, last=last, violation=violation, fits=fits)
    assert type(reason_index) is int
    assert END_REASONS[reason_index] == reason


@pytest.mark.parametrize("kind", ["numpy", "jax", "jit"])
def test_many_dialogues_at_once(kind):
    emotion, goodbye, last, violation, fits, _ = map(np.array, zip(*CASES, strict=True))
    args = [emotion.astype(np.int32), goodbye, last, violation, fits]
    if kind != "numpy":
        args = list(map(jnp.asarray, args))
    of = lambda e, g, l, v, f: end_reason(e, RULES, goodbye=g, last=l, violation=v, fits=f)  # noqa: E731, E741
    actual = (jax.jit(of) if kind == "jit" else of)(*args)
    assert isinstance(actual, np.ndarray if kind == "numpy" else jax.Array)
    assert actual.dtype == np.int32
    assert [END_REASONS[reason] for reason in actual] == [case[-1] for case in CASES]


def test_one_condition_may_be_an_array_alone():
    """On the device, the last turn may be one number for all rows."""
    emotion = jnp.array([50, 80], jnp.int32)
    reasons = end_reason(emotion, RULES, goodbye=jnp.array([False, True]), last=True)
    assert [END_REASONS[reason] for reason in reasons] == ["turn_limit", "success"]


def test_all_kinds_agree():
    """Every combination, on the host against NumPy."""
    flags = list(itertools.product([False, True], repeat=4))
    combined = [(emotion, *conditions) for emotion in (0, 20, 21, 50, 79, 80, 100) for conditions in flags]
    of = lambda e, g, l, v, f: end_reason(e, RULES, goodbye=g, last=l, violation=v, fits=f)  # noqa: E731, E741
    columns = [np.array(column) for column in zip(*combined, strict=True)]
    np.testing.assert_array_equal(of(*columns), [of(*case) for case in combined])
