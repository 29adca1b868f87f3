"""The HTTP side: routes of OpenAI's protocol in front of an engine."""

import asyncio
import collections
import contextlib
import dataclasses
import functools
import hmac
import json
import secrets
import zlib
from collections.abc import AsyncGenerator, AsyncIterator, Awaitable, Callable, Iterator, Sequence
from typing import Any

from pydantic_core import to_json
from starlette.applications import Starlette
from starlette.exceptions import HTTPException
from starlette.requests import Request
from starlette.responses import JSONResponse, Response, StreamingResponse
from starlette.routing import Route

from rlver_jax.serving.engine import Emit, Engine, EngineDown, EngineFull, StreamChunk, Work
from rlver_jax.serving.errors import ProtocolError, quoted
from rlver_jax.serving.protocol import ChatRequest, CompletionRequest, check_consistent, parse
from rlver_jax.serving.request_bodies import MAX_BODY as MAX_BODY
from rlver_jax.serving.request_bodies import Bodies
from rlver_jax.serving.responses import Answers, Choice
from rlver_jax.text.chat import ChatTemplate
from rlver_jax.text.tokenizer_base import check_text

MOST_REPLIES = 16  # of a request where the queue holds fewer
ROOM = 2  # times the context: what is certainly too many tokens
PIECE = 1 << 15  # characters that are taken apart at a time
PATIENCE = 0.5  # seconds between two looks whether the client is still there

Handler = Callable[[Request], Awaitable[Response]]


