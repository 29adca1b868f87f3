"""The one progress meter: a bar in a terminal, lines elsewhere."""

import io

import pytest
from rich.console import Console

from rlver_jax.text.progress import Meter


def shown(terminal: bool) -> str:
    text = io.StringIO()
    console = Console(file=text, force_terminal=terminal, width=100)
    with Meter(console, 9, "beginning", label="a [judge]", completed=2) as meter:
        meter.show(3, "quietly")
        meter.show(4, "half [bold]way", line="4/9 · half [bold]way")
        meter.note("above [the] bar")
    return text.getvalue()


def test_a_file_gets_the_lines_that_are_meant_for_it():
    assert shown(terminal=False).splitlines() == ["4/9 · half [bold]way", "above [the] bar"]


@pytest.mark.parametrize("piece", ["a [judge]", "4/9", "half [bold]way", "above [the] bar", "ETA"])
def test_a_terminal_gets_a_bar_and_no_markup_is_read(piece):
    text = shown(terminal=True)
    assert piece in text
    assert "\n4/9" not in text
