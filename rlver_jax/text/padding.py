"""Rows of tokens as one padded array, in few widths: each new width compiles a new program."""

from collections.abc import Sequence

import numpy as np
from jaxtyping import Int


def round_up(value: int, step: int) -> int:
    """The least multiple of `step` that is not below `value`."""
    return -(-value // step) * step


def longest(rows: Sequence[Sequence[int] | np.ndarray]) -> int:
    """Tokens of the longest row; 0 if there is none."""
    return max(map(len, rows), default=0)


def pad_rows(
    rows: Sequence[Sequence[int] | np.ndarray], width: int, height: int | None = None
) -> tuple[Int[np.ndarray, "B W"], Int[np.ndarray, "B"]]:
    """Rows of tokens as one zero-padded int32 array, and their lengths.

    height: rows of the array, the last ones empty; by default as many as `rows`.

    Raises:
        ValueError: there are more rows than `height`, or one is longer than `width`.
    """
    height = len(rows) if height is None else height
    if len(rows) > height or longest(rows) > width:
        raise ValueError(f"{len(rows)} rows of up to {longest(rows)} tokens don't fit into {height} of {width}")
    tokens, counts = np.zeros((height, width), np.int32), np.zeros(height, np.int32)
    for i, row in enumerate(rows):
        tokens[i, : len(row)], counts[i] = row, len(row)
    return tokens, counts
