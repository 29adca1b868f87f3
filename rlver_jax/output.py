"""Standard output and error of the entry points. A run that took hours must not end because its output is not wanted.

A character that the terminal's encoding lacks is written as its escape; a stream that is closed, whose reader has gone,
or whose disk is full is given up, and the work goes on.
"""

import codecs
import contextlib
import io
import os
import sys
from collections.abc import Iterable
from typing import IO, Any

from rich.console import Console

_NARROWEST = 20  # columns


def consoles(soft_wrap: bool = False) -> tuple[Console, Console]:
    """Consoles on stdout, with `soft_wrap`, and on stderr; from here on both streams last (see above)."""
    _open_missing()
    for name in ("stdin", "stdout", "stderr"):
        stream = getattr(sys, name)
        if stream is None:
            setattr(sys, name, open(os.devnull, "r" if name == "stdin" else "w", encoding="utf-8"))  # noqa: SIM115
        elif isinstance(stream, io.TextIOWrapper) and stream is getattr(sys, f"__{name}__"):
            _bear_any_character(stream)
            if name != "stdin":
                setattr(sys, name, _Lasting(stream))
    width, height = _size()
    how: dict[str, Any] = {"width": width, "height": height, "emoji": False}  # file:x:1 is no picture of an x
    return Console(soft_wrap=soft_wrap, **how), Console(stderr=True, soft_wrap=True, **how)


class _Lasting:
    """A stream that is written to for nothing once it cannot be written to."""

    def __init__(self, stream: IO[str]):
        self._stream = stream

    def __getattr__(self, name: str) -> Any:
        return getattr(self._stream, name)

    def write(self, text: str) -> int:
        try:
            return self._stream.write(text)
        except OSError as error:
            self._give_up(error)
            return len(text)

    def writelines(self, lines: Iterable[str]) -> None:
        for line in lines:
            self.write(line)

    def flush(self) -> None:
        try:
            self._stream.flush()
        except OSError as error:
            self._give_up(error)

    def _give_up(self, error: OSError) -> None:
        """Lets what is buffered, and all that comes, go nowhere; Python would fail at its end otherwise."""
        with contextlib.suppress(OSError):
            null = os.open(os.devnull, os.O_WRONLY)
            os.dup2(null, self._stream.fileno())
            os.close(null)
        if self is sys.stdout and not isinstance(error, BrokenPipeError):  # as with `| head`, which is meant
            print(f"standard output cannot be written to ({error.strerror}); going on without it", file=sys.stderr)


def _open_missing() -> None:
    """Opens /dev/null where a standard stream was closed: the next file would be one, and what XLA says lie in it."""
    for number in range(3):
        try:
            os.fstat(number)
        except OSError:
            os.set_inheritable(os.open(os.devnull, os.O_RDWR), True)
        else:
            with contextlib.suppress(OSError):
                os.set_blocking(number, True)  # a terminal's other programs may have left it so


def _bear_any_character(stream: io.TextIOWrapper) -> None:
    if stream.errors not in ("strict", "surrogateescape"):
        return
    if not stream.readable():
        stream.reconfigure(errors="backslashreplace")
        return
    changes: dict[str, Any] = {"errors": "replace"}
    if codecs.lookup(stream.encoding).name == "ascii":  # a terminal that sends more sends UTF-8
        changes["encoding"] = "utf-8"
    with contextlib.suppress(io.UnsupportedOperation):  # a program that calls `main` has read of it: so it stays
        stream.reconfigure(**changes)


def _size() -> tuple[int | None, int | None]:
    """Columns and lines; None leaves them to `rich`, which takes COLUMNS and LINES as they are."""
    given = [os.environ.get(name, "80") for name in ("COLUMNS", "LINES")]
    sizes = [int(text) if text.isascii() and text.isdigit() else 0 for text in given]
    fine = sizes[0] >= _NARROWEST and sizes[1] > 0
    return (None, None) if fine else (80, 25)
