"""What the miniature's tokenizer and its two models learn from: text, and logs of dialogues."""

import random
from collections.abc import Iterator, Sequence
from pathlib import Path

from rlver_jax.dialogues.log import Record
from rlver_jax.miniature import assets, rule, texts
from rlver_jax.miniature.gold import judged_dialogue
from rlver_jax.miniature.grammar_logs import record_of, sample_dialogue
from rlver_jax.miniature.texts import Dialogue, Reply
from rlver_jax.miniature.world import INTENTIONS, Person, people
from rlver_jax.text.tokenizer import SentencePieceTokenizer, train_sentencepiece
from rlver_jax.user.prompts import MODES, Prompts

VOCABULARY = 1400
SYMBOLS = ("\n", "<think>", "</think>")
PEOPLE, CROWD_SEED = 20_000, 2  # with whom the models learn
TURNS = (3, 3, 3, assets.TURNS)  # of a dialogue: short ones teach as much a turn and cost less attention


def train_tokenizer(path: Path, prompts: Prompts) -> SentencePieceTokenizer:
    """A tokenizer for which most of the grammar's words are one token."""
    draw, corpus = random.Random(1), []
    crowd = people(PEOPLE, seed=1, held_out=False)
    for _ in range(3000):
        dialogue = sample_dialogue(draw, crowd, texts.HEARD, assets.TURNS)
        person = dialogue.person
        corpus += [*map(str, person.to_json().values()), prompts.opening, "system\n", "user\n", "assistant\n"]
        for turn in dialogue.turns:
            corpus += [texts.thought(person, turn.reply), turn.answer or ""]
            corpus += rule.appraisal(person, turn.verdict).values()
            corpus += [] if turn.verdict.kind == "garbled" else [turn.reply.text]
            corpus += [part.value for part in (*prompts.appraisal, *prompts.reply) if part.kind == "text"]
    corpus += [prompts.policy_system("think"), prompts.policy_system("direct")] * 100
    return train_sentencepiece([text for text in corpus if text], path, VOCABULARY, symbols=SYMBOLS)


def crowd() -> list[Person]:
    """Whom the models learn with: others than those of training, and with other numbers."""
    return people(PEOPLE, seed=CROWD_SEED, held_out=False)[assets.TRAIN_COUNT :]


def user_logs(draw: random.Random, count: int, heard: Sequence[Dialogue]) -> Iterator[Record]:
    """What the simulated user learns from: `heard`, and so many dialogues of the grammar."""
    told = _sampled(draw, count, texts.HEARD_LATER if heard else texts.HEARD)
    return (record_of(dialogue, number, "direct") for number, dialogue in enumerate((*heard, *told)))


def policy_logs(draw: random.Random, count: int, shares: dict[str, float]) -> Iterator[Record]:
    """What the policy learns from, both modes in turn; `shares` of the kinds of replies."""
    told = _sampled(draw, count, shares)
    return (record_of(dialogue, number, MODES[number % len(MODES)]) for number, dialogue in enumerate(told))


def _sampled(draw: random.Random, count: int, shares: dict[str, float]) -> Iterator[Dialogue]:
    known = crowd()
    return (sample_dialogue(draw, known, shares, draw.choice(TURNS)) for _ in range(count))


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
