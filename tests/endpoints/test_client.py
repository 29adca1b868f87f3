"""The client against a real server: what it sends, what it bears, what it refuses, and what it keeps."""

import asyncio
import dataclasses
import json
import sqlite3
import time

import pytest

from rlver_jax.endpoints import silence
from rlver_jax.endpoints.answer_cache import AnswerCache
from rlver_jax.endpoints.client import Client, Endpoint
from rlver_jax.endpoints.errors import ContextFull, EndpointError, Refused, Unavailable
from tests.endpoints.server import ChatServer, one_in_five, rule

KEY = "sk-secret-0123456789"
HELLO = [{"role": "user", "content": "hello"}]


def ask(url, cache, count=1, messages=HELLO, **fields):
    """Answers to `count` requests at once, which differ in their seeds; and the client."""

    async def run():
        client = Client(Endpoint(url, "m", first_wait=0.01, **{"deadline": 20, **fields}), cache)
        try:
            work = (client.ask(messages, temperature=0.5, max_tokens=9, seed=i) for i in range(count))
            return await asyncio.gather(*work), client
        finally:
            await client.close()

    return asyncio.run(run())


@pytest.fixture
def cache(tmp_path):
    cache = AnswerCache(tmp_path / "answers.sqlite")
    yield cache
    cache.close()


def test_what_is_sent_and_what_comes_back(server, cache):
    server.key = KEY
    (answer,), _ = ask(server.url, cache, key=KEY, extra={"seed": None, "max_tokens": None, "max_completion_tokens": 9})
    assert server.bodies == [
        {"model": "m", "messages": HELLO, "temperature": 0.5, "stream": False, "max_completion_tokens": 9}
    ]
    assert answer.text == rule(server.bodies[0])
    assert (answer.prompt_tokens, answer.model, answer.cut) == (1, "rule-1", False)


@pytest.mark.parametrize("ending", ["", "/", "/chat/completions"])
def test_addresses(server, cache, ending):
    assert len(ask(server.url + ending, cache)[0]) == 1


def test_faults_change_no_answer(server, cache, tmp_path):
    """60 requests, a fifth of which fails in four ways: the answers of a server without faults."""
    calm, _ = ask(server.url, cache, 60)
    with ChatServer(fault=one_in_five(1)) as troubled:
        other = AnswerCache(tmp_path / "other.sqlite")
        answers, client = ask(troubled.url, other, 60)
        assert answers == calm
        assert client.traffic.sent == troubled.count > 66
        assert client.traffic.failed == troubled.count - 60
        assert len(troubled.bodies) == len(other) == 60


def test_no_request_is_answered_twice(server, cache):
    first, _ = ask(server.url, cache, 5)
    again, client = ask(server.url, cache, 6)
    assert again[:5] == first
    assert (client.traffic.from_cache, client.traffic.sent, server.count) == (5, 1, 6)
    ask(server.url, cache, 1, extra={"top_k": 3})
    ask(server.url, cache, 1, messages=[{"role": "user", "content": "hello "}])
    assert server.count == 8, "another body is another request"


def test_concurrency_is_bounded(server, cache):
    server.before = lambda: time.sleep(0.05)
    ask(server.url, cache, 12, concurrency=3)
    assert server.most == 3


def test_retry_after_holds_back_every_request(server, cache):
    """The first is told to wait a second; none of the others comes before that is over."""
    times = []
    server.before = lambda: times.append(time.monotonic())
    server.fault = lambda n: "429" if n == 1 else ""
    original = server._send
    server._send = lambda handler, status, body, headers=None: original(
        handler, status, body, {"Retry-After": "1"} if status == 429 else headers
    )
    ask(server.url, cache, 4, concurrency=1)
    assert len(times) == 5
    assert min(times[1:]) - times[0] >= 1


def test_a_limit_that_is_used_up_is_respected_before_it_is_broken(server, cache):
    times = []
    server.before = lambda: times.append(time.monotonic())
    server.headers = {"x-ratelimit-remaining-requests": "0", "x-ratelimit-reset-requests": "400ms"}
    ask(server.url, cache, 3, concurrency=1)
    assert times[2] - times[0] >= 0.8


