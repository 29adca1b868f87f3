"""The simulated user's scripts as forms for models that can only be asked in text, and what their answers say.

On the device a script is a guided generation: nothing needs parsing. A model behind an endpoint gets the same script as
a form, each field marked by its name in brackets, and answers with the form filled in:

    [content] What they said: that I should sleep on it.
    …
    [change] -3

Reading is lenient in how the answer looks (bold marks, full-width brackets, a heading without its mark) and strict in
what counts: a change must be a whole number from -10 to 10, a reply must say something. No answer, however long and
whatever it is made of, takes longer than in proportion to its length: a server may send what no model says.
"""

import re
from collections.abc import Sequence
from typing import NamedTuple

from rlver_jax.decoding.script import Part
from rlver_jax.user.emotion import CHANGES

# What leads from one number to another: a range, such as "-10 … +10", is no answer.
BETWEEN = r"\s*(?:…+|\.{2,}|[-−–—~～、,，&到至或和]|or\b|to\b|and\b)\s*"
# Behind the mark: perhaps a colon or bold, then the number, which nothing but a unit or an explanation may follow.
_NUMBER = re.compile(rf"[^\w+\-−–－]*+([+\-−–－]?)\s*+(\d{{1,3}})(?![\d.]*\d)(?!{BETWEEN}[+\-−–－]?\d)")
_ALONE = re.compile(r"(?<![\w.])(?:([+\-−–－])\s*+)?(\d++)(?![\d.]*\d)")
_DIGITS = 20  # more make no number that counts, and Python reads no more than 4,300
_THOUGHT = re.compile(r"\A.*</think>", re.DOTALL)
_FENCE = re.compile(r"^[^\S\n]*```.*$", re.MULTILINE)


class Field(NamedTuple):
    """One thing to fill in: its name, the words that lead to it, and whether it is a number."""

    name: str
    heading: str
    number: bool


class Form(NamedTuple):
    """A script as text to fill in."""

    text: str
    fields: tuple[Field, ...]

    @property
    def wanted(self) -> Field:
        """The field that an answer must have: the last one."""
        return self.fields[-1]


class Filled(NamedTuple):
    """An answer: what every free field says ("" where it is missing), and the change, if the form asks for one."""

    texts: dict[str, str]
    change: int


class Unreadable(ValueError):
    """An answer without the field that counts; `texts` holds what else it says."""

    def __init__(self, missing: str, texts: dict[str, str] | None = None):
        super().__init__(f"no usable {missing}")
        self.texts = texts or {}


def make_form(script: Sequence[Part], emotion: int, band: str) -> Form:
    """The form of a parsed script with its slots filled."""
    slots = {"emotion": str(emotion), "band": band}
    text, fields = "", []
    for part in script:
        if part.kind in ("text", "slot"):
            text += part.value if part.kind == "text" else slots[part.value]
            continue
        start = text.rfind("\n") + 1
        heading = text[start:] or text.rstrip("\n").rpartition("\n")[2]
        fields.append(Field(part.value, heading.strip(), part.kind == "choose"))
        text = f"{text[:start]}[{part.value}] {text[start:]}".rstrip() + "\n"
    return Form(text.strip(), tuple(fields))


def read_form(form: Form, answer: str) -> Filled:
    """What a model filled in.

    Raises:
        Unreadable: the change is no whole number from -10 to 10, or the reply is empty.
    """
    raw = behind_marks(form, answer)
    texts = {field.name: one_line(raw[field.name], form) for field in form.fields if not field.number}
    wanted = form.wanted
    if wanted.number:
        return Filled(texts, _change(_NUMBER.match(raw[wanted.name]), wanted, texts))
    if not texts[wanted.name]:
        raise Unreadable(f"[{wanted.name}]", texts)
    return Filled(texts, 0)


def plain(answer: str) -> str:
    """An answer without its thoughts and fences."""
    return _FENCE.sub("", _THOUGHT.sub("", answer)).replace("\r\n", "\n")


def behind_marks(form: Form, answer: str) -> dict[str, str]:
    """What stands behind each field's mark (or else its heading), up to the next one's; "" where it is missing."""
    answer = plain(answer)
    spans = _spans(form, answer)
    return {field.name: _between(answer, spans, field.name) for field in form.fields}


def read_wanted(form: Form, texts: dict[str, str], answer: str) -> Filled:
    """What a model answered when it was asked for the wanted field alone, with the texts that it gave before.

    Raises:
        Unreadable: there is still none: for a change not exactly one number, or one that it can't be.
    """
    try:
        filled = read_form(form, answer)  # some write the whole form again
        return Filled({name: text or texts.get(name, "") for name, text in filled.texts.items()}, filled.change)
    except Unreadable:
        pass
    wanted = form.wanted
    answer = plain(answer)
    answer = re.sub(rf"\A\W*{_loosely(wanted.heading)}", "", answer, flags=re.IGNORECASE)
    if wanted.number:
        numbers = list(_ALONE.finditer(answer))
        return Filled(texts, _change(numbers[0] if len(numbers) == 1 else None, wanted, texts))
    reply = one_line(answer, form)
    if not reply or answer.lstrip().startswith("["):
        raise Unreadable(f"[{wanted.name}]", texts)
    return Filled(texts | {wanted.name: reply}, 0)


def _spans(form: Form, answer: str) -> dict[str, tuple[int, int]]:
    """Where each field's mark (or else its heading) begins and ends; fields that are not there have none."""
    spans = {}
    for field in form.fields:
        mark = rf"^[^\w\n\[［【]*[\[［【]\s*{field.name}\s*[\]］】]"
        heading = _loosely(field.heading)
        for pattern in (rf"{mark}(?:[^\w\n]*{heading})?", rf"^[^\w\n]*{heading}") if field.heading else (mark,):
            match = re.search(pattern, answer, re.MULTILINE | re.IGNORECASE)
            if match:
                spans[field.name] = match.span()
                break
    return spans


def _loosely(heading: str) -> str:
    """A pattern for a heading whatever its white space and closing colon."""
    words = heading.rstrip(" ：:").split()
    return r"\s+".join(re.escape(word) for word in words) + r"[ \t]*[：:]?"


def _between(answer: str, spans: dict[str, tuple[int, int]], name: str) -> str:
    """The text from a field's heading to the next field's; "" where it is missing."""
    if name not in spans:
        return ""
    end = spans[name][1]
    return answer[end : min((start for start, _ in spans.values() if start >= end), default=len(answer))]


def _change(match: re.Match[str] | None, field: Field, texts: dict[str, str]) -> int:
    number = (
        None
        if match is None or len(match[2]) > _DIGITS
        else int(match[2]) * (-1 if match[1] in ("-", "−", "–", "－") else 1)
    )
    if number not in CHANGES:
        raise Unreadable(f"[{field.name}], a whole number from {CHANGES[0]} to +{CHANGES[-1]}", texts)
    assert number is not None
    return number


def one_line(text: str, form: Form) -> str:
    """One line, as on the device; lines that only repeat the form are left out."""
    known = {line.strip() for line in form.text.split("\n")}
    lines = [line.strip(" \t*") for line in text.split("\n")]
    line = " ".join(line for line in lines if line and line not in known)
    return re.sub(r"^[\s：:*]+", "", line).strip()
