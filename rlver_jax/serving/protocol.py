"""Requests of OpenAI's protocol, checked, and its error objects.

What would change a reply and isn't supported is refused, never ignored; so is a field that the protocol doesn't know.
"""

import json
import math
from typing import Annotated, Any, Literal, TypeVar

from pydantic import BaseModel, BeforeValidator, ConfigDict, Field, ValidationError

MAX_CHOICES = 16  # n, times the prompts of a completion
MAX_STOPS = 16
R = TypeVar("R", bound=BaseModel)


class ProtocolError(Exception):
    """Becomes a response with the protocol's error object."""

    def __init__(self, status: int, message: str, *, code: str | None = None, param: str | None = None):
        super().__init__(message)
        kinds = {401: "authentication_error", 429: "rate_limit_error"}
        kind = kinds.get(status, "invalid_request_error" if status < 500 else "server_error")
        self.status, self.body = status, {"error": {"message": message, "type": kind, "param": param, "code": code}}


def _as_list(value: Any) -> Any:
    return [] if value is None else [value] if isinstance(value, str) else value


Stops = Annotated[
    list[Annotated[str, Field(min_length=1, max_length=256)]], BeforeValidator(_as_list), Field(max_length=MAX_STOPS)
]


class _Strict(BaseModel):
    model_config = ConfigDict(extra="forbid", strict=True, allow_inf_nan=False)


class StreamOptions(_Strict):
    """How a stream ends."""

    include_usage: bool = False
    include_obfuscation: bool = False


class _Common(_Strict):
    """Fields of both kinds of request. Those after `stop` are accepted where they ask for nothing."""

    model: str
    temperature: float | None = Field(None, ge=0, le=2)
    top_p: float | None = Field(None, gt=0, le=1)
    n: int | None = Field(None, ge=1, le=MAX_CHOICES)
    seed: int | None = None
    stream: bool | None = None
    stream_options: StreamOptions | None = None
    stop: Stops = []
    user: str | None = None
    frequency_penalty: Literal[0] | None = None
    presence_penalty: Literal[0] | None = None
    logit_bias: Annotated[dict[str, float], Field(max_length=0)] | None = None


class TextPart(_Strict):
    """A part of a message; there are no others than text."""

    type: Literal["text"]
    text: str


class Message(_Strict):
    """A message of a chat; `type` is what lm-evaluation-harness adds."""

    role: Literal["system", "developer", "user", "assistant"]
    content: str | list[TextPart]
    name: str | None = None
    type: Literal["text"] | None = None

    @property
    def text(self) -> str:
        """Its whole content."""
        return self.content if isinstance(self.content, str) else "".join(part.text for part in self.content)


class TextFormat(_Strict):
    """The one format of replies."""

    type: Literal["text"]


class ChatRequest(_Common):
    """POST /v1/chat/completions. `continue_final_message` goes on with the last message, the assistant's."""

    messages: list[Message] = Field(min_length=1)
    max_tokens: int | None = Field(None, ge=1)
    max_completion_tokens: int | None = Field(None, ge=1)
    logprobs: bool | None = None
    top_logprobs: int | None = Field(None, ge=0, le=20)
    continue_final_message: bool = False
    add_generation_prompt: bool = True
    response_format: TextFormat | None = None
    tools: Annotated[list[Any], Field(max_length=0)] | None = None
    tool_choice: Literal["none"] | None = None
    parallel_tool_calls: bool | None = None
    store: Literal[False] | None = None
    metadata: dict[str, str] | None = None
    service_tier: str | None = None

    @property
    def limit(self) -> int | None:
        """Tokens of the reply."""
        return self.max_tokens if self.max_completion_tokens is None else self.max_completion_tokens

    @property
    def details(self) -> bool:
        """Whether the likeliest tokens are asked for."""
        return bool(self.logprobs and self.top_logprobs)


class CompletionRequest(_Common):
    """POST /v1/completions."""

    prompt: str | list[int] | list[str] | list[list[int]]
    max_tokens: int | None = Field(None, ge=0)
    logprobs: int | None = Field(None, ge=0, le=5)
    echo: bool | None = None
    best_of: int | None = Field(None, ge=1)
    suffix: None = None

    @property
    def details(self) -> bool:
        """Whether the likeliest tokens are asked for."""
        return bool(self.logprobs)

    @property
    def prompts(self) -> list[str] | list[list[int]]:
        """The prompts, also where there is one."""
        if isinstance(self.prompt, str):
            return [self.prompt]
        if self.prompt and isinstance(self.prompt[0], int):
            return [self.prompt]
        return self.prompt  # type: ignore[return-value]


def parse(kind: type[R], body: bytes) -> R:
    """A checked request.

    Raises:
        ProtocolError: no JSON object, or a field that is wrong, unknown or not supported; the first one is named.
    """
    try:
        value = json.loads(body, parse_constant=_refuse_constant)
    except (ValueError, RecursionError) as error:
        raise ProtocolError(400, f"the body is not JSON ({error}); send one JSON object", code="invalid_json") from None
    if not isinstance(value, dict):
        raise ProtocolError(400, f"the body is a JSON {type(value).__name__}; send one object", code="invalid_json")
    try:
        return kind.model_validate(value)
    except ValidationError as error:
        first = error.errors()[0]
        field = ".".join(str(part) for part in first["loc"])
        given = json.dumps(first["input"], ensure_ascii=False, default=str)
        said = "this server doesn't know or support it" if first["type"] == "extra_forbidden" else first["msg"]
        found = "" if first["type"] == "missing" else f" (given: {given[:80]})"
        raise ProtocolError(400, f"{field or 'the request'}: {said}{found}", param=field) from None


def _refuse_constant(name: str) -> float:
    raise ValueError(f"{name} is no JSON number")


def check_consistent(request: ChatRequest | CompletionRequest) -> None:
    """Raises ProtocolError where fields contradict each other."""
    if isinstance(request, ChatRequest):
        if request.top_logprobs and not request.logprobs:
            raise ProtocolError(400, "top_logprobs needs logprobs=true", param="top_logprobs")
        if request.continue_final_message and request.messages[-1].role != "assistant":
            message = "continue_final_message needs a last message of role assistant"
            raise ProtocolError(400, message, param="continue_final_message")
        if request.add_generation_prompt == request.continue_final_message:
            message = "exactly one of add_generation_prompt and continue_final_message can be true"
            raise ProtocolError(400, message, param="add_generation_prompt")
    else:
        if request.best_of not in (None, request.n or 1):
            raise ProtocolError(400, "best_of: only the same number as n is supported", param="best_of")
        if not request.prompts or len(request.prompts) * (request.n or 1) > MAX_CHOICES:
            message = f"{len(request.prompts)} prompts with n={request.n or 1}: 1 to {MAX_CHOICES} replies a request"
            raise ProtocolError(400, message, param="prompt")
        if request.echo and request.stream:
            raise ProtocolError(400, "echo and stream together are not supported", param="echo")
        if request.max_tokens == 0 and not request.echo:
            raise ProtocolError(400, "max_tokens=0 makes sense only with echo=true", param="max_tokens")
    if request.stream_options and not request.stream:
        raise ProtocolError(400, "stream_options needs stream=true", param="stream_options")


def finite(value: float | None) -> float | None:
    """JSON has no infinity: a token that cannot come gets the protocol's -9999."""
    return value if value is None or math.isfinite(value) else -9999.0
