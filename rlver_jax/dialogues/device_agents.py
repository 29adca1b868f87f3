"""Agents on the device, one turn at a time.

What the other agent says comes as text and is encoded here. A model's own words are those of `sample_dialogues` with
the same seed, dialogue and context.
"""

import collections
from collections.abc import Sequence

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Key

from rlver_jax.decoding.cache import Cache
from rlver_jax.dialogues.log import policy_message, user_message
from rlver_jax.dialogues.turn_by_turn import Row
from rlver_jax.parallel.distributed import fetch
from rlver_jax.rollout.agents import Agents
from rlver_jax.rollout.end_reason import CONTEXT, END_REASONS
from rlver_jax.rollout.policy_turn import PolicyTurn
from rlver_jax.rollout.profile_tokens import WIDTH_STEP, ProfileTokens
from rlver_jax.rollout.sampler import room_needed
from rlver_jax.rollout.single_turns import (
    SingleTurn,
    fetch_turn,
    open_policy,
    open_users,
    single_policy_turn,
    single_user_turn,
)
from rlver_jax.rollout.spec import RolloutLimits
from rlver_jax.text.padding import longest, pad_rows, round_up
from rlver_jax.user.turn import Words, dialogue_key

USER_SAY = "user_say_tokens"  # of a policy's message: what a user with a tokenizer of its own reads


class _Batch:
    """What both agents have: the rows of a batch, their keys, and words as padded arrays.

    `first`: the slot of row 0 of its arrays.
    """

    def __init__(
        self, agents: Agents, limits: RolloutLimits, batch: int, rows: Sequence[Row], seed: int, first: int = 0
    ):
        self.agents, self.limits, self.batch, self.first = agents, limits, batch, first
        self.key = jax.random.key(seed)
        ids = np.zeros(batch, np.uint32)
        ids[self.at(rows)] = [row.number for row in rows]
        self._row_keys = jax.vmap(dialogue_key, (None, 0))(self.key, jnp.asarray(ids))

    def at(self, rows: Sequence[Row]) -> list[int]:
        """Indices of the rows in its arrays."""
        return [row.slot - self.first for row in rows]

    def keys(self, turn: int) -> Key[Array, "B"]:
        return jax.vmap(jax.random.fold_in, (0, None))(self._row_keys, turn)

    def words(self, rows: Sequence[Row], texts: Sequence[Sequence[int]], width: int = 0) -> Words:
        """Tokens of the rows in their slots, as wide as the widest needs in steps of WIDTH_STEP, `width` at least."""
        placed: list[Sequence[int]] = [()] * self.batch
        for i, text in zip(self.at(rows), texts, strict=True):
            placed[i] = text
        tokens, count = pad_rows(placed, max(width, round_up(longest(texts), WIDTH_STEP)))
        return jnp.asarray(tokens), jnp.asarray(count)

    def active(self, rows: Sequence[Row]) -> Bool[Array, "B"]:
        mask = np.zeros(self.batch, bool)
        mask[self.at(rows)] = True
        return jnp.asarray(mask)

    def fitting(self, rows: Sequence[Row], cache: Cache, room: int) -> list[Row]:
        """The rows that have room for a turn; the others end."""
        lengths = fetch(cache.length)[self.at(rows)] + room
        fits = [row for row, length in zip(rows, lengths, strict=True) if length <= self.agents.spec.context]
        for row in rows:
            if row not in fits:
                row.end = END_REASONS[CONTEXT]
        return fits

    def encode(self, text: str) -> list[int]:
        return self.agents.tokenizer.encode(text)


class DevicePolicy(_Batch):
    """The policy of one batch of dialogues."""

    def __init__(self, agents: Agents, limits: RolloutLimits, batch: int, rows: Sequence[Row], seed: int):
        super().__init__(agents, limits, batch, rows, seed)
        spec = agents.spec
        self._cache = open_policy(agents.policy, agents.tables[0].system, batch=batch, context=spec.context)
        none = jnp.zeros((batch, spec.say_tokens), jnp.int32)
        self._say: Words = none, jnp.zeros(batch, jnp.int32)

    async def speak(self, rows: Sequence[Row]) -> None:
        """Adds a reply to each of the rows; one without room for it ends."""
        agents, spec, turn = self.agents, self.agents.spec, rows[0].turns
        heard = [self.encode(row.aloud[-1]) for row in rows]
        width = self.words(rows, heard, spec.user_tokens)[0].shape[1]
        rows_heard = list(zip(rows, heard, strict=True))
        rows = self.fitting(rows, self._cache, room_needed(agents.tables, spec, self.limits, width)[0])
        if not rows:
            return
        heard = [tokens for row, tokens in rows_heard if row in rows]
        self._cache, reply = single_policy_turn(
            agents.policy, agents.tables[0], self._cache, self._say, self.words(rows, heard, width),
            self.keys(turn), self.limits, self.active(rows), jnp.bool_(turn == 0), spec=spec,
        )  # fmt: skip
        self._say = reply.say, reply.say_count
        log = fetch_turn(policy=reply)
        for row in rows:
            row.messages.append(policy_message(log, agents, 0, row.slot))


