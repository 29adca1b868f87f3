"""Numbers of a logged dialogue that statistics can use. JSON has others: 1e999, NaN, a text in a list."""

from collections.abc import Iterator, Mapping
from typing import Any

MOST = 10**6  # points that a log may hold; an emotion has 100


def number_faults(record: Mapping[str, Any]) -> Iterator[str]:
    """Where a dialogue whose fields have their types (`log.record_faults`) has a number that is none."""
    wholes = {name: record[name] for name in ("dialogue", "emotion", "initial_emotion")}
    wholes |= {f"emotions[{i}]": emotion for i, emotion in enumerate(record["emotions"])}
    for index, message in enumerate(record["messages"]):
        wholes |= {f"messages[{index}].{name}": message[name] for name in ("emotion", "change") if name in message}
    for name, value in wholes.items():
        most = 2**63 if name == "dialogue" else MOST
        if not isinstance(value, int) or isinstance(value, bool) or abs(value) > most:
            yield f"{name} is {short(value)}, expected a whole number"
    if not -MOST <= record["reward"] <= MOST:
        yield f"reward is {short(record['reward'])}, expected a number"


def is_number(value: Any) -> bool:
    """Whether it is a number that arrays can hold."""
    number = isinstance(value, int | float) and not isinstance(value, bool)
    return number and -1e300 < value < 1e300


def short(value: Any) -> str:
    """A value of a log in a message; of a nested one, which may be deep, only its kind."""
    if isinstance(value, dict) or (isinstance(value, list) and not all(isinstance(x, str) for x in value)):
        return "an object" if isinstance(value, dict) else "a list"
    if isinstance(value, int) and not isinstance(value, bool) and abs(value) >= 10**30:
        return "a number of many digits"
    text = repr(value)
    return "null" if value is None else text if len(text) <= 100 else text[:100] + "…"
