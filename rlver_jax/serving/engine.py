"""Continuous batching: requests come and go while the rows of one cache keep speaking.

One thread owns the device. In each round it gives free rows to waiting requests, lets every row that is still reading
its prompt read one chunk, and lets all others speak one block together. Everything is compiled by `warm_up`.
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
from rlver_jax.serving.programs import BlockOutput, Likeliest, SlotRequest
from rlver_jax.text.padding import pad_rows
from rlver_jax.text.tokenizer import Tokenizer

CHUNKS = (32, 256)  # tokens of a prompt read at a time
FEW_CALLS = 4  # calls of the small chunk rather than one of the large one


@dataclasses.dataclass(frozen=True)
class Work:
    """One reply that is wanted."""

    tokens: Sequence[int]  # the prompt, at least one
    max_tokens: int
    temperature: float = 1.0  # 0: greedy
    top_p: float = 1.0
    stop: Sequence[str] = ()
    seed: int = 0  # below 2**32
    details: bool = False  # tell the likeliest tokens beside each token said
    score_prompt: bool = False  # tell log-probabilities of the prompt's tokens


@dataclasses.dataclass(frozen=True)
class TokenScore:
    """A token with the model's own log-probability, and the likeliest tokens in its place."""

    token: int
    logprob: float | None  # None: the first of a prompt
    top: tuple[tuple[int, float], ...] = ()


@dataclasses.dataclass(frozen=True)
class StreamChunk:
    """What a reply has come to since the last piece."""

    text: str = ""
    scores: Sequence[TokenScore] = ()
    prompt: Sequence[TokenScore] = ()  # with score_prompt, before anything is said
    said: int = 0  # tokens so far, a stop token included
    finish: str | None = None  # stop | length | error; None: it goes on


Emit = Callable[[StreamChunk], None]  # called from the engine's thread


class GenerationRequest:
    """A submitted reply; `cancel` when nobody waits for it any more."""

    def __init__(self, work: Work, emit: Emit):
        self.work, self.emit, self.cancelled = work, emit, False

    def cancel(self) -> None:
        """Frees its row before the next block."""
        self.cancelled = True


class EngineFull(Exception):
    """More requests are waiting than the engine keeps."""


class EngineDown(Exception):
    """The engine has failed or is being closed."""


class _Slot:
    """What one row of the cache is doing."""

    def __init__(self, ticket: GenerationRequest, tokenizer: Tokenizer):
        self.ticket, self.speech = ticket, StreamingDetokenizer(tokenizer, ticket.work.stop)
        self.length = self.said = 0
        self.prompt: list[TokenScore] = []

    @property
    def unread(self) -> int:
        return len(self.ticket.work.tokens) - self.length if not self.said else 0


