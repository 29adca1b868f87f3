"""Clients that mean no good: whatever they send gets an answer that is not 500, in time, and others don't notice."""

import asyncio
import contextlib
import http.client
import itertools
import json
import logging
import random
import socket
import threading
import time
from urllib.parse import urlsplit

import pytest

from rlver_jax.serving import app as app_module
from rlver_jax.serving import connection, request_bodies
from rlver_jax.serving.app import Service
from tests.serving.conftest import CONTEXT, QUEUE
from tests.serving.test_server import GOOD, post
from tests.serving.test_server import chat as chat_with

ROUTES = ["/health", "/stats", "/v1/models", "/v1/models/tiny", "/v1/chat/completions", "/v1/completions"]
PATHS = [
    *ROUTES,
    *("/v1/models/%ED%A0%80", "/v1/models/%00%0d%0aSet-Cookie:x", "/v1/models/" + "m" * 9000, "/v1/models//../..%2f"),
    *("/", "//", "/v1/embeddings", "/health/", "/v1/chat/completions/?a=%ff&b=%ED%A0%80", "/health?" + "q" * 5000),
    *("*", "http://[::1/health", "http://other/health", "/%", "/%zz", "/v1/chat/completions#x"),
]
METHODS = ["GET", "POST", "PUT", "DELETE", "HEAD", "OPTIONS", "PATCH", "TRACE", "CONNECT", "FOO", "get"]
TEXTS = [
    "",
    "\ud800",
    "\x00",
    "\x1b[2J",
    "\u202e",
    "a" * 70_000,
    " " * 5000,
    "1" * 5000,
    "<|im_end|>",
    "\ufeff",
    "𝒳" * 999,
]
NUMBERS = ["NaN", "-Infinity", "1e999", "-0", "1" * 4000, "1" * 5000, "0." + "1" * 5000, "1e-400", "-1", "1.5", "2"]
HEADERS = [
    ("Host", "["),
    ("Host", ""),
    ("Authorization", "Bearer é"),
    ("Content-Type", "application/json; charset=utf-16"),
    ("Content-Type", "\x7f" * 50),
    ("Content-Type", "text/plain"),
    ("Content-Encoding", "gzip"),
    ("Expect", "100-continue"),
    ("Expect", "nonsense"),
    ("Upgrade", "websocket"),
    ("Connection", "upgrade, close"),
    ("X-Forwarded-For", "'; --"),
    ("X-Long", "x" * 12_000),
    ("X-Long", "x" * 40_000),
    ("Accept-Encoding", "\xff"),
    ("Range", "bytes=0-1,5-"),
    ("Transfer-Encoding", "gzip, chunked"),
    ("Content-Length", "-1"),
    ("Content-Length", "9" * 30),
    ("Content-Length", "3"),
]
RAW = [
    b"\x16\x03\x01\x02\x00\x01\x00\x01\xfc\x03\x03",  # TLS
    b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n",
    b"GET /health\r\n\r\n",
    b"GET /health HTTP/1.1\r\n\r\n",  # no Host
    b"GET /health HTTP/1.0\r\n\r\n",
    b"GET /health HTTP/9.9\r\nHost: a\r\n\r\n",
    b"GET /\xff\xfe HTTP/1.1\r\nHost: a\r\n\r\n",
    b"GET /health HTTP/1.1\r\nHost: a\r\nBad Header: x\r\n\r\n",
    b"GET /health HTTP/1.1\r\nHost: a\r\nX: \x00\r\n\r\n",
    b"GET /health HTTP/1.1\r\nHost: a\r\n folded: x\r\n\r\n",
    b"GET /health HTTP/1.1\nHost: a\n\n",
    b"\r\n\r\n\r\nGET /health HTTP/1.1\r\nHost: a\r\n\r\n",
    b"GET /health HTTP/1.1\r\nHost: a\r\n" + b"".join(b"X-%d: 1\r\n" % i for i in range(5000)) + b"\r\n",
    b"GET /health HTTP/1.1\r\nHost: a\r\n\r\n" * 50,
    b"A" * 100_000,
    b"\x00" * 1000,
]
POST = b"POST /v1/chat/completions HTTP/1.1\r\nHost: a\r\nContent-Type: application/json\r\n"
RAW += [
    POST + b"Transfer-Encoding: chunked\r\n\r\nzz\r\nabc\r\n0\r\n\r\n",
    POST + b"Transfer-Encoding: chunked\r\n\r\nffffffffffffffffffff\r\nabc",
    POST + b"Transfer-Encoding: chunked\r\nContent-Length: 5\r\n\r\n0\r\n\r\n",
    POST + b"Content-Length: 3\r\nContent-Length: 5\r\n\r\nabcde",
    POST + b"Content-Length: 1_0\r\n\r\n0123456789",
    POST + b"Content-Length: 99999999999\r\n\r\nabc",
    POST + b"Content-Length: 2\r\n\r\n{}garbage after the end\r\n\r\n",
]


