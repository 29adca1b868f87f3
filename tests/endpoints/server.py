"""A real HTTP server on loopback that speaks the chat completions protocol, answers by a rule, and fails on request.

Its rule knows nothing of the package: it fills in whatever `[mark]` lines the last message holds, and otherwise talks.
"""

import hashlib
import json
import random
import re
import threading
from collections.abc import Callable
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

from tests.in_background import InBackground

FAULTS = ("500", "429", "drop", "garbage")


def digest(*parts) -> int:
    return int(hashlib.sha256(json.dumps(parts, ensure_ascii=False).encode()).hexdigest()[:12], 16)


def rule(body: dict) -> str:
    """An answer that depends on the whole request and on nothing else."""
    number, last = digest(body["messages"], body["temperature"], body.get("seed")), body["messages"][-1]["content"]
    marks = re.findall(r"^\[(\w+)\] *(.*)$", last, re.MULTILINE)
    if marks:
        fill = lambda name, i: f"{number % 21 - 10:+d}" if name == "change" else f"words {(number >> i) % 1000}"  # noqa: E731
        return "\n".join(f"[{name}] {heading} {fill(name, i)}" for i, (name, heading) in enumerate(marks))
    reply = f"I hear you, {number % 100000}."
    think = any("<think>" in m["content"] or "Think" in m["content"] for m in body["messages"][:1])
    return f"<think>\nWhat now? {number % 77}\n</think>\n\n{reply}" if think else reply


class ChatServer(InBackground):
    """Use as a context manager.

    Attributes:
        answer: text, or a whole message object, for a request's body.
        fault: name of a fault, or "", for the n-th request; see `_serve`.
        bodies: of all requests that were answered well, in order; `count`: of all requests; `most`: at once.
        headers: sent with each good answer; `key`: the API key that is wanted, or "".
        whole: makes another object, or bytes, of a whole completion.
        raw: where set, it answers: gets the handler, and writes to its `wfile` what it likes.
    """

    def __init__(self, answer: Callable[[dict], str | dict] = rule, fault: Callable[[int], str] = lambda n: ""):
        self.answer, self.fault, self.key = answer, fault, ""
        self.bodies, self.count, self.most, self.seen_keys = [], 0, 0, set()
        self.headers: dict[str, str] = {}
        self.before = lambda: None  # called before each answer
        self.whole: Callable[[dict], dict | bytes] = lambda whole: whole
        self.raw: Callable[[BaseHTTPRequestHandler], None] | None = None
        self._now, self._lock = 0, threading.Lock()
        outer = self

        class Handler(BaseHTTPRequestHandler):
            protocol_version = "HTTP/1.1"

            def do_POST(self):
                outer._serve(self)

            def log_message(self, *args):
                pass

        class Server(ThreadingHTTPServer):
            daemon_threads = True
            request_queue_size = 128

            def handle_error(self, request, client_address):
                pass  # a client that was killed

        super().__init__(Server(("127.0.0.1", 0), Handler))
        self.url = f"http://127.0.0.1:{self._server.server_port}/v1"

    def _serve(self, handler):
        raw = handler.rfile.read(int(handler.headers["Content-Length"]))
        with self._lock:
            self.count += 1
            self._now += 1
            self.most = max(self.most, self._now)
            fault = self.fault(self.count)
        try:
            self.before()
            self._respond(handler, json.loads(raw), fault)
        finally:
            with self._lock:
                self._now -= 1

    def _respond(self, handler, body, fault):
        sent = handler.headers.get("Authorization", "")
        if self.raw:
            handler.close_connection = True
            return self.raw(handler)
        if fault == "drop":  # half a response, then nothing
            handler.wfile.write(b'HTTP/1.1 200 OK\r\nContent-Length: 500\r\n\r\n{"choices": [')
            handler.close_connection = True
        elif fault == "garbage":
            self._send(handler, 200, b"<html>\xff\xfe bad gateway, you sent " + sent.encode() + b"</html>")
        elif fault.isdigit():
            error = {"error": {"message": f"no luck with {sent}", "code": "x"}}
            self._send(handler, int(fault), json.dumps(error).encode(), {"Retry-After": "0"} if fault == "429" else {})
        elif fault:  # "status message"
            status, _, message = fault.partition(" ")
            self._send(handler, int(status), json.dumps({"error": {"message": message}}).encode())
        elif self.key and sent != f"Bearer {self.key}":
            self._send(handler, 401, json.dumps({"error": {"message": f"Incorrect API key: {sent}"}}).encode())
        else:
            reply = self.answer(body)
            message = {"role": "assistant", **({"content": reply} if isinstance(reply, str) else reply)}
            usage = {
                "prompt_tokens": sum(len(m["content"].split()) for m in body["messages"]),
                "completion_tokens": len((message["content"] or "").split()),
            }
            whole = {"id": "x", "object": "chat.completion", "model": "rule-1", "usage": usage}
            whole["choices"] = [{"index": 0, "message": message, "finish_reason": "stop"}]
            with self._lock:
                self.bodies.append(body)
            whole = self.whole(whole)
            self._send(handler, 200, whole if isinstance(whole, bytes) else json.dumps(whole).encode(), self.headers)
        return None

    def _send(self, handler, status, body, headers=None):
        handler.send_response(status)
        for name, value in {"Content-Type": "application/json", "Content-Length": len(body), **(headers or {})}.items():
            handler.send_header(name, str(value))
        handler.end_headers()
        handler.wfile.write(body)


def one_in_five(seed: int) -> Callable[[int], str]:
    """A fifth of all requests fails, each in one of four ways."""
    draw = random.Random(seed)
    return lambda n: draw.choice(FAULTS) if draw.random() < 0.2 else ""
