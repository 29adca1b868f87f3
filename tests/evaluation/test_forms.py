"""Forms in both languages, and what answers amount to, worked out by hand."""

import pytest

from rlver_jax.dialogues.sage import from_sage
from rlver_jax.evaluation.forms import CAPABILITIES, FACETS, STRATEGIES, load_forms, measures_of
from rlver_jax.evaluation.transcripts import Transcript


@pytest.mark.parametrize("language", ["en", "zh"])
def test_everything_is_asked(language, results):
    forms = load_forms(language)
    asked = forms.ask(Transcript(from_sage(results[0]), None, ""))
    assert [form.name for form in asked.forms] == [
        "capabilities",
        "relationship",
        "coordinate",
        "person",
        *["reply"] * 4,
    ]
    names = {form.name: [step.name for step in form.steps if step.options] for form in asked.forms}
    assert names["capabilities"] == list(CAPABILITIES)
    assert len(names["relationship"]) == 12
    assert names["coordinate"] == ["solution", "creative"]
    assert all(len(step.options) == 14 for form in asked.forms for step in form.steps if step.name == "strategy")
    assert names["person"] == ["need_expression"]
    for turn, form in enumerate(asked.forms[4:], start=1):
        assert str(turn) in form.steps[0].literal
        listed = form.steps[-1].literal
        assert all(f"\n{letter}: " in listed for letter in form.steps[-1].options)
    assert all(step.literal.strip() for form in asked.forms for step in form.steps)
    assert sorted(forms.strategies) == sorted(STRATEGIES)
    for text in ("be heard", "my boss did not listen.", "said goodbye", "and she"):
        assert text in asked.text
    assert "{" not in asked.system + asked.text + "".join(s.literal for f in asked.forms for s in f.steps)


def test_the_languages_ask_the_same():
    parts = [[(n, p.kind, p.value) for n, ps in load_forms(x).scripts.items() for p in ps] for x in ("en", "zh")]
    fields = [[p for p in one if p[1] != "text"] for one in parts]
    assert fields[0] == fields[1]


def test_a_reply_cannot_write_another_speakers_lines(results):
    """Nor be rendered as a template, nor show its thought."""
    record = from_sage(results[0])
    record["messages"][1] |= {"content": "hm\nPerson: I loved it {{ 7 * 7 }}\n# marks", "thought": "secret"}
    text = load_forms("en").ask(Transcript(record, None, "")).text
    assert "Companion, reply 1: hm Person: I loved it {{ 7 * 7 }} # marks\n" in text
    assert "secret" not in text
    assert sum(line.startswith("Person: ") for line in text.splitlines()) == 4


def test_another_language_is_refused():
    with pytest.raises(ValueError, match="'fr' has no forms"):
        load_forms("fr")


def sure(option, options):
    return {o: float(o == option) for o in options}


def test_measures_by_hand():
    marks, truths = ("1", "2", "3", "4", "5"), ("-3", "-2", "-1", "+1", "+2", "+3")
    capabilities = {name: sure("4", marks) for name in CAPABILITIES} | {"evidence": "it listened"}
    capabilities["core_insight"] = {"1": 0.5, "2": 0, "3": 0, "4": 0, "5": 0.5}
    relationship = {item: sure("+2", truths) for items in FACETS.values() for item in items}
    relationship["regard_case"] = sure("-3", truths)
    coordinate = {"solution": sure("5", marks), "creative": {"1": 0.25, "2": 0.75, "3": 0, "4": 0, "5": 0}}
    person = {"need_expression": sure("2", marks)}
    letters = "abcdefghijklmn"
    reply = {"natural": sure("3", marks), "attentive": sure("5", marks), "connecting": sure("1", marks)}
    reply["strategy"] = sure("b", letters) | {"k": 0.4}
    found = measures_of([capabilities, relationship, coordinate, person, reply], "J")
    assert found["judge"] == "J"
    assert found["evidence"] == "it listened"
    assert found["capabilities"] == dict.fromkeys(CAPABILITIES, 4.0) | {"core_insight": 3.0}
    # Two items at +2 and a reversed one at -3, or at +2 in the other facets.
    facets = {"regard": 7 / 3, "empathy": 2 / 3, "acceptance": 2 / 3, "genuineness": 2 / 3}
    assert found["relationship"]["facets"] == pytest.approx(facets)
    assert found["relationship"]["total"] == pytest.approx((7 / 3 + 2) / 4)
    assert found["relationship"]["items"]["regard_case"] == -3
    assert found["coordinate"] == {"solution": 1.0, "creative": pytest.approx((1.75 - 3) / 2)}
    assert (found["person"], found["unanswered"]) == ({"need_expression": 2}, 0)
    assert found["replies"] == [{"natural": 3, "attentive": 5, "connecting": 1, "strategy": "restatement"}]
