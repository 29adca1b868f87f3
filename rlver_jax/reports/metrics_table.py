"""metrics.jsonl as a table of columns: a long run has hundreds of thousands of numbers."""

import math
from array import array
from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any

import numpy as np

from rlver_jax.dialogues.numbers import is_number


class TableRow(Mapping[str, Any]):
    """One step's metrics: its number, and all else that is a number."""

    def __init__(self, columns: Mapping[str, array], index: int):
        """`columns` hold NaN where a row has nothing."""
        self._columns, self._index = columns, index

    def __getitem__(self, name: str) -> Any:
        value = self._columns[name][self._index]
        if math.isnan(value):
            raise KeyError(name)
        return value

    def __iter__(self) -> Iterator[str]:
        return (name for name in self._columns if not math.isnan(self._columns[name][self._index]))

    def __len__(self) -> int:
        return sum(1 for _ in self)


class MetricsTable(Sequence[TableRow]):
    """All rows of a run's metrics."""

    def __init__(self, rows: Iterable[Mapping[str, Any]]):
        """Takes one row after another; what is no number is left out, as what a row doesn't have."""
        self._columns: dict[str, array] = {"step": array("q")}
        for index, row in enumerate(rows):
            for name, value in row.items():
                if name == "step":
                    self._columns[name].append(value)
                elif is_number(value):
                    column = self._columns.get(name)
                    if column is None:
                        column = self._columns[name] = array("d")
                    column.extend([math.nan] * (index - len(column)))
                    column.append(value)
        for column in self._columns.values():
            column.extend([math.nan] * (len(self) - len(column)))

    def complete(self, names: Sequence[str]) -> tuple[np.ndarray, list[np.ndarray]]:
        """(steps, values of each name) of the rows that have all of them."""
        steps = np.array(self._columns["step"])
        if not all(name in self._columns for name in names):
            return steps[:0], [np.zeros(0) for _ in names]
        values = [np.array(self._columns[name]) for name in names]
        complete = ~np.isnan(values).any(axis=0)
        return steps[complete], [column[complete] for column in values]

    def __len__(self) -> int:
        return len(self._columns["step"])

    def __getitem__(self, index):
        if isinstance(index, slice):
            return [self[i] for i in range(*index.indices(len(self)))]
        if not -len(self) <= index < len(self):
            raise IndexError(index)
        return TableRow(self._columns, index % len(self))
