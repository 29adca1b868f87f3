"""Forms in all languages, and what answers amount to, worked out by hand."""

import shutil
from importlib import resources

import pytest

from rlver_jax.config.languages import LANGUAGES
from rlver_jax.dialogues.sage import from_sage
from rlver_jax.evaluation.forms import load_forms
from rlver_jax.evaluation.measures import (
    CAPABILITIES,
    FACETS,
    FORMS,
    MEASURES,
    RATING,
    STRATEGIES,
    Measure,
    measures_of,
    summarize,
)
from rlver_jax.evaluation.transcripts import Transcript


@pytest.mark.parametrize("language", LANGUAGES)
def test_everything_is_asked(language, results):
    forms = load_forms(language)
    asked = forms.ask(Transcript(from_sage(results[0]), None, ""))
    ours = ("capabilities", "relationship", "coordinate", "person", *["reply"] * 4)  # whatever else is asked
    assert [form.name for form in asked.forms if form.name in ours] == list(ours)
    names = {form.name: [step.name for step in form.steps if step.options] for form in asked.forms}
    assert names["capabilities"] == list(CAPABILITIES)
    assert len(names["relationship"]) == 12
    assert names["coordinate"] == ["creative", "empathy"], "SAGE's x and y"
    assert all(len(step.options) == 14 for form in asked.forms for step in form.steps if step.name == "strategy")
    assert names["person"] == ["need_expression"]
    for turn, form in enumerate((form for form in asked.forms if form.name == "reply"), start=1):
        assert str(turn) in form.steps[0].literal
        listed = form.steps[-1].literal
        assert all(f"\n{letter}: " in listed for letter in form.steps[-1].options)
    assert all(step.literal.strip() for form in asked.forms for step in form.steps)
    assert sorted(forms.strategies) == sorted(STRATEGIES)
    for text in ("be heard", "my boss did not listen.", "said goodbye", "and she"):
        assert text in asked.text
    assert "{" not in asked.system + asked.text + "".join(s.literal for f in asked.forms for s in f.steps)


def test_the_languages_ask_the_same():
    parts = [[(n, p.kind, p.value) for n, ps in load_forms(x).scripts.items() for p in ps] for x in LANGUAGES]
    first, *others = [[p for p in one if p[1] != "text"] for one in parts]
    assert others
    assert all(fields == first for fields in others)


def test_a_reply_cannot_write_another_speakers_lines(results):
    """Nor be rendered as a template, nor show its thought."""
    record = from_sage(results[0])
    record["messages"][1] |= {"content": "hm\nPerson: I loved it {{ 7 * 7 }}\n# marks", "thought": "secret"}
    text = load_forms("en").ask(Transcript(record, None, "")).text
    assert "Companion, reply 1: hm Person: I loved it {{ 7 * 7 }} # marks\n" in text
    assert "secret" not in text
    assert sum(line.startswith("Person: ") for line in text.splitlines()) == 4


def test_every_measure_is_asked_in_every_language():
    assert all(set(load_forms(language).scripts) == set(FORMS) for language in LANGUAGES)


@pytest.fixture
def folder(tmp_path, monkeypatch):
    """A copy of our prompts that forms are read from."""
    prompts = resources.files("rlver_jax.evaluation") / "prompts"
    shutil.copytree(prompts, tmp_path / "prompts")
    monkeypatch.setattr("rlver_jax.evaluation.forms.resources.files", lambda package: tmp_path)
    return tmp_path / "prompts"


def test_a_form_that_no_measure_has_is_an_error(folder):
    (folder / "en" / "humour.script").write_text("Funny: <<choose:wit>>\n")
    with pytest.raises(AssertionError, match=r"en: no entry of MEASURES has the form humour\.script"):
        load_forms("en")


