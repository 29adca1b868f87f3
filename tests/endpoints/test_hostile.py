"""Servers that send what no server should: for ever, without end, poisoned. The client lasts, and so does its cache."""

import asyncio
import contextlib
import dataclasses
import functools
import gzip
import json
import os
import sqlite3
import struct
import subprocess
import sys
import time
import zlib
from pathlib import Path

import pytest

from rlver_jax.decoding.script import parse_script
from rlver_jax.endpoints.answer_cache import AnswerCache, request_key
from rlver_jax.endpoints.body import _Decoder
from rlver_jax.endpoints.client import Client, Endpoint
from rlver_jax.endpoints.errors import EndpointError, Unavailable
from rlver_jax.endpoints.usage import Usage, priced, summed
from rlver_jax.evaluation.forms import Step
from rlver_jax.evaluation.text_forms import read
from rlver_jax.user.text_forms import Unreadable, make_form, read_form, read_wanted
from tests.endpoints.server import rule
from tests.endpoints.test_client import HELLO, ask

ROOT = Path(__file__).resolve().parents[2]
HEAD = b"HTTP/1.1 200 OK\r\nContent-Type: application/json\r\n"


@pytest.fixture
def cache(tmp_path):
    with contextlib.closing(AnswerCache(tmp_path / "answers.sqlite")) as answer_cache:
        yield answer_cache


def completion(content="fine", **fields):
    return json.dumps({"choices": [{"message": {"content": content}}], **fields}).encode()


def drip(handler, pieces, every=0.05):
    with contextlib.suppress(OSError):
        for piece in pieces:
            handler.wfile.write(piece)
            handler.wfile.flush()
            time.sleep(every)


SLOW = {
    "body": lambda handler: drip(handler, [HEAD + b"Content-Length: 999\r\n\r\n", *[b" "] * 999]),
    "chunks": lambda handler: drip(handler, [HEAD + b"Transfer-Encoding: chunked\r\n\r\n", *[b"1\r\n \r\n"] * 999]),
    "headers": lambda handler: drip(handler, [HEAD, *[b"X-A: b\r\n"] * 999]),
    "a header": lambda handler: drip(handler, [HEAD + b"X-A: ", *[b"b"] * 999]),
    "status line": lambda handler: drip(handler, [b"HTTP/1.1 200 ", *[b"O"] * 999]),
    "hints": lambda handler: drip(handler, [b"HTTP/1.1 100 Continue\r\n\r\n"] * 999),
    "an error": lambda handler: drip(handler, [b"HTTP/1.1 401 No\r\nContent-Length: 999\r\n\r\n", *[b"x"] * 999]),
    "gzip without output": lambda handler: drip(
        handler, [HEAD + b"Content-Encoding: gzip\r\n\r\n", gzip.compress(b"")[:10], *[b"\0\0\0\xff\xff"] * 999]
    ),
}


@pytest.mark.parametrize("what", SLOW)
def test_a_timeout_bounds_a_whole_attempt(server, cache, what):
    """Something comes every 50 ms, so no single read takes long."""
    server.raw = SLOW[what]
    began = time.monotonic()
    with pytest.raises(Unavailable, match=r"Timeout: no whole answer within 0\.3 s; .* larger remote\.timeout"):
        ask(server.url, cache, timeout=0.3, deadline=1)
    assert time.monotonic() - began < 10  # of the 50 s that the answer takes
    assert server.count >= 2, "each attempt was ended, and another made"


def test_a_slow_answer_is_not_a_broken_one(server, cache):
    body = completion()
    pieces = [bytes([byte]) for byte in body]
    server.raw = lambda handler: drip(handler, [HEAD + b"Content-Length: %d\r\n\r\n" % len(body), *pieces], 0.01)
    (answer,), _ = ask(server.url, cache, timeout=10)
    assert answer.text == "fine"


def flood(handler, head, piece, count):
    with contextlib.suppress(OSError):
        handler.wfile.write(HEAD + head + b"\r\n")
        for _ in range(count):
            handler.wfile.write(piece)