@dataclasses.dataclass(frozen=True)
class Service:
    """One model behind the protocol."""

    engine: Engine
    model: str  # its name in requests
    created: int
    token: str = ""  # bearer token; empty: none is asked for
    system: str = ""  # of conversations that have no system message; empty: what the folder's chat template says
    bodies: Bodies = dataclasses.field(default_factory=Bodies)

    def app(self) -> Starlette:
        """The ASGI application."""
        routes = [
            Route("/health", self._open(self.health)),
            Route("/stats", self._guarded(self.stats)),
            Route("/v1/models", self._guarded(self.models)),
            Route("/v1/models/{name:path}", self._guarded(self.one_model)),
            Route("/v1/chat/completions", self._guarded(self.chat), methods=["POST"]),
            Route("/v1/completions", self._guarded(self.completions), methods=["POST"]),
        ]
        return Starlette(routes=routes, exception_handlers={HTTPException: _http_error, Exception: _fault})

    def _open(self, handler: Handler) -> Handler:
        @functools.wraps(handler)
        async def answer(request: Request) -> Response:
            try:
                return await handler(request)
            except ProtocolError as error:
                headers = {429: {"Retry-After": "1"}, 408: {"Connection": "close"}}.get(error.status, {})
                return JSONResponse(error.body, error.status, headers)

        return answer

    def _guarded(self, handler: Handler) -> Handler:
        async def checked(request: Request) -> Response:
            given = request.headers.get("authorization", "")
            if self.token and not hmac.compare_digest(given.encode("latin-1"), f"Bearer {self.token}".encode()):
                message = "no or a wrong bearer token; send the header `Authorization: Bearer TOKEN`"
                raise ProtocolError(401, message, code="invalid_api_key")
            return await handler(request)

        return self._open(checked)

    async def health(self, request: Request) -> Response:
        """200 while requests are answered."""
        if self.engine.failure is not None:
            raise ProtocolError(503, "the engine has failed; see the server's terminal", code="engine_down")
        return JSONResponse({"status": "ok"})

    async def stats(self, request: Request) -> Response:
        """How busy the engine is."""
        return JSONResponse(self.engine.stats())

    async def models(self, request: Request) -> Response:
        """The one model."""
        return JSONResponse({"object": "list", "data": [self._model()]})

    async def one_model(self, request: Request) -> Response:
        """The model by name."""
        self._check_model(request.path_params["name"])
        return JSONResponse(self._model())

    def _model(self) -> dict[str, Any]:
        limit = {"max_model_len": self.engine.context}
        return {"id": self.model, "object": "model", "created": self.created, "owned_by": "rlver_jax"} | limit

    def _check_model(self, name: str) -> None:
        if name != self.model:
            message = f"the model {quoted(name)} does not exist; this server has {self.model!r}"
            raise ProtocolError(404, message, code="model_not_found", param="model")

    async def chat(self, request: Request) -> Response:
        """POST /v1/chat/completions."""
        return await self._respond(request, self._chat)

    async def completions(self, request: Request) -> Response:
        """POST /v1/completions."""
        return await self._respond(request, self._completion)

    def _chat(self, body: bytes) -> "_Asked":
        ask = parse(ChatRequest, body)
        check_consistent(ask)
        self._check_model(ask.model)
        self._check_texts([message.text for message in ask.messages], "messages")
        prompt = self._chat_prompt(ask)
        room = self.engine.context - len(prompt)
        works = self._works(ask, [prompt], room if ask.limit is None else ask.limit, "messages")
        top = (ask.top_logprobs or 0) if ask.logprobs else None
        return _Asked(ask, works, [prompt], Answers(self.engine.tokenizer, self.model, True, top))

    def _completion(self, body: bytes) -> "_Asked":
        ask = parse(CompletionRequest, body)
        check_consistent(ask)
        self._check_model(ask.model)
        count, n, most = len(ask.prompts), ask.n or 1, max(self.engine.queue, MOST_REPLIES)
        if not 1 <= count * n <= most:
            raise ProtocolError(400, f"{count} prompts with n={n}: 1 to {most} replies a request", param="prompt")
        for prompt in ask.prompts:
            if isinstance(prompt, str):
                self._check_texts([prompt], "prompt")
        prompts = [self._completion_prompt(prompt) for prompt in ask.prompts]
        works = self._works(ask, prompts, 16 if ask.max_tokens is None else ask.max_tokens, "prompt")
        if ask.echo and ask.logprobs is not None:
            works = [dataclasses.replace(work, score_prompt=True) for work in works]
        answers = Answers(self.engine.tokenizer, self.model, False, ask.logprobs, bool(ask.echo))
        return _Asked(ask, works, prompts, answers)

    @functools.cached_property
    def _longest(self) -> int:
        """Bytes of the longest token."""
        tokenizer = self.engine.tokenizer
        return max(len(tokenizer.token_bytes(token)) for token in range(tokenizer.vocab_size))

    def _check_texts(self, texts: Sequence[str], param: str) -> None:
        """Refuses texts that can't fit in the context together, taking no more of them apart than that needs."""
        with _text_errors(param):
            for text in texts:
                check_text(text)
        context, size = self.engine.context, sum(len(text.encode()) for text in texts)
        if size > context * self._longest:
            raise _too_long(f"the text has {size} bytes, more than {context} tokens ever have", context, param)
        if size <= ROOM * context:
            return
        pieces = (text[at : at + PIECE] for text in texts for at in range(0, len(text), PIECE))
        count = 0
        for piece in pieces:
            count += len(self.engine.tokenizer.encode(piece))
            if count > ROOM * context:  # the cuts between pieces add a few tokens at most, not as many again
                raise _too_long(f"the text of {size} bytes has more than {context} tokens", context, param)

    def _chat_prompt(self, ask: ChatRequest) -> list[int]:
        chat = ChatTemplate(self.engine.tokenizer)
        roles = {"developer": "system"}
        messages = [{"role": roles.get(m.role, m.role), "content": m.text} for m in ask.messages]
        if self.system and messages[0]["role"] != "system":
            messages.insert(0, {"role": "system", "content": self.system})
        with _text_errors("messages"):
            if ask.continue_final_message:
                return chat.continued(messages)
            return chat.as_rendered(messages, generation_prompt=True)

    def _completion_prompt(self, prompt: str | list[int]) -> list[int]:
        """Tokens; an empty prompt begins a text."""
        tokenizer = self.engine.tokenizer
        if isinstance(prompt, str):
            with _text_errors("prompt"):
                prompt = tokenizer.encode(prompt)
        wrong = [token for token in prompt if not 0 <= token < tokenizer.vocab_size]
        if wrong:
            message = f"token {wrong[0]} is outside the vocabulary of {tokenizer.vocab_size}"
            raise ProtocolError(400, message, param="prompt")
        return list(prompt) or [tokenizer.pad_id]

    def _works(
        self, ask: ChatRequest | CompletionRequest, prompts: Sequence[list[int]], limit: int, param: str
    ) -> list[Work]:
        """One for each choice: the choices of each prompt together. Raises ProtocolError where one doesn't fit."""
        for prompt in prompts:
            if len(prompt) + max(limit, 1) > self.engine.context:
                found = f"the prompt has {len(prompt)} tokens and {max(limit, 1)} are asked for"
                raise _too_long(found, self.engine.context, param)
        seed = secrets.randbits(63) if ask.seed is None else ask.seed
        return [
            Work(
                tokens=prompt,
                max_tokens=limit,
                temperature=1.0 if ask.temperature is None else ask.temperature,
                top_p=1.0 if ask.top_p is None else ask.top_p,
                stop=tuple(ask.stop),
                seed=zlib.crc32(f"{seed} {choice}".encode()),
                details=ask.details,
            )
            for prompt in prompts
            for choice in range(ask.n or 1)
        ]

    async def _respond(self, request: Request, read: Callable[[bytes], "_Asked"]) -> Response:
        """Work that grows with the request or its answer is done in threads: others are answered meanwhile."""
        async with self.bodies.read(request) as body:
            asked = await self.bodies.work(len(body), functools.partial(read, body))
        if await request.is_disconnected():
            raise _gone()
        ask, works, answers = asked.ask, asked.works, asked.answers
        replies = _Replies(self.engine, works)
        if ask.stream:
            with_usage = bool(ask.stream_options and ask.stream_options.include_usage)
            events = _events(replies, asked.prompts, answers, with_usage)
            return StreamingResponse(events, media_type="text/event-stream", headers={"Cache-Control": "no-cache"})
        choices = [Choice() for _ in works]
        async for index, piece in replies.pieces(request):
            choices[index].add(piece)
        written = await asyncio.to_thread(lambda: to_json(answers.whole(choices, asked.prompts)))
        return Response(written, media_type="application/json")


