"""The schema of a logged dialogue. A record without schema errors can be replayed; later checks rely on its types."""

import dataclasses
import math
from collections.abc import Collection, Iterator, Mapping, Sequence
from typing import Any

from rlver_jax.dialogues.log import REACTION_FIELDS, TOKEN_FIELDS, record_faults
from rlver_jax.dialogues.numbers import short
from rlver_jax.dialogues.trajectory import reactions
from rlver_jax.rollout.agents import Agents
from rlver_jax.user.emotion import CHANGES, HIGHEST, LOWEST
from rlver_jax.user.prompts import Prompts

MOST = 10**9  # more than any number in a log that is no seed
POLICY, USER = "policy", "user"


@dataclasses.dataclass(frozen=True)
class RecordSchema:
    """The fields of a record whose policy and user are on the device or behind an endpoint.

    Attributes:
        appraisal, considerations: names of the fields of the user's scripts, without the change and the reply.
        vocabulary: how many tokens there are.
        endpoints: which of "policy" and "user" are behind one.
    """

    appraisal: tuple[str, ...]
    considerations: tuple[str, ...]
    vocabulary: int
    endpoints: Collection[str] = ()

    @classmethod
    def of(cls, agents: Agents, endpoints: Collection[str] = ()) -> "RecordSchema":
        """The schema of these agents' dialogues."""
        appraisal, reply = script_names(agents.prompts)
        size = agents.tokenizer.vocab_size if len(endpoints) < 2 else 0
        return cls(appraisal, reply[:-1], size, endpoints)

    def errors(self, record: Any) -> Iterator[str]:
        """Schema errors of one dialogue; without any, its fields have the right types and lengths."""
        fault = next(record_faults(record), None)
        if fault is not None:
            yield fault
            return
        yield from _numbers(record)
        first, *messages = record["messages"]
        yield from self._opening(first)
        for index, message in enumerate(messages):
            where = f"turn {index // 2 + 1}: "
            last = index + 1 == len(messages)
            yield from self._reaction(message, where) if index % 2 else self._reply(message, where, last)
        for turn, _, user in reactions(record):
            emotion, change = user["emotion"], user["change"]
            if not LOWEST <= emotion <= HIGHEST or not CHANGES[0] <= change <= CHANGES[-1]:
                yield f"turn {turn + 1}: emotion {short(emotion)} after {short(change)}, " + _EXPECTED

    def _opening(self, message: Mapping[str, Any]) -> Iterator[str]:
        if not LOWEST <= message["emotion"] <= HIGHEST:
            yield f"opening: emotion {short(message['emotion'])}, " + _EXPECTED
        if type(message["generated"]) is not bool:
            yield "opening: generated is null, expected true or false"
        if USER in self.endpoints:
            yield from _nulls(message, ("tokens",), "opening: ", USER)
        else:
            yield from self._tokens(message, "tokens", "opening: ")

    def _reply(self, message: Mapping[str, Any], where: str, last: bool) -> Iterator[str]:
        """Of the policy."""
        if type(message["stopped"]) is not bool:
            yield f"{where}the reply's stopped is null, expected true or false"
        if POLICY in self.endpoints:
            yield from _nulls(message, TOKEN_FIELDS, where, POLICY)
            if message["say_tokens"] is None and (USER in self.endpoints or (last and message["violation"])):
                return  # no user on the device has read it
        else:
            yield from self._tokens(message, "tokens", where)
            for name in ("logprobs", "raw_logprobs"):
                yield from _logprobs(message, name, message["tokens"], where)
        yield from self._tokens(message, "say_tokens", where)

    def _reaction(self, message: Mapping[str, Any], where: str) -> Iterator[str]:
        """Of the user."""
        remote = USER in self.endpoints
        yield from _texts(message["appraisal"], self.appraisal, "appraisal", where)
        none = remote and not message["considerations"]
        yield from _texts(message["considerations"], () if none else self.considerations, "considerations", where)
        if remote:
            yield from _nulls(message, REACTION_FIELDS, where, USER)
            return
        for name in ("tokens", "all_tokens"):
            yield from self._tokens(message, name, where)
        for name in ("logprobs", "raw_logprobs"):
            yield from _logprobs(message, name, message["all_tokens"], where)
        yield from _logprobs(message, "change_logprobs", CHANGES, where)
        if type(message["stopped"]) is not bool:
            yield f"{where}the user's stopped is null, expected true or false"
        for kind, names in (("appraisal", self.appraisal), ("consideration", self.considerations)):
            yield from self._fields(message, kind, names, where)

    def _fields(self, message: Mapping[str, Any], kind: str, names: Sequence[str], where: str) -> Iterator[str]:
        """Of one of the scripts."""
        parts = {what: message[f"{kind}_{what}"] for what in ("tokens", "stopped", "logprobs")}
        for what, part in parts.items():
            if not isinstance(part, dict) or set(part) != set(names):
                fields = sorted(part) if isinstance(part, dict) else part
                yield f"{where}{kind}_{what} has the fields {short(fields)}, expected {sorted(names)}"
                return
        for name in names:
            if type(parts["stopped"][name]) is not bool:
                yield f"{where}{kind}_stopped of {name!r} is {short(parts['stopped'][name])}, expected true or false"
            yield from self._tokens(parts["tokens"], name, f"{where}{kind} ")
            yield from _logprobs(parts["logprobs"], name, parts["tokens"][name], f"{where}{kind} ")

    def _tokens(self, holder: Mapping[str, Any], name: str, where: str) -> Iterator[str]:
        tokens, size = holder[name], self.vocabulary
        if not isinstance(tokens, list):
            yield f"{where}{name} is {short(tokens)}, expected a list of tokens"
        elif set(map(type, tokens)) - {int} or (tokens and not 0 <= min(tokens) <= max(tokens) < size):
            yield f"{where}tokens of {name!r} are not ids from 0 to {size - 1}"


