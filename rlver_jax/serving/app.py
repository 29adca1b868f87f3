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
from typing import Any, NamedTuple

from pydantic_core import to_json
from starlette.applications import Starlette
from starlette.exceptions import HTTPException
from starlette.requests import Request
from starlette.responses import JSONResponse, Response, StreamingResponse
from starlette.routing import Route

from rlver_jax.serving.engine import BASE, Emit, Engine, EngineDown, EngineFull, GenerationParams, StreamChunk
from rlver_jax.serving.errors import ProtocolError, quoted
from rlver_jax.serving.protocol import ChatRequest, CompletionRequest, check_consistent, parse
from rlver_jax.serving.request_bodies import MAX_BODY as MAX_BODY
from rlver_jax.serving.request_bodies import Bodies
from rlver_jax.serving.responses import Choice, ResponseWriter
from rlver_jax.text.chat import ChatTemplate
from rlver_jax.text.tokenizer_base import check_text

MOST_REPLIES = 16  # of a request where the queue holds fewer
ROOM = 2  # times the context: what is certainly too many tokens
CHARACTERS_AT_ONCE = 1 << 15  # that the tokenizer takes
PATIENCE = 0.5  # seconds between two looks whether the client is still there


@dataclasses.dataclass(frozen=True)
class Service:
    """One model behind the protocol."""

    engine: Engine
    model: str  # its name in requests
    created: int
    token: str = ""  # bearer token; empty: none is asked for
    system: str = ""  # of conversations that have no system message; empty: what the folder's chat template says
    thinking: bool | None = None  # see `FolderTemplate.render`, of chats that don't say; None: as the template does
    adapters: tuple[str, ...] = ()  # names in requests of the engine's adapters, which stand beside the model's
    bodies: Bodies = dataclasses.field(default_factory=Bodies)

    def app(self) -> Starlette:
        """The ASGI application."""
        routes = [Route(one.path, self._answering(one), methods=[one.method]) for one in ROUTES]
        return Starlette(routes=routes, exception_handlers={HTTPException: _http_error, Exception: _fault})

    def _answering(self, endpoint: "Endpoint") -> Callable[[Request], Awaitable[Response]]:
        async def answer(request: Request) -> Response:
            try:
                if not endpoint.public:
                    self._check_token(request)
                return await endpoint.answer(self, request)
            except ProtocolError as error:
                headers = {429: {"Retry-After": "1"}, 408: {"Connection": "close"}}.get(error.status, {})
                return JSONResponse(error.body, error.status, headers)

        return answer

    def _check_token(self, request: Request) -> None:
        header = request.headers.get("authorization", "")
        if self.token and not hmac.compare_digest(header.encode("latin-1"), f"Bearer {self.token}".encode()):
            message = "no or a wrong bearer token; send the header `Authorization: Bearer TOKEN`"
            raise ProtocolError(401, message, code="invalid_api_key")

    async def health(self, request: Request) -> Response:
        """200 while requests are answered."""
        if self.engine.failure is not None:
            raise ProtocolError(503, "the engine has failed; see the server's terminal", code="engine_down")
        return JSONResponse({"status": "ok"})

    async def stats(self, request: Request) -> Response:
        """How busy the engine is."""
        return JSONResponse(self.engine.stats())

    async def models(self, request: Request) -> Response:
        """The model, and its adapters."""
        return JSONResponse({"object": "list", "data": [self._model(name) for name in (self.model, *self.adapters)]})

    async def one_model(self, request: Request) -> Response:
        """One of them by name."""
        name = request.path_params["name"]
        self._adapter(name)
        return JSONResponse(self._model(name))

    def _model(self, name: str) -> dict[str, Any]:
        more = {"max_model_len": self.engine.context} | ({"parent": self.model} if name != self.model else {})
        return {"id": name, "object": "model", "created": self.created, "owned_by": "rlver_jax"} | more

    def _adapter(self, name: str) -> int:
        """The engine's number of the model that a request names."""
        if name == self.model:
            return BASE
        if name not in self.adapters:
            known = ", ".join(map(repr, (self.model, *self.adapters)))
            message = f"the model {quoted(name)} does not exist; this server has {known}"
            raise ProtocolError(404, message, code="model_not_found", param="model")
        return self.adapters.index(name)

    async def chat(self, request: Request) -> Response:
        """POST /v1/chat/completions."""
        return await self._respond(request, self._chat)

    async def completions(self, request: Request) -> Response:
        """POST /v1/completions."""
        return await self._respond(request, self._completion)

    def _chat(self, body: bytes) -> "_ParsedRequest":
        request = parse(ChatRequest, body)
        check_consistent(request)
        self._adapter(request.model)
        self._check_texts([message.text for message in request.messages], "messages")
        prompt = self._chat_prompt(request)
        room = self.engine.context - len(prompt)
        wanted = self._params_of(request, [prompt], room if request.limit is None else request.limit, "messages")
        top = (request.top_logprobs or 0) if request.logprobs else None
        return _ParsedRequest(
            request, wanted, [prompt], ResponseWriter(self.engine.tokenizer, request.model, True, top)
        )

    def _completion(self, body: bytes) -> "_ParsedRequest":
        request = parse(CompletionRequest, body)
        check_consistent(request)
        self._adapter(request.model)
        count, n, most = len(request.prompts), request.n or 1, max(self.engine.queue, MOST_REPLIES)
        if not 1 <= count * n <= most:
            raise ProtocolError(400, f"{count} prompts with n={n}: 1 to {most} replies a request", param="prompt")
        for prompt in request.prompts:
            if isinstance(prompt, str):
                self._check_texts([prompt], "prompt")
        prompts = [self._completion_prompt(prompt) for prompt in request.prompts]
        wanted = self._params_of(request, prompts, 16 if request.max_tokens is None else request.max_tokens, "prompt")
        if request.echo and request.logprobs is not None:
            wanted = [dataclasses.replace(params, score_prompt=True) for params in wanted]
        writer = ResponseWriter(self.engine.tokenizer, request.model, False, request.logprobs, bool(request.echo))
        return _ParsedRequest(request, wanted, prompts, writer)

    @functools.cached_property
    def _longest(self) -> int:
        """Bytes of the longest token."""
        tokenizer = self.engine.tokenizer
        return max(len(tokenizer.token_bytes(token)) for token in range(tokenizer.vocab_size))

    def _check_texts(self, texts: Sequence[str], param: str) -> None:
        """Refuses texts that can't fit in the context together; tokenizes no more of them than that needs."""
        with _text_errors(param):
            for text in texts:
                check_text(text)
        context, size = self.engine.context, sum(len(text.encode()) for text in texts)
        if size > context * self._longest:
            raise _too_long(f"the text has {size} bytes, more than {context} tokens ever have", context, param)
        if size <= ROOM * context:
            return
        starts = ((text, start) for text in texts for start in range(0, len(text), CHARACTERS_AT_ONCE))
        parts = (text[start : start + CHARACTERS_AT_ONCE] for text, start in starts)
        count = 0
        for part in parts:
            count += len(self.engine.tokenizer.encode(part))
            if count > ROOM * context:  # the cuts between parts add a few tokens at most, not as many again
                raise _too_long(f"the text of {size} bytes has more than {context} tokens", context, param)

    def _chat_prompt(self, request: ChatRequest) -> list[int]:
        chat = ChatTemplate(self.engine.tokenizer)
        roles = {"developer": "system"}
        messages = [{"role": roles.get(m.role, m.role), "content": m.text} for m in request.messages]
        if self.system and messages[0]["role"] != "system":
            messages.insert(0, {"role": "system", "content": self.system})
        with _text_errors("messages"):
            if request.continue_final_message:
                return chat.continued(messages)
            told = request.thinking
            return chat.as_rendered(messages, True, self.thinking if told is None else told)

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

    def _params_of(
        self, request: ChatRequest | CompletionRequest, prompts: Sequence[list[int]], limit: int, param: str
    ) -> list[GenerationParams]:
        """One for each choice: the choices of each prompt together. Raises ProtocolError where one doesn't fit."""
        for prompt in prompts:
            if len(prompt) + max(limit, 1) > self.engine.context:
                problem = f"the prompt has {len(prompt)} tokens and {max(limit, 1)} are asked for"
                raise _too_long(problem, self.engine.context, param)
        adapter = self._adapter(request.model)
        seed = secrets.randbits(63) if request.seed is None else request.seed
        return [
            GenerationParams(
                tokens=prompt,
                max_tokens=limit,
                temperature=1.0 if request.temperature is None else request.temperature,
                top_p=1.0 if request.top_p is None else request.top_p,
                stop=tuple(request.stop),
                seed=zlib.crc32(f"{seed} {choice}".encode()),
                details=request.details,
                adapter=adapter,
            )
            for prompt in prompts
            for choice in range(request.n or 1)
        ]

    async def _respond(self, request: Request, parse_body: Callable[[bytes], "_ParsedRequest"]) -> Response:
        """Work that grows with the request or its answer is done in threads: others are answered meanwhile."""
        async with self.bodies.read(request) as body:
            parsed = await self.bodies.work(len(body), functools.partial(parse_body, body))
        if await request.is_disconnected():
            raise _gone()
        options, writer = parsed.request, parsed.writer
        replies = _Replies(self.engine, parsed.wanted)
        if options.stream:
            with_usage = bool(options.stream_options and options.stream_options.include_usage)
            events = _events(replies, parsed.prompts, writer, with_usage)
            return StreamingResponse(events, media_type="text/event-stream", headers={"Cache-Control": "no-cache"})
        choices = [Choice() for _ in parsed.wanted]
        async for index, chunk in replies.chunks(request):
            choices[index].add(chunk)
        body = await asyncio.to_thread(lambda: to_json(writer.whole(choices, parsed.prompts)))
        return Response(body, media_type="application/json")


