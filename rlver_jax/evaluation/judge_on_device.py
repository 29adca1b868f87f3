"""A simulated user on the device as a judge: whole batches of finished dialogues, a turn of all of them at a time."""

import dataclasses
from collections.abc import Iterator, Mapping, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh
from jaxtyping import Array, Key
from ml_collections import ConfigDict

from rlver_jax.decoding.cache import LM
from rlver_jax.decoding.generate import Generated
from rlver_jax.dialogues.log import Record
from rlver_jax.evaluation.judge import Appraised, Progress, Work
from rlver_jax.evaluation.judge_settings import judge_settings
from rlver_jax.evaluation.play import eval_spec
from rlver_jax.evaluation.transcripts import Transcript, Turn, turns_of, within
from rlver_jax.rollout.agents import Agents, load_model
from rlver_jax.rollout.single_turns import open_cache, single_appraisal
from rlver_jax.text.padding import pad_rows, round_up
from rlver_jax.text.tokenizer import Tokenizer
from rlver_jax.user.emotion import change_readout
from rlver_jax.user.prompts import load_prompts
from rlver_jax.user.turn import KEY_READOUT, UserLimits, dialogue_key, part_keys

WIDTH_STEP = 32  # tokens; widths are multiples of it


class Size(NamedTuple):
    """How many tokens a dialogue has."""

    prefix: int
    message: int  # the longest that is read before an appraisal
    all: int


class Shape(NamedTuple):
    """What every batch of a job is padded to, so that it is compiled once."""

    batch: int
    prefix: int
    message: int  # of what is read before one appraisal
    capacity: int


def message_tokens(tokenizer: Tokenizer, message: Mapping[str, Any]) -> list[int]:
    """A message in the judge's tokens: the logged ones where they spell it, so that nothing is read otherwise."""
    text, logged = message["content"] or "", message["say_tokens" if "say_tokens" in message else "tokens"]
    if logged is not None and all(0 <= t < tokenizer.vocab_size for t in logged) and tokenizer.decode(logged) == text:
        return list(logged)
    return tokenizer.encode(text.strip())


@dataclasses.dataclass(frozen=True)
class DeviceJudge:
    """A user model with its prompts and rules; see `judge.Judge`."""

    name: str
    agents: Agents  # the user's model stands in for the policy too: nobody speaks
    limits: UserLimits
    batch: int
    settings: dict[str, Any]
    readouts = ("argmax", "mean")  # both from one distribution

    @classmethod
    def load(cls, config: ConfigDict, name: str, mesh: Mesh | None = None) -> "DeviceJudge":
        """The simulated user of a config.

        Raises:
            ValueError, OSError: the model or its prompts cannot be loaded.
        """
        settings = judge_settings(config)
        user, tokenizer = load_model(config.user, "user", mesh)
        prompts = load_prompts(config.data.language, config.user.prompts or None)
        agents = Agents.build(
            user, user, tokenizer, prompts, eval_spec(config),
            style=config.user.style, scenario=config.user.scenario,
        )  # fmt: skip
        limits = UserLimits(jnp.int32(config.user.field_tokens), jnp.int32(0), jnp.float32(0))
        return cls(name, agents, limits, config.eval.batch, settings)

    def appraise(
        self, dialogues: Sequence[Transcript], *, own: bool, progress: Progress
    ) -> Iterator[list[tuple[int, Appraised]]]:
        """See `judge.Judge`."""
        sizes = [self._size(one) for one in dialogues]
        heard = [i for i, size in enumerate(sizes) if size.message]
        silent = [i for i, size in enumerate(sizes) if not size.message]
        if silent:
            yield [(i, Appraised([within(dialogues[i].record["emotions"][0])], [], [], [])) for i in silent]
        shape = self._shape([sizes[i] for i in heard]) if heard else None
        for start in range(0, len(heard), self.batch):
            numbers = heard[start : start + self.batch]
            played = [dialogues[i] for i in numbers]  # which may be read now: all of them need not be in memory
            turns = [turns_of(one.record) for one in played]
            messages = [[self._read_before(turn) for turn in one] for one in turns]
            prefixes = [self.agents.prefix(one.profile) for one in played]  # type: ignore[arg-type]
            batch = _Batch(self, [one.record for one in played], turns, own)
            results = batch.run(prefixes, messages, shape, progress)  # type: ignore[arg-type]
            yield list(zip(numbers, results, strict=True))

    def _size(self, one: Transcript) -> Size:
        counts = [len(self._read_before(turn)) for turn in turns_of(one.record)]
        prefix = len(self.agents.prefix(one.profile)) if counts else 0  # type: ignore[arg-type]
        return Size(prefix, max(counts, default=0), prefix + sum(counts))

    def _read_before(self, turn: Turn) -> list[int]:
        """What the user reads before it appraises: its own last words, and the reply."""
        tables, tokenizer = self.agents.tables[1], self.agents.tokenizer
        close, open_user, open_assistant = (
            np.asarray(x).tolist() for x in (tables.close, tables.open_user, tables.open_assistant)
        )
        own, reply = message_tokens(tokenizer, turn.heard), message_tokens(tokenizer, turn.reply)
        return [*own, *close, *open_user, *reply, *close, *open_assistant]

    def _shape(self, sizes: Sequence[Size]) -> Shape:
        up = lambda n: round_up(n, WIDTH_STEP)  # noqa: E731
        prefix, message, prefill = (max(column) for column in zip(*sizes, strict=True))
        prefix, message = up(prefix), up(message)
        # Padding of what is read is written too, into slots beyond the row.
        tables, tokens = self.agents.tables[1], self.agents.spec.user_tokens
        fields, literal = tables.appraisal.template.shape
        literals = fields * (literal + 2 * tables.appraisal.values.shape[2])
        generated = literals + fields * tokens + tables.scratch
        check_length(self.agents.user, prefill + generated)
        room = message + generated
        return Shape(min(self.batch, len(sizes)), prefix, message, up(max(prefill, prefix) + room))