_EXPECTED = f"expected {LOWEST} to {HIGHEST} after {CHANGES[0]} to +{CHANGES[-1]}"


def script_names(prompts: Prompts) -> tuple[tuple[str, ...], tuple[str, ...]]:
    """Names of the free fields of the appraisal's script and of the reply's, whose last one is the reply."""
    appraisal, reply = (
        tuple(part.value for part in script if part.kind == "free") for script in (prompts.appraisal, prompts.reply)
    )
    return appraisal, reply


def _numbers(record: Mapping[str, Any]) -> Iterator[str]:
    """Numbers that arrays can hold."""
    for name in ("dialogue", "seed"):
        if type(record[name]) is not int or not 0 <= record[name] < 2**32:
            yield f"{name} is {short(record[name])}, expected a whole number from 0 to {2**32 - 1}"
    if not _is_number(record["reward"]) or not math.isfinite(record["reward"]) or abs(record["reward"]) > MOST:
        yield f"reward is {short(record['reward'])}, expected a number"
    emotions = [record["initial_emotion"], record["emotion"], *record["emotions"]]
    if not all(type(emotion) is int and LOWEST <= emotion <= HIGHEST for emotion in emotions):
        yield f"initial_emotion, emotion or emotions are no whole numbers from {LOWEST} to {HIGHEST}"


def _nulls(message: Mapping[str, Any], names: Sequence[str], where: str, side: str) -> Iterator[str]:
    for name in names:
        if message[name] is not None:
            yield f"{where}{name} is {short(message[name])}, but the {side} is behind an endpoint, which gives none"


def _texts(texts: Mapping[str, Any], names: Sequence[str], what: str, where: str) -> Iterator[str]:
    if set(texts) != set(names):
        yield f"{where}{what} has the fields {short(sorted(texts))}, expected {sorted(names)}"
    elif not all(isinstance(text, str) for text in texts.values()):
        yield f"{where}{what} holds something that is no text"


def _logprobs(holder: Mapping[str, Any], name: str, tokens: Any, where: str) -> Iterator[str]:
    logprobs, count = holder[name], len(tokens) if isinstance(tokens, Sequence) else 0
    if not isinstance(logprobs, list):
        yield f"{where}log-probabilities of {name!r} are {short(logprobs)}, expected a list of numbers"
    elif len(logprobs) != count:
        yield f"{where}{count} tokens, but {len(logprobs)} log-probabilities ({name})"
    elif not all(map(_is_number, logprobs)):
        yield f"{where}log-probabilities of {name!r} are not all numbers"


def _is_number(value: Any) -> bool:
    return type(value) is float or (type(value) is int and abs(value) < MOST)
