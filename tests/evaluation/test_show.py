"""What agreement looks like in the terminal."""

import io

import pytest
from rich.console import Console

from rlver_jax.evaluation.agreement import agreement, without_the_reply
from rlver_jax.evaluation.show import show_agreement
from tests.evaluation.test_agreement import DIALOGUES


def shown(name, result, width):
    console = Console(file=io.StringIO(), width=width)
    show_agreement(name, result, console)
    return console.file.getvalue()


@pytest.fixture(scope="module")
def result():
    summary = {"n": 8, "dialogues": 3, "text": agreement(DIALOGUES), "unanswered": 0}
    return summary | {"without_the_reply": without_the_reply(DIALOGUES)}


def test_a_judge_beside_what_needs_no_look_at_the_reply(result):
    """The judge says what is recorded; by hand: the previous change errs by 47 / 8, the median by 47 / 8 too."""
    lines = shown("far, mine", result, 120).splitlines()
    cells = [[cell.strip() for cell in line.split("│")[1:-1]] for line in lines if line.startswith("│")]
    names = [row[0] for row in cells]
    parts = [names.index(part) for part in ("all replies", "first replies (3)", "later replies (5)")]
    assert parts == sorted(parts)
    assert names[parts[0] + 1 : parts[1]] == ["far, mine, text", "emotion alone", "previous change", "the median"]
    assert names[parts[1] + 1 : parts[2]] == ["far, mine, text", "the median"]
    judge, _, previous, median = cells[parts[0] + 1 : parts[1]]
    assert judge[1] == "1.00 [1.00,1.00]"
    assert judge[4] == "0.00 [0.00,0.00]"
    assert previous[4].startswith("5.88 [")
    assert median[1:4] == ["–", "–", "–"]
    assert median[4].startswith("5.88 [")
    assert any("have not read the reply" in line for line in lines)
    assert "bands with text" in " ".join(lines)


def test_intervals_are_whole_where_the_terminal_is_narrow(result):
    assert "[1.00,1.00]" in shown("user", result, 80)


def test_a_record_alone(result):
    only = {name: result[name] for name in ("n", "dialogues", "without_the_reply")}
    text = shown("record", only, 120)
    assert "emotion alone" in text
    assert text.startswith("record: 8 contexts of 3 dialogues")
    assert "record," not in text, "nobody's changes are compared with it"
    assert "bands" not in text
