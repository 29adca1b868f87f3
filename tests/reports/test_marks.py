"""Bars of a judge model's marks, against hand computation."""

import xml.etree.ElementTree as ET

import pytest

from rlver_jax.reports import page, statistics
from rlver_jax.reports.charts import CHARTS
from rlver_jax.reports.group_charts import Marks
from rlver_jax.reports.sources import read_runs
from tests.reports.conftest import make_records, record, write_evaluation


def manner(groups):
    return CHARTS["Manner"].figures([], groups)


def marks(records, path):
    return Marks("", "", path, 1, 5, 1).of(records)


def rated(number, depth, regard, **source):
    capabilities = {"empathic_depth": depth, "core_insight": 3.0}
    relationship = {"facets": {"regard": regard}, "total": 0.0, **source}
    return record(number, f"p{number}", [40, 45], measures={"capabilities": capabilities, "relationship": relationship})


@pytest.fixture
def groups(tmp_path):
    """Two evaluations; of the first one dialogue has a mark that its judge didn't give, of the second one has none."""
    first = write_evaluation(tmp_path / "first", [rated(0, 2.0, -2.0), rated(1, 3.0, -1.0), rated(2, None, None)])
    second = write_evaluation(tmp_path / "second", [rated(0, 4.5, 1.5), record(1, "p1", [40, 45])])
    return statistics.groups(read_runs([first, second]))


def bars(figure):
    return {e.get("data-tip"): e for e in ET.fromstring(figure.chart.markup()).iter("rect") if e.get("data-tip")}


def test_each_group_has_its_means(groups):
    capabilities, relationship = manner(groups)
    assert [figure.title for figure in (capabilities, relationship)] == ["Capabilities", "Relationship, from speech"]
    assert sorted(bars(capabilities)) == [
        "first · core insight +3.00, mean of 3 dialogues",
        "first · empathic depth +2.50, mean of 2 dialogues",
        "second · core insight +3.00, mean of 1 dialogues",
        "second · empathic depth +4.50, mean of 1 dialogues",
    ]
    chart, drawn = relationship.chart, bars(relationship)
    below = drawn["first · regard -1.50, mean of 2 dialogues"]
    above = drawn["second · regard +1.50, mean of 1 dialogues"]
    assert float(below.get("x")) == pytest.approx(chart.px(-1.5), abs=0.1), "a bar leads from 0, to either side"
    assert float(above.get("x")) == pytest.approx(chart.px(0), abs=0.1)
    assert float(below.get("width")) == pytest.approx(float(above.get("width")), abs=0.1)
    assert float(below.get("y")) + float(below.get("height")) <= float(above.get("y")), "one below the other"


def test_what_the_inventory_was_filled_in_from_is_never_mixed(tmp_path):
    spoken = [rated(0, 2.0, -2.0), rated(1, 2.0, -1.0, **{"from": "speech"})]  # older records don't say
    inner = [rated(0, 2.0, 3.0, **{"from": "thoughts"})]
    folders = [write_evaluation(tmp_path / name, one) for name, one in (("spoken", spoken), ("inner", inner))]
    _, from_thoughts, from_speech = manner(statistics.groups(read_runs(folders)))
    assert list(bars(from_thoughts)) == ["inner · regard +3.00, mean of 1 dialogues"]
    assert list(bars(from_speech)) == ["spoken · regard -1.50, mean of 2 dialogues"]


def test_marks_are_taken_as_far_as_there_are_any():
    odd = [record(0, "p", [40]), record(1, "p", [40], measures={"capabilities": {"a": "?", "b": 2}}), rated(2, 1.0, 0)]
    assert marks(odd, ("capabilities",)) == {"b": [2.0], "empathic_depth": [1.0], "core_insight": [3.0]}
    assert marks(odd, ("relationship", "facets")) == {"regard": [0.0]}


def test_a_page_shows_them_where_there_are_any(groups, tmp_path):
    with_marks = read_runs([tmp_path / "first"])
    assert "Capabilities" in page.render(with_marks, 5_000_000)[0]
    without = read_runs([write_evaluation(tmp_path / "third", make_records(0, 2))])
    assert manner(statistics.groups(without)) == []
    assert "Capabilities" not in page.render(without, 5_000_000)[0]