SUMS = {31: zlib.crc32, 15: zlib.adler32, -15: lambda piece, so_far: 0}


@functools.cache
def bomb(size, wbits):
    """Zeros, compressed a thousandfold."""
    piece, count = bytes(2**24), size // 2**24
    stream = zlib.compressobj(9, wbits=-15)
    block = stream.compress(piece) + stream.flush(zlib.Z_FULL_FLUSH)  # stands for itself
    check = functools.reduce(lambda so_far, _: SUMS[wbits](piece, so_far), range(count), 1 if wbits == 15 else 0)
    ends = {31: gzip.compress(b"")[:10], 15: b"\x78\xda", -15: b""}
    tail = {31: struct.pack("<II", check, size % 2**32), 15: struct.pack(">I", check), -15: b""}
    return ends[wbits] + block * count + stream.flush() + tail[wbits]


def encoded(coding, *pieces):
    return b"Content-Encoding: %s\r\n" % coding, b"".join(pieces), 1


BOMB = 2**31  # bytes, decoded
LONG = {  # headers, a piece of the body, how many times it is sent
    "gzip": lambda: encoded(b"gzip", bomb(BOMB, 31)),
    "zlib": lambda: encoded(b"deflate", bomb(BOMB, 15)),
    "raw deflate": lambda: encoded(b"deflate", bomb(BOMB, -15)),
    "gzip in gzip": lambda: encoded(b"gzip, gzip", gzip.compress(gzip.compress(b"{}") + bytes(2**28))),
    "behind gzip": lambda: (b"Content-Encoding: gzip\r\n\r\n" + gzip.compress(b"{}"), b"\0" * 2**20, 2**11),
    "plain": lambda: (b"", b" " * 2**20, 2**11),
    "chunked": lambda: (b"Transfer-Encoding: chunked\r\n", b"100000\r\n" + b" " * 2**20 + b"\r\n", 2**11),
    "objects": lambda: (b"Content-Length: 8400001\r\n\r\n[", b"[],{}," * 100_000, 14),
    "announced": lambda: (b"Content-Length: 999999999999999\r\n", b" ", 1),
    "a header": lambda: (b"X-A: ", b"b" * 2**20, 2**11),
    "headers": lambda: (b"", b"X-A: b\r\n" * 2**17, 2**11),
}


MEASURE = """
import asyncio, json, re, sys
from rlver_jax.endpoints.answer_cache import AnswerCache
from rlver_jax.endpoints.body import _Decoder
from rlver_jax.endpoints.client import Client, Endpoint
async def run(count):
    client = Client(Endpoint(sys.argv[1], "m", first_wait=0.01, deadline=100), AnswerCache(None))
    try:
        asked = [{"role": "user", "content": "hello"}]
        work = (client.ask(asked, temperature=0, max_tokens=9, seed=i) for i in range(count))
        return [found.text for found in await asyncio.gather(*work)]
    finally:
        await client.close()
# Of this process alone: ru_maxrss begins with the size of the one that it was forked from.
peak = lambda: int(re.search(r"VmHWM:\\s+(\\d+) kB", open("/proc/self/status").read())[1]) / 1024
before = peak()
told = asyncio.run(run(int(sys.argv[2])))
print(json.dumps([peak() - before, told]))
"""


def memory_growth(url, count):
    """(MiB that memory grew by, what was answered) of requests at once to a server, in a process of its own."""
    env = os.environ | {"PYTHONPATH": str(ROOT)}
    command = [sys.executable, "-c", MEASURE, url, str(count)]
    done = subprocess.run(command, env=env, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout)


def times(server, count, sent):
    """Has the server send that to its first requests, and answer well after them."""
    left = iter(range(count))
    well = lambda handler: flood(handler, b"", completion(), 1)  # noqa: E731
    server.raw = lambda handler: well(handler) if next(left, None) is None else flood(handler, *sent)


