"""Requests of OpenAI's protocol, checked.

An unsupported field that would change a reply is refused, never ignored; so is a field unknown to the protocol.
A null field counts as absent everywhere, and so does one that states the default.
"""

import math
from typing import Annotated, Any, Literal, TypeVar

from pydantic import (
    BaseModel,
    BeforeValidator,
    ConfigDict,
    FailFast,
    Field,
    PlainValidator,
    ValidationError,
    model_validator,
)
from pydantic_core import PydanticCustomError

from rlver_jax.serving.errors import ProtocolError, quoted
from rlver_jax.serving.request_bodies import json_object

MAX_CHOICES = 128  # n
MAX_MESSAGES = 8192
MAX_STOPS = 16
R = TypeVar("R", bound=BaseModel)


def _as_list(value: Any) -> Any:
    return [] if value is None else [value] if isinstance(value, str) else value


def _only(*values: Any) -> Any:
    """A field that is accepted, without effect, where it has one of `values`."""

    def check(value: Any) -> None:
        if value is not None and not any(value == v and isinstance(value, bool) == isinstance(v, bool) for v in values):
            rest = f", or send {' or '.join(map(quoted, values))}" if values else ""
            raise PydanticCustomError("unsupported", f"this server doesn't support it; leave it out{rest}")

    return PlainValidator(check)


def _text(content: Any) -> Any:
    """The text of a message whose content comes in parts."""
    if not isinstance(content, list):
        return content
    for i, part in enumerate(content):
        kind = part.get("type") if isinstance(part, dict) else None
        if kind != "text" or not isinstance(part.get("text"), str) or len(part) > 2:
            what = f"of type {quoted(kind)}" if kind not in ("text", None) else "no object of `type` and `text`"
            message = "part {i} is {what}; messages are text here: no images, audio or files"
            raise PydanticCustomError("part", message, {"i": i, "what": what})
    return "".join(part["text"] for part in content)


def _prompts(prompt: Any) -> Any:
    """The prompts of a completion, also where there is one; each a text or token ids."""
    if isinstance(prompt, str) or (prompt and _are_ids(prompt)):
        return [prompt]
    if isinstance(prompt, list) and (all(isinstance(one, str) for one in prompt) or all(map(_are_ids, prompt))):
        return prompt
    raise PydanticCustomError("prompt", "expected a text, a list of texts, a list of token ids, or a list of such")


def _are_ids(prompt: Any) -> bool:
    return isinstance(prompt, list) and all(type(token) is int for token in prompt)


Stops = Annotated[
    list[Annotated[str, Field(min_length=1, max_length=256)]],
    FailFast(),
    BeforeValidator(_as_list),
    Field(max_length=MAX_STOPS),
]


class _Strict(BaseModel):
    model_config = ConfigDict(extra="forbid", strict=True, allow_inf_nan=False)


class StreamOptions(_Strict):
    """How a stream ends."""

    include_usage: bool | None = None
    include_obfuscation: bool | None = None


class _Common(_Strict):
    """Fields of both kinds of request."""

    model: str
    temperature: float | None = Field(None, ge=0, le=2)
    top_p: float | None = Field(None, gt=0, le=1)
    n: int | None = Field(None, ge=1, le=MAX_CHOICES)
    seed: int | None = Field(None, ge=-(2**63), lt=2**63)
    stream: bool | None = None
    stream_options: StreamOptions | None = None
    stop: Stops = []
    user: str | None = None
    frequency_penalty: Annotated[None, _only(0)] = None
    presence_penalty: Annotated[None, _only(0)] = None
    logit_bias: Annotated[None, _only({})] = None


class Message(_Strict):
    """A message of a chat; `type` is what lm-evaluation-harness adds. Those after it come with a client's replies."""

    role: Literal["system", "developer", "user", "assistant"]
    content: Annotated[str | None, BeforeValidator(_text)] = None
    name: str | None = None
    type: Literal["text"] | None = None
    refusal: Annotated[None, _only("")] = None
    annotations: Annotated[None, _only([])] = None
    audio: Annotated[None, _only()] = None
    function_call: Annotated[None, _only()] = None
    tool_calls: Annotated[None, _only([])] = None

    @model_validator(mode="after")
    def _check_content(self) -> "Message":
        if self.content is None and self.role != "assistant":
            raise PydanticCustomError("content", "its content is missing; only an assistant's may be null")
        return self

    @property
    def text(self) -> str:
        """Its whole content."""
        return self.content or ""