class DeviceUser(_Batch):
    """The simulated users of one batch of dialogues; profiles are in tokens, in the order of their numbers."""

    def __init__(
        self,
        agents: Agents,
        limits: RolloutLimits,
        batch: int,
        rows: Sequence[Row],
        seed: int,
        tokens: ProfileTokens,
        indices: Sequence[int] | None = None,
        say_field: str = "say_tokens",
    ):
        """Of rows in their slots.

        Args:
            indices: of the rows' profiles in `tokens`; None: by their numbers.
            say_field: of the policy's messages, for the tokens that the user reads; another one where the policy has
                tokens of its own.
        """
        super().__init__(agents, limits, batch, rows, seed)
        self._say_field = say_field
        numbers = [row.number for row in rows]
        count = tokens.count
        indices = [number % count for number in numbers] if indices is None else indices
        profiles = tokens.batch(indices, numbers, batch)
        self._cache, self._reply = open_users(agents.user, agents.tables, profiles, self.key, limits, spec=agents.spec)

    async def begin(self, rows: Sequence[Row]) -> None:
        """Adds the first words: the profile's, or the model's."""
        tokens, count = fetch(self._reply)
        for row in rows:
            first = tokens[row.slot, : count[row.slot]].tolist()
            opening = {"role": "user", "content": self.agents.tokenizer.decode(first), "tokens": first}
            row.messages.append(opening | {"emotion": row.emotions[0], "generated": not row.profile.first_talk})

    async def react(self, rows: Sequence[Row], *, may_reply: bool) -> None:
        """Adds a reaction to each of the rows; one without room for it ends."""
        agents, spec, turn = self.agents, self.agents.spec, rows[0].turns - 1
        says = [self.encode(row.aloud[-1]) for row in rows]
        for row, tokens in zip(rows, says, strict=True):
            row.messages[-1][self._say_field] = tokens  # what the user reads
        words = self.words(rows, says, spec.say_tokens)
        rows = self.fitting(rows, self._cache, self._room(words[0].shape[1]))
        if not rows:
            return
        emotion = np.full(self.batch, spec.rules.initial, np.int32)
        emotion[[row.slot for row in rows]] = [row.emotions[-1] for row in rows]
        self._cache, reaction = single_user_turn(
            agents.user, agents.tables[1], self._cache, self._reply, words, jnp.asarray(emotion),
            self.keys(turn), self.limits, self.active(rows), jnp.bool_(may_reply), spec=spec,
        )  # fmt: skip
        log = fetch_turn(user=reaction)
        replies = []
        for row in rows:
            message = user_message(log, agents, 0, row.slot)
            row.messages.append(message)
            row.goodbye = bool(log.user.goodbye[0, row.slot])
            replies.append(message["tokens"])
        self._reply = self.words(rows, replies, self._reply[0].shape[1])

    def _room(self, width: int) -> int:
        """Slots that a turn may need after a say of `width` tokens."""
        spec = self.agents.spec
        room = room_needed(self.agents.tables, spec, self.limits, self._reply[0].shape[1])[1]
        return int(room) + max(width - spec.policy_tokens, 0)


