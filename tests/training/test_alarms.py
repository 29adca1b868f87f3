"""Each limit stops a run at the figure beyond it, and at nothing else."""

import pytest

from rlver_jax.training.alarms import check

LIMITS = {
    "readable_min": 0.5, "reply_tokens_min": 2.0, "reply_tokens_max": 100.0, "entropy_min": 0.1, "entropy_max": 8.0,
    "ratio_max": 50.0, "kl_max": 1.0, "change_entropy_min": 0.2, "change_at_limit_max": 0.9, "unreadable_max": 0.5,
}  # fmt: skip
GOOD = {
    "reply/readable_share": 0.5, "reply/tokens_mean": 20.0, "policy/entropy": 3.0, "policy/ratio_max": 50.0,
    "policy/update_kl": 0.2, "emotion/change_entropy": 2.0, "emotion/change_at_limit_share": 0.1,
    "dialogue/end_unreadable": 0.5,
}  # fmt: skip


def test_within_its_limits_nothing_is_said():
    assert check(GOOD, LIMITS, 3) is None
    assert check({}, LIMITS, 3) is None, "a batch without replies has no such figures"


@pytest.mark.parametrize(
    ("name", "value", "field", "side"),
    [
        ("reply/readable_share", 0.49, "readable_min", "below"),
        ("reply/tokens_mean", 1.5, "reply_tokens_min", "below"),
        ("reply/tokens_mean", 100.5, "reply_tokens_max", "above"),
        ("policy/entropy", 0.05, "entropy_min", "below"),
        ("policy/entropy", 8.5, "entropy_max", "above"),
        ("policy/ratio_max", 51.0, "ratio_max", "above"),
        ("policy/update_kl", 1.5, "kl_max", "above"),
        ("emotion/change_entropy", 0.1, "change_entropy_min", "below"),
        ("emotion/change_at_limit_share", 0.95, "change_at_limit_max", "above"),
        ("dialogue/end_unreadable", 0.6, "unreadable_max", "above"),
    ],
)
def test_each_limit(name, value, field, side):
    text = check(GOOD | {name: value}, LIMITS, 7)
    assert text.startswith(f"step 7: {name} is {value:.4g}, {side} alarms.{field}=")
    assert ("train.learning_rate" if name.startswith(("reply/", "policy/")) else "Look at the user's answers") in text


@pytest.mark.parametrize("name", GOOD)
def test_a_figure_that_is_no_number_is_a_breach(name):
    assert f"{name} is nan" in check(GOOD | {name: float("nan")}, LIMITS, 1)


def test_an_upper_limit_of_zero_is_none():
    assert check(GOOD | {"reply/tokens_mean": 1e6}, LIMITS | {"reply_tokens_max": 0.0}, 1) is None
