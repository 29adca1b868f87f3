"""The grammar's dialogues as logs, and what `sft` learns from them."""

import random

import numpy as np
import pytest

from rlver_jax.dialogues.faults import recomputed_rewards
from rlver_jax.dialogues.log import read_dialogues, write_dialogues
from rlver_jax.dialogues.trajectory import emotion_faults
from rlver_jax.miniature import assets, fitting, recipe, rule, texts, world
from rlver_jax.miniature.grammar_logs import record_of, sample_dialogue
from rlver_jax.text.chat import ChatTemplate
from rlver_jax.text.tokenizer import load_tokenizer
from rlver_jax.training import sft, sft_data
from rlver_jax.user.emotion import SAGE
from rlver_jax.user.prompts import load_prompts
from rlver_jax.user.turn import option_text

TOKENIZER = load_tokenizer(assets.shipped() / assets.USER)
PROMPTS = load_prompts("en", assets.PROMPTS)


@pytest.fixture(scope="module")
def dialogues():
    people, draw = world.people(40, seed=1, held_out=False), random.Random(3)
    return [sample_dialogue(draw, people, texts.HEARD, 6) for _ in range(12)]


def records_of(dialogues):
    """Think and direct in turn."""
    return [record_of(dialogue, i, ("think", "direct")[i % 2]) for i, dialogue in enumerate(dialogues)]


def learned(folder, dialogues, role, **fields):
    """(fields, examples) of `sft`, in the order of the dialogues."""
    write_dialogues(folder / "log.jsonl", records_of(dialogues))
    fitting.write_untrained(folder / "untrained", TOKENIZER)
    (folder / "runs").mkdir()
    persons = {one.person.number: one.person for one in dialogues}
    for path, half in ((folder / assets.TRAIN, 0), (folder / assets.RUNS / assets.TRAIN, 1)):
        assets.write_profiles(path, [person for number, person in persons.items() if number % 2 == half])
    lesson = fitting.Lesson(role, folder / "untrained", lambda: iter(()), 1)
    config = fitting.lesson_config(folder, lesson, folder / "log.jsonl")
    config.sft.batch = 1
    config.update_from_flattened_dict(fields)
    source = sft_data.open_dialogues(config)
    agents, shortened = sft.without_weights(config, source)
    make = sft_data.examples_of(config, agents)
    examples = sft_data.read_dialogues(config, source, make).learned
    assert (shortened, make.left_out) == ("", {}), "everything is learned"
    assert [one.profile for one in examples] == [f"mini-{one.person.number}" for one in dialogues]
    return make.fields, examples


def targets(fields, example):
    """{field: tokens} of an example, in its order."""
    rows = list(zip((fields[i] for i in example.field), example.target.tolist(), strict=True))
    return {field: [token for name, token in rows if name == field] for field in fields}


def test_a_record_is_a_log_whose_sums_hold(tmp_path, dialogues):
    write_dialogues(tmp_path / "log.jsonl", records_of(dialogues))
    records = read_dialogues(tmp_path / "log.jsonl")
    assert [record["emotions"][1:] for record in records] == [[t.emotion for t in d.turns] for d in dialogues]
    assert not [fault for record in records for fault in emotion_faults(record, SAGE)]
    reasons = {record["end_reason"] for record in records}
    assert reasons <= {"success", "failure", "turn_limit"}
    rewards = recomputed_rewards(records, {"name": "final", "gamma": 1.0, "weight": 1.0})
    np.testing.assert_allclose([reward.value for reward in rewards], [record["emotion"] / 100 for record in records])
    thoughts = [[m["thought"] for m in record["messages"][1::2]] for record in records]
    assert all(thoughts[0])
    assert thoughts[1] == [None] * len(thoughts[1])


def test_the_policy_learns_both_modes(tmp_path, dialogues):
    """Each dialogue's history is the chat template's, its targets the replies, in think mode behind the thoughts."""
    spoken = [one for one in dialogues if all(turn.reply.text for turn in one.turns)]
    fields, examples = learned(tmp_path, spoken, "policy")
    encode, chat, end = TOKENIZER.encode, ChatTemplate(TOKENIZER), TOKENIZER.im_end_id
    for i, (dialogue, example) in enumerate(zip(spoken, examples, strict=True)):
        mode = ("think", "direct")[i % 2]
        messages = [{"role": "system", "content": PROMPTS.policy_system(mode)}]
        heard = [dialogue.person.first_talk, *(turn.answer for turn in dialogue.turns)]
        for turn, words in zip(dialogue.turns, heard, strict=False):
            messages += [{"role": "user", "content": words}, {"role": "assistant", "content": turn.reply.text}]
        history, prompt = chat.conversation(messages), example.tokens[example.branch == 0].tolist()
        assert history[: len(prompt)] == prompt
        tokens = []
        for turn in dialogue.turns:
            thought = texts.thought(dialogue.person, turn.reply) + "\n</think>\n\n"
            tokens += [*(encode(thought) if mode == "think" else []), *encode(turn.reply.text), end]
        assert example.target.tolist() == tokens
        assert bool(targets(fields, example)["thought"]) == (mode == "think")


def test_the_user_learns_the_rules_verdict_in_words(tmp_path, dialogues):
    fields, examples = learned(tmp_path, dialogues, "user")
    assert fields == ["heard", "wish", "feeling", "change", "reply"]
    for dialogue, example in zip(dialogues, examples, strict=True):
        wanted = {field: [] for field in fields}
        for turn in dialogue.turns:
            for field, text in rule.appraisal(dialogue.person, turn.verdict).items():
                wanted[field] += TOKENIZER.encode(text + "\n")
            wanted["change"] += TOKENIZER.encode(option_text(turn.verdict.change))
            wanted["reply"] += TOKENIZER.encode(turn.answer + "\n") if turn.answer is not None else []
        assert targets(fields, example) == wanted


def test_who_is_learned_with_is_nobody_of_the_trainings_people():
    crowd = recipe.crowd()
    assert len({one.number for one in crowd}) == len(crowd) > 10_000
    assert min(one.number for one in crowd) == assets.TRAIN_COUNT
