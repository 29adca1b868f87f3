"""Measures from answers that are given: kept as they come, taken up again, summed up."""

import copy
import json

import numpy as np
import pytest
from rich.console import Console

from rlver_jax.dialogues.sage import from_sage
from rlver_jax.evaluation.forms import load_forms
from rlver_jax.evaluation.judge import Work
from rlver_jax.evaluation.measures import SPEECH, strategies, summarize
from rlver_jax.evaluation.rater import Rated
from rlver_jax.evaluation.score import measure
from rlver_jax.evaluation.transcripts import Transcript, turns_of

QUIET = Console(quiet=True)


class Person:
    """Who is sure of every answer; drawn with a seed of the dialogue, of which it sees the text alone."""

    name, settings = "person", {"who": "a person"}

    def __init__(self):
        self.asked = []

    def fill(self, asked, progress):
        for i, one in enumerate(asked):
            self.asked.append(one)
            draw, filled = np.random.default_rng(len(one.text)), []
            for form in one.forms:
                answers = {}
                for step in form.steps:
                    pick = int(draw.integers(max(len(step.options), 1)))
                    sure = {option: float(k == pick) for k, option in enumerate(step.options)}
                    answers[step.name] = sure if step.options else "it listened"
                filled.append(answers)
            progress(Work(len(one.forms), 0))
            yield [(i, Rated(filled))]


@pytest.fixture
def dialogues(results):
    return [Transcript(from_sage(r, i), None, "") for i, r in enumerate(results)]


def test_measures_are_kept_and_taken_up(dialogues, tmp_path):
    records, asked = measure(Person(), load_forms("en"), dialogues, tmp_path, QUIET)
    assert asked == {}, "no endpoint"
    assert [{k: v for k, v in r.items() if k != "measures"} for r in records] == [d.record for d in dialogues]
    file = tmp_path / "measures.jsonl"
    lines = file.read_bytes().splitlines(keepends=True)
    assert len(lines) == 4
    file.write_bytes(lines[0] + lines[1] + lines[2][:50])
    person = Person()
    assert measure(person, load_forms("en"), dialogues, tmp_path, QUIET) == (records, {})
    assert len(person.asked) == 2, "only what is missing: the last two dialogues, whose thoughts are there"
    again = [Transcript(record, None, "") for record in records]  # measures of before don't count as another dialogue
    person = Person()
    assert measure(person, load_forms("en"), again, tmp_path, QUIET) == (records, {})
    assert not person.asked
    with pytest.raises(ValueError, match="was made with other settings"):
        measure(Person(), load_forms("zh"), dialogues, tmp_path, QUIET)


@pytest.mark.parametrize("language", ["en", "zh"])
def test_the_inventory_is_filled_in_from_inner_thoughts_alone(dialogues, language):
    """Of each appraisal its activity and feeling, SAGE's Activity and Analyse; nothing that was said, no goal."""
    person = Person()
    records, _ = measure(person, load_forms(language), dialogues, None, QUIET)
    inner = [one for one in person.asked if [form.name for form in one.forms] == ["relationship"]]
    of_speech = [one for one in person.asked if one not in inner]
    assert len(inner) == len(of_speech) == 4
    assert not any(form.name == "relationship" for one in of_speech for form in one.forms)
    for one, dialogue in zip(inner, dialogues, strict=True):
        _, *lines = one.text.splitlines()
        assert [line.rpartition(":" if language == "en" else "：")[2].strip() for line in lines] == [
            "hm b" for _ in turns_of(dialogue.record)
        ]
        assert not any(text in one.system + one.text for text in ("my boss", "be heard", "partly", "and she"))
    assert [r["measures"]["relationship"]["from"] for r in records] == ["thoughts"] * 4
    assert summarize(records)["relationship/total"]["n"] == 4


def test_thoughts_of_other_scripts_and_dialogues_without_any(dialogues):
    """Scripts of one's own may ask for neither field; a reply that nobody appraised leaves no thought."""
    records = [copy.deepcopy(one.record) for one in dialogues[:2]]
    for message in records[0]["messages"][2::2]:
        message["appraisal"] = {"heard": "they asked", "wish": "to be heard"}
    records[1] |= {"messages": records[1]["messages"][:2], "turns": 1}
    person = Person()
    results, _ = measure(person, load_forms("en"), [Transcript(one, None, "") for one in records], None, QUIET)
    (inner,) = [one for one in person.asked if "went through" in one.text]
    assert "After the companion's reply 1: they asked to be heard" in inner.text
    assert "relationship" in results[0]["measures"]
    assert "relationship" not in results[1]["measures"]
    assert summarize(results)["relationship/total"]["n"] == 1


