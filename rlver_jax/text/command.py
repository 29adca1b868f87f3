"""What all commands share: where they print, how they end, and the exit status.

Exit status 2 is bad usage: a flag, a config, a file or a folder that cannot be used. It is one line on standard error
that begins with the command's name, without a traceback. Any other exception is a bug and keeps its traceback.
"""

import sys
from collections.abc import Callable, Mapping, Sequence
from typing import NamedTuple

import jax

from rlver_jax.parallel import distributed
from rlver_jax.text.console import consoles


class Ending(NamedTuple):
    """How an exception ends a command.

    Attributes:
        status: exit status.
        text: its message; {error} is the exception's own, {output} the `Command.output`.
    """

    status: int
    text: str = "{error}"


Endings = Mapping[type[BaseException], Ending]
ENDINGS: Endings = {ValueError: Ending(2), OSError: Ending(2), KeyboardInterrupt: Ending(130, "interrupted")}


class Command:
    """A command as it runs.

    Attributes:
        name: as messages begin.
        console, errors: on standard output and standard error.
        output: folder or file of the results, as messages name it; empty until it is known.
    """

    def __init__(self, name: str, soft_wrap: bool = False):
        self.name, self.output = name, ""
        self.console, self.errors = consoles(soft_wrap)

    def print(self, text: str) -> None:
        """Prints a line on standard output as it is, without colours, and wrapped by the terminal alone."""
        self.console.print(text, markup=False, highlight=False, soft_wrap=True)

    def error(self, text: object) -> None:
        """Prints a message on standard error, behind the command's name."""
        self.errors.print(f"{self.name}: {text}", markup=False, highlight=False)

    def end(self, error: BaseException, endings: Endings) -> int | None:
        """Says why the command ends; returns the exit status, or None where the error is a bug."""
        if isinstance(error, jax.errors.JaxRuntimeError) and (text := distributed.peer_failure(error)):
            self.error(text)
            return 1
        known = [kind for kind in type(error).__mro__ if kind in ENDINGS or kind in endings]
        if not known:
            return None
        ending = endings.get(known[0]) or ENDINGS[known[0]]
        if "{output}" in ending.text and not self.output:  # it ends before anything is written
            ending = ENDINGS.get(known[0], Ending(ending.status))
        self.error(ending.text.format(error=error, output=self.output))
        return ending.status


def run_command(
    name: str,
    body: Callable[[Command, Sequence[str]], int],
    argv: Sequence[str] | None,
    endings: Endings | None = None,
    *,
    soft_wrap: bool = False,
) -> int:
    """Runs a command; returns the exit status.

    Args:
        name: as its messages begin.
        body: takes the command and its arguments, and returns the exit status.
        argv: arguments without the program's name; None: those of this process.
        endings: of exceptions that are no bug, beside or instead of `ENDINGS`; the most specific class counts.
        soft_wrap: lines on standard output are wrapped by the terminal alone.
    """
    command = Command(name, soft_wrap)
    try:
        return body(command, sys.argv[1:] if argv is None else argv)
    except BaseException as error:
        status = command.end(error, endings or {})
        if status is None:
            raise
        return status