class TemplateOptions(_Strict):
    """What a chat tells the chat template; of effect where the template knows it."""

    enable_thinking: bool | None = None


class ChatRequest(_Common):
    """POST /v1/chat/completions. `continue_final_message` continues the last message, the assistant's."""

    messages: Annotated[list[Message], FailFast(), Field(min_length=1, max_length=MAX_MESSAGES)]
    max_tokens: int | None = Field(None, ge=1)
    max_completion_tokens: int | None = Field(None, ge=1)
    logprobs: bool | None = None
    top_logprobs: int | None = Field(None, ge=0, le=20)
    continue_final_message: bool = False
    add_generation_prompt: bool = True
    chat_template_kwargs: TemplateOptions | None = None
    response_format: Annotated[None, _only({"type": "text"})] = None
    tools: Annotated[None, _only([])] = None
    tool_choice: Annotated[None, _only("none", "auto")] = None
    functions: Annotated[None, _only([])] = None
    function_call: Annotated[None, _only("none", "auto")] = None
    parallel_tool_calls: bool | None = None
    modalities: Annotated[None, _only(["text"])] = None
    audio: Annotated[None, _only()] = None
    prediction: Annotated[None, _only()] = None
    reasoning_effort: Annotated[None, _only("none")] = None
    verbosity: Annotated[None, _only("medium")] = None
    web_search_options: Annotated[None, _only()] = None
    store: Annotated[None, _only(False)] = None
    metadata: dict[str, str] | None = None
    service_tier: str | None = None
    safety_identifier: str | None = None
    prompt_cache_key: str | None = None
    prompt_cache_retention: str | None = None

    @property
    def thinking(self) -> bool | None:
        """Whether the reply begins with a thought; None: the chat doesn't say."""
        return None if self.chat_template_kwargs is None else self.chat_template_kwargs.enable_thinking

    @property
    def limit(self) -> int | None:
        """Tokens of the reply."""
        return self.max_tokens if self.max_completion_tokens is None else self.max_completion_tokens

    @property
    def details(self) -> bool:
        """Whether the likeliest tokens are asked for."""
        return bool(self.logprobs and self.top_logprobs)


class CompletionRequest(_Common):
    """POST /v1/completions. Without a prompt a new text begins."""

    prompt: Annotated[Any, PlainValidator(_prompts)] = ("",)
    max_tokens: int | None = Field(None, ge=0)
    logprobs: int | None = Field(None, ge=0, le=5)
    echo: bool | None = None
    best_of: int | None = Field(None, ge=1)
    suffix: Annotated[None, _only("")] = None

    @property
    def details(self) -> bool:
        """Whether the likeliest tokens are asked for."""
        return bool(self.logprobs)

    @property
    def prompts(self) -> list[str] | list[list[int]]:
        """The prompts, also where there is one."""
        return list(self.prompt)


def parse(kind: type[R], body: bytes) -> R:
    """A checked request.

    Raises:
        ProtocolError: no JSON object, or a field that is wrong, unknown or not supported; the first one is named.
    """
    value = json_object(body)
    try:
        return kind.model_validate(value)
    except ValidationError as error:
        first = error.errors(include_url=False, include_context=False)[0]
        field = ".".join(str(part) for part in first["loc"])
        problem = "this server doesn't know or support it" if first["type"] == "extra_forbidden" else first["msg"]
        received = "" if first["type"] == "missing" else f" (given: {quoted(first['input'])})"
        where = quoted(field)[1:-1] or "the request"
        raise ProtocolError(400, f"{where}: {problem}{received}", param=field or None) from None


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
        if request.echo and request.stream:
            raise ProtocolError(400, "echo and stream together are not supported", param="echo")
        if request.max_tokens == 0 and not request.echo:
            raise ProtocolError(400, "max_tokens=0 makes sense only with echo=true", param="max_tokens")
    options = request.stream_options
    if options and (options.include_usage or options.include_obfuscation) and not request.stream:
        raise ProtocolError(400, "stream_options needs stream=true", param="stream_options")


def finite(value: float | None) -> float | None:
    """JSON has no infinity: a token that cannot come gets the protocol's -9999."""
    return value if value is None or math.isfinite(value) else -9999.0