def random_value(draw: random.Random, depth: int = 0) -> str:
    """Any JSON, or nearly."""
    kind = draw.randrange(8 if depth < 4 else 5)
    if kind < 2:
        return json.dumps(draw.choice(TEXTS))
    if kind < 5:
        return draw.choice([*NUMBERS, "null", "true", "false", "{}", "[]"])
    if kind < 7:
        return "[" + ",".join(random_value(draw, depth + 1) for _ in range(draw.randrange(4))) + "]"
    pairs = [f"{json.dumps(draw.choice(TEXTS[:5]))}:{random_value(draw, depth + 1)}" for _ in range(draw.randrange(4))]
    return "{" + ",".join(pairs) + "}"


def random_body(draw: random.Random) -> bytes:
    """A request of which something is changed."""
    fields = {"model": '"tiny"', "max_tokens": "2"}
    fields |= {"messages": '[{"role":"user","content":"a"}]'} if draw.random() < 0.6 else {"prompt": '"a"'}
    names = [*app_module.ChatRequest.model_fields, *app_module.CompletionRequest.model_fields, "\ud800", "", "x" * 9999]
    for _ in range(draw.randrange(3)):
        fields[draw.choice(names)] = random_value(draw)
    if draw.random() < 0.3:
        part = draw.choice(["role", "content", "name", "tool_calls", "type", "\x00"])
        fields["messages"] = f'[{{"role":"user","content":"a",{json.dumps(part)}:{random_value(draw)}}}]'
    body = ("{" + ",".join(f"{json.dumps(name)}:{value}" for name, value in fields.items()) + "}").encode()
    chance = draw.random()
    if chance < 0.1:
        return body[: draw.randrange(len(body))]
    if chance < 0.2:
        position = draw.randrange(len(body))
        return body[:position] + draw.randbytes(3) + body[position:]
    return draw.choice([body] * 9 + [body.decode().encode("utf-16"), b"", b"[" * 50_000, b'{"a":' * 2000])


def random_request(draw: random.Random) -> bytes:
    """All bytes of a request."""
    if draw.random() < 0.15:
        return draw.choice(RAW)
    path, method = draw.choice(ROUTES[-2:] * 8 + PATHS), draw.choice(["POST"] * 60 + METHODS)
    body = random_body(draw)
    headers = [("Host", "a"), ("Content-Type", "application/json"), ("Content-Length", str(len(body)))]
    if draw.random() < 0.4:
        changed = draw.choice(HEADERS)
        headers = [pair for pair in headers if pair[0] != changed[0] or draw.random() < 0.3] + [changed]
    lines = [f"{method} {path} HTTP/1.1", *(f"{name}: {value}" for name, value in headers), "", ""]
    return "\r\n".join(lines).encode("latin-1") + body


