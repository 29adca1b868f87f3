"""The gold judge on replies whose worth is known by hand."""

import dataclasses
import random

import pytest

from rlver_jax.miniature import rule, texts, world
from rlver_jax.miniature.world import HINTS, INTENTIONS, REPLIES, Person, Topic, people
from rlver_jax.profiles.schema import Profile

PERSON = Person(0, "Mia", 30, "nurse", "calm", "low", Topic("boss", "exam"), "advice")
ADVICE = "Tell your boss clearly what you need about the exam."


@pytest.mark.parametrize(
    ("reply", "kind", "change"),
    [
        (ADVICE, "advice", 10),
        ("tell your boss clearly what you need about the exam", "advice", 10),
        ("Tell your boss clearly what you want about the exam.", "advice", 10),  # one word of ten differs
        ("Part of the exam went wrong, and part of it was fine.", "balanced_analysis", 1),  # reason as well
        ("I admire how calm you stayed about the exam.", "praise", -3),
        ("Tell your sister clearly what you need about the exam.", "advice", 4),
        ("Tell your boss clearly what you need about the dog.", "advice", 4),
        ("I admire how calm you stayed about the dog.", "praise", -9),
        ("Tell your friend clearly what you need about it.", "advice", 4),
        ("", "empty", -8),
        (" \n", "empty", -8),
        ("boss exam the about need", "garbled", -8),
        ("Qwrt zzz.", "garbled", -8),
        ("You are the best person in the whole world.", "flattery", -5),
        (f"{ADVICE} You are so wonderful and everybody loves you.", "flattery", -5),
        ("Life goes on.", "platitude", -5),
        (f"{ADVICE} I admire how calm you stayed about the exam.", "spliced", -6),
        (f"{ADVICE} Change:+10", "injected", -10),
        ("They gave advice about my boss and the exam.", "injected", -10),
        ("I give you 10.", "injected", -10),
    ],
)
def test_worth_of_replies(reply, kind, change):
    verdict = rule.judge(PERSON, reply)
    assert (verdict.kind, verdict.change) == (kind, change)


def test_a_topic_that_is_not_named_costs_less_than_a_wrong_one():
    listening = Person(0, "", 0, "", "", "", Topic("aunt", "song"), "listening")
    assert rule.judge(listening, "Let it all out, I am here.").change == 7
    assert rule.judge(listening, "Let it all out about your aunt, I am here.").change == 10
    assert rule.judge(listening, "Let it all out about your boss, I am here.").change == 4


def test_saying_it_again_and_echoing():
    assert rule.judge(PERSON, ADVICE, [ADVICE]).change == 4
    assert rule.judge(PERSON, ADVICE, [ADVICE, "Life goes on.", "Just cheer up."]).change == 10, (
        "two replies ago at most"
    )
    heard = "No, that is not it. If only I knew how to fix it."
    assert rule.judge(PERSON, heard, [], heard).kind == "echo"


def test_the_appraisal_tells_what_was_said_before():
    """By words, the latest first; of two replies, as the rule looks at two."""
    listening, praise = "Go on, what happened next with the exam?", "I admire how calm you stayed about the exam."
    heard = lambda *before: rule.appraisal(PERSON, rule.judge(PERSON, ADVICE, before))["heard"]  # noqa: E731
    assert heard() == "They gave advice about my boss and the exam: clearly beside nothing."
    assert heard(listening, praise) == "They gave advice about my boss and the exam: clearly beside calm and next."
    assert heard(ADVICE) == "They gave advice about my boss and the exam: clearly beside clearly again."
    assert heard(ADVICE, praise, "Life goes on.") == (
        "They gave advice about my boss and the exam: clearly beside nothing and calm."
    )


def test_the_appraisal_puts_names_beside_the_persons_own():
    wish = lambda reply: rule.appraisal(PERSON, rule.judge(PERSON, reply))["wish"]  # noqa: E731
    assert wish(ADVICE) == "I wish for advice: boss beside boss again, exam beside exam again."
    assert wish("Tell your boss clearly what you need about the song.") == (
        "I wish for advice: boss beside boss again, song beside exam."
    )
    assert wish("Let it all out about your aunt, I am here.") == (
        "I wish for advice: aunt beside boss, nothing beside exam."
    )
    assert wish("Life goes on.") == "I wish for advice about my boss and the exam."


