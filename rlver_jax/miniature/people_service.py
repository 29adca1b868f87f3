"""The miniature's people as a web service: OpenAI's chat protocol in front of the grammar's rule."""

import asyncio
import collections
import dataclasses
import functools
import hashlib
import random
import time
from typing import Any

from starlette.applications import Starlette
from starlette.requests import Request
from starlette.responses import JSONResponse, Response
from starlette.routing import Route

from rlver_jax.miniature.answering import NotOfThisWorld, People
from rlver_jax.serving.errors import ProtocolError, quoted
from rlver_jax.serving.protocol import ChatRequest, check_consistent, parse
from rlver_jax.serving.request_bodies import Bodies

MODEL = "people"  # its name in requests
LONGEST = 1 << 17  # characters of a request's messages; the rule's time grows with them


@dataclasses.dataclass
class Stats:
    """What was asked so far.

    Attributes:
        requests: all attempts: answered, failed on purpose (--fail), refused for what they hold.
        distinct: different requests among the answered ones. What exceeds it was answered, so paid for, twice.
        most_at_once: in the server at one time.
        prompt_tokens, completion_tokens: words, as in each answer's `usage`.
    """

    requests: int = 0
    answered: int = 0
    failed: int = 0
    refused: int = 0
    distinct: int = 0
    now: int = 0
    most_at_once: int = 0
    prompt_tokens: int = 0
    completion_tokens: int = 0


class PeopleService:
    """The people behind the protocol."""

    def __init__(self, latency: float = 0.0, fail: float = 0.0):
        """Serves nothing yet; `latency` in seconds, `fail` as a share of all attempts."""
        self.people, self.latency, self.fail, self.stats = People(), latency, fail, Stats()
        self._bodies, self._began = Bodies(), time.monotonic()
        self._attempts: collections.Counter[bytes] = collections.Counter()  # by a request's hash
        self._answered: set[bytes] = set()

    def app(self) -> Starlette:
        """The ASGI application."""

        async def health(request: Request) -> Response:
            return JSONResponse({"status": "ok"})

        async def models(request: Request) -> Response:
            model = {"id": MODEL, "object": "model", "created": 0, "owned_by": "rlver_jax"}
            return JSONResponse({"object": "list", "data": [model]})

        async def stats(request: Request) -> Response:
            uptime = round(time.monotonic() - self._began, 3)
            return JSONResponse(dataclasses.asdict(self.stats) | {"uptime_s": uptime})

        gets = {"/health": health, "/v1/models": models, "/stats": stats}
        routes = [Route(path, answer, methods=["GET"]) for path, answer in gets.items()]
        return Starlette(routes=[*routes, Route("/v1/chat/completions", self._chat, methods=["POST"])])

    async def _chat(self, request: Request) -> Response:
        """POST /v1/chat/completions."""
        stats = self.stats
        stats.requests += 1
        stats.now += 1
        stats.most_at_once = max(stats.most_at_once, stats.now)
        try:
            async with self._bodies.read(request) as body:
                key, answer = await self._bodies.work(len(body), functools.partial(self._answer, body))
            await asyncio.sleep(self.latency)
            if self._fails(key):
                stats.failed += 1
                raise ProtocolError(503, "this attempt fails on purpose (--fail); try again", code="unlucky")
            self._count(key, answer["usage"])
            return JSONResponse(answer)
        except ProtocolError as error:
            stats.refused += error.status != 503
            return JSONResponse(error.body, error.status)
        finally:
            stats.now -= 1

    def _answer(self, body: bytes) -> tuple[bytes, dict[str, Any]]:
        """(hash of the request, chat completion). Raises ProtocolError: it cannot be answered."""
        request = parse(ChatRequest, body)
        check_consistent(request)
        _check(request)
        key = hashlib.sha256(request.model_dump_json().encode()).digest()
        messages = [{"role": message.role, "content": message.text} for message in request.messages]
        try:
            text = self.people.answer(messages, random.Random(key))
        except NotOfThisWorld as error:
            raise ProtocolError(400, str(error), param="messages") from None
        prompt_tokens = sum(len(message["content"].split()) for message in messages)
        completion_tokens = len(text.split())
        choice = {"index": 0, "message": {"role": "assistant", "content": text}, "finish_reason": "stop"}
        usage = {
            "prompt_tokens": prompt_tokens,
            "completion_tokens": completion_tokens,
            "total_tokens": prompt_tokens + completion_tokens,
        }
        head = {"id": f"chatcmpl-{key.hex()[:24]}", "object": "chat.completion", "created": 0, "model": MODEL}
        return key, head | {"choices": [choice], "usage": usage}

    def _fails(self, key: bytes) -> bool:
        """Whether this attempt at a request is one of those that fail."""
        self._attempts[key] += 1
        return random.Random(key + self._attempts[key].to_bytes(8)).random() < self.fail

    def _count(self, key: bytes, usage: dict[str, int]) -> None:
        self._answered.add(key)
        self.stats.answered += 1
        self.stats.distinct = len(self._answered)
        self.stats.prompt_tokens += usage["prompt_tokens"]
        self.stats.completion_tokens += usage["completion_tokens"]


def _check(request: ChatRequest) -> None:
    """Raises ProtocolError for what no rule can do."""
    if request.model != MODEL:
        message = f"the model {quoted(request.model)} does not exist; this server has {MODEL!r}"
        raise ProtocolError(404, message, code="model_not_found", param="model")
    for name, wanted in (("stream", request.stream), ("logprobs", request.logprobs), ("n", (request.n or 1) > 1)):
        if wanted:
            raise ProtocolError(400, f"{name}: this server answers whole, once, without probabilities", param=name)
    length = sum(len(message.text) for message in request.messages)
    if length > LONGEST:
        message = f"the messages have {length} characters, more than the {LONGEST} that are read"
        raise ProtocolError(400, message, code="context_length_exceeded", param="messages")
