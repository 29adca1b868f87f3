"""Rows of tokens as one array."""

import pytest

from rlver_jax.text.padding import longest, pad_rows, round_up


def test_rounding_up():
    assert [round_up(n, 32) for n in (0, 1, 31, 32, 33)] == [0, 32, 32, 32, 64]


def test_rows_become_a_rectangle():
    tokens, counts = pad_rows([[5, 6, 7], [], [8]], 4, 5)
    assert tokens.tolist() == [[5, 6, 7, 0], [0, 0, 0, 0], [8, 0, 0, 0], [0, 0, 0, 0], [0, 0, 0, 0]]
    assert counts.tolist() == [3, 0, 1, 0, 0]
    assert (tokens.dtype, counts.dtype) == ("int32", "int32")
    assert pad_rows([], 4)[0].shape == (0, 4)
    assert longest([[5, 6, 7], []]) == 3
    assert longest([]) == 0


@pytest.mark.parametrize(("rows", "height"), [([[1, 2, 3]], None), ([[1], [2]], 1)])
def test_what_does_not_fit_is_refused(rows, height):
    """Nothing is cut silently."""
    with pytest.raises(ValueError, match="don't fit into"):
        pad_rows(rows, 2, height)
