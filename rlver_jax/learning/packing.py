"""Sequence packing: which row holds which dialogues, and arrays moved from one dialogue a row to shared rows and back.

What is computed of a dialogue alone (rewards, advantages, weights in the loss) stays as `build_sequences` makes it,
[N, L], one dialogue a row. Models read shared rows, [reads, width, L]: `width` rows at a time, one for each device that
rows are spread over, as often as dialogues need. Dialogues in a row follow each other, see nothing of each other and
count their positions from 0. How many reads there are is data: another batch compiles nothing.
"""

import dataclasses
from collections.abc import Sequence
from typing import Any

import flax.struct
import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Int

from rlver_jax.learning.sequences import PackedBatch
from rlver_jax.parallel import rules
from rlver_jax.text.padding import round_up

LENGTH_STEP = 64  # packed rows are multiples of it


@flax.struct.dataclass
class RowAssignment:
    """Where N dialogues lie: each in row r % width of read r // width, from `start` on; NumPy arrays on the host."""

    row: Any  # int32 [*u, N]
    start: Any  # int32 [*u, N]
    microbatches: Any  # int32 [*u], those that hold any dialogue


@flax.struct.dataclass
class PackingPlan:
    """Row assignments of all B dialogues of a batch, and of those of each of its U updates.

    Where the number of updates is data (`train.turns_per_update`), `updates` is [U, B], of as many updates as there
    may be: `members` says which dialogues are an update's, and the first `count` updates have any.
    """

    whole: RowAssignment
    updates: RowAssignment  # [U, B / minibatches]
    members: Any = None  # bool [U, B]
    count: Any = None  # int32 []


@flax.struct.dataclass
class SharedRows(PackedBatch):
    """Rows that dialogues share; `count` holds the tokens of all of a row's."""

    segment: Int[Array, "B L"]  # position at which the dialogue of a token begins; of padding, the first of padding


def plan_packing(
    lengths: np.ndarray, minibatches: np.ndarray, ladder: Sequence[int], width: int, most: float
) -> tuple[int, PackingPlan]:
    """How to read a batch, on the host: in the shortest rows with little padding, since long ones cost attention.

    Args:
        lengths: [B] tokens of the dialogues.
        minibatches: [U, N] dialogues of each update.
        ladder: lengths of rows that may be compiled, rising; the last one holds the longest dialogue.
        width: rows read at a time.
        most: share of padding in the rows of all updates that is little; where no length has less, the least it is.

    Returns:
        The length of rows, and the assignments of dialogues to them.

    Raises:
        ValueError: a dialogue is longer than any row.
    """
    length, updates = _choose_length(lengths, list(minibatches), ladder, width, most)
    return length, PackingPlan(assign_rows(lengths, length, width), jax.tree.map(lambda *x: np.stack(x), *updates))


def plan_turns(
    lengths: np.ndarray, minibatches: Sequence[np.ndarray], number: int, ladder: Sequence[int], width: int, most: float
) -> tuple[int, PackingPlan]:
    """As `plan_packing`, with updates of as many dialogues as each minibatch has, for a program of `number` updates.

    Raises:
        ValueError: as `plan_packing`; or there are more updates than that.
    """
    if len(minibatches) > number:
        raise ValueError(f"{len(minibatches)} updates, but the step is compiled for {number}")
    length, assignments = _choose_length(lengths, minibatches, ladder, width, most)
    shape = (number, len(lengths))
    row, start = np.zeros(shape, np.int32), np.zeros(shape, np.int32)
    microbatches, members = np.zeros(number, np.int32), np.zeros(shape, bool)
    for i, (dialogues, assignment) in enumerate(zip(minibatches, assignments, strict=True)):
        row[i, dialogues], start[i, dialogues] = assignment.row, assignment.start
        microbatches[i], members[i, dialogues] = assignment.microbatches, True
    updates = RowAssignment(row, start, microbatches)
    return length, PackingPlan(assign_rows(lengths, length, width), updates, members, np.int32(len(minibatches)))


def group_by_turns(turns: np.ndarray, per_update: int) -> list[np.ndarray]:
    """Dialogues in their order, cut into updates of about `per_update` turns: each where its first turn falls.

    One without turns makes no update of its own.
    """
    update = (np.cumsum(turns) - turns) // per_update
    update = np.minimum(update, update[turns > 0].max(initial=0))
    return [np.flatnonzero(update == i) for i in np.unique(update)]


def _choose_length(
    lengths: np.ndarray, minibatches: Sequence[np.ndarray], ladder: Sequence[int], width: int, most: float
) -> tuple[int, list[RowAssignment]]:
    """The length of rows, and the assignment of each update's dialogues to them."""
    if lengths.max() > ladder[-1]:
        raise ValueError(f"a dialogue has {lengths.max()} tokens, but rows have at most {ladder[-1]}")
    tokens = sum(int(lengths[order].sum()) for order in minibatches)
    best: tuple[float, int, list[RowAssignment]] | None = None
    for length in ladder:
        if length < lengths.max():
            continue
        updates = [assign_rows(lengths[order], length, width) for order in minibatches]
        padding = 1 - tokens / (sum(int(assignment.microbatches) for assignment in updates) * width * length)
        if best is None or padding < best[0]:
            best = (padding, length, updates)
        if padding <= most:
            break
    assert best is not None
    return best[1:]


