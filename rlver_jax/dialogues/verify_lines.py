"""Lines of a dialogue log that is not trusted: unreadable lines are reported with their number."""

import json
import os
import re
from collections.abc import Iterator
from typing import Any, NamedTuple

from rlver_jax.dialogues.log import Record, lines_of, record_faults
from rlver_jax.text.strict_json import half_character, repeats

_NUMBER = re.compile(rb'\s*\{\s*"dialogue"\s*:\s*(\d{1,10})\s*[,}]')


class Line(NamedTuple):
    """One line: a dialogue, or the fault that keeps it from being one."""

    number: int  # in its file, from 1
    record: Record | None
    fault: str
    dialogue: int | None  # its number, where that can be read


def read_log(path: str | os.PathLike[str]) -> list[Line]:
    """All lines of a log.

    Raises:
        DialogueLogError: no such file.
    """
    return [_line(line, number) for number, line in enumerate(lines_of(path), start=1)]


def _line(line: bytes, number: int) -> Line:
    number_match = _NUMBER.match(line)
    dialogue = int(number_match[1]) if number_match else None
    if not line.strip():
        return Line(number, None, "is blank, expected a dialogue", None)
    try:
        record = _parse(line)
    except (ValueError, RecursionError) as error:
        return Line(number, None, f"not a JSON object ({error})", dialogue)
    fault = next(record_faults(record), "")
    return Line(number, None if fault else record, fault, dialogue)


def _parse(line: bytes) -> Any:
    """The JSON value of a line; ValueError where there is none that means one thing alone."""
    value = json.loads(line.decode("utf-8"), object_pairs_hook=_object, parse_constant=_constant)
    if b"\\u" in line and (text := next(_half_characters(value), None)) is not None:
        raise ValueError(f"{text[:60]!r} holds half of a surrogate pair")
    return value


def _object(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    """json would silently keep the last of several fields with one name."""
    fields = dict(pairs)
    if len(fields) < len(pairs):
        raise ValueError(f"field {next(repeats(pairs))[:60]!r} twice in an object")
    return fields


def _constant(name: str) -> Any:
    raise ValueError(f"{name} is no number of JSON")


def _half_characters(value: Any) -> Iterator[str]:
    """Texts that no encoding can hold."""
    rest = [value]
    while rest:
        one = rest.pop()
        if isinstance(one, dict):
            rest += [*one, *one.values()]
        elif isinstance(one, list):
            rest += one
        elif isinstance(one, str) and half_character(one):
            yield one