class TextPolicy:
    """The policy of one batch of dialogues whose users give text; each row stands at a turn of its own.

    A row's words do not depend on who speaks with it: rows are decoded together where the words that they hear are
    equally wide once padded, and keep their slots. Rows lie in cohorts of neighbours with a cache each.
    """

    def __init__(
        self, agents: Agents, limits: RolloutLimits, batch: int, rows: Sequence[Row], seed: int, widest: int,
        cohorts: int = 1,
    ):  # fmt: skip
        """Of rows in their slots.

        Args:
            widest: tokens of the longest words that may be heard; a dialogue with longer ones ends for its context.
            cohorts: a divisor of `batch`.
        """
        self.batch, self._size = batch, batch // cohorts
        self._cohorts = [
            _TextCohort(agents, limits, self._size, own, seed, widest, index * self._size)
            for index, own in enumerate(self._split(rows, cohorts))
        ]

    def cohorts(self, rows: Sequence[Row]) -> list[list[Row]]:
        """The rows of each cohort that has any of them."""
        return [own for own in self._split(rows, len(self._cohorts)) if own]

    def speak(self, rows: Sequence[Row]) -> None:
        """Adds a reply to each of the rows; one without room for it ends. Blocks; one call at a time."""
        for cohort, own in zip(self._cohorts, self._split(rows, len(self._cohorts)), strict=True):
            if own:
                cohort.speak(own)

    @property
    def log(self) -> PolicyTurn | None:
        """All replies as the sampler's arrays, NumPy [T, B, …]; None: nobody has spoken yet."""
        logs = [cohort.log for cohort in self._cohorts]
        spoken = next((log for log in logs if log is not None), None)
        if spoken is None:
            return None
        logs = [jax.tree.map(np.zeros_like, spoken) if log is None else log for log in logs]
        return jax.tree.map(lambda *parts: np.concatenate(parts, 1), *logs)

    def _split(self, rows: Sequence[Row], cohorts: int) -> list[list[Row]]:
        return [[row for row in rows if row.slot // self._size == index] for index in range(cohorts)]


class _TextCohort(_Batch):
    """The part of a `TextPolicy` that has a cache of its own; `log` holds its replies."""

    def __init__(
        self, agents: Agents, limits: RolloutLimits, batch: int, rows: Sequence[Row], seed: int, widest: int, first: int
    ):
        super().__init__(agents, limits, batch, rows, seed, first)
        spec = agents.spec
        self.widest = max(widest, self._width(0))
        # A row that waits keeps its slots while others write words that are wider than it could hear.
        slots = spec.context + self.widest - self._width(0)
        with self.agents.on_mesh():
            self._cache = open_policy(agents.policy, agents.tables[0].system, batch=batch, context=slots)
        self._say = np.zeros((batch, spec.say_tokens), np.int32), np.zeros(batch, np.int32)
        self.log: PolicyTurn | None = None  # NumPy [T, B, …]; None: nobody has spoken yet

    def speak(self, rows: Sequence[Row]) -> None:
        """Adds a reply to each of the rows; one without room for it ends. Blocks; one call at a time."""
        widths = collections.defaultdict(list)
        for row in rows:
            heard = self.encode(row.aloud[-1])
            widths[self._width(len(heard))].append((row, heard))
        with self.agents.on_mesh():  # a thread has none of its own
            for width in sorted(widths):
                self._speak(width, dict(widths[width]))

    def _width(self, tokens: int) -> int:
        return max(self.agents.spec.user_tokens, round_up(max(tokens, 1), WIDTH_STEP))

    def _speak(self, width: int, heard: dict[Row, list[int]]) -> None:
        agents, spec = self.agents, self.agents.spec
        if width > self.widest:
            for row in heard:
                row.end = END_REASONS[CONTEXT]
            return
        rows = self.fitting(list(heard), self._cache, room_needed(agents.tables, spec, self.limits, width)[0])
        if not rows:
            return
        turns = np.zeros(self.batch, np.int32)
        turns[self.at(rows)] = [row.turns for row in rows]
        keys = jax.vmap(jax.random.fold_in)(self._row_keys, jnp.asarray(turns))
        self._cache, reply = single_policy_turn(
            agents.policy, agents.tables[0], self._cache, jax.tree.map(jnp.array, self._say),
            self.words(rows, [heard[row] for row in rows], width), keys, self.limits, self.active(rows),
            jnp.asarray(turns == 0), spec=spec,
        )  # fmt: skip
        self._store(rows, fetch(reply))

    def _store(self, rows: Sequence[Row], reply: PolicyTurn) -> None:
        """Writes the rows' replies to their messages, and to the log."""
        turns = self.agents.spec.max_turns
        if self.log is None:
            self.log = jax.tree.map(lambda x: np.zeros((turns, *x.shape), x.dtype), reply)
        slots, turn = self.at(rows), [row.turns for row in rows]
        for logged, new in zip(jax.tree.leaves(self.log), jax.tree.leaves(reply), strict=True):
            logged[turn, slots] = new[slots]
        for say, new in zip(self._say, (reply.say, reply.say_count), strict=True):
            say[slots] = new[slots]
        log = SingleTurn(policy=jax.tree.map(lambda x: x[None], reply))
        for row, i in zip(rows, slots, strict=True):
            row.messages.append(policy_message(log, self.agents, 0, i))
