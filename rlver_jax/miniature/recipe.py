"""Training data of the miniature's tokenizer and its two models: streams of batches."""

import random
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import NamedTuple

from rlver_jax.dialogues.log import Record
from rlver_jax.miniature import assets, rule, texts
from rlver_jax.miniature.gold import judged_dialogue
from rlver_jax.miniature.sequences import SequenceBatch, SequenceBuilder, TrainingSequence, sample_dialogues, stack
from rlver_jax.miniature.texts import Dialogue, Reply
from rlver_jax.miniature.world import INTENTIONS, Person, people
from rlver_jax.text.tokenizer import SentencePieceTokenizer, train_sentencepiece
from rlver_jax.user.prompts import Prompts

VOCABULARY = 1400
SYMBOLS = ("\n", "<think>", "</think>")
PEOPLE = 20_000  # from whom the training dialogues are drawn


class Shape(NamedTuple):
    """Of a batch: turns a dialogue, sequences, tokens. Short dialogues teach as much a turn and cost less attention."""

    turns: int
    batch: int
    length: int


def train_tokenizer(path: Path, prompts: Prompts) -> SentencePieceTokenizer:
    """A tokenizer for which most of the grammar's words are one token."""
    draw, corpus = random.Random(1), []
    for dialogue in sample_dialogues(3000, draw, people(PEOPLE, seed=1, held_out=False), texts.HEARD, assets.TURNS):
        person = dialogue.person
        corpus += [*map(str, person.to_json().values()), prompts.opening, "system\n", "user\n", "assistant\n"]
        for turn in dialogue.turns:
            corpus += [texts.thought(person, turn.reply), turn.answer or ""]
            corpus += rule.appraisal(person, turn.verdict).values()
            corpus += [] if turn.verdict.kind == "garbled" else [turn.reply.text]
            corpus += [part.value for part in (*prompts.appraisal, *prompts.reply) if part.kind == "text"]
    corpus += [prompts.policy_system("think"), prompts.policy_system("direct")] * 100
    return train_sentencepiece([text for text in corpus if text], path, VOCABULARY, symbols=SYMBOLS)


def batches(
    make: Callable[[random.Random, int], TrainingSequence], shapes: Sequence[Shape], seed: int
) -> Callable[[int], SequenceBatch]:
    """The batch of step i, of its shape in turn, from a stream of its own: a build can be repeated."""

    def batch_of(step: int) -> SequenceBatch:
        draw, shape = random.Random(f"{seed} {step}"), shapes[step % len(shapes)]
        return stack([make(draw, shape.turns) for _ in range(shape.batch)], shape.length)

    return batch_of


def user_batches(builder: SequenceBuilder, seed: int, heard: Sequence[Dialogue] = ()) -> Callable[[int], SequenceBatch]:
    """What the simulated user learns from: the grammar's dialogues; with `heard`, every third is one of these."""
    crowd = people(PEOPLE, seed=seed, held_out=False)
    shares = texts.HEARD_LATER if heard else texts.HEARD

    def make(draw: random.Random, turns: int) -> TrainingSequence:
        if heard and draw.random() < 1 / 3:
            return builder.user(draw.choice(heard))
        return builder.user(sample_dialogues(1, draw, crowd, shares, turns)[0])

    whole = Shape(assets.TURNS, 8, 784)
    return batches(make, (whole,) if heard else (Shape(3, 16, 448), Shape(3, 16, 448), whole), seed)


def policy_batches(builder: SequenceBuilder, seed: int, shares: dict[str, float]) -> Callable[[int], SequenceBatch]:
    """What the policy learns from, both modes in turn; `shares` of the kinds of replies."""
    crowd = people(PEOPLE, seed=seed, held_out=False)

    def make(draw: random.Random, turns: int) -> TrainingSequence:
        mode = draw.choice(("think", "direct"))
        return builder.policy(sample_dialogues(1, draw, crowd, shares, turns)[0], mode)

    return batches(make, (Shape(3, 16, 248), Shape(assets.TURNS, 8, 448)), seed)


def rl_dialogues(records: Sequence[Record], persons: dict[str, Person]) -> list[Dialogue]:
    """Replies of a policy in training, answered by people of the grammar; `records`: a run's logged dialogues."""
    dialogues = []
    for number, record in enumerate(records):
        logged, draw = judged_dialogue(record).replies, random.Random(number)
        replies = lambda before, heard, logged=logged: Reply(INTENTIONS[0], logged[len(before)])  # noqa: E731
        initial = record["initial_emotion"]
        person = persons[record["profile"]]
        dialogues.append(texts.play(person, draw, {}, turns=len(logged), initial=initial, replies=replies))
    return dialogues
