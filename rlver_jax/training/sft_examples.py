"""Finished dialogues as examples to learn from: the very tokens, positions and branches that a model reads in play.

The packers of `verify` lay them out (`user.replay_sequence`, `rollout.policy_replay_sequence`). A log's own tokens are
taken where they spell its texts; other texts are encoded, as if the model that learns had written them: one line a
field, cut at the limits that it plays under.
"""

import collections
import dataclasses
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple, Protocol

import numpy as np
from jaxtyping import Float

from rlver_jax.config.validate import ConfigError
from rlver_jax.decoding.choice import Options
from rlver_jax.decoding.grammar import CLOSING
from rlver_jax.decoding.replay_sequence import GIVEN, Completion, ReplaySequence, States
from rlver_jax.dialogues.log import Record, thought_of
from rlver_jax.dialogues.trajectory import Message, reactions
from rlver_jax.dialogues.verify_tokens import user_fields
from rlver_jax.evaluation.judge_on_device import message_tokens
from rlver_jax.evaluation.transcripts import Transcript, turns_of, within
from rlver_jax.learning.sft_rows import Example
from rlver_jax.models.attention import BRANCH_RADIX
from rlver_jax.rollout.agents import Agents
from rlver_jax.rollout.policy_replay_sequence import PolicyPacker, Reply
from rlver_jax.text.tokenizer import Tokenizer
from rlver_jax.user.emotion import CHANGES
from rlver_jax.user.replay_sequence import LoggedTurn, Packer

CHANGE, THOUGHT, REPLY = "change", "thought", "reply"  # names of fields


class Target(NamedTuple):
    """One target of `sft_rows.Example`."""

    at: int
    token: int
    share: float
    field: int


class Examples(Protocol):
    """What makes examples of one role."""

    fields: Sequence[str]
    options: Options | None  # of a change
    teaches_appraisal: bool  # whether a logged appraisal stands before each change
    left_out: collections.Counter[str]  # what was not learned, in words, and how often

    def example(self, one: Transcript) -> Example | None:
        """The example of a dialogue; None where nothing in it is to be learned."""


def soft_targets(change: int, width: int) -> Float[np.ndarray, " 21"]:
    """Shares of the options of a change: falling linearly over `width` neighbours on either side; together 1."""
    shares = np.maximum(width + 1 - np.abs(np.array(CHANGES) - change), 0).astype(np.float64)
    return shares / shares.sum()


def change_pairs(options: Options, shares: Float[np.ndarray, " 21"]) -> list[tuple[int, int, float]]:
    """(place behind the token before the options, token, share): targets whose cross-entropy is that of the options.

    With log p(option) = sum_j log p(token_j | tokens before it), the cross-entropy - sum_o q_o log p(o) gives a token
    that follows some beginning of an option the share of all options that begin with both. Places count from 0, that
    of the token that predicts the options' first tokens.
    """
    offsets, pairs = np.asarray(options.contexts), collections.defaultdict[tuple[int, int], float](float)
    columns = (options.pair_context, options.pair_token, options.pair_option)
    for context, token, option in zip(*(np.asarray(x).tolist() for x in columns), strict=True):
        pairs[int(offsets[context]), token] += shares[option]
    return [(offset, token, share) for (offset, token), share in pairs.items() if share > 0]


