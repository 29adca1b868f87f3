"""Numbers of a logged dialogue that figures can be made of. JSON has others: 1e999, NaN, a text in a list."""

from collections.abc import Iterator, Mapping
from typing import Any

MOST = 10**6  # points that a log may hold; an emotion has 100


def number_faults(record: Mapping[str, Any]) -> Iterator[str]:
    """Where a dialogue whose fields have their types (`dialogue_log.record_faults`) has a number that is none."""
    wholes = {name: record[name] for name in ("dialogue", "emotion", "initial_emotion")}
    wholes |= {f"emotions[{i}]": emotion for i, emotion in enumerate(record["emotions"])}
    for index, message in enumerate(record["messages"]):
        wholes |= {f"messages[{index}].{name}": message[name] for name in ("emotion", "change") if name in message}
    for name, value in wholes.items():
        most = 2**63 if name == "dialogue" else MOST
        if not isinstance(value, int) or isinstance(value, bool) or abs(value) > most:
            yield f"{name} is {_short(value)}, expected a whole number"
    if not -MOST <= record["reward"] <= MOST:
        yield f"reward is {_short(record['reward'])}, expected a number"


def is_number(value: Any) -> bool:
    """Whether arrays can hold it as a number."""
    number = isinstance(value, int | float) and not isinstance(value, bool)
    return number and -1e300 < value < 1e300


def _short(value: Any) -> str:
    if isinstance(value, int):
        return f"{value}" if abs(value) < 10**30 else "of more than thirty digits"
    return repr(value)[:60]
