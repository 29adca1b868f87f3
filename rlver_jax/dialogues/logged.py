"""A dialogue log that may be larger than memory."""

from pathlib import Path

from rlver_jax.dialogues.lines import ComputedSequence, IndexedLines
from rlver_jax.dialogues.log import Record, parse_dialogue


class DialogueLog(ComputedSequence[Record]):
    """A log's dialogues: all are checked at once, and each is read again on access."""

    def __init__(self, path: Path):
        """Reads the log; raises OSError, or DialogueLogError with file and line."""
        self._lines, self._count = IndexedLines(path), 0
        for line in self._lines:
            self._count += 1
            parse_dialogue(line, f"{path}:{self._count}")

    def __len__(self) -> int:
        return self._count

    def _compute(self, index: int) -> Record:
        return parse_dialogue(self._lines.read(index), f"{self._lines.path}:{index + 1}")
