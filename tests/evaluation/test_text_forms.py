"""A judge model's forms in text, and answers as models of all tempers write them."""

import pytest

from rlver_jax.config.languages import LANGUAGES
from rlver_jax.dialogues.sage import from_sage
from rlver_jax.evaluation.forms import Step, load_forms
from rlver_jax.evaluation.measures import LETTERS, RATING, TRUTH
from rlver_jax.evaluation.text_forms import read, read_choice, write
from rlver_jax.evaluation.transcripts import Transcript

STEPS = (
    Step("All in all.\nBest and worst:", "evidence", ()),
    Step("\nMarks from 1 to 5.\nDepth, whether it went down:\n", "depth", RATING),
    Step("I mattered:\n", "mattered", TRUTH),
)
FORM = """\
All in all.
[evidence] Best and worst:
Marks from 1 to 5.
[depth] Depth, whether it went down: (1 / 2 / 3 / 4 / 5)
[mattered] I mattered: (-3 / -2 / -1 / +1 / +2 / +3)"""


def sure(option, options):
    return {o: float(o == option) for o in options}


def test_a_form_has_marks_and_its_choices():
    assert write(STEPS) == FORM


@pytest.mark.parametrize(
    "answer",
    [
        "[evidence] It listened.\n[depth] 4\n[mattered] -2",
        "[depth] 4\n[mattered] -2\n[evidence] It listened.",
        FORM.replace("worst:", "worst: It listened.").replace("5)", "5) 4").replace("+3)", "+3) -2"),
        "[evidence] Best and worst: It listened.\n[depth] Depth, whether it went down: 4\n[mattered] I mattered: −2",
        "**[evidence]** It listened.\n\n**[depth]** **4/5**\n\n**[mattered]** - 2 (untrue)",
        "<think>\n[depth] 1?\n</think>\n```\n【evidence】 It\nlistened.\n【depth】：4。\n【mattered】 -2\n```",
        "Best and worst: It listened.\nDepth, whether it went down: 4, it did\nI mattered: -2",
    ],
)
def test_readable_answers(answer):
    assert read(STEPS, answer) == {
        "evidence": "It listened.",
        "depth": sure("4", RATING),
        "mattered": sure("-2", TRUTH),
    }


@pytest.mark.parametrize(
    ("text", "options", "chosen"),
    [
        ("4", RATING, "4"),
        (" (4)", RATING, "4"),
        ("- 4", RATING, "4"),
        ("4 / 5", RATING, "4"),
        ("3", TRUTH, "+3"),
        ("+1.", TRUTH, "+1"),
        ("C", LETTERS, "c"),
        ("c: names the feelings", LETTERS, "c"),
        ("(n)", LETTERS, "n"),
        ("0", RATING, None),
        ("6", RATING, None),
        ("45", RATING, None),
        ("4.5", RATING, None),
        ("4-5", RATING, None),
        ("4 or 5", RATING, None),
        ("4 / 3", RATING, None),
        ("4到5", RATING, None),
        ("four", RATING, None),
        ("about 4", RATING, None),
        ("", RATING, None),
        ("0", TRUTH, None),
        ("-1 to +1", TRUTH, None),
        ("+2 / +3", TRUTH, None),
        ("-4", TRUTH, None),
        ("-3 … +3", TRUTH, None),
        ("x", LETTERS, None),
        ("analysis", LETTERS, None),
        ("a or b", LETTERS, None),
        ("a, b", LETTERS, None),
        ("1", LETTERS, None),
    ],
)
def test_a_choice_is_exactly_one_of_its_options(text, options, chosen):
    assert read_choice(text, options) == chosen


def test_only_what_was_answered_is_found():
    assert read(STEPS, "I can't do that.") == {"evidence": ""}
    assert read(STEPS, "[depth] (1 / 2 / 3 / 4 / 5)\n[mattered] very") == {"evidence": ""}
    assert read(STEPS[1:2], "4") == {"depth": sure("4", RATING)}, "asked for alone, it may be bare"
    assert read(STEPS[1:], "4") == {}
    assert read(STEPS[1:2], "of 5: 4") == {}


@pytest.mark.parametrize("language", LANGUAGES)
def test_our_own_forms_come_back(language, results):
    """Filled in with the form copied, and with bare marks; no form's heading is taken for another's."""
    for form in load_forms(language).ask(Transcript(from_sage(results[0]), None, "")).forms:
        chosen = {step.name: step.options[i % len(step.options)] for i, step in enumerate(form.steps) if step.options}
        for copied in (True, False):
            lines = []
            for line in write(form.steps).splitlines():
                name = line[1:].partition("]")[0] if line.startswith("[") else ""
                lines.append(f"{line if copied else f'[{name}]'} {chosen.get(name, 'well')}" if name else line)
            answers = read(form.steps, "\n".join(lines))
            want = {s.name: sure(chosen[s.name], s.options) if s.options else "well" for s in form.steps}
            assert answers == want
