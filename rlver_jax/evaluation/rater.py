"""A model on the device that fills in forms about finished dialogues: guided answers, whole batches at a time."""

import dataclasses
import functools
import math
from collections.abc import Iterator, Sequence
from typing import Any, NamedTuple, Protocol

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh
from jaxtyping import Array, Bool, Float, Int, Key, UInt32
from ml_collections import ConfigDict

from rlver_jax.decoding.cache import LM, Cache, append, rollback
from rlver_jax.decoding.choice import Options, build_options, choose
from rlver_jax.decoding.generate import Generated, Limits, generate
from rlver_jax.decoding.grammar import Grammar, one_line
from rlver_jax.evaluation.forms import Questionnaire, Step
from rlver_jax.evaluation.judge import Progress, Work
from rlver_jax.evaluation.judge_on_device import check_length
from rlver_jax.evaluation.judge_settings import judge_settings
from rlver_jax.evaluation.measures import Answers
from rlver_jax.rollout.agents import load_model
from rlver_jax.rollout.single_turns import open_cache
from rlver_jax.text.chat import ChatTemplate
from rlver_jax.text.padding import longest, pad_rows, round_up
from rlver_jax.text.tokenizer import Tokenizer

LEAST_WIDTH = 64  # tokens; what is read is padded to it times a power of four, so that few widths are compiled


class Rated(NamedTuple):
    """What a dialogue's forms hold once they are filled in."""

    answers: list[Answers]  # a form each; a choice that could not be got has no probabilities
    remote: dict[str, Any] | None = None  # requests to an endpoint, as `endpoints.usage.priced` gives it


class Rater(Protocol):
    """Anything that can fill in forms: a model on the device, or one behind an endpoint."""

    @property
    def name(self) -> str:
        """Short, fit for a file's name."""
        ...

    @property
    def settings(self) -> dict[str, Any]:
        """Everything that its answers depend on, in JSON's types."""
        ...

    def fill(self, questionnaires: Sequence[Questionnaire], progress: Progress) -> Iterator[list[tuple[int, Rated]]]:
        """Fills in every form of each; yields (index, answers) of a few at a time, in any order.

        The forms of one number must have the same fields wherever there are any.
        """
        ...


class Drawing(NamedTuple):
    """How free lines are drawn: by each questionnaire's own seed, whatever else is in the batch."""

    seeds: UInt32[Array, "B"]
    temperature: Float[Array, ""]

    @classmethod
    def of(cls, batch: Sequence[Questionnaire], size: int) -> "Drawing":
        """Of a batch, filled up to `size` rows."""
        seeds = [one.seed for one in batch] + [0] * (size - len(batch))
        return cls(jnp.asarray(seeds, jnp.uint32), jnp.float32(batch[0].temperature))

    def keys(self, form: Int[Array, ""], field: Int[Array, ""]) -> Key[Array, "B"]:
        """Of one field of one form."""
        fold_in = jax.random.fold_in
        return jax.vmap(lambda seed: fold_in(fold_in(jax.random.key(seed), form), field))(self.seeds)


