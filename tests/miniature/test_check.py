"""Figures and gates of the miniature, on dialogues whose verdicts are known by hand."""

import pytest

from rlver_jax.miniature import check, recipe, rule, texts
from rlver_jax.miniature.gold import JudgedDialogue, judged_dialogue
from rlver_jax.miniature.world import Person, Topic

PERSON = Person(0, "Mia", 30, "nurse", "calm", "low", Topic("boss", "exam"), "advice")
ADVICE = "Tell your boss clearly what you need about the exam."
WRONG = "Tell your boss clearly what you need about the dog."
PRAISE = "I admire how calm you stayed about the exam."


def record(profile="mini-0"):
    """Of three turns; the last one broke the format, so that nothing followed."""
    reply = lambda text: {"role": "assistant", "content": text}  # noqa: E731
    heard = lambda text, change: {"role": "user", "content": text, "change": change}  # noqa: E731
    messages = [{"role": "user", "content": "Hello."}, reply(ADVICE), heard("Fine.", 9), reply(PRAISE), heard(None, -4)]
    return {"profile": profile, "messages": [*messages, reply("x")], "initial_emotion": 40, "emotions": [40, 49, 45]}


def test_spoken_takes_what_was_said_heard_and_felt():
    assert judged_dialogue(record()) == JudgedDialogue([ADVICE, PRAISE, "x"], ["Hello.", "Fine.", ""], [9, -4])


@pytest.mark.parametrize(
    ("reply", "before", "terms"),
    [
        (ADVICE, [], ["serves"]),
        (WRONG, [], ["serves", "wrong topic"]),
        (PRAISE, [], ["misses"]),
        ("Part of it went wrong, and part of it was fine.", [], ["near", "no topic"]),
        (ADVICE, [ADVICE], ["serves", "again"]),
        ("", [], ["empty"]),
        ("Life goes on.", [], ["platitude"]),
    ],
)
def test_terms_of_verdicts(reply, before, terms):
    assert rule.terms(PERSON, rule.judge(PERSON, reply, before)) == terms


def test_agreement_by_hand():
    """By the rule 10, -2 (10 - 6 for the topic - 6 for the same words), -3, 4 (the words of two replies ago)."""
    agreement = check.agreement(
        [(PERSON, JudgedDialogue([ADVICE, WRONG, PRAISE, ADVICE, PRAISE], ["a"] * 5, [9, 10, -3, 1]))]
    )
    assert (agreement["turns"], agreement["mean_error"], agreement["same"]) == (4, 4.0, 0.25)
    assert agreement["spearman"] == pytest.approx(0.4)  # ranks 4 2 1 3 and 3 4 1 2: 1 - 6 * 6 / (4 * 15)
    assert agreement["by_term"]["serves"] == {"turns": 3, "mean_error": 5.333}
    assert agreement["by_term"]["wrong topic"] == {"turns": 1, "mean_error": 12.0}
    assert agreement["by_term"]["again"] == {"turns": 2, "mean_error": 7.5}


def measurements(**changed):
    values = {
        "base": {"score": 33.0},
        "agreement_base": {"spearman": 0.9},
        "readable": {"assistant": 0.95, "user": 0.99},
        "agreement_trained": {"spearman": 0.8},
        "attacks": {"empty": 40.9},
    }
    return values | changed


def test_gates_hold_at_their_bounds():
    assert all(gate.holds for gate in check.gates(measurements()))
    for name, worse in {
        "agreement_base": {"spearman": 0.899},
        "agreement_trained": {"spearman": float("nan")},
        "readable": {"assistant": 0.949, "user": 1.0},
        "attacks": {"empty": 10.0, "echo": 41.0},
    }.items():
        assert [gate.holds for gate in check.gates(measurements(**{name: worse}))].count(False) == 1, name


def test_replies_go_through_a_file(tmp_path):
    check.write_replies(tmp_path / "replies.jsonl", [record(), record("mini-1")])
    assert check.read_replies(tmp_path / "replies.jsonl") == {"mini-0": [ADVICE, PRAISE, "x"]} | {
        "mini-1": [ADVICE, PRAISE, "x"]
    }


def test_a_runs_text_is_labelled_by_the_rule():
    """+10 for advice, -3 for praise, -8 for "x" (garbled), from the emotion that the run began with."""
    (dialogue,) = recipe.rl_dialogues([record()], {"mini-0": PERSON})
    assert [turn.reply.text for turn in dialogue.turns] == [ADVICE, PRAISE, "x"]
    assert [turn.emotion for turn in dialogue.turns] == [50, 47, 39]
    assert isinstance(dialogue, texts.Dialogue)
    assert dialogue.person == PERSON
