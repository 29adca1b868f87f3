"""Measures from answers that are given: kept as they come, taken up again, summed up."""

import numpy as np
import pytest
from rich.console import Console

from rlver_jax.judging.finished import Finished
from rlver_jax.judging.forms import load_forms
from rlver_jax.judging.judge import Work
from rlver_jax.judging.measures import measured, summed_up
from rlver_jax.runs.sage import from_sage

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
            yield [(i, filled)]


@pytest.fixture
def dialogues(results):
    return [Finished(from_sage(r, i), None, "") for i, r in enumerate(results)]


def test_measures_are_kept_and_taken_up(dialogues, tmp_path):
    records = measured(Person(), load_forms("en"), dialogues, tmp_path, QUIET)
    assert [{k: v for k, v in r.items() if k != "measures"} for r in records] == [d.record for d in dialogues]
    file = tmp_path / "measures.jsonl"
    lines = file.read_bytes().splitlines(keepends=True)
    assert len(lines) == 4
    file.write_bytes(lines[0] + lines[1] + lines[2][:50])
    person = Person()
    assert measured(person, load_forms("en"), dialogues, tmp_path, QUIET) == records
    assert len(person.asked) == 2, "only what is missing"
    again = [Finished(record, None, "") for record in records]  # measures of before don't count as another dialogue
    person = Person()
    assert measured(person, load_forms("en"), again, tmp_path, QUIET) == records
    assert not person.asked
    with pytest.raises(ValueError, match="was made with other settings"):
        measured(Person(), load_forms("zh"), dialogues, tmp_path, QUIET)


def test_the_sum_of_measures(dialogues):
    records = measured(Person(), load_forms("en"), dialogues, None, QUIET)
    summary = summed_up(records)
    depths = [r["measures"]["capabilities"]["empathic_depth"] for r in records]
    assert len(set(depths)) > 1
    assert set(depths) <= {1, 2, 3, 4, 5}
    assert summary["capabilities/empathic_depth"]["mean"] == pytest.approx(np.mean(depths))
    assert summary["capabilities/empathic_depth"]["std"] == pytest.approx(np.std(depths, ddof=1))
    assert summary["capabilities/empathic_depth"]["n"] == 4
    flow = [np.mean([reply["natural"] for reply in r["measures"]["replies"]]) for r in records]
    assert summary["replies/natural"]["mean"] == pytest.approx(np.mean(flow))
    assert sum(summary["strategies"].values()) == 4 + 6 + 4 + 1  # of all replies, the unappraised one included
    assert summary["judge"] == "person"