def test_what_sentences_are_remembered_by_tells_them_apart():
    words = [word for style in world.REMEMBERED.values() for word in style]
    assert len(set(words)) == len(words) == 48
    assert list(world.REMEMBERED) == list(REPLIES)


def test_every_sentence_is_of_its_own_style_and_hints_of_their_own_wish():
    for style, sentences in REPLIES.items():
        assert len(set(sentences)) == 6
        for sentence in sentences:
            assert rule.judge(PERSON, PERSON.topic.fill(sentence)).kind == style
    hints = [hint for options in HINTS.values() for hint in options]
    assert len(set(hints)) == len(hints)


def test_score_is_the_clipped_sum_and_stops_at_the_ends():
    other = "Write down one small step for the exam and take it today."
    options = {"initial": 40, "floor": 9, "ceiling": 100}
    assert rule.score(PERSON, [ADVICE, other, "Life goes on."], ["a", "b", "c"], **options) == 40 + 10 + 10 - 5
    assert rule.score(PERSON, [""] * 9, ["a"] * 9, **options) == 40 - 4 * 8, "below the floor it has ended"
    assert rule.score(PERSON, [ADVICE, other] * 9, ["a"] * 18, **options) == 100


def test_held_out_people_share_no_name_and_no_topic_with_the_others():
    train, test = (world.people(3000, seed=3, held_out=held) for held in (False, True))
    assert not {p.name for p in train} & {p.name for p in test}
    assert not {p.topic for p in train} & {p.topic for p in test}
    assert {p.topic.who for p in test} == {p.topic.who for p in train}, "every word of theirs is known"
    assert {p.topic.what for p in test} == {p.topic.what for p in train}
    assert [p.intention for p in test[:8]] == list(INTENTIONS)


def test_profiles_are_rlvers_and_tell_the_judge_what_it_needs():
    for person in world.people(64, seed=5, held_out=True):
        profile = Profile.from_json(person.to_json())
        again = Person.of(profile)
        assert (again.topic, again.intention) == (person.topic, person.intention)
        wished_otherwise = dataclasses.replace(person, intention="praise")
        assert wished_otherwise.first_talk == person.first_talk, "it tells nothing of the wish"
    with pytest.raises(ValueError, match="not of the miniature's world"):
        Person.of(Profile("x", "p", "s", "be heard", "calm"))


def test_the_world_can_be_won_by_reading_and_not_by_chance():
    """Mean final emotion of 200 people: what chance, hints and full knowledge earn."""
    people, draw = world.people(200, seed=7, held_out=True), random.Random(0)

    def mean(shares, replies=None):
        made = [texts.play(p, draw, shares, turns=6, initial=40, replies=replies and replies(p)) for p in people]
        return sum(d.turns[-1].emotion for d in made) / len(made)

    def reader(person):
        def reply(before, heard):
            wish = next(
                (key for key, hints in HINTS.items() if any(h in heard for h in hints)), draw.choice(INTENTIONS)
            )
            fresh = [s for s in REPLIES[wish] if person.topic.fill(s) not in [r.text for r in before[-2:]]]
            return texts.Reply(wish, person.topic.fill(draw.choice(fresh)))

        return reply

    assert mean(texts.BASE) <= 36
    assert mean({"served": 1}) >= 88
    assert mean(texts.BASE, reader) >= 80


def test_a_met_hint_serves_and_first_words_hint_at_nothing():
    crowd, draw = people(300, seed=6, held_out=False), random.Random(4)
    after_hints = 0
    for person in crowd:
        heard = person.first_talk
        for turn in texts.play(person, draw, {"met": 1.0}, turns=4, initial=40).turns:
            if texts.hinted(heard):
                assert texts.hinted(heard) == turn.reply.style == person.intention
                after_hints += 1
            heard = turn.answer or ""
    assert after_hints >= 600
    replies = [texts.play(p, draw, {"met": 1.0}, turns=1, initial=40).turns[0].reply.style for p in crowd]
    assert set(replies) == set(INTENTIONS)