def answer(url: str, sent: bytes) -> bytes:
    """All that comes back until the server closes, or has nothing to say for a while."""
    where = urlsplit(url)
    with socket.create_connection((where.hostname, where.port), timeout=20) as client:
        with contextlib.suppress(ConnectionError):  # it needn't hear us out
            client.sendall(sent)
            client.shutdown(socket.SHUT_WR) if sent.startswith(b"\x00") else None
        received = b""
        with contextlib.suppress(ConnectionResetError):
            while part := client.recv(1 << 16):
                received += part
                if complete(received):
                    break
        return received


def complete(received: bytes) -> bool:
    head, end, body = received.partition(b"\r\n\r\n")
    if head.startswith(b"HTTP/1.1 100"):
        return complete(body)
    lengths = [int(x.split(b":")[1]) for x in head.lower().split(b"\r\n") if x.startswith(b"content-length:")]
    return bool(end and lengths) and len(body) >= lengths[0]


def test_hostile_requests_get_answers(url, engine, monkeypatch, caplog):
    """Four hundred of them, seeded: over routes, methods, headers, bodies, and what is no HTTP at all."""
    # What owes more bytes is cut: soon here, and without an answer where the headers aren't complete.
    monkeypatch.setattr(connection.Connection, "patience", dict.fromkeys(connection.Connection.patience, 1.0))
    monkeypatch.setattr(request_bodies, "BODY_S", 0.4)
    draw, statuses = random.Random(25), []
    requests = [*RAW, *(random_request(draw) for _ in range(400 - len(RAW)))]
    for sent in requests:
        received = answer(url, sent)
        while received.startswith(b"HTTP/1.1 100"):
            received = received.partition(b"\r\n\r\n")[2]
        head, _, body = received.partition(b"\r\n\r\n")
        if not received:  # cut: only where it never was a whole head, or cut off while we still sent
            assert b"\r\n\r\n" not in sent or len(sent) > 16_000, sent[:300]
            continue
        statuses.append(int(head.split()[1]))
        assert statuses[-1] != 500, (sent[:500], received)
        method = sent.split(b" ")[0]
        if statuses[-1] >= 400 and method != b"HEAD":
            error = json.JSONDecoder().raw_decode(body.decode("utf-8"))[0]["error"]  # pipelined ones may follow
            assert set(error) == {"message", "type", "param", "code"}, sent[:300]
            assert error["message"].isprintable()
            assert len(error["message"]) < 5000
    assert len(statuses) > 380
    assert {200, 400, 404, 405, 408, 413, 415} <= set(statuses)
    assert not [r for r in caplog.records if r.levelno >= logging.ERROR], caplog.text
    assert post(url, "/health", b"", method="GET") == (200, {"status": "ok"})
    assert not engine.stats()["busy"]


def test_slow_clients_are_cut(url, monkeypatch):
    """Headers, a body that drips, a connection that is only held: all end, with 408 where there is someone to tell."""
    monkeypatch.setattr(request_bodies, "BODY_S", 0.6)
    patience = {"headers": 0.5, "body": 1.5, "idle": 0.5, "closing": 0.5, "reading": 0.5}
    monkeypatch.setattr(connection.Connection, "patience", patience)
    head = POST + b"Content-Length: 1000\r\n\r\n"
    whole = b"GET /health HTTP/1.1\r\nHost: a\r\n\r\n"
    for first, drip, told in (
        (b"", b"", b""),
        (b"", b"G", b""),
        (POST, b"X: 1\r\n", b""),
        (head, b" ", b"408"),
        (POST + b"Transfer-Encoding: chunked\r\n\r\n", b"1\r\n \r\n", b"408"),
        (whole, b"", b"200"),
        (whole, b"G", b"200"),
        (POST + b"Content-Length: 99999999\r\n\r\n", b" ", b"413"),
    ):
        where = urlsplit(url)
        with socket.create_connection((where.hostname, where.port), timeout=0.05) as client:
            began, received, ended = time.monotonic(), b"", False
            client.sendall(first)
            while not ended and time.monotonic() < began + 10:
                with contextlib.suppress(ConnectionError):
                    client.sendall(drip)
                try:
                    part = client.recv(4096)
                    received, ended = received + part, not part
                except TimeoutError:
                    pass
                except ConnectionError:
                    ended = True
            assert ended, (first, drip)
            assert time.monotonic() - began < 4
            assert told in received, (first, drip, received)


