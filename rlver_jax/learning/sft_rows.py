"""Dialogues to learn from by supervised fine-tuning, and the rows that they share.

What is learned is a list of targets: the position that predicts one, the token, its share of a distribution over tokens
there, and the field that it belongs to. A position may have several targets: those of a soft distribution.
"""

import dataclasses
from collections.abc import Sequence
from typing import NamedTuple

import flax.struct
import numpy as np
from jaxtyping import Array, Float, Int

from rlver_jax.learning.packing import RowAssignment


@dataclasses.dataclass(frozen=True)
class Example:
    """One dialogue as the model that learns reads it; NumPy arrays.

    n tokens, q targets, c changes of emotion that the user chose from its options.
    """

    profile: str  # id
    tokens: Int[np.ndarray, " n"]
    positions: Int[np.ndarray, " n"]  # rotary
    branch: Int[np.ndarray, " n"]  # see `models.attention`
    at: Int[np.ndarray, " q"]  # place of the token that predicts a target
    target: Int[np.ndarray, " q"]
    share: Float[np.ndarray, " q"]  # 1 of a token that was written; of a change's tokens the shares of `soft_targets`
    field: Int[np.ndarray, " q"]  # index into the fields' names
    choices: Int[np.ndarray, " c"]  # place of the first option's first token
    changes: Int[np.ndarray, " c"]  # as logged, -10 to 10
    emotions: Int[np.ndarray, " c"]  # before each change
    replies: Int[np.ndarray, " c"]  # number of the reply that each change is about, from 0

    def __len__(self) -> int:
        return len(self.tokens)


@flax.struct.dataclass
class Rows:
    """Rows of L positions with Q targets each; NumPy arrays or arrays on the device. In padding all is 0."""

    tokens: Int[Array, "*b L"]
    positions: Int[Array, "*b L"]
    branch: Int[Array, "*b L"]
    segment: Int[Array, "*b L"]  # place at which the dialogue of a token begins; of padding, the first of padding
    at: Int[Array, "*b Q"]
    target: Int[Array, "*b Q"]
    share: Float[Array, "*b Q"]
    field: Int[Array, "*b Q"]


class Choices(NamedTuple):
    """The changes in rows, K at most each."""

    first: Int[np.ndarray, "*b K"]  # as `Example.choices`; 0: none
    change: Int[np.ndarray, "*b K"]
    emotion: Int[np.ndarray, "*b K"]  # before it
    reply: Int[np.ndarray, "*b K"]  # number of the reply that it is about, from 0


class Capacity(NamedTuple):
    """How many targets and changes a row may have: no example has more of them a token, so no row has."""

    targets: tuple[int, int]  # of the example with the most a token; its tokens
    choices: tuple[int, int]

    @classmethod
    def of(cls, examples: Sequence[Example]) -> "Capacity":
        """Of all examples that rows are made of."""
        targets = max(((len(one.at), len(one)) for one in examples), key=lambda pair: pair[0] / pair[1])
        choices = max(((len(one.choices), len(one)) for one in examples), key=lambda pair: pair[0] / pair[1])
        return cls(targets, choices)

    def targets_in(self, length: int) -> int:
        """Q of a row of that many tokens."""
        return max(length * self.targets[0] // self.targets[1], 1)

    def choices_in(self, length: int) -> int:
        """K of it."""
        return max(length * self.choices[0] // self.choices[1], 1)


def pack_rows(
    examples: Sequence[Example], assignment: RowAssignment, length: int, width: int, capacity: Capacity
) -> tuple[Rows, Choices]:
    """Examples in shared rows, [reads, width, …], as `packing.assign_rows` lays them out."""
    count = int(assignment.microbatches) * width
    whole = {name: np.zeros((count, length), np.int32) for name in ("tokens", "positions", "branch", "segment")}
    listed = {name: np.zeros((count, capacity.targets_in(length)), np.int32) for name in ("at", "target", "field")}
    listed["share"] = np.zeros((count, capacity.targets_in(length)), np.float32)
    chosen = Choices(*(np.zeros((count, capacity.choices_in(length)), np.int32) for _ in Choices._fields))
    filled, targets, choices = (np.zeros(count, np.int64) for _ in range(3))
    for one, row, start in zip(examples, assignment.row.tolist(), assignment.start.tolist(), strict=True):
        here = slice(start, start + len(one))
        for name in ("tokens", "positions", "branch"):
            whole[name][row, here] = getattr(one, name)
        whole["segment"][row, here] = start
        filled[row] = max(filled[row], here.stop)
        there = slice(targets[row], targets[row] + len(one.at))
        listed["at"][row, there] = one.at + start
        for name in ("target", "share", "field"):
            listed[name][row, there] = getattr(one, name)
        among = slice(choices[row], choices[row] + len(one.choices))
        columns = (one.choices + start, one.changes, one.emotions, one.replies)
        for whole_column, column in zip(chosen, columns, strict=True):
            whole_column[row, among] = column
        targets[row], choices[row] = there.stop, among.stop
    padding = np.arange(length) >= filled[:, None]
    whole["segment"] = np.where(padding, filled[:, None], whole["segment"]).astype(np.int32)
    fold = lambda x: x.reshape(-1, width, *x.shape[1:])  # noqa: E731
    rows = Rows(**{name: fold(x) for name, x in (whole | listed).items()})
    return rows, Choices(*map(fold, chosen))
