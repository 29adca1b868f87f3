"""Drawn charts, read back by an XML parser."""

import xml.etree.ElementTree as ET

import pytest

from rlver_jax.reports.svg import Chart, Key, ticks


@pytest.mark.parametrize(
    ("low", "high", "whole", "expected"),
    [
        (0, 100, False, [0, 20, 40, 60, 80, 100]),
        (1, 60, True, [10, 20, 30, 40, 50, 60]),
        (0.5, 1.5, True, [1]),
        (-0.4, 0.3, False, [-0.4, -0.2, 0, 0.2]),
        (0, 3, True, [0, 1, 2, 3]),
        (40.2, 41.1, False, [40.2, 40.4, 40.6, 40.8, 41]),
    ],
)
def test_ticks_are_round_numbers_within_the_range(low, high, whole, expected):
    assert ticks(low, high, whole=whole) == pytest.approx(expected)


def chart(**options):
    """A plot of 100 by 100 units whose upper left corner lies at (38, 8)."""
    return Chart("a <title>", (0, 10), (0, 100), size=(38 + 100 + 18, 8 + 100 + 19), **options)


def drawn(made, classes):
    return [e for e in ET.fromstring(made.markup()).iter() if e.get("class") == classes]


def test_lines_lie_where_their_values_are_and_stay_in_the_plot():
    made = chart()
    made.line([0, 5, 10], [0, 50, 250], "c0")
    made.band([0, 10], [-10, 20], [10, 30], "c1")
    assert [e.get("d") for e in drawn(made, "line c0")] == ["M38.0 108.0L88.0 58.0L138.0 8.0"]
    assert [e.get("d") for e in drawn(made, "band c1")] == ["M38.0 98.0L138.0 78.0L138.0 88.0L38.0 108.0Z"]


def test_bars_and_touched_columns_cover_their_values():
    made = chart()
    made.bar((2, 4), (25, 75), "good", "half")
    made.tips([0, 4, 10], ["a", "b", "c"])
    (bar,) = drawn(made, "bar good")
    assert [float(bar.get(name)) for name in ("x", "y", "width", "height")] == [58, 33, 20, 50]
    assert bar.get("data-tip") == "half"
    columns = [(float(e.get("x")), float(e.get("width")), e.get("data-tip")) for e in drawn(made, "hit")]
    assert columns == [(38, 20, "a"), (58, 50, "b"), (108, 30, "c")]


def test_rows_may_count_downwards():
    made = Chart("rows", (0, 10), (2, 0), size=(156, 127))
    made.line([0, 10], [0.5, 0.5], "c0")
    assert drawn(made, "line c0")[0].get("d") == "M38.0 33.0L138.0 33.0"


def test_names_are_text_whatever_they_hold():
    name = "<script>alert(1)</script>&\x1b[31m\u202e"
    made = chart(legend=[Key("c0", name)])
    made.tips([5], [name])
    made.row_name(50, name)
    root = ET.fromstring(made.document("text { }"))
    texts = [e.text for e in root.iter() if e.text]
    assert "<script>alert(1)</script>&[31m" in texts
    assert not [e for e in root.iter() if e.tag.endswith("script")]
    assert root.get("aria-label") == "a <title>"


def test_a_legend_goes_on_in_a_new_line():
    keys = [Key(f"c{i}", "a name of some length") for i in range(3)]
    labels = [e for e in ET.fromstring(Chart("", (0, 1), (0, 1), legend=keys).markup()) if e.get("class") == "label"]
    assert [float(e.get("x")) for e in labels] == [20, 172, 20]
    assert float(labels[2].get("y")) > float(labels[0].get("y"))


def test_a_long_name_loses_its_middle_and_is_whole_when_pointed_at():
    made = Chart("rows", (0, 1), (1, 0), left=132)
    made.row_name(0.5, "a run with quite a long name · steps 10–20")
    (name,) = drawn(made, "tick end")
    assert name.text.startswith("a run wit…")
    assert name.text.endswith("10–20")
    assert name.find("title").text == "a run with quite a long name · steps 10–20"
