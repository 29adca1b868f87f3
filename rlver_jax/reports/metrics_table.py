"""metrics.jsonl as a table of columns: a long run has hundreds of thousands of numbers."""

import math
from array import array
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import numpy as np

from rlver_jax.dialogues.numbers import is_number


class MetricsTable:
    """All numbers of a run's metrics, a row a step."""

    def __init__(self, rows: Iterable[Mapping[str, Any]]):
        """Reads rows one by one; anything but a number counts as absent."""
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

    @property
    def steps(self) -> list[int]:
        """Of the rows, rising."""
        return self._columns["step"].tolist()

    @property
    def names(self) -> list[str]:
        """Of all metrics that a row has."""
        return sorted(self._columns.keys() - {"step"})

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