@dataclasses.dataclass(frozen=True)
class _Asked:
    """What one request comes to."""

    ask: ChatRequest | CompletionRequest
    works: Sequence[Work]  # the choices of each prompt together
    prompts: Sequence[list[int]]
    answers: Answers


class _Replies:
    """Replies that are being made, on the server's event loop."""

    def __init__(self, engine: Engine, works: Sequence[Work]):
        """Submits them; raises ProtocolError where the engine takes no more."""
        self._queue: asyncio.Queue[tuple[int, StreamChunk]] = asyncio.Queue()
        self._open = len(works)
        loop = asyncio.get_running_loop()

        def emitter(index: int) -> Emit:
            def emit(piece: StreamChunk) -> None:
                if not loop.is_closed():
                    loop.call_soon_threadsafe(self._queue.put_nowait, (index, piece))

            return emit

        try:
            self._tickets = engine.submit([(work, emitter(i)) for i, work in enumerate(works)])
        except EngineFull as error:
            raise ProtocolError(429, f"{error}; try again", code="queue_full") from None
        except EngineDown:
            raise ProtocolError(503, "the server is going down", code="engine_down") from None

    async def pieces(self, request: Request | None = None) -> AsyncGenerator[tuple[int, StreamChunk], None]:
        """(choice, piece) until all replies have ended; whoever leaves early, or whose client has, frees the rows."""
        loop = asyncio.get_running_loop()
        look = loop.time() + PATIENCE
        try:
            while self._open:
                if request is not None and loop.time() > look:
                    if await request.is_disconnected():
                        raise _gone()
                    look = loop.time() + PATIENCE
                try:
                    index, piece = await asyncio.wait_for(self._queue.get(), PATIENCE)
                except TimeoutError:
                    continue
                if piece.finish == "error":
                    raise ProtocolError(500, "the reply could not be finished", code="engine_down")
                self._open -= piece.finish is not None
                yield index, piece
        finally:
            for ticket in self._tickets:
                ticket.cancel()


async def _events(replies: _Replies, prompts, answers: Answers, with_usage: bool) -> AsyncIterator[str]:
    """Server-sent events of a streamed response."""
    said: dict[int, int] = {}
    told = collections.Counter[int]()
    try:
        async with contextlib.aclosing(replies.pieces()) as pieces:
            async for index, piece in pieces:
                if answers.chat and index not in said:
                    yield _event(answers.opening(index))
                said[index] = piece.said
                if piece.text or piece.scores or piece.finish:
                    yield _event(answers.chunk(index, piece, offset=told[index], usage_null=with_usage))
                told[index] += len(piece.text)
    except ProtocolError as error:
        yield _event(error.body)
        return
    if with_usage:
        yield _event(answers.usage_chunk(prompts, said.values()))
    yield "data: [DONE]\n\n"


def _event(value: dict[str, Any]) -> str:
    return f"data: {json.dumps(value, ensure_ascii=False)}\n\n"


@contextlib.contextmanager
def _text_errors(param: str) -> Iterator[None]:
    """Text that the tokenizer refuses becomes an error of the request."""
    try:
        yield
    except ValueError as error:
        raise ProtocolError(400, str(error), param=param) from None


def _gone() -> ProtocolError:
    return ProtocolError(499, "the client has gone")


def _too_long(found: str, context: int, param: str) -> ProtocolError:
    message = f"{found}, but the context holds {context}; shorten the prompt or lower max_tokens"
    return ProtocolError(400, message, code="context_length_exceeded", param=param)


async def _fault(request: Request, error: Exception) -> Response:
    """A fault of the server itself: the client is told that much; the traceback goes to the terminal."""
    return JSONResponse(ProtocolError(500, "the server has a fault; see its terminal").body, 500)


async def _http_error(request: Request, error: Exception) -> Response:
    assert isinstance(error, HTTPException)
    known = ProtocolError(error.status_code, f"{request.method} {quoted(request.scope['path'])}: {error.detail}")
    return JSONResponse(known.body, error.status_code, error.headers)
