"""Which profiles are held out: hashes by another program, the size of a share, and shares that nest."""

import numpy as np
import pytest

from rlver_jax.profiles.held_out import choose_held_out, held_out

# `printf a | sha256sum` begins with ca978112ca1bbdca, and so on.
BY_SHA256SUM = {"a": "ca978112ca1bbdca", "b": "3e23e8160039594a", "c": "2e7d2c03a9507ae2", "甲": "33e3580c093111e1"}
MANY = [f"profile-{i}" for i in range(5_000)]


@pytest.mark.parametrize(("profile", "digits"), BY_SHA256SUM.items())
def test_the_rule_is_one_that_any_program_can_follow(profile, digits):
    fraction = int(digits, 16) / 2**64
    assert held_out(profile, fraction + 1e-9)
    assert not held_out(profile, fraction - 1e-9)


@pytest.mark.parametrize("share", [0.05, 0.3, 0.7])
def test_a_share_is_about_as_large_as_it_says(share):
    deviation = np.sqrt(share * (1 - share) / len(MANY))
    assert abs(np.mean([held_out(one, share) for one in MANY]) - share) < 4 * deviation


def test_a_smaller_share_is_part_of_a_larger_one():
    small, large = ({one for one in MANY if held_out(one, share)} for share in (0.1, 0.3))
    assert small < large


def test_no_one_and_all():
    assert not any(held_out(one, 0) for one in MANY)
    assert all(held_out(one, 1) for one in MANY)


@pytest.mark.parametrize("share", [-0.1, 1.1, 30, float("nan")])
def test_a_share_that_is_none_is_refused(share):
    with pytest.raises(ValueError, match="expected a number from 0 to 1"):
        held_out("a", share)


def test_of_a_few_there_are_some_on_either_side():
    """By the hashes above `b` is at 0.24, `c` at 0.18, `甲` at 0.20, `a` at 0.79 of the range."""
    few = ["a", "b", "c", "甲"]
    assert choose_held_out(few, 0.5) == {"c", "甲"}
    assert choose_held_out(few, 0.7) == {"b", "c", "甲"}
    assert choose_held_out(few, 0.1) == {"c"}, "none would be"
    assert choose_held_out(few, 0.9) == {"b", "c", "甲"}, "all would be"
    with pytest.raises(ValueError, match="expected a number from 0 to 1"):
        choose_held_out(few, 1.5)
    assert choose_held_out(["a"], 0.1) == choose_held_out(few, 0.0) == set()
    assert choose_held_out(few, 1.0) == set(few)
