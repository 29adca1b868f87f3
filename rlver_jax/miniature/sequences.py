"""Dialogues of the grammar as training sequences: exactly the tokens that each model will be given in a dialogue."""

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


class SequenceBatch(NamedTuple):
    """A batch of sequences; `target` is the token that a position predicts, -1 where nothing is learned."""

    tokens: np.ndarray  # int32 [B, L]
    positions: np.ndarray
    branch: np.ndarray
    target: np.ndarray


@dataclasses.dataclass
class TrainingSequence(Branches):
    """One sequence under construction."""

    target: list[int] = dataclasses.field(default_factory=list)

    def add_context(self, tokens: Sequence[int], branch: int, position: int) -> int:
        """Adds tokens that the model is given; returns the position after them."""
        self.target += [-1] * len(tokens)
        return self.add(tokens, branch, position)

    def add_targets(self, tokens: Sequence[int], branch: int, position: int) -> int:
        """Adds tokens that the model learns to generate: each is the target of the position before it."""
        start = len(self.tokens) - 1
        position = self.add_context(tokens, branch, position)
        self.target[start : start + len(tokens)] = tokens
        return position


@dataclasses.dataclass(frozen=True)
class SequenceBuilder:
    """Turns dialogues into sequences for one tokenizer and one set of prompts."""

    tokenizer: Tokenizer
    prompts: Prompts

    @functools.cached_property
    def chat(self) -> ChatTemplate:
        """Segments of the chat template."""
        return ChatTemplate(self.tokenizer)

    def user(self, dialogue: Dialogue) -> TrainingSequence:
        """What the simulated user is given, appraises and answers."""
        sequence, chat, person = TrainingSequence(), self.chat, dialogue.person
        profile = person.profile()
        system = self.prompts.user_system(
            profile.persona, profile.background, profile.hidden_intention, style=dialogue.style,
            scenario="heart_to_heart", rules=SAGE,
        )  # fmt: skip
        prefix = chat.message("system", system) + chat.message("user", self.prompts.opening) + chat.open("assistant")
        position = sequence.add_context(prefix + self.tokenizer.encode(person.first_talk), 0, 0)
        emotion = dialogue.initial
        for index, turn in enumerate(dialogue.turns):
            branch = (index + 1) * BRANCH_RADIX
            reply = self.tokenizer.encode(turn.reply.text)
            position = sequence.add_context([*chat.close, *chat.turns.exchange(reply)], 0, position)
            fields = rule.appraisal(person, turn.verdict)
            after = self._script(sequence, self.prompts.appraisal, emotion, fields, branch, position)
            after = sequence.add_targets(self.tokenizer.encode(option_text(turn.verdict.change)), branch, after)
            emotion = turn.emotion
            if turn.answer is None:
                break
            self._script(sequence, self.prompts.reply, emotion, {"reply": turn.answer}, branch, after)
            position = sequence.add_context(self.tokenizer.encode(turn.answer), 0, position)
        return sequence

    def _script(
        self, sequence: TrainingSequence, parts: Sequence[Part], emotion: int, fields, branch: int, position: int
    ) -> int:
        """A script with its free fields filled, up to its choice."""
        literal: list[int] = []
        for part in parts:
            if part.kind == "free":
                position = sequence.add_context(literal, branch, position)
                position = sequence.add_targets(self.tokenizer.encode(fields[part.value] + "\n"), branch, position)
                literal = []
            elif part.kind != "choose":
                slots = {"emotion": str(emotion), "band": SAGE.band_name(emotion)}
                literal += self.tokenizer.encode(slots[part.value] if part.kind == "slot" else part.value)
        return sequence.add_context(literal, branch, position)

    def policy(self, dialogue: Dialogue, mode: str) -> TrainingSequence:
        """What the policy is given and replies, in think or direct mode."""
        sequence, chat = TrainingSequence(), self.chat
        position = sequence.add_context(chat.message("system", self.prompts.policy_system(mode)), 0, 0)
        heard, end = dialogue.person.first_talk, [self.tokenizer.im_end_id]
        for index, turn in enumerate(dialogue.turns):
            position = sequence.add_context(chat.turns.exchange(self.tokenizer.encode(heard)), 0, position)
            reply = self.tokenizer.encode(turn.reply.text)
            if mode == "think":
                branch = (index + 1) * BRANCH_RADIX
                after = sequence.add_context(self.tokenizer.encode(THINK_OPEN), branch, position)
                thought = texts.thought(dialogue.person, turn.reply)
                sequence.add_targets([*self.tokenizer.encode(thought + THINK_CLOSE), *reply, *end], branch, after)
                position = sequence.add_context([*reply, *chat.close], 0, position)
            else:
                position = sequence.add_targets([*reply, *end], 0, position)
                position = sequence.add_context(chat.close[1:], 0, position)
            heard = turn.answer or ""
        return sequence


def stack(sequences: Sequence[TrainingSequence], length: int) -> SequenceBatch:
    """Sequences padded to one length; longer ones are cut."""
    batch = SequenceBatch(*(np.zeros((len(sequences), length), np.int32) for _ in SequenceBatch._fields))
    batch.target[:] = -1
    for i, sequence in enumerate(sequences):
        for array, values in zip(
            batch, (sequence.tokens, sequence.positions, sequence.branch, sequence.target), strict=True
        ):
            array[i, : len(values)] = values[:length]
    return batch


def sample_dialogues(count: int, draw: random.Random, people, shares: dict[str, float], turns: int) -> list[Dialogue]:
    """Seeded dialogues with random people, initial emotions and both kinds of users."""
    dialogues = []
    for _ in range(count):
        style = "vanilla" if draw.random() < 0.7 else "challenging"
        dialogues.append(
            texts.play(draw.choice(people), draw, shares, turns=turns, initial=draw.randint(20, 75), style=style)
        )
    return dialogues