@dataclasses.dataclass
class _Batch:
    """Dialogues that are appraised side by side."""

    judge: DeviceJudge
    records: Sequence[Record]
    turns: Sequence[Sequence[Turn]]
    own: bool

    def run(
        self,
        prefixes: Sequence[list[int]],
        messages: Sequence[list[list[int]]],
        shape: Shape,
        progress: Progress,
    ) -> list[Appraised]:
        """One turn of all dialogues at a time."""
        user, rules = self.judge.agents.user, self.judge.agents.spec.rules
        cache = open_cache(user, *pad_rows(prefixes, shape.prefix, shape.batch), capacity=shape.capacity)
        row_keys = self._keys(shape.batch)
        results = [Appraised([within(record["emotions"][0])], [], [], []) for record in self.records]
        for turn in range(max(map(len, self.turns))):
            active = [turn < len(ours) and not self._over(r) for ours, r in zip(self.turns, results, strict=True)]
            texts = [one[turn] if on else [] for one, on in zip(messages, active, strict=True)]
            emotion = [self._before(i, turn, results[i]) for i in range(len(results))]
            rest = shape.batch - len(active)
            keys = jax.vmap(jax.random.fold_in, (0, None))(row_keys, turn)
            cache, fields, logprobs = single_appraisal(
                user, self.judge.agents.tables[1], cache, *pad_rows(texts, shape.message, shape.batch),
                jnp.asarray(emotion + [rules.initial] * rest, jnp.int32), keys, self.judge.limits,
                jnp.asarray(active + [False] * rest), rules=rules, max_tokens=self.judge.agents.spec.user_tokens,
            )  # fmt: skip
            self._note(results, turn, emotion, active, fields, logprobs, keys)
            progress(Work(sum(active), int(np.asarray(fields.count).sum())))
        return results

    def _keys(self, count: int) -> Key[Array, "B"]:
        """As the sampler folded them when it played the dialogues; of use where the readout samples."""
        pairs = [(record["seed"] or 0, record["dialogue"]) for record in self.records]
        pairs += [(0, 0)] * (count - len(pairs))
        return jnp.stack([dialogue_key(jax.random.key(seed), np.uint32(number)) for seed, number in pairs])

    def _over(self, result: Appraised) -> bool:
        return self.own and bool(self.judge.agents.spec.rules.ended(result.emotions[-1]))

    def _before(self, row: int, turn: int, result: Appraised) -> int:
        fixed = not self.own and turn < len(self.turns[row])
        return self.turns[row][turn].emotion if fixed else result.emotions[-1]

    def _note(self, results, turn, emotion, active, fields: Generated, logprobs, keys) -> None:
        """Adds a turn to the results of the rows that have it."""
        agents = self.judge.agents
        rules, readout = agents.spec.rules, agents.spec.readout
        read_keys = part_keys(keys, KEY_READOUT, 1)[0] if readout == "sample" else None
        changes = np.asarray(rules.clamp(change_readout(logprobs, readout, read_keys)))
        logprobs, fields = np.asarray(logprobs), jax.device_get(fields)
        for row, result in enumerate(results):
            if turn >= len(self.turns[row]):
                continue
            change = int(changes[row]) if active[row] else 0
            result.changes.append(change)
            result.emotions.append(rules.update(emotion[row], change))
            result.change_logprobs.append([float(x) for x in logprobs[row]] if active[row] else [])
            result.appraisals.append(self._texts(fields, row) if active[row] else {})

    def _texts(self, fields: Generated, row: int) -> dict[str, str]:
        agents, texts = self.judge.agents, {}
        for position, name in enumerate(agents.tables[1].appraisal.names[:-1]):
            count = int(fields.count[position, row]) - bool(fields.stopped[position, row])
            texts[name] = agents.tokenizer.decode(fields.tokens[position, row, :count].tolist())
        return texts


def check_length(user: LM, tokens: int) -> None:
    """Refuses dialogues of so many tokens, what is written about them included, if the model reads fewer.

    Raises:
        ValueError: it does; before anything is compiled, but not before the dialogues are in the judge's tokens.
    """
    what = f"the longest dialogue and what is written about it may take {tokens} tokens"
    user.model.config.check_context(tokens, "user", what, "judge shorter dialogues, or take a model that reads more")
