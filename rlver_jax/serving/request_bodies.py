"""Bodies of requests: reading them, limits on them, and the threads that parse them.

The event loop has to answer others meanwhile. So work on a body runs in a thread, on one large body at a time, and no
single call of it may hold Python's lock for long: what JSON holds is counted before any of it is built.
"""

import asyncio
import contextlib
import json
import re
from collections.abc import AsyncIterator, Callable
from typing import Any, TypeVar

from starlette.requests import ClientDisconnect, Request

from rlver_jax.serving.errors import ProtocolError, quoted
from rlver_jax.text.strict_json import repeats

MAX_BODY = 4 << 20  # bytes of a request
MAX_HELD = 64 << 20  # bytes of all bodies that are being read or worked on
MAX_VALUES = 1 << 16  # strings in a body, names among them, and as many objects and lists
MAX_COMMAS = 1 << 18  # nearly all that numbers need: token ids
MAX_NAMES = 512  # fields of one object
BODY_S = 60.0  # seconds that a body may take to arrive
SLICE = 256 << 10  # bytes that are counted in one go
SMALL = 64 << 10  # bytes that are worked on at once, whatever they hold
REST_S = 0.02  # seconds between large bodies, in which those who wait for Python's lock get all their turns

T = TypeVar("T")
_REST_OF_ESCAPE = re.compile(rb"\\*.?", re.DOTALL)


class Bodies:
    """The request bodies that a server holds at the moment."""

    def __init__(self):
        self._held = 0
        self._large = asyncio.Semaphore(1)

    @contextlib.asynccontextmanager
    async def read(self, request: Request) -> AsyncIterator[bytes]:
        """The body of a request, counted as held within the context.

        Raises:
            ProtocolError: its type, its size, too many others at once, or it takes too long.
        """
        _check_headers(request)
        body = bytearray()
        try:
            async with asyncio.timeout(BODY_S):
                async for part in request.stream():
                    body += part
                    self._held += len(part)
                    if len(body) > MAX_BODY:
                        raise _too_large()
                    if self._held > MAX_HELD:
                        raise ProtocolError(429, "too many large bodies at once; try again", code="queue_full")
            yield bytes(body)
        except TimeoutError:
            message = f"the body has not arrived within {BODY_S:g} seconds; send it faster"
            raise ProtocolError(408, message, code="request_timeout") from None
        except ClientDisconnect:
            raise ProtocolError(499, "the client has gone") from None
        finally:
            self._held -= len(body)

    async def work(self, size: int, call: Callable[[], T]) -> T:
        """The result of `call` on a body of `size` bytes, in a thread; large bodies one after the other."""
        if size <= SMALL:
            return await asyncio.to_thread(call)
        async with self._large:
            try:
                return await asyncio.to_thread(call)
            finally:
                await asyncio.sleep(REST_S)


def _too_large() -> ProtocolError:
    return ProtocolError(413, f"the body has more than {MAX_BODY} bytes; send less", code="request_too_large")


def _check_headers(request: Request) -> None:
    """Refuses what the headers already rule out. Another web page's form can't send JSON to this machine."""
    kind = request.headers.get("content-type", "").partition(";")[0].strip().lower()
    if kind != "application/json":
        received = quoted(kind) if kind else "missing"
        raise ProtocolError(415, f"content-type is {received}; send application/json", code="invalid_json")
    length = request.headers.get("content-length", "")
    if length.isdecimal() and (len(length) > 20 or int(length) > MAX_BODY):
        raise _too_large()


def json_object(body: bytes) -> dict[str, Any]:
    """The object that a body holds. A field that is null isn't there: null asks for nothing.

    Raises:
        ProtocolError: it isn't one JSON object, a field stands twice in one, or there is too much in it.
    """
    if len(body) > SMALL:
        _check_amount(body)
    try:
        value = json.loads(body.decode("utf-8"), parse_constant=_refuse_constant, object_pairs_hook=_fields)
    except UnicodeDecodeError as error:
        message = f"the body is not JSON (no UTF-8 at byte {error.start}); send one JSON object in UTF-8"
        raise ProtocolError(400, message, code="invalid_json") from None
    except (ValueError, RecursionError) as error:
        why = "a number has thousands of digits" if "int_max_str_digits" in str(error) else str(error)
        raise ProtocolError(400, f"the body is not JSON ({why}); send one JSON object", code="invalid_json") from None
    if not isinstance(value, dict):
        raise ProtocolError(400, f"the body is a JSON {type(value).__name__}; send one object", code="invalid_json")
    return value


def _check_amount(body: bytes) -> None:
    """Counts what would be built: its text is looked at slice by slice, as far as it is allowed to go."""
    at, inside, quotes, containers, commas = 0, False, 0, 0, 0
    while at < len(body):
        end = at + SLICE
        if body[end - 1 : end] == b"\\":  # an escape stays whole
            end = _REST_OF_ESCAPE.match(body, end).end()  # type: ignore[union-attr]
        parts = body[at:end].replace(rb"\\", b"").replace(rb"\"", b"").split(b'"')
        outside = b"".join(parts[inside::2])  # of strings
        quotes, inside = quotes + len(parts) - 1, inside ^ (len(parts) % 2 == 0)
        containers += outside.count(b"{") + outside.count(b"[")
        commas += outside.count(b",")
        limits = {
            f"{MAX_VALUES} strings": quotes <= 2 * MAX_VALUES,
            f"{MAX_VALUES} objects and lists": containers <= MAX_VALUES,
            f"{MAX_COMMAS} values": commas < MAX_COMMAS,
        }
        if exceeded := [limit for limit, holds in limits.items() if not holds]:
            message = (
                f"the body is not JSON of a size that is read: it holds more than {exceeded[0]}; send less at once"
            )
            raise ProtocolError(400, message, code="invalid_json")
        at = end


def _fields(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    if len(pairs) > MAX_NAMES:
        raise ValueError(f"an object of {len(pairs)} fields; {MAX_NAMES} are read")
    fields = dict(pairs)
    if len(fields) < len(pairs):
        raise ValueError(f"the field {quoted(next(repeats(pairs)))} stands twice in one object")
    return {name: value for name, value in pairs if value is not None}


def _refuse_constant(name: str) -> float:
    raise ValueError(f"{name} is no JSON number")
