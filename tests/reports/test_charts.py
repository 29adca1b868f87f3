"""Which charts a report has, and that they show the numbers they are of."""

import xml.etree.ElementTree as ET

import pytest

from rlver_jax.reports import page, statistics
from rlver_jax.reports.charts import CHARTS, Section
from rlver_jax.reports.curves import Curve
from rlver_jax.reports.group_charts import coordinate
from rlver_jax.reports.sources import read_runs
from tests.reports.conftest import make_records, record, row, write_evaluation, write_run


def learning(runs):
    return CHARTS["Learning"].figures(runs, [])


def by_step(runs):
    return CHARTS["Outcomes by step"].figures(runs, [])


def of_dialogues(groups):
    return CHARTS["Dialogues in the logs"].figures([], groups)


def trajectories(groups):
    return CHARTS["Emotion over the turns, by hidden intention"].figures([], groups)


def tips(figure):
    return [e.get("data-tip") for e in ET.fromstring(figure.chart.markup()).iter() if e.get("data-tip")]


def test_a_training_run_has_its_curves(small_run):
    charts = {figure.title: figure for figure in learning(read_runs([small_run]))}
    assert list(charts) == [
        *("Emotion at the end of a dialogue", "Reward", "Held-out score", "Turns"),
        "Length of a reply",
    ]
    assert tips(charts["Emotion at the end of a dialogue"]) == ["step 1 · 45.00 ± 10.00", "step 2 · 55.00 ± 10.00"]
    assert tips(charts["Held-out score"]) == [
        "step 0 · small: 41.50 · small (dashed): 40.00",
        "step 2 · small: 61.50 · small (dashed): 50.00",
    ]


def test_runs_share_their_charts_and_evaluations_have_none(small_run, tmp_path):
    other = write_run(tmp_path / "other", [row(2, 20.0), row(3, 30.0)], {})
    seen = write_evaluation(tmp_path / "seen", make_records(0, 2))
    emotion = learning(read_runs([small_run, other, seen]))[0]
    assert tips(emotion) == [
        "step 1 · small: 45.00 ± 10.00",
        "step 2 · small: 55.00 ± 10.00 · other: 20.00 ± 10.00",
        "step 3 · other: 30.00 ± 10.00",
    ]
    held_out = learning(read_runs([small_run, other]))[2]
    names = [e.text for e in ET.fromstring(held_out.chart.markup()) if e.get("class") == "label"]
    assert names == ["small"], "the other one has no evaluation"
    assert learning(read_runs([seen])) == by_step(read_runs([seen])) == []


def test_a_run_of_thousands_of_steps_draws_a_bounded_number_of_points(tmp_path):
    run = read_runs([write_run(tmp_path / "long", [row(step, 40.0) for step in range(1, 3001)], {})])
    assert len(tips(learning(run)[0])) == 231, "3000 steps by thirteens"
    assert tips(by_step(run)[0])[0].startswith("steps 1–50 ·")


def test_outcomes_and_ends_are_stacked_to_the_whole(small_run):
    outcomes, ends = by_step(read_runs([small_run]))
    assert tips(outcomes)[0] == "step 1 · success 25%, between 62%, failure 12%"
    assert tips(ends)[1] == "step 2 · success 25%, turn limit 75%"
    bars = list(ET.fromstring(outcomes.chart.markup()).iter("rect"))
    heights = [
        # the first rectangle of a class is the legend's
        float([bar for bar in bars if bar.get("class") == f"bar {part}"][1].get("height"))
        for part in ("success", "between", "failure")
    ]
    assert heights == pytest.approx([sum(heights) * share for share in (0.25, 0.625, 0.125)], abs=0.2)
    assert sum(heights) == pytest.approx(outcomes.chart.bottom - outcomes.chart.top, abs=0.2)


def test_trajectories_are_by_hidden_intention(small_run):
    charts = trajectories(statistics.groups(read_runs([small_run])))
    assert [figure.title for figure in charts] == ["advice", "listening", "to be <b>left</b> alone"]
    # profiles p0 and p3 want advice: 45 and 48 at the end of step 1, 65 and 68 at the end of step 2
    last = tips(charts[0])[-1]
    assert last.startswith("turn 2 · small · step 1: 46.5 (")
    assert "small · step 2: 66.5 (66–67), n 2" in last
    assert charts[0].caption == "Dialogues: 2 of small · step 1, 2 of small · step 2"


def test_dialogues_that_ended_before_a_turn_are_charted_too(tmp_path):
    run = read_runs([write_evaluation(tmp_path / "cut", [record(0, "p", [40], "context")])])
    groups = statistics.groups(run)
    assert tips(trajectories(groups)[0])[0] == "before the first turn · cut: 40.0 (40–40), n 1"
    assert [figure.title for figure in of_dialogues(groups)] == [
        *("Outcomes", "Ends", "Turns", "Characters of a reply"),
    ]


def test_boxes_say_quartiles(tmp_path):
    records = [record(i, f"p{i}", [40] * (turns + 1)) for i, turns in enumerate((1, 2, 3, 4, 9))]
    groups = statistics.groups(read_runs([write_evaluation(tmp_path / "seen", records)]))
    assert tips(of_dialogues(groups)[2]) == ["seen · 1 to 9, quartiles 2, 3, 4; mean 3.8"]


def test_the_coordinate_is_shown_where_a_judge_placed_dialogues(small_run, tmp_path):
    assert coordinate([], statistics.groups(read_runs([small_run]))) == []
    records = [
        record(i, f"p{i}", [40], measures={"coordinate": {"creative": x, "empathy": y}})
        for i, (x, y) in enumerate(((-1.0, 0.5), (0.5, 1.0)))
    ]
    folder = write_evaluation(tmp_path / "placed", records)
    (figure,) = coordinate([], statistics.groups(read_runs([folder])))
    assert tips(figure) == [
        "placed · p0 · creative -1.00, empathy +0.50, emotion 40",
        "placed · p1 · creative +0.50, empathy +1.00, emotion 40",
        "placed · mean of 2: -0.25, +0.75",
    ]
    left, right, mean = (
        [float(e.get(k)) for k in ("cx", "cy")] for e in ET.fromstring(figure.chart.markup()).iter("circle")
    )
    assert left[0] < mean[0] < right[0]
    assert left[1] > mean[1] > right[1], "empathy is up"


@pytest.mark.parametrize(("count", "bands"), [(4, 4), (5, 0)])
def test_many_runs_are_lines_without_areas(tmp_path, count, bands):
    runs = read_runs([write_run(tmp_path / str(i), [row(1, 40.0), row(2, 50.0)], {}) for i in range(count)])
    classes = [e.get("class") for e in ET.fromstring(learning(runs)[0].chart.markup()).iter("path")]
    assert len([one for one in classes if one.startswith("band")]) == bands
    assert len([one for one in classes if one.startswith("line")]) == count


def test_a_new_chart_is_one_entry(small_run, monkeypatch):
    seconds = Curve("Seconds of a rollout", "Of a step.", {"time/rollout_s": ""}, starts_at_zero=True)
    monkeypatch.setitem(CHARTS, "Speed", Section((seconds,)))
    runs = read_runs([small_run])
    assert tips(CHARTS["Speed"].figures(runs, [])[0]) == ["step 1 · 2.00", "step 2 · 2.00"]
    assert "<h3>Seconds of a rollout</h3>" in page.render(runs, 5_000_000)[0]
