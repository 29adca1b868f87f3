"""The progress of something slow: a bar in a terminal, lines of text elsewhere."""

from typing import Self

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, ProgressColumn, TextColumn
from rich.progress import TimeElapsedColumn as Elapsed
from rich.progress import TimeRemainingColumn as Remaining


class Meter:
    """A bar that goes away at the end, `label ▬▬▬ 3/12 state elapsed ETA`; a context manager.

    rich takes the ETA from what this process has done: what was `completed` before costs it no time.
    """

    def __init__(
        self, console: Console, total: int, state: str, *, label: str = "", completed: int = 0, times: bool = True
    ):
        """`times`: shows the time elapsed and rich's ETA behind the state."""
        self.console = console
        columns: list[ProgressColumn] = [TextColumn(label, markup=False)] * bool(label)
        columns += [BarColumn(), MofNCompleteColumn(), TextColumn("{task.fields[state]}", markup=False)]
        columns += [Elapsed(), TextColumn("ETA"), Remaining()] * times
        self._bar = Progress(*columns, console=console, transient=True, disable=not console.is_terminal)
        self._task = self._bar.add_task("", total=total, completed=completed, state=state)

    def __enter__(self) -> Self:
        self._bar.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._bar.stop()

    def show(self, completed: int, state: str, line: str = "") -> None:
        """Moves the bar; prints `line`, if there is one, where there is no bar."""
        self._bar.update(self._task, completed=completed, state=state)
        if line and self._bar.disable:
            self.note(line)

    def note(self, text: str) -> None:
        """A line, above the bar where there is one."""
        self.console.print(text, highlight=False, markup=False, soft_wrap=True)
