"""A judge model's forms for models that can only be asked in text, and what their answers say.

    [evidence] What it did best and what it missed:
    [empathic_depth] Empathic depth, …: (1 / 2 / 3 / 4 / 5)

Reading is lenient in looks, as that of a user's form is, and strict in what counts: a choice is one of its options,
with nothing before it and no other option beside it.
"""

import re
from collections.abc import Sequence

from rlver_jax.evaluation.forms import Step
from rlver_jax.evaluation.measures import Answers
from rlver_jax.user.text_forms import BETWEEN, Field, Form, behind_marks, one_line, plain

_SIGNS = "+＋\\-−–－"
_LONGEST = 100  # characters of a choice, with spaces; Python reads no number of more than 4,300 digits
_MINUS = "-−–－"


def write(steps: Sequence[Step]) -> str:
    """The form as text: a mark before each line that leads to an answer, the options behind it."""
    return _form(steps).text


def read(steps: Sequence[Step], answer: str) -> Answers:
    """What a model filled in: lines ("" where there is none), and choices as distributions that are sure.

    A choice that is missing, or is none of its options, is left out. An answer to one choice alone may be bare.
    """
    form = _form(steps)
    raw = behind_marks(form, answer)
    if len(steps) == 1 and not raw[steps[0].name].strip():
        raw = {steps[0].name: plain(answer)}
    answers: Answers = {}
    for step in steps:
        if not step.options:
            answers[step.name] = one_line(raw[step.name], form)
            continue
        chosen = read_choice(raw[step.name].replace(_listed(step.options), " "), step.options)
        if chosen is not None:
            answers[step.name] = {option: float(option == chosen) for option in step.options}
    return answers


def read_choice(text: str, options: Sequence[str]) -> str | None:
    """The option that a text begins with; None where it begins with something else, or names a second one with it."""
    if options[0].isalpha():
        one, signs = r"[A-Za-z](?![A-Za-z])", ""
        known = {option.lower(): option for option in options}
    else:
        signs = _SIGNS if options[0][0] in "+-" else ""
        one = (rf"[{signs}]?\s*+" if signs else "") + r"\d++(?![\d.]*\d)"
        known = {str(int(option)): option for option in options}
    match = re.match(rf"[^\w{signs}]*+({one})", text)
    if match is None or len(match[1]) > _LONGEST:
        return None
    rest = text[match.end() :]
    of_all = not signs and re.match(rf"\s*/\s*{options[-1]}(?!\w)", rest)  # "4/5"
    if not of_all and re.match(rf"(?:{BETWEEN}|\s*/\s*){one}", rest):
        return None
    spelled = re.sub(r"\s", "", match[1]).lower()
    if not options[0].isalpha():
        spelled = str(int(re.sub(r"\D", "", spelled)) * (-1 if spelled[0] in _MINUS else 1))
    return known.get(spelled)


def _listed(options: Sequence[str]) -> str:
    return f"({' / '.join(options)})"


def _form(steps: Sequence[Step]) -> Form:
    lines: list[str] = []
    fields = []
    for step in steps:
        *before, heading = step.literal.strip("\n").split("\n")
        choices = f" {_listed(step.options)}" if step.options else ""
        lines += [*before, f"[{step.name}] {heading}{choices}"]
        fields.append(Field(step.name, heading.strip(), bool(step.options)))
    return Form("\n".join(lines), tuple(fields))
