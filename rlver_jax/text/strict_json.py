"""What Python's json takes, though no two readers need agree on it: a name twice in an object, half a character."""

import re
from collections.abc import Iterator
from typing import Any

_HALF = re.compile("[\ud800-\udfff]")


def repeats(pairs: list[tuple[str, Any]]) -> Iterator[str]:
    """Names of an object (`object_pairs_hook`) that have stood before in it: json silently keeps the last value."""
    seen = set()
    for name, _ in pairs:
        if name in seen:
            yield name
        seen.add(name)


def half_character(text: str) -> str:
    """The first half of a surrogate pair in a text, which has no UTF-8 and no tokens; empty: there is none."""
    match = None if text.isascii() else _HALF.search(text)
    return match[0] if match else ""
