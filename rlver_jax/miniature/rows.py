"""Dialogues of the grammar as packed training rows: exactly the tokens that the engine will put before each model."""

import dataclasses
import functools
import random
from collections.abc import Sequence
from typing import NamedTuple

import numpy as np

from rlver_jax.decoding.replay_sequence import Branches
from rlver_jax.decoding.script import Part
from rlver_jax.miniature import rule, texts
from rlver_jax.miniature.texts import Dialogue
from rlver_jax.models.attention import BRANCH_RADIX
from rlver_jax.rollout.policy_turn import THINK_OPEN
from rlver_jax.text.chat import ChatTemplate
from rlver_jax.text.tokenizer import Tokenizer
from rlver_jax.user.emotion import SAGE
from rlver_jax.user.prompts import Prompts
from rlver_jax.user.turn import option_text

THINK_CLOSE = "\n</think>\n\n"


class Rows(NamedTuple):
    """Packed rows; `target` stands at the place that predicts it, -1 where nothing is learned."""

    tokens: np.ndarray  # int32 [B, L]
    positions: np.ndarray
    branch: np.ndarray
    target: np.ndarray


@dataclasses.dataclass
class Row(Branches):
    """One row under construction."""

    target: list[int] = dataclasses.field(default_factory=list)

    def read(self, tokens: Sequence[int], branch: int, position: int) -> int:
        """Adds tokens that are given; returns the position after them."""
        self.target += [-1] * len(tokens)
        return self.add(tokens, branch, position)

    def learn(self, tokens: Sequence[int], branch: int, position: int) -> int:
        """Adds tokens that the model is to say: each is the target of the place before it."""
        start = len(self.tokens) - 1
        position = self.read(tokens, branch, position)
        self.target[start : start + len(tokens)] = tokens
        return position


@dataclasses.dataclass(frozen=True)
class Packer:
    """Turns dialogues into rows for one tokenizer and one set of prompts."""

    tokenizer: Tokenizer
    prompts: Prompts

    @functools.cached_property
    def chat(self) -> ChatTemplate:
        """Segments of the chat template."""
        return ChatTemplate(self.tokenizer)

    def user(self, dialogue: Dialogue) -> Row:
        """What the simulated user reads, appraises and answers."""
        row, chat, person = Row(), self.chat, dialogue.person
        profile = person.profile()
        system = self.prompts.user_system(
            profile.persona, profile.background, profile.hidden_intention, style=dialogue.style,
            scenario="heart_to_heart", rules=SAGE,
        )  # fmt: skip
        prefix = chat.message("system", system) + chat.message("user", self.prompts.opening) + chat.open("assistant")
        position = row.read(prefix + self.tokenizer.encode(person.first_talk), 0, 0)
        emotion = dialogue.initial
        for index, turn in enumerate(dialogue.turns):
            branch = (index + 1) * BRANCH_RADIX
            reply = self.tokenizer.encode(turn.reply.text)
            position = row.read([*chat.close, *chat.turns.exchange(reply)], 0, position)
            fields = rule.appraisal(person, turn.verdict)
            after = self._script(row, self.prompts.appraisal, emotion, fields, branch, position)
            after = row.learn(self.tokenizer.encode(option_text(turn.verdict.change)), branch, after)
            emotion = turn.emotion
            if turn.answer is None:
                break
            self._script(row, self.prompts.reply, emotion, {"reply": turn.answer}, branch, after)
            position = row.read(self.tokenizer.encode(turn.answer), 0, position)
        return row

    def _script(self, row: Row, parts: Sequence[Part], emotion: int, fields, branch: int, position: int) -> int:
        """A script with its free fields filled, up to its choice."""
        literal: list[int] = []
        for part in parts:
            if part.kind == "free":
                position = row.read(literal, branch, position)
                position = row.learn(self.tokenizer.encode(fields[part.value] + "\n"), branch, position)
                literal = []
            elif part.kind != "choose":
                slots = {"emotion": str(emotion), "band": SAGE.band_name(emotion)}
                literal += self.tokenizer.encode(slots[part.value] if part.kind == "slot" else part.value)
        return row.read(literal, branch, position)

    def policy(self, dialogue: Dialogue, mode: str) -> Row:
        """What the policy reads and says, in think or direct mode."""
        row, chat = Row(), self.chat
        position = row.read(chat.message("system", self.prompts.policy_system(mode)), 0, 0)
        heard, end = dialogue.person.first_talk, [self.tokenizer.im_end_id]
        for index, turn in enumerate(dialogue.turns):
            position = row.read(chat.turns.exchange(self.tokenizer.encode(heard)), 0, position)
            say = self.tokenizer.encode(turn.reply.text)
            if mode == "think":
                branch = (index + 1) * BRANCH_RADIX
                after = row.read(self.tokenizer.encode(THINK_OPEN), branch, position)
                thought = texts.thought(dialogue.person, turn.reply)
                row.learn([*self.tokenizer.encode(thought + THINK_CLOSE), *say, *end], branch, after)
                position = row.read([*say, *chat.close], 0, position)
            else:
                position = row.learn([*say, *end], 0, position)
                position = row.read(chat.close[1:], 0, position)
            heard = turn.answer or ""
        return row


def stack(rows: Sequence[Row], length: int) -> Rows:
    """Rows of equal length; longer ones are cut."""
    made = Rows(*(np.zeros((len(rows), length), np.int32) for _ in Rows._fields))
    made.target[:] = -1
    for i, row in enumerate(rows):
        for array, values in zip(made, (row.tokens, row.positions, row.branch, row.target), strict=True):
            array[i, : len(values)] = values[:length]
    return made


def sample_dialogues(count: int, draw: random.Random, people, shares: dict[str, float], turns: int) -> list[Dialogue]:
    """Seeded dialogues with random people, initial emotions and both kinds of users."""
    made = []
    for _ in range(count):
        style = "vanilla" if draw.random() < 0.7 else "challenging"
        made.append(
            texts.play(draw.choice(people), draw, shares, turns=turns, initial=draw.randint(20, 75), style=style)
        )
    return made