@pytest.mark.parametrize("fault", ["500", "429", "drop", "garbage"])
def test_the_deadline_ends_a_hopeless_request(server, cache, fault):
    server.fault = lambda n: fault
    began = time.monotonic()
    with pytest.raises(Unavailable, match=r"no answer within 0.5 s; the last attempt ended with: .+"):
        ask(server.url, cache, deadline=0.5)
    assert time.monotonic() - began < 3
    assert server.count > 2
    assert len(cache) == 0


def test_whoever_waits_is_told_why(server, cache, monkeypatch, caplog):
    """Once in a while, and never of an endpoint that answers in between."""
    monkeypatch.setattr(silence, "NOTICE", 0.4)
    server.fault = lambda n: "500" if n <= 8 else ""
    assert len(ask(server.url, cache, key=KEY)[0]) == 1
    told = [record.getMessage() for record in caplog.records]
    assert 1 <= len(told) < 8
    assert all(f"{server.url}/chat/completions: no answer for" in line and "status 500" in line for line in told)
    assert "remote.deadline=20 s" in told[0]
    assert KEY not in caplog.text
    caplog.clear()
    with ChatServer(fault=lambda n: "500" if n % 2 else "") as troubled:
        ask(troubled.url, cache, 40)
    assert not caplog.records


def test_a_server_that_hangs_or_is_not_there(server, cache):
    server.before = lambda: time.sleep(2)
    began = time.monotonic()
    with pytest.raises(Unavailable, match="Timeout"):
        ask(server.url, cache, timeout=0.1, deadline=0.6)
    assert time.monotonic() - began < 2
    with pytest.raises(Unavailable, match="Connect"):
        ask("http://127.0.0.1:9/v1", cache, deadline=0.3)


@pytest.mark.parametrize(
    ("fault", "error", "says"),
    [
        ("401 who are you", EndpointError, "status 401.*key_env"),
        ("404 no such model", EndpointError, "no such model.*base address"),
        ("400 seed is not supported", Refused, "seed is not supported.*extra"),
        ("429 insufficient_quota", EndpointError, "insufficient_quota"),
        ("400 This model's maximum context length is 512 tokens", ContextFull, "maximum context"),
    ],
)
def test_a_refusal_is_told_at_once(server, cache, fault, error, says):
    server.fault = lambda n: fault
    with pytest.raises(EndpointError, match=says) as caught:
        ask(server.url, cache)
    assert type(caught.value) is error
    assert server.count == 1


def test_the_key_is_written_nowhere(server, cache, tmp_path):
    """A server that repeats it in errors, in garbage and in its answers."""
    server.key, server.answer = KEY, lambda body: f"your key is {KEY}"
    server.fault = lambda n: ["garbage", "500", "429", ""][n - 1] if n < 5 else ""
    (answer,), _ = ask(server.url, cache, key=KEY)
    assert answer.text == "your key is ***"
    server.fault = lambda n: "500"
    with pytest.raises(Unavailable) as caught:
        ask(server.url, cache, key=KEY, deadline=0.1, extra={"x": 1})
    assert KEY not in str(caught.value)
    assert "***" in str(caught.value)
    server.fault = lambda n: ""
    server.key = "another"
    with pytest.raises(EndpointError) as caught:
        ask(server.url, cache, key=KEY, extra={"x": 2})
    assert "Incorrect API key: Bearer ***" in str(caught.value)
    assert KEY not in repr(Endpoint(server.url, "m", KEY))
    assert all(KEY.encode() not in file.read_bytes() for file in tmp_path.iterdir())


def test_the_cache_is_readable_and_refuses_other_files(server, cache, tmp_path):
    ask(server.url, cache, 2)
    with sqlite3.connect(tmp_path / "answers.sqlite") as file:
        rows = file.execute("SELECT request, answer FROM answers").fetchall()
    assert {json.loads(request)["seed"] for request, _ in rows} == {0, 1}
    (tmp_path / "text").write_text("no database, " * 100)
    with pytest.raises(ValueError, match=r"text: cannot be used as the cache"):
        AnswerCache(tmp_path / "text")


def test_answers_of_all_shapes(server, cache):
    server.answer = lambda body: {"content": None, "reasoning_content": "hm"}
    (answer,), _ = ask(server.url, cache)
    assert dataclasses.astuple(answer)[:2] == ("", "hm")
