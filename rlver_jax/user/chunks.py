"""A packed dialogue cut in chunks of one width, to be read one after the other by one compiled program.

Between two chunks the cache forgets what no later token sees: the reasoning of the turns that have ended.
"""

import itertools
from collections.abc import Iterator, Sequence
from typing import NamedTuple

from rlver_jax.models.attention import BRANCH_RADIX
from rlver_jax.user.packed import Choice, Packed, Query

WIDTHS = range(256, 513, 32)  # of a chunk, in tokens: enough for the weights' products


class Chunk(NamedTuple):
    """Tokens that are read together, and what to hold against the user there (`place` and `choices`: in the chunk)."""

    keep: list[int]  # slots of the cache, as the chunk before left it, that stay, moved together to its front
    held: list[int]  # their branches
    tokens: list[int]
    positions: list[int]
    branch: list[int]
    queries: list[Query]
    choices: list[Choice]


def cuts(packed: Packed, width: int) -> list[int]:
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


def chunks_of(packed: Packed, width: int) -> Iterator[Chunk]:
    """The chunks of a dialogue. Those that end within its prefix are the same for every dialogue with that prefix."""
    queries, choices = iter(packed.queries), iter(packed.choices)
    query, choice = next(queries, None), next(choices, None)
    keep, held = list[int](), list[int]()
    ends = cuts(packed, width)
    for start, stop in itertools.pairwise(ends):
        asked, chosen = list[Query](), list[Choice]()
        while query and query.place < stop:
            asked.append(query._replace(place=query.place - start))
            query = next(queries, None)
        while choice and choice.end <= stop:
            chosen.append(choice.moved(-start))
            choice = next(choices, None)
        own = slice(start, stop)
        yield Chunk(keep, held, packed.tokens[own], packed.positions[own], packed.branch[own], asked, chosen)
        slots = held + packed.branch[own]
        seen = {0, _trunk(packed.branch[stop]) if stop < ends[-1] else 0}
        keep = [slot for slot, branch in enumerate(slots) if branch in seen]
        held = [slots[slot] for slot in keep]


def _trunk(branch: int) -> int:
    """The branch that a twig belongs to."""
    return branch - branch % BRANCH_RADIX


class Sizes(NamedTuple):
    """What chunks of a log are padded to, so that one program reads them all."""

    width: int  # tokens of a chunk
    capacity: int  # slots of a cache
    choices: int  # of a chunk

    @classmethod
    def of(cls, dialogues: Sequence[Packed]) -> "Sizes":
        """The width that leaves the least padding for these dialogues, the largest of equal ones, and what it needs."""
        prefixes = dict.fromkeys(tuple(packed.tokens[: packed.prefix]) for packed in dialogues)

        def places(width: int) -> int:
            """Of all chunks, those of a prefix once."""
            whole = sum(len(prefix) // width for prefix in prefixes)
            return width * (whole + sum(len(cuts(one, width)) - 1 - one.prefix // width for one in dialogues))

        width = min(reversed(WIDTHS), key=places)
        chunks = [chunk for packed in dialogues for chunk in chunks_of(packed, width)]
        capacity = max((len(chunk.keep) for chunk in chunks), default=0) + width
        return cls(width, capacity, max((len(chunk.choices) for chunk in chunks), default=0))
