"""Continuous batching: requests come and go while the rows of one KV cache keep decoding.

One thread owns the device. In each round it gives free rows to waiting requests, prefills one chunk of every prompt
that isn't whole yet, and decodes one block of all others together. `warm_up` compiles everything.
"""

import collections
import dataclasses
import threading
import time
from collections.abc import Callable, Iterable, Sequence
from typing import Any

import jax
import numpy as np

from rlver_jax.decoding.cache import LM
from rlver_jax.decoding.grammar import free_text
from rlver_jax.serving import programs
from rlver_jax.serving.detokenizer import StreamingDetokenizer
from rlver_jax.serving.programs import BlockOutput, SlotRequest, TokenLogprobs
from rlver_jax.text.padding import pad_rows
from rlver_jax.text.tokenizer import Tokenizer

CHUNKS = (32, 256)  # tokens of a prompt prefilled at a time
BASE = -1  # as an adapter: the model alone
FEW_CALLS = 4  # calls of the small chunk rather than one of the large one


@dataclasses.dataclass(frozen=True)
class GenerationParams:
    """One reply that is wanted: its prompt, and how it is sampled."""

    tokens: Sequence[int]  # the prompt, at least one
    max_tokens: int
    temperature: float = 1.0  # 0: greedy
    top_p: float = 1.0
    stop: Sequence[str] = ()
    seed: int = 0  # below 2**32
    details: bool = False  # return the likeliest tokens beside each generated one
    score_prompt: bool = False  # return log-probabilities of the prompt's tokens
    adapter: int = BASE  # of those beside the model


@dataclasses.dataclass(frozen=True)
class TokenScore:
    """A token with the model's own log-probability, and the likeliest tokens in its place."""

    token: int
    logprob: float | None  # None: the first of a prompt
    top: tuple[tuple[int, float], ...] = ()


@dataclasses.dataclass(frozen=True)
class StreamChunk:
    """What a reply has gained since the last chunk."""

    text: str = ""
    scores: Sequence[TokenScore] = ()
    prompt: Sequence[TokenScore] = ()  # with score_prompt, before the first generated token
    generated: int = 0  # tokens so far, a stop token included
    finish: str | None = None  # stop | length | error; None: it goes on


Emit = Callable[[StreamChunk], None]  # called from the engine's thread


class GenerationRequest:
    """A submitted reply; `cancel` when nobody waits for it any more."""

    def __init__(self, params: GenerationParams, emit: Emit):
        self.params, self.emit, self.cancelled = params, emit, False

    def cancel(self) -> None:
        """Frees its row before the next block."""
        self.cancelled = True


class EngineFull(Exception):
    """More requests are waiting than the engine keeps."""


class EngineDown(Exception):
    """The engine has failed or is being closed."""


class _Slot:
    """The request that one row of the cache works on."""

    def __init__(self, request: GenerationRequest, tokenizer: Tokenizer):
        self.request, self.detokenizer = request, StreamingDetokenizer(tokenizer, request.params.stop)
        self.length = self.generated = 0
        self.prompt: list[TokenScore] = []

    @property
    def unread(self) -> int:
        return len(self.request.params.tokens) - self.length if not self.generated else 0


