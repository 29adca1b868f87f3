"""Guided answers on the device against plain forward passes over the whole text."""

import dataclasses

import numpy as np
import pytest
import transformers
from rich.console import Console
from scipy import special

from rlver_jax.decoding.grammar import one_line
from rlver_jax.dialogues.sage import from_sage
from rlver_jax.evaluation.forms import Form, Questionnaire, Step, load_forms
from rlver_jax.evaluation.rater import DeviceRater
from rlver_jax.evaluation.score import measure
from rlver_jax.evaluation.transcripts import Transcript
from rlver_jax.text.chat import ChatTemplate
from rlver_jax.text.tokenizer import load_tokenizer
from tests.conftest import plain
from tests.evaluation.test_judge_on_device import greedy_line
from tests.text.conftest import write_qwen3

WIDE, NARROW = ("-3", "+1", "+3"), ("a", "b")


def step(literal, name, options=()):
    return Step(literal, name, options)


def asked(who, replies):
    first = Form("first", (step("Heard:", "line"), step("\nMark:\n", "mark", WIDE), step("Next:\n", "next", NARROW)))
    second = [Form("reply", (step(f"Reply {i}:\n", "mark", WIDE),)) for i in range(replies)]
    return Questionnaire("my boss", f"{who} said goodbye", (first, *second))


@pytest.fixture(scope="module")
def rater(user_lm, bpe):
    return DeviceRater("tiny", user_lm, bpe, one_line(bpe, user_lm.model.config.vocab_size), 6, 2, {"model": "tiny"})


@pytest.fixture(scope="module")
def questions():
    return [asked("my sister", 2), asked("she", 0), asked("I felt awful and my boss", 1)]


@pytest.fixture(scope="module")
def filled(rater, questions):
    work: list = []
    answers = {i: rated.answers for batch in rater.fill(questions, work.append) for i, rated in batch}
    assert sum(w.turns for w in work) == 6
    return answers


def by_hand(user_lm, bpe, ids, options):
    """Probabilities of options, each in a row of its own."""
    spelled = [bpe.encode(f"{o}\n") for o in options]
    logp = plain(user_lm, [ids + o for o in spelled])[1]
    total = [sum(x[len(ids) - 1 + j, t] for j, t in enumerate(o)) for x, o in zip(logp, spelled, strict=True)]
    return special.softmax(np.array(total, np.float64))


def test_answers_are_the_models_own(filled, questions, user_lm, bpe):
    """Within a form each answer has the earlier ones in front; forms don't see each other."""
    chat = ChatTemplate(bpe)
    for index, one in enumerate(questions):
        opening = chat.message("system", one.system) + chat.message("user", one.text) + chat.open("assistant")
        assert len(filled[index]) == len(one.forms)
        for form, answers in zip(one.forms, filled[index], strict=True):
            ids = list(opening)
            for each in form.steps:
                ids += bpe.encode(each.literal)
                if not each.options:
                    line = greedy_line(user_lm, bpe, ids)
                    assert answers[each.name] == bpe.decode(line)
                    ids += line
                    continue
                want = by_hand(user_lm, bpe, ids, each.options)
                assert list(answers[each.name]) == list(each.options)
                np.testing.assert_allclose(list(answers[each.name].values()), want, atol=1e-4)
                ids += bpe.encode(f"{each.options[int(want.argmax())]}\n")


def test_lines_are_drawn_by_a_questionnaires_own_seed(rater, questions, filled):
    """Greedy ones are its likeliest; drawn ones belong to the seed, whatever is filled in beside it."""

    def lines(*seeds):
        drawn = [questions[1]._replace(temperature=3.0, seed=seed) for seed in seeds]
        rated = dict(pair for batch in rater.fill(drawn, lambda work: None) for pair in batch)
        return [rated[i].answers[0]["line"] for i in range(len(seeds))]

    several = lines(*range(8))
    assert len({*several, filled[1][0]["line"]}) == 9
    assert lines(5, 2) == [several[5], several[2]]


@pytest.mark.slow
def test_our_own_forms_are_filled_in(rater, results):
    """Long ones, in both languages, with the model that will be asked."""
    dialogues = [Transcript(from_sage(r, i), None, "") for i, r in enumerate(results)]
    for language in ("en", "zh"):
        records, _ = measure(rater, load_forms(language), dialogues, None, Console(quiet=True))
        for record in records:
            measures = record["measures"]
            assert len(measures["replies"]) == record["turns"]
            assert measures["evidence"]
            assert all(1 < mark < 5 for mark in measures["capabilities"].values())
            assert all(-1 < x < 1 for x in measures["coordinate"].values())
            assert all(-3 < x < 3 for x in measures["relationship"]["items"].values())


def test_a_judge_that_thinks_by_itself_answers_after_an_empty_thought(rater, questions, tmp_path):
    """As `apply_chat_template` begins a reply without a thought, where the judge has Qwen3's template."""
    folder = write_qwen3(tmp_path)
    judge = dataclasses.replace(rater, tokenizer=load_tokenizer(folder))
    messages = [{"role": "system", "content": "my boss"}, {"role": "user", "content": "my sister said goodbye"}]
    reference = transformers.AutoTokenizer.from_pretrained(folder)
    want = reference.apply_chat_template(messages, add_generation_prompt=True, enable_thinking=False, return_dict=False)
    assert judge._context(questions[0]) == want
    assert reference.decode(want).endswith("<think>\n\n</think>\n\n")