@dataclasses.dataclass(frozen=True)
class DeviceRater:
    """A model that answers in an assistant's message; see `Rater`."""

    name: str
    lm: LM
    tokenizer: Tokenizer
    grammar: Grammar
    field_tokens: int
    batch: int
    settings: dict[str, Any]

    @classmethod
    def load(cls, config: ConfigDict, name: str, mesh: Mesh | None = None) -> "DeviceRater":
        """The model of a config's `user`; `user.field_tokens` bound what it writes, `eval.batch` how many at once.

        Raises:
            ValueError, OSError: the model cannot be loaded.
        """
        settings = judge_settings(config)
        lm, tokenizer = load_model(config.user, "user", mesh)
        grammar = one_line(tokenizer, lm.model.config.vocab_size)
        return cls(name, lm, tokenizer, grammar, config.user.field_tokens, config.eval.batch, settings)

    def fill(self, questionnaires: Sequence[Questionnaire], progress: Progress) -> Iterator[list[tuple[int, Rated]]]:
        """See `Rater`."""
        sizes = [
            (len(self._context(one)), max((self._length(f.steps) for f in one.forms), default=0))
            for one in questionnaires
        ]
        prefill, most = (max(column) for column in zip(*sizes, strict=True)) if sizes else (0, 0)
        width = round_up(prefill, LEAST_WIDTH)
        check_length(self.lm, prefill + most)
        capacity, size = width + most, min(self.batch, len(questionnaires))
        for start in range(0, len(questionnaires), self.batch):
            rows = range(start, min(start + self.batch, len(questionnaires)))
            batch = [questionnaires[i] for i in rows]
            contexts, drawing = [self._context(one) for one in batch], Drawing.of(batch, size)
            cache = open_cache(self.lm, *pad_rows(contexts, width, size), capacity=capacity)
            filled: list[list[Answers]] = [[] for _ in rows]
            for number in range(max(len(one.forms) for one in batch)):
                having = [one.forms[number].steps if number < len(one.forms) else None for one in batch]
                cache, answers, tokens = self._fill_form(cache, having, size, number, drawing)
                for ours, answer, steps in zip(filled, answers, having, strict=True):
                    if steps is not None:
                        ours.append(answer)
                progress(Work(sum(steps is not None for steps in having), tokens))
            yield list(zip(rows, map(Rated, filled), strict=True))

    def _context(self, questionnaire: Questionnaire) -> list[int]:
        messages = [
            {"role": "system", "content": questionnaire.system},
            {"role": "user", "content": questionnaire.text},
        ]
        chat = ChatTemplate(self.tokenizer)
        return chat.conversation(messages, generation_prompt=True) + chat.opening(think=False)

    def _length(self, steps: Sequence[Step]) -> int:
        """Slots that a form may take, padding and scratch included."""
        lengths = [len(self.tokenizer.encode(step.literal)) + self.field_tokens for step in steps]
        spelled = [len(self.tokenizer.encode(f"{o}\n")) * len(step.options) for step in steps for o in step.options]
        scratch = max(spelled, default=0)
        return sum(lengths) + _up(max(lengths) + 8) + scratch + 8 * len(steps)

    def _fill_form(
        self, cache: Cache, rows: Sequence[Sequence[Step] | None], size: int, number: int, drawing: Drawing
    ) -> tuple[Cache, list[Answers], int]:
        """One form of all rows that have it, step by step; (cache as it was, answers, tokens generated)."""
        first = next(steps for steps in rows if steps is not None)
        active = jnp.asarray([steps is not None for steps in rows] + [False] * (size - len(rows)))
        answers: list[Answers] = [{} for _ in rows]
        opening, count = jnp.copy(cache.length), 0  # the cache's own arrays are donated at every step
        chosen: list[list[int]] = [[] for _ in rows]
        for i, step in enumerate(first):
            texts = [
                chosen[row] + self.tokenizer.encode(steps[i].literal) if steps is not None else []
                for row, steps in enumerate(rows)
            ]
            padded = pad_rows(texts, _up(longest(texts)), size)
            if step.options:
                spelled = [self.tokenizer.encode(f"{option}\n") for option in step.options]
                cache, logprobs = _ask(self.lm, cache, *padded, build_options(spelled))
                probabilities = np.asarray(jax.nn.softmax(logprobs, axis=-1), np.float64)
                for row in range(len(rows)):
                    answers[row][step.name] = dict(zip(step.options, map(float, probabilities[row]), strict=True))
                    chosen[row] = spelled[int(probabilities[row].argmax())]
                continue
            field = drawing, jnp.int32(number), jnp.int32(i)
            cache, line = _write(self.lm, cache, *padded, self.grammar, active, *field, max_tokens=self.field_tokens)
            line = jax.device_get(line)
            count += int(line.count.sum())
            for row in range(len(rows)):
                text = line.tokens[row, : int(line.count[row]) - bool(line.stopped[row])]
                answers[row][step.name], chosen[row] = self.tokenizer.decode(text.tolist()), []
        return rollback(cache, opening), answers, count


def _up(length: int) -> int:
    return LEAST_WIDTH * 4 ** max(math.ceil(math.log(max(length, 1) / LEAST_WIDTH, 4)), 0)


@functools.partial(jax.jit, donate_argnames="cache")
def _ask(
    lm: LM, cache: Cache, tokens: Int[Array, "B S"], count: Int[Array, "B"], options: Options
) -> tuple[Cache, Float[Array, "B O"]]:
    return choose(lm, append(lm, cache, tokens, count), options)


@functools.partial(jax.jit, static_argnames="max_tokens", donate_argnames="cache")
def _write(
    lm: LM,
    cache: Cache,
    tokens: Int[Array, "B S"],
    count: Int[Array, "B"],
    grammar: Grammar,
    active: Bool[Array, "B"],
    drawing: Drawing,
    form: Int[Array, ""],
    field: Int[Array, ""],
    *,
    max_tokens: int,
) -> tuple[Cache, Generated]:
    """A line of each row's own; what ended it is forgotten again."""
    cache = append(lm, cache, tokens, count)
    cache, line = generate(
        lm,
        cache,
        drawing.keys(form, field),
        grammar,
        max_tokens=max_tokens,
        limits=Limits(jnp.int32(max_tokens), jnp.int32(0)),
        temperature=drawing.temperature,
        active=active,
    )
    return rollback(cache, cache.length - line.stopped), line