class Endpoint(NamedTuple):
    """One route; `public` ones ask for no bearer token."""

    method: str
    path: str
    answer: Callable[[Service, Request], Awaitable[Response]]
    public: bool = False


ROUTES = (
    Endpoint("GET", "/health", Service.health, public=True),
    Endpoint("GET", "/stats", Service.stats),
    Endpoint("GET", "/v1/models", Service.models),
    Endpoint("GET", "/v1/models/{name:path}", Service.one_model),
    Endpoint("POST", "/v1/chat/completions", Service.chat),
    Endpoint("POST", "/v1/completions", Service.completions),
)


@dataclasses.dataclass(frozen=True)
class _ParsedRequest:
    """A checked request, and what it wants of the engine."""

    request: ChatRequest | CompletionRequest
    wanted: Sequence[GenerationParams]  # the choices of each prompt together
    prompts: Sequence[list[int]]
    writer: ResponseWriter


class _Replies:
    """Replies in generation, on the server's event loop."""

    def __init__(self, engine: Engine, wanted: Sequence[GenerationParams]):
        """Submits them; raises ProtocolError where the engine takes no more."""
        self._queue: asyncio.Queue[tuple[int, StreamChunk]] = asyncio.Queue()
        self._open = len(wanted)
        loop = asyncio.get_running_loop()

        def emitter(index: int) -> Emit:
            def emit(chunk: StreamChunk) -> None:
                if not loop.is_closed():
                    loop.call_soon_threadsafe(self._queue.put_nowait, (index, chunk))

            return emit

        try:
            self._requests = engine.submit([(params, emitter(i)) for i, params in enumerate(wanted)])
        except EngineFull as error:
            raise ProtocolError(429, f"{error}; try again", code="queue_full") from None
        except EngineDown:
            raise ProtocolError(503, "the server is going down", code="engine_down") from None

    async def chunks(self, request: Request | None = None) -> AsyncGenerator[tuple[int, StreamChunk], None]:
        """(choice, chunk) until all replies have ended; whoever leaves early, or whose client has, frees the rows."""
        loop = asyncio.get_running_loop()
        look = loop.time() + PATIENCE
        try:
            while self._open:
                if request is not None and loop.time() > look:
                    if await request.is_disconnected():
                        raise _gone()
                    look = loop.time() + PATIENCE
                try:
                    index, chunk = await asyncio.wait_for(self._queue.get(), PATIENCE)
                except TimeoutError:
                    continue
                if chunk.finish == "error":
                    raise ProtocolError(500, "the reply could not be finished", code="engine_down")
                self._open -= chunk.finish is not None
                yield index, chunk
        finally:
            for generation in self._requests:
                generation.cancel()


