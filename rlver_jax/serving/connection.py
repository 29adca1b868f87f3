"""Connections: uvicorn's, with time limits for all that a client must do, and a limit on their number."""

import asyncio
import json
from typing import Any, ClassVar

import h11
import uvicorn
from uvicorn.protocols.http.h11_impl import H11Protocol

from rlver_jax.serving.errors import ProtocolError
from rlver_jax.serving.request_bodies import BODY_S, MAX_BODY

MAX_CONNECTIONS = 512
MAX_WIRE = 4 * MAX_BODY  # bytes that come in for one request, chunks' frames and what is thrown away included
BYTES_AT_ONCE = 1 << 16  # that are parsed in one turn of the event loop
CHUNKED_AT_ONCE = 1 << 11  # of a body in chunks: they may be hundreds of tiny ones


class Connection(H11Protocol):
    """One client's connection; closed when the client takes too long."""

    # Seconds for: all headers; the body (the application says 408 before that); the answer's next 64 KiB to be read;
    # the next request; the last bytes before it is closed.
    patience: ClassVar[dict[str, float]] = {
        "headers": 20.0,
        "body": BODY_S + 5,
        "reading": 60.0,
        "idle": 75.0,
        "closing": 10.0,
    }

    def __init__(self, *args: Any, **kwargs: Any):
        super().__init__(*args, **kwargs)
        self._stage: tuple[str, object] | None = None
        self._timer: asyncio.TimerHandle | None = None
        self._unread, self._taken, self._writes = bytearray(), 0, True

    def connection_made(self, transport: asyncio.Transport) -> None:  # type: ignore[override]
        """Starts the clock."""
        super().connection_made(transport)
        if len(self.connections) > MAX_CONNECTIONS:
            self.app = _too_many
        self._reset_clock()

    def connection_lost(self, exc: Exception | None) -> None:
        """Stops it."""
        self._unread.clear()
        super().connection_lost(exc)
        if self._timer is not None:
            self._timer.cancel()

    def data_received(self, data: bytes) -> None:
        """Takes bytes part by part, so that others' turns come in between."""
        self._taken += len(data)
        if self._taken > MAX_WIRE:
            self.transport.abort()
            return
        feeding = bool(self._unread)
        self._unread += data
        if not feeding:
            self._feed()

    def _feed(self) -> None:
        chunked = any(name == b"transfer-encoding" for name, _ in self.headers or ())
        size = CHUNKED_AT_ONCE if chunked else BYTES_AT_ONCE
        part = bytes(self._unread[:size])
        del self._unread[:size]
        if part and not self.transport.is_closing():
            super().data_received(part)
            self._reset_clock()
        if self._unread:
            self.loop.call_soon(self._feed)

    def on_response_complete(self) -> None:
        """Starts the clock for the next request."""
        self._taken = len(self._unread)
        super().on_response_complete()
        self._reset_clock()

    def pause_writing(self) -> None:
        """The client doesn't read what it asked for."""
        super().pause_writing()
        self._writes = False
        self._reset_clock()

    def resume_writing(self) -> None:
        """It does again."""
        super().resume_writing()
        self._writes = True
        self._reset_clock()

    def send_400_response(self, msg: str) -> None:
        """What isn't HTTP gets the protocol's error object too, unless an answer has begun."""
        if self.conn.our_state not in (h11.IDLE, h11.SEND_RESPONSE):
            self.transport.abort()
            return
        message = "this is no HTTP/1.1 request, or one with more than 16 KiB of headers"
        body = json.dumps(ProtocolError(400, message, code="invalid_http").body).encode()
        headers = {"content-type": "application/json", "content-length": str(len(body)), "connection": "close"}
        response = h11.Response(status_code=400, headers=list(headers.items()), reason=b"Bad Request")
        for event in (response, h11.Data(data=body), h11.EndOfMessage()):
            self.transport.write(self.conn.send(event) or b"")
        self.transport.close()

    def _reset_clock(self) -> None:
        """Restarts the clock where something else is awaited of the client than before."""
        stage = self._awaited(), self.cycle
        if stage == self._stage:
            return
        self._stage = stage
        if self._timer is not None:
            self._timer.cancel()
        seconds = self.patience.get(stage[0])
        self._timer = None if seconds is None else self.loop.call_later(seconds, self.transport.abort)

    def _awaited(self) -> str:
        if self.transport.is_closing():
            return "closing"
        if not self._writes:
            return "reading"
        if self.cycle is not None and not self.cycle.response_complete:
            return "body" if self.cycle.more_body else "nothing"
        if self.conn.their_state is h11.SEND_BODY:  # answered before the body was read
            return "body"
        return "headers" if self.cycle is None or self.conn.trailing_data[0] else "idle"


async def _too_many(scope: Any, receive: Any, send: Any) -> None:
    """The answer on connections above the limit."""
    error = ProtocolError(503, f"more than {MAX_CONNECTIONS} connections; try again", code="too_many_connections")
    headers = [(b"content-type", b"application/json"), (b"retry-after", b"1"), (b"connection", b"close")]
    await send({"type": "http.response.start", "status": 503, "headers": headers})
    await send({"type": "http.response.body", "body": json.dumps(error.body).encode()})


def make_server(app: Any) -> uvicorn.Server:
    """A server of an ASGI application over such connections."""
    return uvicorn.Server(
        uvicorn.Config(
            app,
            http=Connection,
            ws="none",
            lifespan="off",
            proxy_headers=False,
            log_level="warning",
            timeout_keep_alive=int(Connection.patience["idle"]),
            timeout_graceful_shutdown=5,
        )
    )
