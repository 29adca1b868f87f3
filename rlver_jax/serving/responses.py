"""Responses of OpenAI's protocol, whole or as chunks of a stream."""

import codecs
import dataclasses
import functools
import time
import uuid
from collections.abc import Iterable, Sequence
from typing import Any

from rlver_jax.serving.engine import StreamChunk, TokenScore
from rlver_jax.serving.protocol import finite
from rlver_jax.text.tokenizer import Tokenizer


@dataclasses.dataclass
class Choice:
    """A whole reply, gathered from its chunks."""

    text: str = ""
    scores: list[TokenScore] = dataclasses.field(default_factory=list)
    prompt: Sequence[TokenScore] = ()
    generated: int = 0
    finish: str | None = None

    def add(self, chunk: StreamChunk) -> None:
        """Takes the next chunk."""
        self.text += chunk.text
        self.scores += chunk.scores
        self.prompt = self.prompt or chunk.prompt
        self.generated, self.finish = chunk.generated, chunk.finish


@dataclasses.dataclass(frozen=True)
class ResponseWriter:
    """Writes the responses to one request."""

    tokenizer: Tokenizer
    model: str
    chat: bool
    top: int | None  # likeliest tokens beside each token; None: no log-probabilities at all
    echo: bool = False
    id: str = dataclasses.field(default_factory=lambda: uuid.uuid4().hex)
    created: int = dataclasses.field(default_factory=lambda: int(time.time()))

    def whole(self, choices: Sequence[Choice], prompts: Sequence[Sequence[int]]) -> dict[str, Any]:
        """The response to a request that is not streamed; `prompts` in tokens, each with its share of the choices."""
        each = len(choices) // len(prompts)
        entries = [self._choice(i, choice, prompts[i // each]) for i, choice in enumerate(choices)]
        return self._head("chat.completion" if self.chat else "text_completion") | {
            "choices": entries,
            "usage": usage(prompts, [choice.generated for choice in choices]),
        }

    def chunk(self, index: int, chunk: StreamChunk, *, offset: int, usage_null: bool) -> dict[str, Any]:
        """One chunk of a stream; `offset` characters were sent before it."""
        logprobs = self._logprobs(chunk.scores, offset) if self.top is not None and chunk.scores else None
        reply = {"delta": {"content": chunk.text}} if self.chat else {"text": chunk.text}
        choice = {"index": index, **reply, "logprobs": logprobs, "finish_reason": chunk.finish}
        return self._chunk_head() | {"choices": [choice]} | ({"usage": None} if usage_null else {})

    def opening(self, index: int) -> dict[str, Any]:
        """The first chunk of a chat's stream: the role."""
        delta = {"role": "assistant", "content": ""}
        choice = {"index": index, "delta": delta, "logprobs": None, "finish_reason": None}
        return self._chunk_head() | {"choices": [choice]}

    def usage_chunk(self, prompts: Sequence[Sequence[int]], generated: Iterable[int]) -> dict[str, Any]:
        """The last chunk, where usage was asked for."""
        return self._chunk_head() | {"choices": [], "usage": usage(prompts, generated)}

    def _head(self, kind: str) -> dict[str, Any]:
        prefix = "chatcmpl" if self.chat else "cmpl"
        return {"id": f"{prefix}-{self.id}", "object": kind, "created": self.created, "model": self.model}

    def _chunk_head(self) -> dict[str, Any]:
        return self._head("chat.completion.chunk" if self.chat else "text_completion")

    def _choice(self, index: int, choice: Choice, prompt: Sequence[int]) -> dict[str, Any]:
        scores = [*choice.prompt, *choice.scores]
        logprobs = None if self.top is None else self._logprobs(scores)
        if self.chat:
            reply: dict[str, Any] = {"message": {"role": "assistant", "content": choice.text, "refusal": None}}
        else:
            reply = {"text": (self.tokenizer.decode(prompt) if self.echo else "") + choice.text}
        return {"index": index, **reply, "logprobs": logprobs, "finish_reason": choice.finish}

    def _logprobs(self, scores: Sequence[TokenScore], offset: int = 0) -> dict[str, Any]:
        if not self.chat:
            return self._arrays(scores, offset)
        return {"content": [self._chat_token(score) for score in scores], "refusal": None}

    def _chat_token(self, score: TokenScore) -> dict[str, Any]:
        top = [self._named(token, value) for token, value in score.top[: self.top]]
        return self._named(score.token, score.logprob) | {"top_logprobs": top}

    def _named(self, token: int, logprob: float | None) -> dict[str, Any]:
        return {
            "token": self._name(token),
            "logprob": finite(logprob),
            "bytes": list(self.tokenizer.token_bytes(token)) if token < self.tokenizer.vocab_size else [],
        }

    def _name(self, token: int) -> str:
        """A token's text; of specials, and of rows beyond the vocabulary, a name."""
        if token >= self.tokenizer.vocab_size:
            return f"<|row_{token}|>"
        return self._specials.get(token) or self.tokenizer.decode([token])

    @functools.cached_property
    def _specials(self) -> dict[int, str]:
        return {number: name for name, number in self.tokenizer.special_ids.items()}

    def _arrays(self, scores: Sequence[TokenScore], at: int) -> dict[str, Any]:
        """The older form, of completions; offsets count characters of the text that is sent."""
        names, offsets = [self._name(score.token) for score in scores], []
        characters = codecs.getincrementaldecoder("utf-8")("replace")
        for score in scores:
            offsets.append(at)
            at += len(characters.decode(self.tokenizer.token_bytes(score.token)))
        top = [
            None if score.logprob is None else {self._name(t): finite(v) for t, v in score.top[: self.top]}
            for score in scores
        ]
        return {
            "tokens": names,
            "token_logprobs": [finite(score.logprob) for score in scores],
            "top_logprobs": top if self.top else None,
            "text_offset": offsets,
        }


def usage(prompts: Sequence[Sequence[int]], generated: Iterable[int]) -> dict[str, int]:
    """Tokens read and generated (a stop token counts)."""
    prompt, completion = sum(map(len, prompts)), sum(generated)
    return {"prompt_tokens": prompt, "completion_tokens": completion, "total_tokens": prompt + completion}
