"""One dialogue in which a person plays the user or the policy, one turn at a time."""

from collections.abc import Sequence

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Key

from rlver_jax.dialogues.log import Record, policy_message, user_message
from rlver_jax.profiles.schema import Profile
from rlver_jax.rollout.agents import Agents
from rlver_jax.rollout.end_reason import CONTEXT, END_REASONS, FORMAT, RUNNING, end_reason
from rlver_jax.rollout.sampler import room_needed
from rlver_jax.rollout.single_turns import (
    fetch_turn,
    open_policy,
    open_users,
    single_policy_turn,
    single_user_turn,
)
from rlver_jax.rollout.spec import RolloutLimits
from rlver_jax.text.padding import pad_rows
from rlver_jax.user.turn import Words, dialogue_key

TYPED = 256  # tokens that a person may say at once; less where the context is small
_UNKNOWN = dict.fromkeys(("logprobs", "raw_logprobs", "stopped"))


def typed_tokens(context: int) -> int:
    """Tokens that a person may say at once."""
    return min(TYPED, context // 8)


class Conversation:
    """A dialogue of one profile. Roles take turns: the user's words, the policy's reply, the user's reaction.

    For each, a person's words or the model's: `user_says` or `user_begins`; `policy_replies` or `policy_says`;
    `user_reacts`, whose reply a person's next `user_says` replaces. `record` is the dialogue so far, as in a log.
    A model's words are those of `sample_dialogues` with the same seed and dialogue 0, as long as all words are.
    """

    def __init__(self, agents: Agents, profile: Profile, limits: RolloutLimits, seed: int):
        """Reads the profile.

        Raises:
            ValueError: it leaves no room for a turn.
        """
        self.agents, self.limits = agents, limits
        profiles = agents.tokens([profile]).batch([0], [0])
        self.width = max(typed_tokens(agents.spec.context), profiles.first_talk.shape[1], agents.spec.user_tokens)
        key, context = jax.random.key(seed), agents.spec.context
        self._policy = open_policy(agents.policy, agents.tables[0].system, batch=1, context=context)
        self._user, first = open_users(agents.user, agents.tables, profiles, key, limits, spec=agents.spec)
        self._first = self._words(np.asarray(first[0][0, : int(first[1][0])]).tolist())
        self._active = jnp.ones(1, bool)
        self._key = dialogue_key(key, jnp.uint32(0))
        self._room = room_needed(agents.tables, agents.spec, limits, self.width)
        self._say, self._heard = self._words([], agents.spec.say_tokens), self._words([])
        self.record = _empty_record(agents, profile, seed)
        if self._is_full():
            need = max(int(c.length[0]) + room for c, room in zip((self._policy, self._user), self._room, strict=True))
            raise ValueError(f"rollout.context is {agents.spec.context}, but a turn may need {need}; raise it to that")

    @property
    def ended(self) -> bool:
        """Whether nobody speaks any more; `record["end_reason"]` says why."""
        return self.record["end_reason"] != END_REASONS[RUNNING]

    def encode(self, text: str, side: str) -> list[int]:
        """Tokens of what a person typed as `side` ("user" or "policy").

        Raises:
            ValueError: it is empty, too long, or no text.
        """
        tokens = self.agents.tokenizer.encode(text.strip())
        most = self.width if side == "user" else self.agents.spec.say_tokens
        if not tokens or len(tokens) > most:
            raise ValueError(f"{len(tokens)} tokens; say something of 1 to {most}")
        return tokens

    def user_begins(self) -> str:
        """The user's first words: the profile's, or else the model's."""
        return self.user_says(np.asarray(self._first[0][0, : int(self._first[1][0])]).tolist())

    def user_says(self, tokens: Sequence[int]) -> str:
        """A person's words as the user, which may replace the model's last reply."""
        self._heard = self._words(tokens)
        text, messages = self.agents.tokenizer.decode(tokens), self.record["messages"]
        if messages:
            reply: Record = {"content": text, "tokens": list(tokens), "all_tokens": None, "considerations": {}}
            messages[-1] |= reply | _UNKNOWN | {f"consideration_{x}": None for x in ("tokens", "stopped", "logprobs")}
        else:
            opening = {"role": "user", "content": text, "tokens": list(tokens), "generated": False}
            messages.append(opening | {"emotion": self.record["emotion"]})
        return text

    def policy_replies(self) -> Record:
        """The policy's message; one that breaks the think format ends the dialogue."""
        first = jnp.bool_(self.record["turns"] == 0)
        self._policy, reply = single_policy_turn(
            self.agents.policy, self.agents.tables[0], self._policy, self._say, self._heard, self._turn_keys(),
            self.limits, self._active, first, spec=self.agents.spec,
        )  # fmt: skip
        self._say = reply.say, reply.say_count
        message = policy_message(fetch_turn(policy=reply), self.agents, 0, 0)
        self._add_reply(message)
        if message["violation"]:
            self._end(FORMAT)
        return message

    def policy_says(self, tokens: Sequence[int]) -> Record:
        """A person's reply as the policy."""
        self._say, tokens = self._words(tokens, self.agents.spec.say_tokens), list(tokens)
        reply = {"role": "assistant", "thought": None, "content": self.agents.tokenizer.decode(tokens)}
        message = reply | _UNKNOWN | {"tokens": tokens, "say_tokens": tokens, "violation": False}
        self._add_reply(message)
        return message

    def user_reacts(self, *, ends: bool) -> Record:
        """The user's reaction to the reply; `ends`: the emotion, a goodbye or the turn limit can end the dialogue.

        With `ends` the user answers, unless the dialogue is over; without it only the emotion is wanted.
        """
        spec, turns = self.agents.spec, self.record["turns"]
        last = turns >= spec.max_turns
        self._user, reaction = single_user_turn(
            self.agents.user, self.agents.tables[1], self._user, self._heard, self._say,
            jnp.array([self.record["emotion"]], jnp.int32), self._turn_keys(turns - 1), self.limits,
            self._active, jnp.bool_(ends and not last), spec=spec,
        )  # fmt: skip
        message = user_message(fetch_turn(user=reaction), self.agents, 0, 0)
        self._heard = self._words(message["tokens"])
        self._add_reaction(message)
        reason = end_reason(message["emotion"], spec.rules, goodbye=bool(reaction.goodbye[0]), last=last)
        if ends and reason != RUNNING:
            self._end(reason)
        elif self._is_full():
            self._end(CONTEXT)
        return message

    def _is_full(self) -> bool:
        """Whether another turn might not fit."""
        lengths = int(self._policy.length[0]), int(self._user.length[0])
        return any(n + room > self.agents.spec.context for n, room in zip(lengths, self._room, strict=True))

    def _turn_keys(self, turn: int | None = None) -> Key[Array, "1"]:
        return jax.random.fold_in(self._key, self.record["turns"] if turn is None else turn)[None]

    def _words(self, tokens: Sequence[int], width: int = 0) -> Words:
        padded, count = pad_rows([tokens], width or self.width)
        return jnp.asarray(padded), jnp.asarray(count)

    def _add_reply(self, message: Record) -> None:
        record = self.record
        record["messages"].append(message)
        record["turns"] += 1
        record["emotions"].append(record["emotion"])
        record["violation"] = message["violation"]

    def _add_reaction(self, message: Record) -> None:
        record = self.record
        record["messages"].append(message)
        record["emotion"] = record["emotions"][-1] = message["emotion"]
        record["reward"] = message["emotion"] / 100

    def _end(self, reason: int) -> None:
        self.record["end_reason"] = END_REASONS[reason]
        if reason == FORMAT:
            self.record["reward"] = 0.0


def _empty_record(agents: Agents, profile: Profile, seed: int) -> Record:
    """A dialogue in which nobody has spoken."""
    initial = agents.spec.rules.initial
    return {
        "dialogue": 0,
        "profile": profile.id,
        "seed": seed,
        "mode": agents.spec.mode,
        "language": agents.prompts.language,
        "style": agents.style,
        "scenario": agents.scenario,
        "readout": agents.spec.readout,
        "initial_emotion": initial,
        "hidden_intention": profile.hidden_intention,
        "end_reason": END_REASONS[RUNNING],
        "turns": 0,
        "violation": False,
        "reward": initial / 100,
        "emotion": initial,
        "emotions": [initial],
        "messages": [],
    }