class Engine:
    """Serves replies of one model from one thread; `submit` may be called from any."""

    def __init__(
        self,
        lm: LM,
        tokenizer: Tokenizer,
        *,
        rows: int,
        context: int,
        block: int = 8,
        queue: int = 256,
        owners: Sequence[int] = (),
    ):
        """An engine that is not running yet: `warm_up`, then `start`.

        Args:
            lm: with several adapters as `models.lora.side_by_side` puts them.
            owners: of each of their ranks, the number of its adapter.
            rows: of the cache: requests that are answered at once.
            context: tokens of a prompt and its reply together.
            block: tokens that all rows decode between two looks at the host.
            queue: requests that may wait for a row.
        """
        self.lm, self.tokenizer = lm, tokenizer
        self.rows, self.context, self.block, self.queue = rows, context, block, queue
        self.owners = list(owners)
        self._grammar = free_text(tokenizer, lm.model.config.vocab_size)
        # Padding is written too: a chunk at the end of the context must not reach back over earlier tokens.
        cache = programs.empty_cache(lm, rows, context + max(CHUNKS))
        # Bound to where it lies, as every program's result is: else the first call would be compiled once more.
        self._cache = jax.device_put(cache, jax.tree.map(lambda x: x.sharding, cache))
        self._slots: list[_Slot | None] = [None] * rows
        self._waiting: collections.deque[GenerationRequest] = collections.deque()
        self._wake, self._closed = threading.Condition(), False
        self._thread: threading.Thread | None = None
        self.failure: Exception | None = None
        self._began, self._counts = time.monotonic(), collections.Counter[str]()

    def warm_up(self) -> None:
        """Compiles everything that will run."""
        for _ in range(2):  # on several devices once more, with a cache that lies where the programs put it
            for size in CHUNKS:
                self._prefill(0, 0, [self.tokenizer.pad_id], size)
            self._prefill(0, 0, [self.tokenizer.pad_id], CHUNKS[0], score=True)
            self._decode([])
        jax.block_until_ready(self._cache)

    def start(self) -> None:
        """Begins to serve."""
        self._thread = threading.Thread(target=self._run, name="engine", daemon=True)
        self._thread.start()

    def swap(self, lm: LM) -> None:
        """Goes on with other parameters of the same shapes, also in the replies that are being generated."""
        self.lm = lm

    def close(self) -> None:
        """Ends the thread; requests that are not answered yet get the finish `error`."""
        with self._wake:
            self._closed = True
            self._wake.notify()
        if self._thread is not None:
            self._thread.join()

    def submit(self, wanted: Iterable[tuple[GenerationParams, Emit]]) -> list[GenerationRequest]:
        """Puts replies in the queue, all or none; their chunks go to the emitters.

        Raises:
            EngineFull: they don't fit in the queue.
            EngineDown: the engine has failed or was closed.
        """
        requests = [GenerationRequest(params, emit) for params, emit in wanted]
        with self._wake:
            if self._closed or self.failure is not None:
                raise EngineDown("the engine does not run")
            if len(self._waiting) + len(requests) > self.queue:
                raise EngineFull(f"{len(self._waiting)} replies are waiting, at most {self.queue} may")
            self._waiting += requests
            self._counts["accepted"] += len(requests)
            self._wake.notify()
        return requests

    def stats(self) -> dict[str, Any]:
        """Counts since the start; `occupancy` is the mean share of rows that were active in a decode step."""
        counts, busy = self._counts, sum(slot is not None for slot in self._slots)
        steps = counts["steps"]
        return {
            "rows": self.rows,
            "busy": busy,
            "waiting": len(self._waiting),
            "replies": {name: counts[name] for name in ("accepted", "finished", "cancelled", "failed")},
            "tokens": {"prompt": counts["prefilled"], "generated": counts["generated"]},
            "steps": steps,
            "occupancy": counts["generated"] / (steps * self.rows) if steps else 0.0,
            "rows_mean": counts["generated"] / steps if steps else 0.0,
            "programs_compiled": programs.compiled(),
            "uptime_s": round(time.monotonic() - self._began, 3),
        }

    def _run(self) -> None:
        try:
            while self._admit():
                self._round()
        except Exception as error:  # whoever waits must hear of it, whatever it was
            self.failure = error
        with self._wake:
            self._closed = True
            left = [slot.request for slot in self._slots if slot is not None] + list(self._waiting)
            self._waiting.clear()
        for request in left:
            self._counts["failed"] += 1
            request.emit(StreamChunk(finish="error"))

    def _admit(self) -> bool:
        """Waits for something to do and gives rows to those who wait; False: the engine was closed."""
        with self._wake:
            while not (self._closed or self._waiting or any(self._slots)):
                self._wake.wait()
            for row, slot in enumerate(self._slots):
                while slot is None and self._waiting:
                    request = self._waiting.popleft()
                    if request.cancelled:
                        self._counts["cancelled"] += 1
                        continue
                    slot = self._slots[row] = _Slot(request, self.tokenizer)
            return not self._closed

    def _round(self) -> None:
        for row, slot in enumerate(self._slots):
            if slot is not None and slot.request.cancelled:
                self._free(row, "cancelled")
        for row, slot in enumerate(self._slots):
            if slot is not None and slot.unread:
                self._prefill_chunk(row, slot)
        decoding = [row for row, slot in enumerate(self._slots) if slot is not None and not slot.unread]
        if not decoding:
            return
        output = jax.device_get(self._decode(decoding))
        self._counts["steps"] += int(output.count.max())
        self._counts["generated"] += int(output.count.sum())
        for row in decoding:
            self._take(row, output)

    def _decode(self, decoding: Sequence[int]) -> BlockOutput:
        requests = self._slot_requests(decoding)
        self._cache, output = programs.decode_block(self.lm, self._cache, self._grammar, requests, steps=self.block)
        return output

    def _prefill_chunk(self, row: int, slot: _Slot) -> None:
        """Prefills one chunk of a prompt; after the last one the scores of the prompt are emitted."""
        params = slot.request.params
        size = CHUNKS[0] if params.score_prompt or slot.unread <= FEW_CALLS * CHUNKS[0] else CHUNKS[-1]
        part = list(params.tokens[slot.length : slot.length + size])
        scores = self._prefill(row, slot.length, part, size, params.score_prompt)
        if scores is not None:
            slot.prompt += [_score(part[i], scores, i, first=slot.length + i == 0) for i in range(len(part))]
        slot.length += len(part)
        self._counts["prefilled"] += len(part)
        if not slot.unread and (slot.prompt or not params.max_tokens):
            slot.request.emit(StreamChunk(prompt=slot.prompt, finish=None if params.max_tokens else "length"))
            if not params.max_tokens:
                self._free(row, "finished")

    def _prefill(
        self, row: int, length: int, part: Sequence[int], size: int, score: bool = False
    ) -> TokenLogprobs | None:
        slot = self._slots[row]
        ranks = self._ranks(np.array([BASE if slot is None else slot.request.params.adapter]))
        prompt = np.int32(row), np.int32(length), *pad_rows([part], size), ranks
        if not score:
            self._cache = programs.prefill(self.lm, self._cache, *prompt)
            return None
        self._cache, scores = programs.prefill_and_score(self.lm, self._cache, *prompt)
        return jax.device_get(scores)

    def _ranks(self, adapters: np.ndarray) -> Any:
        """Which ranks rows with these adapters take."""
        return (adapters[:, None] == np.array(self.owners)).astype(np.float32) if self.owners else None

    def _slot_requests(self, decoding: Sequence[int]) -> SlotRequest:
        def column(dtype: Any, value: Callable[[_Slot], Any]) -> Any:
            array = np.zeros(self.rows, dtype)
            for row, slot in enumerate(self._slots):
                if slot is not None:
                    array[row] = value(slot)
            return array

        return SlotRequest(
            length=column(np.int32, lambda s: s.length),  # of rows in prefill too: their tokens must stay
            active=np.isin(np.arange(self.rows), decoding),  # type: ignore[arg-type]
            limit=column(np.int32, lambda s: s.request.params.max_tokens - s.generated),
            generated=column(np.int32, lambda s: s.generated),
            seed=column(np.uint32, lambda s: s.request.params.seed),
            temperature=column(np.float32, lambda s: s.request.params.temperature),
            top_p=column(np.float32, lambda s: s.request.params.top_p),
            details=column(bool, lambda s: s.request.params.details),
            ranks=self._ranks(column(np.int32, lambda s: s.request.params.adapter)),
        )

    def _take(self, row: int, output: BlockOutput) -> None:
        """Takes what a row generated in a block and emits it."""
        slot = self._slots[row]
        assert slot is not None
        count, text, scores = int(output.count[row]), "", []
        slot.length += count
        for i in range(count - int(output.stopped[row])):
            token = int(output.tokens[row, i])
            text += slot.detokenizer.add(token)
            logprobs = TokenLogprobs(*(array[row] for array in output.logprobs))
            scores.append(_score(token, logprobs, i, top=slot.request.params.details))
            if slot.detokenizer.stopped:
                count = i + 1
                break
        slot.generated += count
        ended = slot.detokenizer.stopped or bool(output.stopped[row])
        finish = "stop" if ended else "length" if slot.generated >= slot.request.params.max_tokens else None
        if finish:
            text += slot.detokenizer.finish()
            finish = "stop" if slot.detokenizer.stopped else finish  # the last character may complete a stop string
        slot.request.emit(StreamChunk(text, scores, generated=slot.generated, finish=finish))
        if finish:
            self._free(row, "finished")

    def _free(self, row: int, outcome: str) -> None:
        self._slots[row] = None
        self._counts[outcome] += 1


def _score(token: int, logprobs: TokenLogprobs, i: int, *, first: bool = False, top: bool = True) -> TokenScore:
    if first:
        return TokenScore(token, None)
    pairs = zip(logprobs.top[i].tolist(), logprobs.top_logprob[i].tolist(), strict=True) if top else ()
    return TokenScore(token, float(logprobs.logprob[i]), tuple(pairs))