class Engine:
    """Serves replies of one model from one thread; `submit` may be called from any."""

    def __init__(self, lm: LM, tokenizer: Tokenizer, *, rows: int, context: int, block: int = 8, queue: int = 256):
        """An engine that is not running yet: `warm_up`, then `start`.

        Args:
            rows: requests that are answered at once.
            context: tokens of a prompt and its reply together.
            block: tokens that all rows say between two looks at the host.
            queue: requests that may wait for a row.
        """
        self.lm, self.tokenizer = lm, tokenizer
        self.rows, self.context, self.block, self.queue = rows, context, block, queue
        self._grammar = free_text(tokenizer, lm.model.config.vocab_size)
        # Padding is written too: a chunk beyond the last token must not reach back over what was read.
        cache = programs.empty(lm, rows, context + max(CHUNKS))
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
                self._read(0, 0, [self.tokenizer.pad_id], size)
            self._read(0, 0, [self.tokenizer.pad_id], CHUNKS[0], score=True)
            self._cache, _ = programs.speak(self.lm, self._cache, self._grammar, self._ask([]), steps=self.block)
        jax.block_until_ready(self._cache)

    def start(self) -> None:
        """Begins to serve."""
        self._thread = threading.Thread(target=self._run, name="engine", daemon=True)
        self._thread.start()

    def close(self) -> None:
        """Ends the thread; requests that are not answered yet get the finish `error`."""
        with self._wake:
            self._closed = True
            self._wake.notify()
        if self._thread is not None:
            self._thread.join()

    def submit(self, wanted: Iterable[tuple[Work, Emit]]) -> list[GenerationRequest]:
        """Puts replies in the queue, all or none; their pieces are given to the emitters.

        Raises:
            EngineFull: they don't fit in the queue.
            EngineDown: the engine has failed or was closed.
        """
        tickets = [GenerationRequest(work, emit) for work, emit in wanted]
        with self._wake:
            if self._closed or self.failure is not None:
                raise EngineDown("the engine does not run")
            if len(self._waiting) + len(tickets) > self.queue:
                raise EngineFull(f"{len(self._waiting)} replies are waiting, at most {self.queue} may")
            self._waiting += tickets
            self._counts["accepted"] += len(tickets)
            self._wake.notify()
        return tickets

    def stats(self) -> dict[str, Any]:
        """Figures since the start; `occupancy` is the mean share of rows that spoke in a decoding step."""
        counts, busy = self._counts, sum(slot is not None for slot in self._slots)
        steps = counts["steps"]
        return {
            "rows": self.rows,
            "busy": busy,
            "waiting": len(self._waiting),
            "replies": {name: counts[name] for name in ("accepted", "finished", "cancelled", "failed")},
            "tokens": {"prompt": counts["read"], "generated": counts["said"]},
            "steps": steps,
            "occupancy": counts["said"] / (steps * self.rows) if steps else 0.0,
            "rows_mean": counts["said"] / steps if steps else 0.0,
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
            left = [slot.ticket for slot in self._slots if slot is not None] + list(self._waiting)
            self._waiting.clear()
        for ticket in left:
            self._counts["failed"] += 1
            ticket.emit(StreamChunk(finish="error"))

    def _admit(self) -> bool:
        """Waits for something to do and gives rows to those who wait; False: the engine was closed."""
        with self._wake:
            while not (self._closed or self._waiting or any(self._slots)):
                self._wake.wait()
            for row, slot in enumerate(self._slots):
                while slot is None and self._waiting:
                    ticket = self._waiting.popleft()
                    if ticket.cancelled:
                        self._counts["cancelled"] += 1
                        continue
                    slot = self._slots[row] = _Slot(ticket, self.tokenizer)
            return not self._closed

    def _round(self) -> None:
        for row, slot in enumerate(self._slots):
            if slot is not None and slot.ticket.cancelled:
                self._free(row, "cancelled")
        for row, slot in enumerate(self._slots):
            if slot is not None and slot.unread:
                self._read_some(row, slot)
        speaking = [row for row, slot in enumerate(self._slots) if slot is not None and not slot.unread]
        if not speaking:
            return
        ask = self._ask(speaking)
        self._cache, spoken = programs.speak(self.lm, self._cache, self._grammar, ask, steps=self.block)
        spoken = jax.device_get(spoken)
        self._counts["steps"] += int(spoken.count.max())
        self._counts["said"] += int(spoken.count.sum())
        for row in speaking:
            self._hear(row, spoken)

    def _read_some(self, row: int, slot: _Slot) -> None:
        """One chunk of a prompt; with the last one the scores of the prompt are told."""
        work = slot.ticket.work
        size = CHUNKS[0] if work.score_prompt or slot.unread <= FEW_CALLS * CHUNKS[0] else CHUNKS[-1]
        part = list(work.tokens[slot.length : slot.length + size])
        scores = self._read(row, slot.length, part, size, work.score_prompt)
        if scores is not None:
            slot.prompt += [_score(part[i], scores, i, first=slot.length + i == 0) for i in range(len(part))]
        slot.length += len(part)
        self._counts["read"] += len(part)
        if not slot.unread and (slot.prompt or not work.max_tokens):
            slot.ticket.emit(StreamChunk(prompt=slot.prompt, finish=None if work.max_tokens else "length"))
            if not work.max_tokens:
                self._free(row, "finished")

    def _read(self, row: int, length: int, part: Sequence[int], size: int, score: bool = False) -> Likeliest | None:
        where = np.int32(row), np.int32(length), *pad_rows([part], size)
        if not score:
            self._cache = programs.prefill(self.lm, self._cache, *where)
            return None
        self._cache, scores = programs.read_and_score(self.lm, self._cache, *where)
        return jax.device_get(scores)

    def _ask(self, speaking: Sequence[int]) -> SlotRequest:
        def column(dtype: Any, value: Callable[[_Slot], Any]) -> Any:
            array = np.zeros(self.rows, dtype)
            for row, slot in enumerate(self._slots):
                if slot is not None:
                    array[row] = value(slot)
            return array

        return SlotRequest(
            length=column(np.int32, lambda s: s.length),  # of rows that read too: what they read must stay
            active=np.isin(np.arange(self.rows), speaking),  # type: ignore[arg-type]
            limit=column(np.int32, lambda s: s.ticket.work.max_tokens - s.said),
            said=column(np.int32, lambda s: s.said),
            seed=column(np.uint32, lambda s: s.ticket.work.seed),
            temperature=column(np.float32, lambda s: s.ticket.work.temperature),
            top_p=column(np.float32, lambda s: s.ticket.work.top_p),
            details=column(bool, lambda s: s.ticket.work.details),
        )

    def _hear(self, row: int, spoken: BlockOutput) -> None:
        """Takes what a row said in a block and tells it."""
        slot = self._slots[row]
        assert slot is not None
        count, text, scores = int(spoken.count[row]), "", []
        slot.length += count
        for place in range(count - int(spoken.stopped[row])):
            token = int(spoken.tokens[row, place])
            text += slot.speech.add(token)
            likeliest = Likeliest(*(array[row] for array in spoken.likeliest))
            scores.append(_score(token, likeliest, place, top=slot.ticket.work.details))
            if slot.speech.stopped:
                count = place + 1
                break
        slot.said += count
        ended = slot.speech.stopped or bool(spoken.stopped[row])
        finish = "stop" if ended else "length" if slot.said >= slot.ticket.work.max_tokens else None
        if finish:
            text += slot.speech.finish()
            finish = "stop" if slot.speech.stopped else finish  # the last character may complete a stop string
        slot.ticket.emit(StreamChunk(text, scores, said=slot.said, finish=finish))
        if finish:
            self._free(row, "finished")

    def _free(self, row: int, how: str) -> None:
        self._slots[row] = None
        self._counts[how] += 1


def _score(token: int, likeliest: Likeliest, place: int, *, first: bool = False, top: bool = True) -> TokenScore:
    if first:
        return TokenScore(token, None)
    pairs = zip(likeliest.top[place].tolist(), likeliest.top_logprob[place].tolist(), strict=True) if top else ()
    return TokenScore(token, float(likeliest.logprob[place]), tuple(pairs))