def test_thoughts_and_speech_are_not_mixed(dialogues, tmp_path):
    first, _ = measure(Person(), load_forms("en"), dialogues, tmp_path, QUIET, SPEECH)
    assert [r["measures"]["relationship"]["from"] for r in first] == ["speech"] * 4
    assert not (tmp_path / "thoughts.jsonl").exists()
    with pytest.raises(ValueError, match="relationship was 'speech', is 'thoughts'"):
        measure(Person(), load_forms("en"), dialogues, tmp_path, QUIET)
    noted = tmp_path / "measures.settings.json"  # as an older version left it, which knew nothing else
    settings = json.loads(noted.read_text())
    noted.write_text(json.dumps({name: value for name, value in settings.items() if name != "relationship"}))
    with pytest.raises(ValueError, match="relationship was no field, is 'thoughts'") as refused:
        measure(Person(), load_forms("en"), dialogues, tmp_path, QUIET)
    assert len(str(refused.value)) < 2000


def test_the_sum_of_measures(dialogues):
    records, _ = measure(Person(), load_forms("en"), dialogues, None, QUIET)
    summary = summarize(records)
    depths = [r["measures"]["capabilities"]["empathic_depth"] for r in records]
    assert len(set(depths)) > 1
    assert set(depths) <= {1, 2, 3, 4, 5}
    assert summary["capabilities/empathic_depth"]["mean"] == pytest.approx(np.mean(depths))
    assert summary["capabilities/empathic_depth"]["std"] == pytest.approx(np.std(depths, ddof=1))
    assert summary["capabilities/empathic_depth"]["n"] == 4
    flow = [np.mean([reply["natural"] for reply in r["measures"]["replies"]]) for r in records]
    assert summary["replies/natural"]["mean"] == pytest.approx(np.mean(flow))
    assert sum(one["n"] for one in summary["strategies"].values()) == 4 + 6 + 4 + 1  # the unappraised reply included
    assert summary["judge"] == "person"
    need = [r["measures"]["person"]["need_expression"] for r in records]
    assert summary["person/need_expression"]["mean"] == pytest.approx(np.mean(need))


def test_strategies_are_followed_by_the_users_changes(dialogues):
    """Of the first dialogue (+5, -3, 0, and a last reply that nobody appraised) and the last (+4)."""
    subset = [dialogues[0], dialogues[3]]
    labels = [["question", "praise", "question", "analysis"], ["question"]]
    records = [
        d.record | {"measures": {"replies": [{"strategy": label} for label in ours]}}
        for d, ours in zip(subset, labels, strict=True)
    ]
    result = strategies(records)
    assert result["question"] == {"n": 3, "acceptance": pytest.approx(2 / 3), "change": pytest.approx(3)}
    assert result["praise"] == {"n": 1, "acceptance": 0, "change": -3}
    assert result["analysis"] == {"n": 1, "acceptance": None, "change": None}
    assert result["suggestion"]["n"] == 0


def test_what_was_not_answered_is_left_out(dialogues):
    class Silent(Person):
        def fill(self, asked, progress):
            for batch in super().fill(asked, progress):
                for i, rated in batch:
                    if i == 0:
                        for name in ("core_insight", "regard_case", "strategy", "natural"):
                            first = next(answers for answers in rated.answers if name in answers)
                            first[name] = {}
                yield batch

    records, _ = measure(Silent(), load_forms("en"), dialogues, None, QUIET, SPEECH)
    full, _ = measure(Person(), load_forms("en"), dialogues, None, QUIET, SPEECH)
    first = records[0]["measures"]
    assert first["unanswered"] == 4
    assert first["capabilities"]["core_insight"] is None
    assert first["relationship"]["facets"]["regard"] is first["relationship"]["total"] is None
    assert first["relationship"]["facets"]["empathy"] is not None
    assert first["replies"][0]["strategy"] is first["replies"][0]["natural"] is None
    summary, complete = summarize(records), summarize(full)
    assert (summary["unanswered"], complete["unanswered"]) == (4, 0)
    assert summary["capabilities/core_insight"]["n"] == 3
    others = [r["measures"]["capabilities"]["core_insight"] for r in full[1:]]
    assert summary["capabilities/core_insight"]["mean"] == pytest.approx(np.mean(others))
    assert summary["capabilities/empathic_depth"] == complete["capabilities/empathic_depth"]
    assert sum(one["n"] for one in summary["strategies"].values()) == 14
