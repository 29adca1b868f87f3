"""A packed dialogue cut into chunks of one width, which one compiled program prefills one after the other.

Between two chunks the KV cache drops what no later token sees: the reasoning of the turns that have ended.
"""

import itertools
from collections.abc import Iterator, Sequence
from typing import NamedTuple

import numpy as np
from jaxtyping import Int

from rlver_jax.decoding.replay_sequence import Choice, Query, ReplaySequence
from rlver_jax.models.attention import BRANCH_RADIX

WIDTHS = range(192, 513, 32)  # of a chunk, in tokens: enough for the weights' products
_PREVIOUS, _END = Query._fields.index("previous"), Choice._fields.index("end")  # columns by which entries are in order
_INDICES, _BOUNDS = np.isin(Query._fields, "previous"), np.isin(Choice._fields, ("first", "end"))  # that hold indices


class Chunk(NamedTuple):
    """Tokens that are prefilled together, and the queries and choices among them, with indices into the chunk."""

    retained: Int[np.ndarray, "K"]  # slots of the cache after the chunk before that stay, moved to its front
    held: Int[np.ndarray, "K"]  # their branches
    rows: Int[np.ndarray, "3 N"]  # tokens, positions and branches
    queries: Int[np.ndarray, "Q 8"]  # a `Query` each
    choices: Int[np.ndarray, "C 3"]  # a `Choice` each


def cuts(sequence: ReplaySequence, width: int) -> list[int]:
    """Where chunks of at most `width` tokens begin, and the end: a choice lies in one chunk, with the token before it.

    Raises:
        ValueError: a choice is longer than `width`.
    """
    choices, starts, total = iter(sequence.choices), [0], len(sequence.tokens)
    choice = next(choices, None)
    while starts[-1] < total:
        stop = min(starts[-1] + width, total)
        while choice and choice.end <= stop:
            choice = next(choices, None)
        if choice and choice.first - 1 < stop:
            stop = choice.first - 1
            if stop == starts[-1]:
                raise ValueError(f"a choice takes {choice.end - stop} tokens, but a chunk has {width}")
        starts.append(stop)
    return starts


def chunks_of(sequence: ReplaySequence, width: int) -> Iterator[Chunk]:
    """The chunks of a dialogue. Those that end within its prefix are the same for every dialogue with that prefix."""
    rows = np.array([sequence.tokens, sequence.positions, sequence.branch], np.int32)
    queries, choices = _table(sequence.queries, Query), _table(sequence.choices, Choice)
    slots = np.zeros(0, np.int32)  # index in the sequence of each slot of the cache
    for start, stop in itertools.pairwise(cuts(sequence, width)):
        visible = _visible(rows[2], start)
        chunk_queries = queries[slice(*np.searchsorted(queries[:, _PREVIOUS], (start, stop)))] - start * _INDICES
        chunk_choices = (
            choices[slice(*np.searchsorted(choices[:, _END], (start, stop), side="right"))] - start * _BOUNDS
        )
        yield Chunk(
            np.searchsorted(slots, visible), rows[2, visible], rows[:, start:stop], chunk_queries, chunk_choices
        )
        slots = np.concatenate([visible, np.arange(start, stop)])


def _table(entries: Sequence[tuple[int, ...]], kind: type[Query] | type[Choice]) -> Int[np.ndarray, "n F"]:
    return np.array(entries, np.int32).reshape(-1, len(kind._fields))


def _visible(branch: Int[np.ndarray, "N"], start: int) -> Int[np.ndarray, "K"]:
    """Indices before `start` that a later token may see: messages, and the reasoning of the turn under way."""
    trunk = branch[start] - branch[start] % BRANCH_RADIX
    return np.flatnonzero((branch[:start] == 0) | (branch[:start] == trunk))


class Sizes(NamedTuple):
    """What chunks of a log are padded to, so that one program reads them all."""

    width: int  # tokens of a chunk
    capacity: int  # slots of a cache
    choices: int  # of a chunk

    @classmethod
    def of(cls, dialogues: Sequence[ReplaySequence]) -> "Sizes":
        """The width that leaves the least padding for these dialogues, the largest of equal ones, and what it needs."""
        prefixes = dict.fromkeys(tuple(sequence.tokens[: sequence.shared]) for sequence in dialogues)

        def positions(width: int) -> int:
            """Of all chunks, those of a prefix once."""
            whole = sum(len(prefix) // width for prefix in prefixes)
            return width * (whole + sum(len(cuts(one, width)) - 1 - one.shared // width for one in dialogues))

        width = min(reversed(WIDTHS), key=positions)
        cached, choices = [0], [0]
        for sequence in dialogues:
            starts, branch = cuts(sequence, width), np.array(sequence.branch)
            cached += [len(_visible(branch, start)) for start in starts[:-1]]
            ends = [choice.end for choice in sequence.choices]
            choices += np.diff(np.searchsorted(ends, starts, side="right")).tolist()
        return cls(width, max(cached) + width, max(choices))