def test_a_client_that_never_reads_frees_its_rows(url, engine, monkeypatch):
    """Its answer doesn't fit in what the kernel holds for it. Steps are made slow: it is cut before they are over."""
    ask, before = engine._slot_requests, engine.stats()["replies"]
    monkeypatch.setattr(engine, "_slot_requests", lambda rows: (time.sleep(0.05), ask(rows))[1])
    monkeypatch.setattr(connection.Connection, "patience", connection.Connection.patience | {"reading": 0.5})
    made = connection.Connection.connection_made

    def narrow(self, transport):
        transport.get_extra_info("socket").setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, 4096)
        made(self, transport)

    monkeypatch.setattr(connection.Connection, "connection_made", narrow)
    body = json.dumps(
        GOOD | {"temperature": 2, "max_tokens": 250, "n": 30, "stream": True, "logprobs": True, "top_logprobs": 20}
    )
    where = urlsplit(url)
    with socket.socket() as client:
        client.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)
        client.connect((where.hostname, where.port))
        client.sendall(POST + b"Content-Length: %d\r\n\r\n" % len(body) + body.encode())
        deadline = time.monotonic() + 60
        while (now := engine.stats())["replies"] == before or now["busy"] or now["waiting"]:
            assert time.monotonic() < deadline
            time.sleep(0.1)
    ended = {name: count - before[name] for name, count in now["replies"].items()}
    assert ended["accepted"] == 30 == ended["finished"] + ended["cancelled"]
    assert ended["cancelled"] > 0


def test_work_on_a_body_leaves_the_loop_free(engine, monkeypatch):
    """Parsing, taking text apart and writing the answer run in other threads than the one that answers."""
    service, seen = Service(engine, "tiny", 0), []
    for name in ("_chat", "_completion"):
        real = getattr(Service, name)
        note = lambda self, body, real=real: (seen.append(threading.current_thread()), real(self, body))[1]  # noqa: E731
        monkeypatch.setattr(Service, name, note)

    async def ask():
        parts = [{"type": "http.request", "body": b"{}", "more_body": False}]
        scope = {"type": "http", "method": "POST", "path": "/v1/completions", "query_string": b"", "server": None}
        scope |= {"headers": [(b"content-type", b"application/json")], "root_path": "", "client": None}

        async def receive():
            return parts.pop(0) if parts else {"type": "http.disconnect"}

        async def send(message):
            seen.append(message)

        await service.app()(scope, receive, send)
        return threading.current_thread()

    loop = asyncio.run(ask())
    assert seen[0] is not loop
    assert seen[1]["status"] == 400


@pytest.mark.parametrize("fails", [False, True])
def test_others_have_their_turns_between_large_bodies(monkeypatch, fails):
    """Large ones follow each other after a rest, refused ones too; a small one waits for none of them."""
    monkeypatch.setattr(request_bodies, "REST_S", 0.2)
    held, times = request_bodies.Bodies(), []

    def call():
        times.append(time.monotonic())
        if fails:
            raise app_module.ProtocolError(400, "no")

    async def work():
        large = asyncio.gather(*(held.work(request_bodies.SMALL + 1, call) for _ in range(3)), return_exceptions=True)
        await asyncio.sleep(0.05)
        return await held.work(request_bodies.SMALL, time.monotonic), await large

    small, told = asyncio.run(work())
    assert small < times[2]
    assert [isinstance(one, app_module.ProtocolError) for one in told] == [fails] * 3
    assert all(after - before >= 0.19 for before, after in itertools.pairwise(times))


