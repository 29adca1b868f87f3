"""The rows of metrics.jsonl in columns: a long run has hundreds of thousands of figures."""

import math
from array import array
from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any

import numpy as np

from rlver_jax.dialogues.numbers import is_number


class Row(Mapping[str, Any]):
    """One row: its step, and what of it is a number."""

    def __init__(self, columns: Mapping[str, array], place: int):
        """`columns` hold NaN where a row has nothing."""
        self._columns, self._place = columns, place

    def __getitem__(self, name: str) -> Any:
        value = self._columns[name][self._place]
        if math.isnan(value):
            raise KeyError(name)
        return value

    def __iter__(self) -> Iterator[str]:
        return (name for name in self._columns if not math.isnan(self._columns[name][self._place]))

    def __len__(self) -> int:
        return sum(1 for _ in self)


class Rows(Sequence[Row]):
    """All rows of a run."""

    def __init__(self, rows: Iterable[Mapping[str, Any]]):
        """Takes one row after another; what is no number is left out, as what a row doesn't have."""
        self._columns: dict[str, array] = {"step": array("q")}
        for place, row in enumerate(rows):
            for name, value in row.items():
                if name == "step":
                    self._columns[name].append(value)
                elif is_number(value):
                    column = self._columns.get(name)
                    if column is None:
                        column = self._columns[name] = array("d")
                    column.extend([math.nan] * (place - len(column)))
                    column.append(value)
        for column in self._columns.values():
            column.extend([math.nan] * (len(self) - len(column)))

    def whole(self, names: Sequence[str]) -> tuple[np.ndarray, list[np.ndarray]]:
        """(steps, values of each name) of the rows that have all of them."""
        steps = np.array(self._columns["step"])
        if not all(name in self._columns for name in names):
            return steps[:0], [np.zeros(0) for _ in names]
        values = [np.array(self._columns[name]) for name in names]
        whole = ~np.isnan(values).any(axis=0)
        return steps[whole], [column[whole] for column in values]

    def __len__(self) -> int:
        return len(self._columns["step"])

    def __getitem__(self, index):
        if isinstance(index, slice):
            return [self[i] for i in range(*index.indices(len(self)))]
        if not -len(self) <= index < len(self):
            raise IndexError(index)
        return Row(self._columns, index % len(self))