@pytest.mark.parametrize("each_reply", [False, True])
def test_a_new_measure_is_a_form_and_an_entry(folder, monkeypatch, results, each_reply):
    """It is asked, read, summed up, in the language that has its form; of each reply, beside the form that is there."""
    (folder / "en" / "humour.script").write_text("How funny (1-5): <<choose:wit>>\nTruly (1-5): <<choose:truth>>\n")
    numbers = (lambda replies: {"wit": replies[0]["wit"]}) if each_reply else dict
    humour = Measure({"wit": RATING, "truth": RATING}, each_reply=each_reply, numbers=numbers)
    monkeypatch.setitem(MEASURES, "humour", humour)
    monkeypatch.setitem(FORMS, "humour", ("humour", humour))
    assert "humour" not in load_forms("zh").scripts
    dialogue = Transcript(from_sage(results[0]), None, "")
    asked = load_forms("en").ask(dialogue).forms
    names = [form.name for form in asked]
    assert names.count("humour") == (4 if each_reply else 1)
    answers = [
        {step.name: sure(step.options[-2], step.options) if step.options else "noted" for step in form.steps}
        for form in asked
    ]
    measures = measures_of(names, answers, "J")
    each = {"wit": 4.0, "truth": 4.0}
    assert measures["humour"] == ([each] * 4 if each_reply else each)
    summary = summarize([dialogue.record | {"measures": measures}])
    assert summary["humour/wit"]["mean"] == 4
    assert summary["replies/natural"]["mean"] == 4


def test_another_language_is_refused():
    with pytest.raises(ValueError, match="'klingon' has no forms"):
        load_forms("klingon")


def sure(option, options):
    return {o: float(o == option) for o in options}


def test_measures_by_hand():
    marks, truths = ("1", "2", "3", "4", "5"), ("-3", "-2", "-1", "+1", "+2", "+3")
    capabilities = {name: sure("4", marks) for name in CAPABILITIES} | {"evidence": "it listened"}
    capabilities["core_insight"] = {"1": 0.5, "2": 0, "3": 0, "4": 0, "5": 0.5}
    relationship = {item: sure("+2", truths) for items in FACETS.values() for item in items}
    relationship["regard_case"] = sure("-3", truths)
    coordinate = {"empathy": sure("5", marks), "creative": {"1": 0.25, "2": 0.75, "3": 0, "4": 0, "5": 0}}
    person = {"need_expression": sure("2", marks)}
    letters = "abcdefghijklmn"
    reply = {"natural": sure("3", marks), "attentive": sure("5", marks), "connecting": sure("1", marks)}
    reply["strategy"] = sure("b", letters) | {"k": 0.4}
    names = ["capabilities", "relationship", "coordinate", "person", "reply"]
    result = measures_of(names, [capabilities, relationship, coordinate, person, reply], "J")
    order = ("judge", "evidence", "capabilities", "relationship", "replies", "coordinate", "person", "unanswered")
    assert tuple(result) == order, "as in the logs"
    assert result["judge"] == "J"
    assert result["evidence"] == "it listened"
    assert result["capabilities"] == dict.fromkeys(CAPABILITIES, 4.0) | {"core_insight": 3.0}
    # Two items at +2 and a reversed one at -3, or at +2 in the other facets.
    facets = {"regard": 7 / 3, "empathy": 2 / 3, "acceptance": 2 / 3, "genuineness": 2 / 3}
    assert result["relationship"]["facets"] == pytest.approx(facets)
    assert result["relationship"]["total"] == pytest.approx((7 / 3 + 2) / 4)
    assert result["relationship"]["items"]["regard_case"] == -3
    assert result["coordinate"] == {"creative": pytest.approx((1.75 - 3) / 2), "empathy": 1.0}
    assert result["relationship"]["from"] == "speech"
    assert (result["person"], result["unanswered"]) == ({"need_expression": 2}, 0)
    assert result["replies"] == [{"natural": 3, "attentive": 5, "connecting": 1, "strategy": "restatement"}]