@pytest.mark.parametrize("what", LONG)
def test_memory_stays_flat_whatever_is_sent(server, what):
    times(server, 1, LONG[what]())
    grown, told = memory_growth(server.url, 1)
    assert grown < 100, f"{grown} MiB"
    assert told == ["fine"]


def test_memory_stays_flat_of_many_requests_at_once(server):
    times(server, 8, LONG["gzip"]())
    grown, told = memory_growth(server.url, 8)
    assert grown < 200, f"{grown} MiB"
    assert told == ["fine"] * 8


@pytest.mark.parametrize("wbits", [31, 15, -15])
def test_bombs_are_what_they_say(wbits):
    assert zlib.decompress(bomb(2**25, wbits), wbits) == bytes(2**25)


def test_what_a_body_of_too_many_bytes_is_called(server, cache):
    server.raw = lambda handler: flood(handler, *LONG["chunked"]())
    with pytest.raises(Unavailable, match="a body of more than 8 MiB, which is no answer"):
        ask(server.url, cache, deadline=0.5)
    assert len(cache) == 0


def test_an_answer_of_megabytes_is_one(server, cache):
    server.answer = lambda body: "long " * 1_000_000
    (answer,), _ = ask(server.url, cache)
    assert answer.text == "long " * 1_000_000


