"""Training sequences hold exactly the tokens that the engine puts before the models."""

import random

import numpy as np
import pytest

from rlver_jax.decoding.replay_sequence import Completion
from rlver_jax.miniature import assets, rule, sequences, texts, world
from rlver_jax.models.attention import BRANCH_RADIX
from rlver_jax.text.tokenizer import train_sentencepiece
from rlver_jax.user.emotion import SAGE
from rlver_jax.user.prompts import load_prompts
from rlver_jax.user.replay_sequence import LoggedTurn, Packer
from rlver_jax.user.turn import build_user_tables, option_text


@pytest.fixture(scope="module")
def builder(tmp_path_factory):
    prompts = load_prompts("en", assets.PROMPTS)
    words = [s for style in world.REPLIES.values() for s in style] + ["<think> assistant user system change"]
    path = tmp_path_factory.mktemp("mini") / "tokenizer.model"
    tokenizer = train_sentencepiece(words, path, 500, symbols=("\n", "<think>", "</think>"))
    return sequences.SequenceBuilder(tokenizer, prompts)


@pytest.fixture(scope="module")
def dialogues():
    people = world.people(40, seed=1, held_out=False)
    return sequences.sample_dialogues(12, random.Random(3), people, texts.HEARD, 6)


def logged(builder, dialogue) -> list[LoggedTurn]:
    """The dialogue as a log would hold it."""
    encode, emotion, turns = builder.tokenizer.encode, dialogue.initial, []
    said = lambda text: Completion(encode(text + "\n"), True)  # noqa: E731
    for i, turn in enumerate(dialogue.turns):
        fields = [said(text) for text in rule.appraisal(dialogue.person, turn.verdict).values()]
        answer = [] if turn.answer is None else [said(turn.answer)]
        say, change = encode(turn.reply.text), turn.verdict.change
        turns.append(LoggedTurn(i, emotion, turn.emotion, say, fields, change, answer))
        emotion = turn.emotion
    return turns


def test_a_users_sequence_is_what_the_engine_reads(builder, dialogues):
    """Against what `verify` reads, whose distributions are compared with the sampler's elsewhere."""
    tables = build_user_tables(builder.tokenizer, builder.prompts, builder.tokenizer.vocab_size)
    engine = Packer(tables, SAGE.band)
    encode, (newline,) = builder.tokenizer.encode, builder.tokenizer.encode("\n")
    assert {dialogue.turns[-1].answer is None for dialogue in dialogues} == {True, False}
    for dialogue in dialogues:
        sequence, prefix = builder.user(dialogue), prefix_length(builder, dialogue)
        packed = engine.dialogue(
            sequence.tokens[:prefix], encode(dialogue.person.first_talk), logged(builder, dialogue)
        )
        plain = [i for i, branch in enumerate(packed.branch) if branch % BRANCH_RADIX == 0]  # without the options
        read = [(packed.tokens[i], packed.positions[i], packed.branch[i]) for i in plain][prefix:]
        mine = list(zip(sequence.tokens, sequence.positions, sequence.branch, strict=True))[prefix:]
        ends = [mine[i + 1][2] == 0 if i + 1 < len(mine) else True for i in range(len(mine))]
        mine = [x for x, last in zip(mine, ends, strict=True) if not (x[2] and last and x[0] == newline)]
        last = dialogue.turns[-1]
        # what the sequence ends with and no reply follows: an answer, or the option that ended the dialogue
        tail = encode(last.answer) if last.answer else encode(option_text(last.verdict.change))[:-1]
        assert [token for token, _, _ in mine[-len(tail) :]] == tail
        assert mine[: -len(tail)] == read
        taught = [token for token in sequence.target if token >= 0]
        options = [encode(option_text(turn.verdict.change)) for turn in dialogue.turns]
        assert len(taught) == len(packed.queries) + sum(map(len, options))
        assert sorted(taught) == sorted([q.token for q in packed.queries] + [t for o in options for t in o])


@pytest.mark.parametrize("mode", ["think", "direct"])
def test_a_policys_sequence_is_the_dialogue_without_thoughts_and_one_branch_a_turn(builder, dialogues, mode):
    encode, end = builder.tokenizer.encode, builder.tokenizer.im_end_id
    for dialogue in dialogues:
        sequence, person = builder.policy(dialogue, mode), dialogue.person
        messages = [{"role": "system", "content": builder.prompts.policy_system(mode)}]
        answers = [person.first_talk, *(turn.answer for turn in dialogue.turns)]
        for turn, heard in zip(dialogue.turns, answers, strict=False):
            messages += [{"role": "user", "content": heard}, {"role": "assistant", "content": turn.reply.text}]
        history = [token for token, branch in zip(sequence.tokens, sequence.branch, strict=True) if branch == 0]
        assert history == builder.chat.conversation(messages)
        says = [[*encode(turn.reply.text), end] for turn in dialogue.turns]
        if mode == "think":
            thoughts = [encode(texts.thought(person, turn.reply) + "\n</think>\n\n") for turn in dialogue.turns]
            says = [thought + say for thought, say in zip(thoughts, says, strict=True)]
            for i, said in enumerate(says):
                branch = [
                    t for t, b in zip(sequence.tokens, sequence.branch, strict=True) if b == (i + 1) * BRANCH_RADIX
                ]
                assert branch == encode("<think>\n") + said
        assert [token for token in sequence.target if token >= 0] == [token for said in says for token in said]


def test_a_target_stands_where_it_is_predicted(builder, dialogues):
    """The next token of the same branch or, at its beginning, after the history's last."""
    for dialogue in dialogues:
        for sequence in (builder.user(dialogue), builder.policy(dialogue, "think"), builder.policy(dialogue, "direct")):
            for i, target in enumerate(sequence.target):
                if target >= 0:
                    assert sequence.tokens[i + 1] == target
                    assert sequence.positions[i + 1] == sequence.positions[i] + 1
                    assert sequence.branch[i + 1] == sequence.branch[i] or sequence.branch[i] == 0


def test_stacked_sequences_are_padded_and_cut():
    batch = sequences.stack(
        [
            sequences.TrainingSequence([1, 2], [0, 1], [0, 0], [2, -1]),
            sequences.TrainingSequence([3] * 5, [0] * 5, [0] * 5, [3] * 5),
        ],
        4,
    )
    np.testing.assert_array_equal(batch.tokens, [[1, 2, 0, 0], [3, 3, 3, 3]])
    np.testing.assert_array_equal(batch.target, [[2, -1, -1, -1], [3, 3, 3, 3]])


def prefix_length(builder, dialogue) -> int:
    profile = dialogue.person.profile()
    system = builder.prompts.user_system(
        profile.persona, profile.background, profile.hidden_intention, style=dialogue.style,
        scenario="heart_to_heart", rules=SAGE,
    )  # fmt: skip
    messages = [{"role": "system", "content": system}, {"role": "user", "content": builder.prompts.opening}]
    return len(builder.chat.conversation(messages, generation_prompt=True))