def length_ladder(longest: int, buckets: int) -> tuple[int, ...]:
    """Lengths of rows that may be compiled, rising, `buckets` an octave at most; the last holds `longest` tokens."""
    up = lambda x: round_up(x, LENGTH_STEP)  # noqa: E731
    lengths = [LENGTH_STEP]
    while lengths[-1] < longest:
        octave = 1 << (lengths[-1].bit_length() - 1)
        lengths.append(min(lengths[-1] + up(-(-octave // buckets)), up(longest)))
    return tuple(lengths)


def assign_rows(lengths: np.ndarray, length: int, width: int) -> RowAssignment:
    """[N] dialogues in as few reads of `width` rows as can be found, filled evenly.

    The longest first, each into the emptiest row; where that fails with so many reads as first-fit needs, first-fit.
    """
    order = np.argsort(-lengths, kind="stable")
    packed = _fill(lengths, order, length, len(lengths), evenly=False)
    assert packed is not None, "a row for each would do"
    microbatches = max(-(-(int(packed[0].max(initial=0)) + 1) // width), 1)
    for fewer in range(max(-(-int(lengths.sum()) // (length * width)), 1), microbatches + 1):
        even = _fill(lengths, order, length, fewer * width, evenly=True)
        if even is not None:
            packed, microbatches = even, fewer
            break
    return RowAssignment(*packed, np.int32(microbatches))


def _fill(
    lengths: np.ndarray, order: np.ndarray, length: int, rows: int, *, evenly: bool
) -> tuple[np.ndarray, np.ndarray] | None:
    """(row, start) of each dialogue, each in the emptiest row or in the first that has room; None: no room."""
    filled = np.zeros(rows, np.int64)
    row, start = np.zeros(len(lengths), np.int32), np.zeros(len(lengths), np.int32)
    for n in order:
        r = int(filled.argmin() if evenly else (filled + lengths[n] <= length).argmax())
        if filled[r] + lengths[n] > length:
            return None
        row[n], start[n] = r, filled[r]
        filled[r] += lengths[n]
    return row, start


def pack(tree: Any, assignment: RowAssignment, count: Int[Array, " N"], width: int) -> Any:
    """Arrays of dialogues, [N, L], in shared rows, [reads, width, L]: 0 in padding. A PackedBatch becomes SharedRows.

    Every device gets all of the arrays (a few bytes a token) and keeps its rows.
    """
    at = _Source.of(assignment, count, _length(tree), width)

    def batch(x: PackedBatch) -> SharedRows:
        fields = {f.name: at.take(getattr(x, f.name)) for f in dataclasses.fields(PackedBatch) if f.name != "count"}
        return SharedRows(**fields, count=at.filled, segment=at.segment)

    is_batch = lambda x: isinstance(x, PackedBatch)  # noqa: E731
    return jax.tree.map(lambda x: batch(x) if is_batch(x) else at.take(x), tree, is_leaf=is_batch)


def unpack(tree: Any, assignment: RowAssignment, count: Int[Array, " N"]) -> Any:
    """Undoes `pack` for arrays [reads, width, L]: [N, L], 0 beyond a dialogue's end."""

    def back(x: Array) -> Array:
        length = x.shape[2]
        source = (assignment.row * length + assignment.start)[:, None] + jnp.arange(length)
        values = jnp.take(rules.constrain(x, None, None, None).reshape(-1), source, mode="clip")
        return rules.constrain_rows(jnp.where(jnp.arange(length) < count[:, None], values, 0))

    return jax.tree.map(back, tree)


def _length(tree: Any) -> int:
    return next(x.shape[1] for x in jax.tree.leaves(tree) if x.ndim == 2)


@dataclasses.dataclass(frozen=True)
class _Source:
    """Of each position of shared rows: which token of which dialogue stands there."""

    index: Int[Array, "P w L"]  # in the flat [N * L] arrays
    inside: Array  # [P, w, L] whether one does
    segment: Int[Array, "P w L"]
    filled: Int[Array, "P w"]

    @classmethod
    def of(cls, assignment: RowAssignment, count: Int[Array, " N"], length: int, width: int) -> "_Source":
        """By marking where dialogues begin."""
        number = count.shape[0]
        microbatches = -(-number // width)
        row = jnp.where(count > 0, assignment.row, microbatches * width)  # an empty dialogue begins nowhere
        begins = jnp.zeros((microbatches * width, length), jnp.int32)
        begins = begins.at[row, assignment.start].set(jnp.arange(1, number + 1), mode="drop")
        here = jnp.arange(length)
        first = jax.lax.cummax(jnp.where(begins > 0, here, 0), axis=1)
        dialogue = jnp.take_along_axis(begins, first, axis=1) - 1
        inside = (dialogue >= 0) & (here - first < count[dialogue])
        filled = inside.sum(1, dtype=jnp.int32)
        index = jnp.where(inside, dialogue * length + here - first, 0)
        segment = jnp.where(inside, first, filled[:, None])
        fold = lambda x: _spread(x.reshape(microbatches, width, *x.shape[1:]))  # noqa: E731
        return cls(fold(index), fold(inside), fold(segment), fold(filled))

    def take(self, x: Array) -> Array:
        whole = rules.constrain(x, None, None).reshape(-1)
        return _spread(jnp.where(self.inside, whole[self.index], 0).astype(x.dtype))


def _spread(x: Array) -> Array:
    """[reads, width, …]: a device has its row of every read."""
    return rules.constrain(x, None, "batch", *(None,) * (x.ndim - 2))
