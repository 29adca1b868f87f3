"""A packed dialogue cut in chunks of one width, to be read one after the other by one compiled program.

Between two chunks the cache forgets what no later token sees: the reasoning of the turns that have ended.
"""

import itertools
from collections.abc import Iterator, Sequence
from typing import NamedTuple

import numpy as np
from jaxtyping import Int

from rlver_jax.decoding.replay_sequence import Choice, Query, ReplaySequence
from rlver_jax.models.attention import BRANCH_RADIX

WIDTHS = range(192, 513, 32)  # of a chunk, in tokens: enough for the weights' products
_PLACE, _END = Query._fields.index("place"), Choice._fields.index("end")  # columns by which entries are in order
_PLACES, _BOUNDS = np.isin(Query._fields, "place"), np.isin(Choice._fields, ("first", "end"))  # that hold indices


class Chunk(NamedTuple):
    """Tokens that are read together, and what to hold against the model there, with indices into them."""

    keep: Int[np.ndarray, "K"]  # slots of the cache, as the chunk before left it, that stay, moved to its front
    held: Int[np.ndarray, "K"]  # their branches
    rows: Int[np.ndarray, "3 N"]  # tokens, positions and branches
    queries: Int[np.ndarray, "Q 8"]  # a `Query` each
    choices: Int[np.ndarray, "C 3"]  # a `Choice` each


def cuts(packed: ReplaySequence, width: int) -> list[int]:
    """Where chunks of at most `width` tokens begin, and the end: a choice lies in one chunk, with the token before it.

    Raises:
        ValueError: a choice is longer than `width`.
    """
    choices, found, total = iter(packed.choices), [0], len(packed.tokens)
    choice = next(choices, None)
    while found[-1] < total:
        stop = min(found[-1] + width, total)
        while choice and choice.end <= stop:
            choice = next(choices, None)
        if choice and choice.first - 1 < stop:
            stop = choice.first - 1
            if stop == found[-1]:
                raise ValueError(f"a choice takes {choice.end - stop} tokens, but a chunk has {width}")
        found.append(stop)
    return found


def chunks_of(packed: ReplaySequence, width: int) -> Iterator[Chunk]:
    """The chunks of a dialogue. Those that end within its prefix are the same for every dialogue with that prefix."""
    rows = np.array([packed.tokens, packed.positions, packed.branch], np.int32)
    queries, choices = _table(packed.queries, Query), _table(packed.choices, Choice)
    slots = np.zeros(0, np.int32)  # the place of what lies in each slot of the cache
    for start, stop in itertools.pairwise(cuts(packed, width)):
        kept = _kept(rows[2], start)
        asked = queries[slice(*np.searchsorted(queries[:, _PLACE], (start, stop)))] - start * _PLACES
        chosen = choices[slice(*np.searchsorted(choices[:, _END], (start, stop), side="right"))] - start * _BOUNDS
        yield Chunk(np.searchsorted(slots, kept), rows[2, kept], rows[:, start:stop], asked, chosen)
        slots = np.concatenate([kept, np.arange(start, stop)])


def _table(entries: Sequence[tuple[int, ...]], kind: type[Query] | type[Choice]) -> Int[np.ndarray, "n F"]:
    return np.array(entries, np.int32).reshape(-1, len(kind._fields))


def _kept(branch: Int[np.ndarray, "N"], start: int) -> Int[np.ndarray, "K"]:
    """Places before `start` that a token from there on may see: messages, and the reasoning that still goes on."""
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
        prefixes = dict.fromkeys(tuple(packed.tokens[: packed.shared]) for packed in dialogues)

        def places(width: int) -> int:
            """Of all chunks, those of a prefix once."""
            whole = sum(len(prefix) // width for prefix in prefixes)
            return width * (whole + sum(len(cuts(one, width)) - 1 - one.shared // width for one in dialogues))

        width = min(reversed(WIDTHS), key=places)
        kept, choices = [0], [0]
        for packed in dialogues:
            found, branch = cuts(packed, width), np.array(packed.branch)
            kept += [len(_kept(branch, start)) for start in found[:-1]]
            ends = [choice.end for choice in packed.choices]
            choices += np.diff(np.searchsorted(ends, found, side="right")).tolist()
        return cls(width, max(kept) + width, max(choices))
