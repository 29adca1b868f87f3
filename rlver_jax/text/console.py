"""Standard output and error of the entry points. A run that took hours must not end because its output is not wanted.

A character that the terminal's encoding lacks is written as its escape. A stream that is closed, whose reader has gone,
or whose disk is full is discarded, and the work continues. Text of files and models is only displayed: nothing in it
moves the cursor, recolours the terminal or changes the direction of a line (`plain`).
"""

import codecs
import contextlib
import io
import os
import re
import sys
from collections.abc import Iterable
from typing import IO, Any

from rich.console import Console, ConsoleOptions, RenderableType
from rich.segment import Segment

_NARROWEST, _WIDEST = 20, 200  # columns
# Invisible characters that terminals, browsers and searches obey, and those that UTF-8 or XML forbid.
_INVISIBLE = re.compile(
    "["
    "\x00-\x08\x0b-\x1f\x7f-\x9f"  # controls, escape among them; tab and line end stay
    "\ud800-\udfff"  # half characters
    "\u061c\u200e\u200f\u202a-\u202e\u2066-\u206f"  # direction
    "\u180e\u200b\u2060-\u2064\ufeff\ufff9-\ufffb\U000e0000-\U000e007f"  # no width; joiners stay, emoji have them
    "\ufdd0-\ufdef\ufffe\uffff"  # no characters
    "]"
)


def plain(text: str) -> str:
    """The text without invisible characters that control a terminal: escapes, direction, half characters, …

    Line ends stay, tabs become spaces.
    """
    if text.isprintable():
        return text
    lines = text.replace("\r\n", "\n").replace("\u2028", "\n").replace("\u2029", "\n").replace("\t", "    ")
    return _INVISIBLE.sub("", lines)


def plain_line(text: str) -> str:
    """`plain` on one line, for names: one of several lines could look like another of ours."""
    return " ".join(plain(text).splitlines())


class _PlainConsole(Console):
    """A console that prints nothing but readable text, in rich's own colours and with its own movements."""

    def render(self, renderable: RenderableType, options: ConsoleOptions | None = None) -> Iterable[Segment]:
        for text, style, control in super().render(renderable, options):
            yield Segment(text if control else plain(text), style, control)


def consoles(soft_wrap: bool = False) -> tuple[Console, Console]:
    """Consoles on stdout, with `soft_wrap`, and on stderr; from here on no write to either fails (see above)."""
    _open_missing()
    for name in ("stdin", "stdout", "stderr"):
        stream = getattr(sys, name)
        if stream is None:
            setattr(sys, name, open(os.devnull, "r" if name == "stdin" else "w", encoding="utf-8"))  # noqa: SIM115
        elif isinstance(stream, io.TextIOWrapper) and stream is getattr(sys, f"__{name}__"):
            _accept_any_character(stream)
            if name != "stdin":
                setattr(sys, name, _FailSafeStream(stream))
    return (  # without emoji: file:x:1 is no picture of an x
        _PlainConsole(soft_wrap=soft_wrap, emoji=False, **_size(sys.stdout)),
        _PlainConsole(stderr=True, soft_wrap=True, emoji=False, **_size(sys.stderr)),
    )


class _FailSafeStream:
    """A stream that discards what is written once a write has failed."""

    def __init__(self, stream: IO[str]):
        self._stream = stream

    def __getattr__(self, name: str) -> Any:
        return getattr(self._stream, name)

    def write(self, text: str) -> int:
        try:
            return self._stream.write(text)
        except OSError as error:
            self._discard(error)
            return len(text)

    def writelines(self, lines: Iterable[str]) -> None:
        for line in lines:
            self.write(line)

    def flush(self) -> None:
        try:
            self._stream.flush()
        except OSError as error:
            self._discard(error)

    def _discard(self, error: OSError) -> None:
        """Sends the buffer and all later writes to /dev/null; Python would fail at exit otherwise."""
        with contextlib.suppress(OSError):
            null = os.open(os.devnull, os.O_WRONLY)
            os.dup2(null, self._stream.fileno())
            os.close(null)
        if self is sys.stdout and not isinstance(error, BrokenPipeError):  # as with `| head`, which is meant
            print(f"standard output cannot be written to ({error.strerror}); continuing without it", file=sys.stderr)


def _open_missing() -> None:
    """Opens /dev/null where a standard stream was closed: else the next file opened would receive XLA's messages."""
    for number in range(3):
        try:
            os.fstat(number)
        except OSError:
            os.set_inheritable(os.open(os.devnull, os.O_RDWR), True)
        else:
            with contextlib.suppress(OSError):
                os.set_blocking(number, True)  # a terminal's other programs may have left it so


def _accept_any_character(stream: io.TextIOWrapper) -> None:
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


def _size(stream: IO[str]) -> dict[str, Any]:
    """Columns and lines for `rich`; none leave them to it: it asks a terminal, and takes COLUMNS and LINES as they are.

    A file has room for the widest table, whose cells would be cut short at rich's 80 columns.
    """
    texts = [os.environ.get(name, "80") for name in ("COLUMNS", "LINES")]
    sizes = [int(text) if text.isascii() and text.isdigit() else 0 for text in texts]
    fine = sizes[0] >= _NARROWEST and sizes[1] > 0
    if stream.isatty() or "COLUMNS" in os.environ:
        return {} if fine else {"width": 80, "height": 25}
    return {"width": _WIDEST, "height": 25}