async def _events(replies: _Replies, prompts, writer: ResponseWriter, with_usage: bool) -> AsyncIterator[str]:
    """Server-sent events of a streamed response."""
    generated: dict[int, int] = {}
    sent = collections.Counter[int]()
    try:
        async with contextlib.aclosing(replies.chunks()) as chunks:
            async for index, chunk in chunks:
                if writer.chat and index not in generated:
                    yield _event(writer.opening(index))
                generated[index] = chunk.generated
                if chunk.text or chunk.scores or chunk.finish:
                    yield _event(writer.chunk(index, chunk, offset=sent[index], usage_null=with_usage))
                sent[index] += len(chunk.text)
    except ProtocolError as error:
        yield _event(error.body)
        return
    if with_usage:
        yield _event(writer.usage_chunk(prompts, generated.values()))
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


def _too_long(problem: str, context: int, param: str) -> ProtocolError:
    message = f"{problem}, but the context holds {context}; shorten the prompt or lower max_tokens"
    return ProtocolError(400, message, code="context_length_exceeded", param=param)


async def _fault(request: Request, error: Exception) -> Response:
    """A fault of the server itself: the client is sent that much; the traceback goes to the terminal."""
    return JSONResponse(ProtocolError(500, "the server has a fault; see its terminal").body, 500)


async def _http_error(request: Request, error: Exception) -> Response:
    assert isinstance(error, HTTPException)
    message = f"{request.method} {quoted(request.scope['path'])}: {error.detail}"
    return JSONResponse(ProtocolError(error.status_code, message).body, error.status_code, error.headers)