@pytest.mark.parametrize("wbits", [31, 15, -15])
@pytest.mark.parametrize("pieces", [1, 1000])
def test_compressed_answers(server, cache, wbits, pieces):
    body, stream = completion("é" * 5000), zlib.compressobj(wbits=wbits)
    data = stream.compress(body) + stream.flush()
    coding = b"gzip" if wbits == 31 else b"deflate"
    step = -(-len(data) // pieces)
    cut = [data[i : i + step] for i in range(0, len(data), step)]
    head = HEAD + b"Content-Encoding: %s\r\nContent-Length: %d\r\n\r\n" % (coding, len(data))
    server.raw = lambda handler: drip(handler, [head, *cut], 0)
    (answer,), _ = ask(server.url, cache)
    assert answer.text == "é" * 5000


@pytest.mark.parametrize("wbits", [31, 15, -15])
@pytest.mark.parametrize("size", [1, 2, 3, 7])
def test_pieces_of_any_size_are_decoded(wbits, size):
    """Each is a chunk of its own, as a slow connection delivers them: a header may be cut in the middle."""
    text = b"any length of text " * 99
    stream = zlib.compressobj(wbits=wbits)
    data = stream.compress(text) + stream.flush()
    decoder = _Decoder("gzip" if wbits == 31 else "deflate")
    assert b"".join(decoder.decoded(data[i : i + size], 10**6) for i in range(0, len(data), size)) == text
    assert decoder.complete


def test_a_body_of_half_a_header_is_not_complete():
    decoder = _Decoder("gzip")
    assert decoder.complete, "nothing came"
    assert decoder.decoded(b"\x1f", 9) == b""
    assert not decoder.complete


@pytest.mark.parametrize(
    ("coding", "data", "says"),
    [
        (b"gzip", completion(), "not gzip, as it says"),
        (b"deflate", b"\xff" * 50, "not deflate, as it says"),
        (b"gzip", gzip.compress(completion())[:-9], "ends in the middle of its gzip coding"),
        (b"br", b"\x0b\x02\x80{}\x03", "encoded as 'br'; expected gzip, deflate or none"),
        (b"zstd", b"x", "encoded as 'zstd'"),
        (b"gzip, gzip", gzip.compress(gzip.compress(completion())), "encoded as 'gzip, gzip'"),
    ],
    ids=["plain for gzip", "garbage for deflate", "cut gzip", "br", "zstd", "two"],
)
def test_codings_that_cannot_be_undone(server, cache, coding, data, says):
    head = HEAD + b"Content-Encoding: %s\r\nContent-Length: %d\r\n\r\n" % (coding, len(data))
    server.raw = lambda handler: drip(handler, [head, data], 0)
    with pytest.raises(Unavailable, match=says):
        ask(server.url, cache, deadline=0.3)


@pytest.mark.parametrize(
    "head",
    [b"Content-Length: " + b"9" * 5000, b"Content-Length: -1", b"Content-Length: x", b"Retry-After: " + b"9" * 99],
    ids=["digits", "negative", "letter", "pause"],
)
def test_headers_that_lie(server, cache, head):
    server.raw = lambda handler: drip(handler, [HEAD + head + b"\r\nContent-Length: 5\r\n\r\n{}"], 0)
    with pytest.raises(Unavailable, match="no answer within"):
        ask(server.url, cache, deadline=0.4)


NESTED = b"[" * 100_000 + b"]" * 100_000
BODIES = {  # name: (body, text) with "" for what is no completion
    "byte order mark": (b"\xef\xbb\xbf" + completion(), "fine"),
    "NaN": (completion()[:-1] + b', "x": NaN, "y": [Infinity, -Infinity, 1e999]}', "fine"),
    "digits": (completion()[:-1] + b', "created": ' + b"9" * 5000 + b"}", "fine"),
    "named twice": (completion("first")[:-1] + b', "choices": [{"message": {"content": "last"}}]}', "last"),
    "raw controls": (b'{"choices": [{"message": {"content": "a\tb\n\x01c\x00"}}]}', "a\tb\nc"),
    "deep extra": (completion()[:-1] + b', "x": ' + b"[" * 300 + b"]" * 300 + b"}", "fine"),
    "choices": (json.dumps({"choices": [{"message": {"content": x}} for x in ("a", "b")]}).encode(), "a"),
    "extras": (completion(id={}, object=[1], system_fingerprint=None, x={"usage": [{}]}, created="now"), "fine"),
    "parts": (completion([{"type": "text", "text": "a"}, "b", {"type": "output_text", "text": "c"}]), "abc"),
    "no parts": (completion([]), ""),
    "null": (completion(None), ""),
    "refusal": (b'{"choices": [{"message": {"content": null, "refusal": "I won\'t"}}]}', "I won't"),
    "refusal that is none": (b'{"choices": [{"message": {"content": "a", "refusal": {"x": 1}}}]}', "a"),
    "odd finish": (b'{"choices": [{"message": {"content": "a"}, "finish_reason": {"x": []}}]}', "a"),
    "bytes": (b'{"choices": [{"message": {"content": "a\xff\xfeb"}}]}', "a\ufffd\ufffdb"),
    "usage": (completion(usage=[1]), "fine"),
    "model": (completion(model={"a": 1}), "fine"),
}


@pytest.mark.parametrize("what", BODIES)
def test_odd_bodies_that_are_answers(server, cache, what):
    body, text = BODIES[what]
    server.whole = lambda whole: body
    (answer,), _ = ask(server.url, cache)
    assert (answer.text, answer.prompt_tokens, answer.model, answer.cut) == (text, 0, "", False)
    again, client = ask(server.url, cache)
    assert again == [answer]
    assert client.traffic.sent == 0


NONE = {
    "empty": b"",
    "null": b"null",
    "a list": b"[]",
    "a number": b"1e400",
    "no choices": b"{}",
    "empty choices": b'{"choices": []}',
    "null choices": b'{"choices": null}',
    "choices by name": b'{"choices": {"0": {"message": {"content": "a"}}}}',
    "no message": b'{"choices": [{}]}',
    "a text for a message": b'{"choices": [{"message": "a"}]}',
    "a number for content": completion(5),
    "a number of digits": completion(7).replace(b"7", b"7" * 9999),
    "true": completion(True),
    "an object": completion({"text": "a"}),
    "odd parts": completion([{"type": "image_url", "image_url": {"url": "x"}}]),
    "numbers for parts": completion([1, 2]),
    "nested": NESTED,
    "nested content": completion(0).replace(b"0", NESTED),
    "cut": completion()[:-5],
    "error": b'{"error": {"message": "overloaded"}}',
    "utf-16": completion().decode().encode("utf-16"),
}


@pytest.mark.parametrize("what", NONE)
def test_bodies_that_are_none_are_asked_for_again(server, cache, what):
    """And never kept: once the server has recovered, the answer is what it says then."""
    bad = iter([NONE[what]] * 2)
    server.whole = lambda whole: next(bad, json.dumps(whole).encode())
    (answer,), client = ask(server.url, cache)
    assert answer.text == rule(server.bodies[0])
    assert (client.traffic.sent, client.traffic.failed, len(cache)) == (3, 2, 1)


STRINGS = {
    "half": ("a\ud800b", "a\ufffdb"),
    "other half": ("a\udfffb", "a\ufffdb"),
    "whole of two": ("a\ud83d\ude00b", "a😀b"),
    "halves the wrong way": ("\ude00\ud83d", "\ufffd\ufffd"),
    "zero": ("a\0b", "ab"),
    "escape": ("a\x1b[31mb\x07\x7f\x9bc", "a[31mbc"),
    "white": ("a\tb\nc\r\nd", "a\tb\nc\r\nd"),
}


@pytest.mark.parametrize("what", STRINGS)
def test_strings_are_clean_before_they_are_kept(server, cache, tmp_path, what):
    dirty, text = STRINGS[what]
    server.answer = lambda body: {"content": dirty, "reasoning_content": dirty, dirty: dirty}
    server.whole = lambda whole: whole | {"model": dirty, "id": dirty, dirty: dirty}
    (answer,), _ = ask(server.url, cache)
    assert (answer.text, answer.reasoning, answer.model) == (text, text, " ".join(text.split()))
    json.dumps(dataclasses.asdict(answer), ensure_ascii=False).encode()
    with sqlite3.connect(tmp_path / "answers.sqlite") as file:
        stored = json.loads(file.execute("SELECT answer FROM answers").fetchone()[0])
    assert stored["choices"][0]["message"] == {"role": "assistant", "content": text, "reasoning_content": text}
    assert set(stored) == {"model", "choices", "usage"}
    asked = [*HELLO, {"role": "assistant", "content": answer.text}, *HELLO]
    ask(server.url, cache, messages=asked)
    assert server.bodies[1]["messages"][1]["content"] == text, "it can be sent back"


@pytest.mark.parametrize(
    ("count", "taken"),
    [
        *[(value, value) for value in (0, 7, 10**9)],
        (12.0, 12),
        *[(value, 0) for value in (-1, 1.5, 1e308, 10**9 + 1, 2**63, 10**400, True, "5", None, [5], {"a": 5})],
        *[(value, 0) for value in (float("nan"), float("inf"), -float("inf"))],
    ],
    ids=lambda value: str(value)[:20],
)
def test_counts_that_cannot_be_are_none(server, cache, count, taken):
    server.whole = lambda whole: whole | {"usage": {"prompt_tokens": count, "completion_tokens": count, "x": count}}
    (answer,), _ = ask(server.url, cache)
    assert (answer.prompt_tokens, answer.completion_tokens) == (taken, taken)
    assert type(answer.prompt_tokens) is int
    usage = Usage()
    usage.add(answer, again=False)
    assert summed([priced(usage.to_json(), (1.0, 3.0))])["cost"] == pytest.approx(4 * taken / 1e6)


def test_counts_in_logs_of_older_versions():
    """They took over what a server made up; a sum of costs ended every start."""
    used = Usage(1, 0, 10**400, -5).to_json()
    assert summed([priced(used, (1.0, 1.0))]) == {
        "requests": 1, "asked_again": 0, "prompt_tokens": 0, "completion_tokens": 0, "cost": 0, "models": [],
    }  # fmt: skip


def body_of(seed):
    return {"model": "m", "messages": HELLO, "temperature": 0.5, "max_tokens": 9, "seed": seed, "stream": False}


ROWS = {
    "half": '{"choices": [{"message": {"content": "\\ud800"}}]}',
    "counts": '{"choices": [{"message": {"content": "x"}}], "usage": {"prompt_tokens": 1' + "0" * 400 + "}}",
}
SPOILED = {
    "cut": '{"choices": [{"mess',
    "empty": "",
    "null": None,
    "a number": 5,
    "bytes": b"\xff\xfe\x00",
    "no text": b'{"choices": [{"message": {"content": "\xff',
    "nested": NESTED.decode(),
    "a list": "[1]",
    "content": '{"choices": [{"message": {"content": 5}}]}',
    "choices": '{"choices": []}',
}


@pytest.mark.parametrize("what", [*ROWS, *SPOILED])
def test_a_start_gets_past_spoiled_rows(server, tmp_path, capsys, what):
    path = tmp_path / "answers.sqlite"
    with contextlib.closing(AnswerCache(path)) as cache:
        ask(server.url, cache, 3)
    row = {**ROWS, **SPOILED}[what]
    with sqlite3.connect(path) as file:
        for seed in (0, 1):
            key = request_key(server.url + "/chat/completions", body_of(seed), seed)
            assert file.execute("UPDATE answers SET answer = ? WHERE key = ?", (row, key)).rowcount == 1
    with contextlib.closing(AnswerCache(path)) as cache:
        answers, client = ask(server.url, cache, 3)
    if what in ROWS:
        assert client.traffic.sent == 0
        assert answers[0].text == {"half": "\ufffd", "counts": "x"}[what]
        return
    assert client.traffic.sent == 2
    assert [answer.text for answer in answers] == [rule(body_of(seed)) for seed in range(3)]
    error_text = capsys.readouterr().err
    assert error_text.count("cannot be used") == error_text.count("\n") == 1
    assert str(path) in error_text
    with contextlib.closing(AnswerCache(path)) as cache:
        again, client = ask(server.url, cache, 3)
    assert (again, client.traffic.sent, capsys.readouterr().err) == (answers, 0, "")


def test_a_damaged_file_is_named(server, tmp_path):
    path = tmp_path / "answers.sqlite"
    with contextlib.closing(AnswerCache(path)) as cache:
        ask(server.url, cache, 60)
    data = bytearray(path.read_bytes())
    data[4096:-10] = b"\xa5" * (len(data) - 4106)
    path.write_bytes(data)
    with pytest.raises(ValueError, match=r"answers\.sqlite: .*cache"), contextlib.closing(AnswerCache(path)) as cache:
        ask(server.url, cache, 60)


def test_old_and_new_code_read_each_others_rows(server, tmp_path):
    """What the client's earlier `_answer` reads of a row, by hand; and a row as it was written before."""
    path = tmp_path / "answers.sqlite"
    with contextlib.closing(AnswerCache(path)) as cache:
        (answer,), _ = ask(server.url, cache)
        with sqlite3.connect(path) as file:
            stored = json.loads(file.execute("SELECT answer FROM answers").fetchone()[0])
            old = {"id": "x", "object": "chat.completion", "model": "old", "usage": {"prompt_tokens": 3}}
            old["choices"] = [{"index": 0, "message": {"role": "assistant", "content": "b"}, "finish_reason": "length"}]
            key = request_key(server.url + "/chat/completions", body_of(1), 1)
            file.execute("INSERT INTO answers VALUES (?, ?, ?)", (key, "{}", json.dumps(old)))
        (_, received), client = ask(server.url, cache, 2)
    assert stored["choices"][0]["message"]["content"] == answer.text
    assert stored["usage"]["prompt_tokens"] == answer.prompt_tokens == 1
    assert client.traffic.sent == 0
    assert (received.text, received.prompt_tokens, received.completion_tokens, received.model, received.cut) == (
        "b",
        3,
        0,
        "old",
        True,
    )


def test_a_connection_that_was_given_up_is_not_used_again(server, cache):
    """After a timeout and after a body without end, the next answers are the right ones."""
    faults = iter([SLOW["body"], lambda handler: flood(handler, *LONG["chunked"]()), SLOW["headers"]])

    def next_fault():
        server.raw = next(faults, None)

    server.before = next_fault
    answers, client = ask(server.url, cache, 6, timeout=0.3, concurrency=1)
    assert [answer.text for answer in answers] == [rule(body_of(seed)) for seed in range(6)]
    assert client.traffic.failed == 3


def test_nothing_but_a_socket():
    """No HTTP at all, in many ways."""

    async def run():
        garbage = iter([b"", b"\0" * 100, b"SSH-2.0-x\r\n", b"HTTP/1.1 200\r\n\r\n", b"HTTP/9.9 999 \xff\r\n\r\n"] * 9)

        async def serve(reader, writer):
            await reader.read(100)
            writer.write(next(garbage, b""))
            writer.close()

        listening = await asyncio.start_server(serve, "127.0.0.1", 0)
        host, port = listening.sockets[0].getsockname()
        with contextlib.closing(AnswerCache(None)) as cache:
            client = Client(Endpoint(f"http://{host}:{port}/v1", "m", first_wait=0.01, deadline=0.5), cache)
            try:
                await client.ask(HELLO, temperature=0, max_tokens=9, seed=0)
            finally:
                await client.close()
                listening.close()

    with pytest.raises(Unavailable):
        asyncio.run(run())


def test_extras_that_cannot_be_sent():
    for extra in ({"a": float("nan")}, {"a": "\ud800"}, {"a": {1, 2}}):
        with pytest.raises(ValueError, match="cannot be written as JSON"):
            Endpoint("http://127.0.0.1:9/v1", "m", extra=extra).check()


def test_an_error_status_with_a_bomb_for_a_body(server, cache):
    data = bomb(2**28, 31)
    head = b"HTTP/1.1 404 No\r\nContent-Encoding: gzip\r\nContent-Length: %d\r\n\r\n" % len(data)
    server.raw = lambda handler: drip(handler, [head, data], 0)
    with pytest.raises(EndpointError, match="status 404"):
        ask(server.url, cache)
    assert server.count == 1


FORM = make_form(parse_script("What they said:<<free:content>>\nMy feelings move by:<<choose:change>>\n"), 40, "B")
CHOICES = [Step("a", "Depth:", tuple("12345")), Step("b", "Sides:", ("-2", "-1", "0", "+1", "+2"))]


@pytest.mark.parametrize("before", ["", "[change] ", "[content] x\n[change] +", "[a] ", "[b] -", "```"])
@pytest.mark.parametrize("text", ["\n", " ", "9", "1.", "-", "+ ", "[change]", "[", "*", "…", "</think>", "``` ", "١"])
def test_reading_an_answer_takes_time_in_proportion(before, text):
    """What is kept is read at every start: it must not take for ever there, or fail by Python's limit on digits."""
    answer = before + text * (200_000 // len(text))
    began = time.monotonic()
    for reading in (lambda: read_form(FORM, answer), lambda: read_wanted(FORM, {}, answer)):
        with contextlib.suppress(Unreadable):
            reading()
    assert read(CHOICES, answer).keys() <= {"a", "b"}
    read(CHOICES[:1], answer)
    assert time.monotonic() - began < 2


@pytest.mark.parametrize(
    ("answer", "change"),
    [
        *[("[change] -3", -3), ("[change]:   + 4 points", 4), ("[change]\n\n**-2**", -2), ("[change] − 7", -7)],
        *[("-5", -5), ("it moves by 3.", 3), ("```\n[change] 6\n```", 6), ("by - 2", -2)],
        *[("[change] 1.5", None), ("[change] 3 to 5", None), ("15.5", None), ("3 or 4", None), ("9" * 5000, None)],
    ],
)
def test_changes_are_read_as_before(answer, change):
    try:
        change_read = read_wanted(FORM, {}, answer).change
    except Unreadable:
        change_read = None
    assert change_read == change