class UserExamples:
    """Examples of a simulated user: the fields of its appraisal, the change, its considerations and its reply.

    A turn whose texts lack a field of the script is not learned: the user would be taught to leave it out. One without
    considerations is learned up to its change. Later turns read what was said all the same.

    Attributes:
        replies: whether considerations and replies are learned. Otherwise a turn ends at its change: what follows it is
            read by later turns alone.
    """

    def __init__(self, agents: Agents, *, field_tokens: int, reply_tokens: int, soft: int):
        """`field_tokens`, `reply_tokens`: limits in play; `soft`: see `soft_targets`."""
        self._agents, self._field_tokens, self._reply_tokens = agents, field_tokens, reply_tokens
        tables = agents.tables[1]
        self._appraisal, self._reply = tables.appraisal.names[:-1], tables.reply.names
        self._queried = user_fields(agents)
        self.fields: Sequence[str] = list(dict.fromkeys([*self._appraisal, CHANGE, *self._reply]))
        self.options: Options | None = tables.options
        self.teaches_appraisal = bool(self._appraisal)
        self.left_out: collections.Counter[str] = collections.Counter()
        self._pairs = {change: change_pairs(tables.options, soft_targets(change, soft)) for change in CHANGES}
        self._packer = Packer(tables, agents.spec.rules.band)
        self.replies = True
        self._line_end = agents.tokenizer.encode("\n")
        if len(self._line_end) != 1:
            raise ConfigError(f"the tokenizer writes a line end as {len(self._line_end)} tokens; expected one")

    def example(self, one: Transcript) -> Example | None:
        """See `Examples`."""
        assert one.profile is not None
        agents, record = self._agents, one.record
        told = {name: record[name] or getattr(agents, name) for name in ("style", "scenario")}  # a log says what it was
        prefix = dataclasses.replace(agents, **told).prefix(one.profile)
        first = message_tokens(agents.tokenizer, record["messages"][0])
        turns = self._turns(record)
        packed = self._packer.dialogue(prefix, first, turns)
        while turns and _reach(packed) > agents.spec.context:
            self.left_out["turns beyond rollout.context"] += 1
            turns = turns[:-1]
            packed = self._packer.dialogue(prefix, first, turns)
        targets = [
            Target(query.previous, query.token, 1.0, self.fields.index(self._queried[query.field]))
            for query in packed.queries
        ]
        appraised = [turn for turn in turns if turn.appraisal is not None]
        field = self.fields.index(CHANGE)
        for choice, turn in zip(packed.choices, appraised, strict=True):
            pairs = self._pairs[turn.change]
            targets += [Target(choice.first - 1 + offset, token, share, field) for offset, token, share in pairs]
        return _example(one, packed, targets, [choice.first for choice in packed.choices], appraised)

    def _turns(self, record: Record) -> list[LoggedTurn]:
        rules, turns = self._agents.spec.rules, []
        before = [one.emotion for one in turns_of(record)]
        for emotion, (turn, reply, user) in zip(before, reactions(record), strict=True):
            appraisal = self._lines(self._appraisal, user, "appraisal")
            considered = self._lines(self._reply[:-1], user, "consideration")
            completion = self._line(user["content"] or "", user["all_tokens"], user["stopped"], self._reply_tokens)
            whole = completion is not None and considered is not None and appraisal is not None
            lines = [*considered, completion] if whole and self.replies else []  # type: ignore[misc]
            words = list(completion.text_tokens) if completion is not None else []
            say = message_tokens(self._agents.tokenizer, reply)
            change, after = rules.clamp(user["change"]), within(user["emotion"])
            turns.append(LoggedTurn(turn, emotion, after, say, appraisal, change, lines, words))
        return turns

    def _lines(self, names: Sequence[str], user: Message, kind: str) -> list[Completion] | None:
        """The fields of a script; None where one has no text."""
        texts = user["appraisal" if kind == "appraisal" else "considerations"]
        logged, stopped = (user[f"{kind}_{what}"] or {} for what in ("tokens", "stopped"))
        lines = []
        for name in names:
            line = self._line(texts.get(name, ""), logged.get(name), stopped.get(name), self._field_tokens)
            if line is None:
                if user["content"] is not None or kind == "appraisal":
                    self.left_out[f"turns without the field {name!r} of the {kind} script"] += 1
                return None
            lines.append(line)
        return lines

    def _line(self, text: str, logged: Sequence[int] | None, stopped: bool | None, limit: int) -> Completion | None:
        """A line as the user writes it; None where there is no text."""
        tokenizer = self._agents.tokenizer
        if logged and stopped is not None and _spells(tokenizer, logged[: len(logged) - stopped], text):
            return Completion(list(logged), stopped)
        line = as_line(text)
        return _limited([*tokenizer.encode(line), *self._line_end], limit) if line else None


def as_line(text: str) -> str:
    """A text in one line. Of SAGE's fields the first line is the rest of a heading, "…]", which is left out."""
    first, _, rest = text.partition("\n")
    if rest and first.rstrip().endswith("]") and "[" not in first:
        text = rest
    return " ".join(text.split())


