"""A dialogue log that may be larger than memory."""

from collections.abc import Sequence
from pathlib import Path

from rlver_jax.runs.dialogue_log import Record, parse_dialogue
from rlver_jax.runs.lines import Lines


class Logged(Sequence[Record]):
    """A log's dialogues: all are checked at once, and each is read again when it is asked for."""

    def __init__(self, path: Path):
        """Reads the log; raises OSError, or DialogueLogError with file and line."""
        self._lines, self._count = Lines(path), 0
        for line in self._lines:
            self._count += 1
            parse_dialogue(line, f"{path}:{self._count}")

    def __len__(self) -> int:
        return self._count

    def __getitem__(self, index):
        if isinstance(index, slice):
            return [self[i] for i in range(*index.indices(len(self)))]
        if not -len(self) <= index < len(self):
            raise IndexError(index)
        index %= len(self)
        return parse_dialogue(self._lines.again(index), f"{self._lines.path}:{index + 1}")