def test_text_is_taken_apart_only_as_far_as_it_may_fit(engine, monkeypatch):
    """Beyond that its tokens aren't counted; what may fit is, exactly."""
    service, taken = Service(engine, "tiny", 0), []
    encode = type(engine.tokenizer).encode
    monkeypatch.setattr(
        type(engine.tokenizer), "encode", lambda self, text: (taken.append(len(text)), encode(self, text))[1]
    )
    longest = max(len(engine.tokenizer.token_bytes(t)) for t in range(engine.tokenizer.vocab_size))
    for size in (4_000_000, CONTEXT * longest, 3 * CONTEXT, CONTEXT):
        taken.clear()
        body = {"model": "tiny", "prompt": "7" * size}  # digits are tokens each
        with pytest.raises(app_module.ProtocolError) as refused:
            service._completion(json.dumps(body).encode())
        assert refused.value.body["error"]["code"] == "context_length_exceeded"
        assert sum(taken) <= 2 * CONTEXT * longest
        assert sum(taken) == 0 or size < 4_000_000


def test_many_prompts_in_one_request(client):
    """As lm-evaluation-harness batches them: more than rows; the limit is named."""
    texts = [f"my boss {i}" for i in range(32)]
    many = client.completions.create(model="tiny", prompt=texts, max_tokens=3, temperature=0)
    one = client.completions.create(model="tiny", prompt=texts[31], max_tokens=3, temperature=0)
    assert len(many.choices) == 32
    assert [c.index for c in many.choices] == list(range(32))
    assert many.choices[31].text == one.choices[0].text
    with pytest.raises(Exception, match=f"1 to {QUEUE} replies a request"):
        client.completions.create(model="tiny", prompt=["a"] * (QUEUE + 1), max_tokens=1)


def test_a_reply_is_sent_back_as_the_client_has_it(client):
    reply = chat_with(client).choices[0].message
    messages = [{"role": "user", "content": "a"}, reply.model_dump(), {"role": "user", "content": "b"}]
    assert chat_with(client, messages).choices[0].finish_reason
    assert chat_with(client, [messages[0], reply, messages[2]]).choices[0].finish_reason


def test_connections_beyond_the_limit_are_told(url, monkeypatch):
    monkeypatch.setattr(connection, "MAX_CONNECTIONS", 3)
    where = urlsplit(url)
    with contextlib.ExitStack() as held:
        for _ in range(3):
            held.enter_context(socket.create_connection((where.hostname, where.port)))
        time.sleep(0.2)
        status, told = post(url, "/health", b"", method="GET")
        assert (status, told["error"]["code"]) == (503, "too_many_connections")
    time.sleep(0.2)
    assert post(url, "/health", b"", method="GET")[0] == 200


def test_bodies_held_at_once_are_bounded(url, monkeypatch):
    monkeypatch.setattr(request_bodies, "MAX_HELD", 100_000)
    where = urlsplit(url)
    with socket.create_connection((where.hostname, where.port)) as one:
        one.sendall(POST + b"Content-Length: 99999\r\n\r\n" + b" " * 90_000)
        time.sleep(0.3)
        status, told = post(url, "/v1/chat/completions", b" " * 50_000)
        assert (status, told["error"]["type"]) == (429, "rate_limit_error")
    deadline = time.monotonic() + 10
    while post(url, "/v1/chat/completions", b" " * 50_000)[0] == 429 and time.monotonic() < deadline:
        time.sleep(0.05)  # until the server has noticed that the other is gone
    assert post(url, "/v1/chat/completions", b" " * 50_000)[0] == 400


def test_tiny_chunks_are_a_body_like_another(url):
    body = json.dumps(GOOD | {"max_tokens": 2}).encode()
    chunks = [body[i : i + 1] for i in range(len(body))]
    server = http.client.HTTPConnection(urlsplit(url).netloc, timeout=30)
    server.request(
        "POST", "/v1/chat/completions", iter(chunks), {"Content-Type": "application/json"}, encode_chunked=True
    )
    assert server.getresponse().status == 200
    server.close()
