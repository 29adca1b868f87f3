"""Dialogues of the grammar as logs: what `sft` learns the miniature's two models from.

Such a log is like one of a user and a policy behind endpoints: texts without tokens.
"""

import random
from collections.abc import Iterator, Sequence

from rlver_jax.dialogues.endpoint_agents import reaction_message, reply_message
from rlver_jax.dialogues.log import Record
from rlver_jax.endpoints.completion import Answer
from rlver_jax.miniature import rule, texts
from rlver_jax.miniature.texts import Dialogue
from rlver_jax.miniature.world import Person
from rlver_jax.rollout.end_reason import END_REASONS, end_reason
from rlver_jax.user.emotion import SAGE
from rlver_jax.user.endpoint import Reaction


def sample_dialogue(draw: random.Random, people: Sequence[Person], shares: dict[str, float], turns: int) -> Dialogue:
    """A seeded dialogue with a random person, initial emotion and kind of user."""
    style = "vanilla" if draw.random() < 0.7 else "challenging"
    person, initial = draw.choice(people), draw.randint(20, 75)
    return texts.play(person, draw, shares, turns=turns, initial=initial, style=style)


def record_of(dialogue: Dialogue, number: int, mode: str) -> Record:
    """The log of a dialogue.

    Args:
        number: of the dialogue.
        mode: think: with the policy's thoughts; direct.
    """
    person, emotions = dialogue.person, [dialogue.initial, *(turn.emotion for turn in dialogue.turns)]
    return {
        "dialogue": number,
        "profile": person.profile().id,
        "seed": None,
        "mode": mode,
        "language": "en",
        "style": dialogue.style,
        "scenario": "heart_to_heart",
        "readout": "argmax",
        "initial_emotion": dialogue.initial,
        "hidden_intention": person.profile().hidden_intention,
        "end_reason": END_REASONS[end_reason(emotions[-1], SAGE, goodbye=False, last=True)],
        "turns": len(dialogue.turns),
        "violation": False,
        "reward": emotions[-1] / 100,
        "emotion": emotions[-1],
        "emotions": emotions,
        "messages": list(_messages(dialogue, mode)),
    }


def _messages(dialogue: Dialogue, mode: str) -> Iterator[Record]:
    person, think = dialogue.person, mode == "think"
    opening = {"role": "user", "content": person.first_talk, "tokens": None, "generated": False}
    yield opening | {"emotion": dialogue.initial}
    for turn in dialogue.turns:
        thought = texts.thought(person, turn.reply) if think else ""
        message = reply_message(Answer(turn.reply.text, thought, 0, 0, "", cut=False), think=think)
        yield message | {"violation": False}  # a reply without a word is one that a person hears
        appraisal = rule.appraisal(person, turn.verdict)
        yield reaction_message(Reaction(appraisal, turn.verdict.change, turn.emotion, {}, turn.answer))
