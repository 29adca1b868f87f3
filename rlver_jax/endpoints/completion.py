"""Chat completions as servers send them, and what is kept of one: plain texts and counts, without surprises.

What is kept is itself a chat completion, with the fields that are read and no other, so that it can be written to any
file and read again: no half characters, no control characters, no numbers beyond reason, no API key.
"""

import json
import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

from rlver_jax.config.credentials import Secrets

_CONTROLS = re.compile(r"[\x00-\x08\x0b\x0c\x0e-\x1f\x7f-\x9f]")  # all but tab and line ends
_LONGEST_NAME = 200  # characters of a model's name
_MOST_PARTS = 1_000_000  # commas and brackets: each may become an object of some 80 bytes
_DIGITS = 30  # more are beyond any number that is read, and Python refuses 4,300
_MOST = 10**9  # no model reads or writes as many tokens at once; their sums fit any counter


def count_of(value: Any) -> int:
    """A count as a server gave it; 0 where it is none, or beyond reason."""
    whole = isinstance(value, int | float) and not isinstance(value, bool) and 0 <= value <= _MOST
    return int(value) if whole and value == int(value) else 0


class NoCompletion(ValueError):
    """What came instead of a chat completion."""


@dataclass(frozen=True)
class Answer:
    """A model's answer; `reasoning` where the endpoint separates it. Tokens are the endpoint's own count."""

    text: str
    reasoning: str
    prompt_tokens: int
    completion_tokens: int
    model: str  # as the endpoint calls what really answered
    cut: bool  # by max_tokens


def clean(text: str) -> str:
    """The text with halves of characters joined or else replaced, and without control characters."""
    if not text.isascii():
        text = text.encode("utf-16-le", "surrogatepass").decode("utf-16-le", "replace")
    return _CONTROLS.sub("", text)


def parsed(text: str) -> Any:
    """A JSON value; None where it is none, or nested too deep."""
    if text.count(",") + text.count("[") + text.count("{") > _MOST_PARTS:
        return None
    try:
        return json.loads(text.removeprefix("\ufeff"), parse_int=_whole, strict=False)
    except (ValueError, RecursionError):
        return None


def _whole(digits: str) -> int | float:
    return int(digits) if len(digits) <= _DIGITS else float(digits)


def completion_of(response: Any, secrets: Secrets) -> dict[str, Any]:
    """What is kept of a chat completion.

    The parts of a message are joined, without thoughts; where there are several choices, the first is taken; a refusal
    in a field of its own is the text. Counts that cannot be are 0.

    Raises:
        NoCompletion: there is no message in it.
    """
    try:
        choice = response["choices"][0]
        message = choice["message"]
        content = message.get("content")
    except (KeyError, IndexError, TypeError, AttributeError):
        raise NoCompletion("a body that is no chat completion") from None
    if not isinstance(content, str | list | None):
        raise NoCompletion(f"a chat completion whose content is {type(content).__name__}, not text")
    text, thoughts = (content or "", "") if not isinstance(content, list) else _joined(content)
    reasoning = _first_text(message, ("reasoning_content", "reasoning")) or thoughts
    usage, reason = response.get("usage"), choice.get("finish_reason")
    tokens = {name: count_of(usage.get(name) if isinstance(usage, dict) else None) for name in _TOKENS}
    tidy = lambda text: secrets.hide(clean(text))  # noqa: E731
    return {
        "model": " ".join(tidy(_first_text(response, ("model",))).split())[:_LONGEST_NAME],
        "choices": [
            {
                "index": 0,
                "message": {
                    "role": "assistant",
                    "content": tidy(text or _first_text(message, ("refusal",))),
                    "reasoning_content": tidy(reasoning),
                },
                "finish_reason": reason if reason in ("stop", "length") else None,
            }
        ],
        "usage": tokens,
    }


_TOKENS = ("prompt_tokens", "completion_tokens")


def answer_of(response: Mapping[str, Any]) -> Answer:
    """What `completion_of` has kept."""
    (choice,), message = response["choices"], response["choices"][0]["message"]
    return Answer(
        text=message["content"],
        reasoning=message["reasoning_content"],
        **response["usage"],
        model=response["model"],
        cut=choice["finish_reason"] == "length",
    )


def _first_text(obj: Mapping[str, Any], names: tuple[str, ...]) -> str:
    return next((value for name in names if isinstance(value := obj.get(name), str) and value), "")


def _joined(parts: list[Any]) -> tuple[str, str]:
    """(text, thoughts) of a message in parts: texts, or objects that hold one.

    Raises:
        NoCompletion: one of them is neither.
    """
    texts: list[str] = []
    thoughts: list[str] = []
    for part in parts:
        if isinstance(part, str):
            texts.append(part)
        elif isinstance(part, dict) and isinstance(part.get("thinking"), str | list):
            thoughts += _texts(part["thinking"])
        elif isinstance(part, dict) and isinstance(text := part.get("text", part.get("refusal")), str):
            texts.append(text)
        else:
            raise NoCompletion("a chat completion with a part that is no text")
    return "".join(texts), "".join(thoughts)


def _texts(thinking: str | list[Any]) -> Iterator[str]:
    """Of a thought, which may be in parts itself."""
    for part in [thinking] if isinstance(thinking, str) else thinking:
        text = part.get("text") if isinstance(part, dict) else part
        if isinstance(text, str):
            yield text
