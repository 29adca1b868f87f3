"""Lines of a file that may be larger than memory: all in their order, then any of them again."""

import abc
import codecs
import shutil
import tempfile
import weakref
import zlib
from array import array
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import BinaryIO, TypeVar

T = TypeVar("T")


def each_line(file: BinaryIO, *, unfinished: bool = False) -> Iterator[tuple[int, bytes]]:
    """(offset, line without its end) of a file of UTF-8 text, without a byte order mark.

    Args:
        unfinished: pass over a last line without an end.
    """
    offset = 0
    for line in file:
        mark = len(codecs.BOM_UTF8) if not offset and line.startswith(codecs.BOM_UTF8) else 0
        whole = line.endswith(b"\n")
        if len(line) > mark and (whole or not unfinished):
            yield offset + mark, line[mark : -1 if whole else None]
        offset += len(line)


class ComputedSequence(Sequence[T]):
    """A sequence whose elements are computed on access; slices are lists of them."""

    @abc.abstractmethod
    def _compute(self, index: int) -> T:
        """The element of an index from 0."""

    def __getitem__(self, index):
        if isinstance(index, slice):
            return [self[i] for i in range(*index.indices(len(self)))]
        if not -len(self) <= index < len(self):
            raise IndexError(index)
        return self._compute(index % len(self))


class IndexedLines:
    """A file whose lines are read once from the first to the last, and then one by one on access.

    Only their offsets and checksums are in memory. A pipe, which can be read only once, is copied to disk.
    """

    def __init__(self, path: Path):
        """Opens it; raises OSError where it cannot be read."""
        self.path = path
        self._spans, self._sums = array("q"), array("Q")  # offset and length of each; CRC-32
        with path.open("rb") as file:
            self._copy = None if file.seekable() else tempfile.TemporaryFile()  # noqa: SIM115
            if self._copy:
                weakref.finalize(self, self._copy.close)
                shutil.copyfileobj(file, self._copy)

    def __iter__(self) -> Iterator[bytes]:
        """All lines, for the first time or again."""
        self._spans, self._sums = array("q"), array("Q")
        file = self._open()
        try:
            for offset, line in each_line(file):
                self._spans.extend((offset, len(line)))
                self._sums.append(zlib.crc32(line))
                yield line
        finally:
            self._close(file)

    def read(self, index: int) -> bytes:
        """A line that has been read before.

        Raises:
            ValueError: the file has been changed since.
        """
        offset, length = self._spans[2 * index : 2 * index + 2]
        file = self._open()
        try:
            file.seek(offset)
            line = file.read(length)
        finally:
            self._close(file)
        if zlib.crc32(line) != self._sums[index]:
            raise ValueError(f"{self.path}: was changed while it was read; start again when it is finished")
        return line

    def _open(self) -> BinaryIO:
        if self._copy is None:
            return self.path.open("rb")
        self._copy.seek(0)
        return self._copy

    def _close(self, file: BinaryIO) -> None:
        if file is not self._copy:
            file.close()
