"""A conversation against the batch sampler: with the same words on both sides it is the same dialogue."""

import dataclasses
import json

import pytest

from rlver_jax.dialogues.log import dialogue_records, read_dialogues, write_dialogues
from rlver_jax.rollout.end_reason import END_REASONS
from rlver_jax.serving.conversation import Conversation


@pytest.mark.slow
def test_the_users_words_typed_again_give_the_same_dialogue(played, tmp_path):
    """The person says what the user said: every reply, appraisal, change and emotion is the sampler's."""
    d, records = played.dialogues, _records(played)
    for b, (profile, record) in enumerate(zip(played.profiles, records, strict=True)):
        talk = Conversation(played.agents, profile, played.limits, played.seed)
        heard = record["messages"][0]["tokens"]
        for turn in range(d.turns[b]):
            talk.user_says(heard)
            _same(talk.policy_replies(), record["messages"][1 + 2 * turn])
            if talk.ended:
                assert record["end_reason"] == talk.record["end_reason"] == "format"
                break
            theirs = record["messages"][2 + 2 * turn]
            ours = talk.user_reacts(ends=False)
            assert ours["content"] is None
            for name in ("appraisal", "appraisal_tokens", "change", "emotion"):
                assert ours[name] == theirs[name]
            heard = theirs["tokens"]
        assert talk.record["emotions"] == record["emotions"]
        write_dialogues(tmp_path / f"{b}.jsonl", [talk.record])
        assert read_dialogues(tmp_path / f"{b}.jsonl") == [json.loads(json.dumps(talk.record))]


def test_the_policys_words_typed_again_give_the_same_dialogue(played):
    """The person says what the policy said: first words, reactions, replies and the end are the sampler's."""
    agents, ended = played.agents, set()
    for profile, record in zip(played.profiles, _records(played), strict=True):
        talk = Conversation(agents, profile, played.limits, played.seed)
        assert talk.user_begins() == record["messages"][0]["content"]
        for theirs, reaction in zip(record["messages"][1::2], record["messages"][2::2], strict=False):
            assert not talk.ended
            talk.policy_says(theirs["say_tokens"])
            ours = talk.user_reacts(ends=True)
            _same(ours, reaction)
        if record["end_reason"] != "format":
            assert talk.record["end_reason"] == record["end_reason"]
            assert talk.record["emotions"] == record["emotions"]
        ended.add(talk.record["end_reason"])
    assert ended & {"turn_limit", "goodbye"}, f"{ended}; of {END_REASONS}"


def _records(played):
    """The batch as a log has it, by the log's own writer."""
    count = len(played.profiles)
    options = {"seed": played.seed, "rewards": [0.0] * count}
    return dialogue_records(played.dialogues, played.agents, played.profiles, [0] * count, **options)


def _same(ours, theirs):
    """Texts and tokens to the letter, figures to rounding."""
    assert set(ours) == set(theirs)
    for name, value in ours.items():
        if "logprobs" in name:
            flat = lambda x: list(x.values()) if isinstance(x, dict) else [x]  # noqa: E731
            for one, other in zip(flat(value), flat(theirs[name]), strict=True):
                assert one == pytest.approx(other, abs=1e-4)
        else:
            assert value == theirs[name], name


def test_what_a_person_types_is_checked(played):
    talk = Conversation(played.agents, played.profiles[0], played.limits, 0)
    assert talk.encode("  I felt awful ", "user") == talk.agents.tokenizer.encode("I felt awful")
    for text, side in (("", "user"), ("awful " * 300, "user"), ("awful did not " * 20, "policy"), ("\ud800", "user")):
        with pytest.raises(ValueError, match=r"tokens; say something|surrogate"):
            talk.encode(text, side)


def test_a_context_without_room_is_refused(played):
    small = dataclasses.replace(played.agents.spec, context=400)
    with pytest.raises(ValueError, match=r"rollout.context is 400.* raise it"):
        Conversation(dataclasses.replace(played.agents, spec=small), played.profiles[0], played.limits, 0)


def test_a_full_context_ends_it(played):
    """Long words, until another turn might not fit: it ends by itself, and says so."""
    talk = Conversation(played.agents, played.profiles[0], played.limits, 0)
    words = talk.encode("my boss did not listen " * 8, "user")
    while not talk.ended and talk.record["turns"] < 12:
        talk.user_says(words)
        talk.policy_says(words[:16])
        talk.user_reacts(ends=False)
    assert talk.record["end_reason"] == "context"
    assert talk.record["turns"] > 1
