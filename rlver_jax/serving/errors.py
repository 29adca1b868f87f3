"""Errors of OpenAI's protocol, and how they quote what a client has sent: short, and in characters that print."""

import reprlib
from typing import Any

MAX_MESSAGE = 500  # characters of an error's message
MAX_QUOTE = 80  # characters of a value in it

_REPR = reprlib.Repr()
_REPR.maxstring = _REPR.maxother = _REPR.maxlong = MAX_QUOTE - 10
_REPR.maxlist = _REPR.maxdict = 4
_REPR.maxlevel = 3


class ProtocolError(Exception):
    """Becomes a response with the protocol's error object."""

    def __init__(self, status: int, message: str, *, code: str | None = None, param: str | None = None):
        message = printable(message, MAX_MESSAGE)
        super().__init__(message)
        kinds = {401: "authentication_error", 429: "rate_limit_error"}
        kind = kinds.get(status, "invalid_request_error" if status < 500 else "server_error")
        param = None if param is None else printable(param, MAX_QUOTE)
        self.status, self.body = status, {"error": {"message": message, "type": kind, "param": param, "code": code}}


def printable(text: str, most: int) -> str:
    """At most so many characters of a text; of what doesn't print (controls, lone surrogates) the escapes."""
    text = text if len(text) <= most else text[: most - 1] + "…"
    return "".join(c if c.isprintable() else c.encode("unicode_escape").decode() for c in text)


def quoted(value: Any) -> str:
    """A JSON value as an error quotes it; as quick for a large one."""
    return printable(_REPR.repr(value), MAX_QUOTE)