class PolicyExamples:
    """Examples of a policy: its thoughts, in think mode, and its replies; those that broke the format are left out."""

    def __init__(self, agents: Agents, *, min_change: int, say_tokens: int, fields: Sequence[str] = ()):
        """What makes examples in the mode of `agents`.

        Args:
            min_change: of the reaction to a reply that is learned.
            say_tokens: of a reply at most, in play.
            fields: names of all fields that are learned; those of the mode if there are none.
        """
        self._agents, self._min_change, self._say_tokens = agents, min_change, say_tokens
        spec, tables = agents.spec, agents.tables[0]
        self._think = spec.mode == "think"
        self.fields: Sequence[str] = fields or ([THOUGHT, REPLY] if self._think else [REPLY])
        self.options: Options | None = None
        self.teaches_appraisal = False
        self.left_out: collections.Counter[str] = collections.Counter()
        self._packer = PolicyPacker(tables, think_tokens=spec.think_tokens)
        self._states = States.of(tables.grammar)

    def example(self, one: Transcript) -> Example | None:
        """See `Examples`."""
        replies = self._replies(one.record)
        packed = self._packer.dialogue(replies)
        while replies and _reach(packed) > self._agents.spec.context:
            self.left_out["turns beyond rollout.context"] += 1
            replies = replies[:-1]
            packed = self._packer.dialogue(replies)
        in_thought = lambda state: self._think and not self._states.matched(state)  # noqa: E731
        targets = [
            Target(query.previous, query.token, 1.0, self.fields.index(THOUGHT if in_thought(query.state) else REPLY))
            for query in packed.queries
            if query.source != GIVEN
        ]
        return _example(one, packed, targets, [], [])

    def _replies(self, record: Record) -> list[Reply]:
        messages, tokenizer, replies = record["messages"], self._agents.tokenizer, []
        reactions_after = [*messages[2::2], None]
        for user, message, reaction in zip(messages[::2], messages[1::2], reactions_after, strict=False):
            say = message_tokens(tokenizer, message)
            completion = self._completion(record, message, say) if self._wanted(message, reaction) else None
            replies.append(Reply(message_tokens(tokenizer, user), completion, say))
        return replies

    def _wanted(self, message: Message, reaction: Mapping[str, Any] | None) -> bool:
        if message["violation"]:
            self.left_out["replies that broke the format"] += 1
            return False
        change = reaction["change"] if reaction else CHANGES[0]
        if change < self._min_change:
            self.left_out["replies below sft.min_change"] += 1
        return change >= self._min_change

    def _completion(self, record: Record, message: Message, say: list[int]) -> Completion | None:
        """A reply as the policy writes it; None where it has no text, or no thought that fits in its limit."""
        tokenizer, logged, stopped = self._agents.tokenizer, message["tokens"], message["stopped"]
        if logged and record["mode"] == self._agents.spec.mode and say == message["say_tokens"]:
            text = logged[: len(logged) - stopped]
            if not self._think or thought_of(tokenizer, text) == message["thought"]:
                return Completion(list(logged), stopped)
        if not say:
            self.left_out["replies without a text"] += 1
            return None
        reply = _limited([*say, tokenizer.im_end_id], self._say_tokens)
        if not self._think:
            return reply
        thought = (message["thought"] or "").strip()
        tokens = tokenizer.encode(thought + CLOSING) if thought else []
        if not 0 < len(tokens) <= self._agents.spec.think_tokens:
            self.left_out[f"replies {'with too long' if tokens else 'without'} a thought"] += 1
            return None
        return Completion([*tokens, *reply.tokens], reply.stopped)


class LoggedModeExamples:
    """Examples of a policy, each in the mode in which its dialogue was played."""

    def __init__(self, agents: Mapping[str, Agents], **limits: int):
        """`agents`: of each mode; `limits` as in `PolicyExamples`."""
        self.fields: Sequence[str] = [THOUGHT, REPLY]
        self.options: Options | None = None
        self.teaches_appraisal = False
        self.left_out: collections.Counter[str] = collections.Counter()
        self._of = {mode: PolicyExamples(one, **limits, fields=self.fields) for mode, one in agents.items()}
        for one in self._of.values():
            one.left_out = self.left_out

    def example(self, one: Transcript) -> Example | None:
        """See `Examples`."""
        return self._of[one.record["mode"]].example(one)


def _limited(tokens: list[int], limit: int) -> Completion:
    """Tokens with the one that ends them, as a model writes them under a limit."""
    return Completion(tokens[:limit], len(tokens) <= limit)


def _spells(tokenizer: Tokenizer, tokens: Sequence[int], text: str) -> bool:
    return all(0 <= token < tokenizer.vocab_size for token in tokens) and tokenizer.decode(tokens) == text


def _reach(packed: ReplaySequence) -> int:
    """Slots that the dialogue takes in play, where options are read beyond them."""
    positions = zip(packed.positions, packed.branch, strict=True)
    return 1 + max(position for position, branch in positions if branch % BRANCH_RADIX == 0)


def _example(
    one: Transcript,
    packed: ReplaySequence,
    targets: Sequence[Target],
    choices: Sequence[int],
    appraised: Sequence[LoggedTurn],
) -> Example | None:
    if not targets:
        return None
    ints = lambda values: np.array(values, np.int32)  # noqa: E731
    at, token, share, field = zip(*targets, strict=True)
    return Example(
        one.record["profile"], ints(packed.tokens), ints(packed.positions), ints(packed.branch),
        ints(at), ints(token), np.array(share, np.float32), ints(field), ints(choices),
        ints([turn.change for turn in appraised]), ints([turn.emotion_before for turn in appraised]),
        ints([turn.turn for turn in appraised]),
    )  # fmt: skip
