"""The numbers behind the charts, against hand computation and the standard library's statistics."""

import statistics

import numpy as np
import pytest

from rlver_jax.reports import sources
from rlver_jax.reports.dialogue_store import DialogueStore
from rlver_jax.reports.metrics_table import MetricsTable
from rlver_jax.reports.sources import read_runs
from rlver_jax.reports.statistics import (
    Point,
    coordinates,
    end_shares,
    groups,
    outcome,
    outcome_shares,
    overview,
    points,
    reply_lengths,
    settings_table,
    trajectory,
    turn_counts,
)
from tests.reports.conftest import make_records, record, row, write_evaluation, write_run


def test_rows_become_points_and_many_rows_means():
    metrics = MetricsTable(
        [{"step": 0, "eval": 1.0}, *({"step": s, "x": float(s), "y": None if s == 3 else 1.0} for s in range(1, 8))]
    )
    assert points(metrics, ["x", "y"], 10)[:2] == [Point(1, 1, (1.0, 1.0)), Point(2, 2, (2.0, 1.0))]
    # six whole rows (1 2 4 5 6 7) as at most four points: pairs
    assert points(metrics, ["x", "y"], 4) == [
        Point(1, 2, (1.5, 1.0)),
        Point(4, 5, (4.5, 1.0)),
        Point(6, 7, (6.5, 1.0)),
    ]
    assert points(metrics, ["nothing"], 4) == []
    assert [point.steps for point in points(metrics, ["x", "y"], 3)] == [
        "steps 1–2",
        "steps 4–5",
        "steps 6–7",
    ]
    assert Point(4, 4, ()).steps == "step 4"


def test_a_trajectory_is_quartiles_and_mean_and_an_ended_dialogue_keeps_its_emotion():
    emotions = [[40, 50, 60], [40, 45], [40, 30, 20], [40, 40, 44], [40, 100]]
    quartiles = trajectory([record(i, "p", e) for i, e in enumerate(emotions)])
    assert quartiles.shape == (3, 3)
    assert quartiles[0].tolist() == [40, 40, 40]
    for turn, values in ((1, [50, 45, 30, 40, 100]), (2, [60, 45, 20, 44, 100])):
        low, _, high = statistics.quantiles(values, n=4, method="inclusive")
        np.testing.assert_allclose(quartiles[turn], [low, statistics.fmean(values), high])


def test_outcomes_follow_sages_borders():
    assert [outcome(emotion) for emotion in (0, 9, 10, 99, 100)] == [
        *("failure", "failure"),
        *("between", "between"),
        "success",
    ]
    records = [
        record(0, "p", [40, e], end) for e, end in ((100, "success"), (5, "failure"), (50, "goodbye"), (9, "failure"))
    ]
    assert outcome_shares(records) == {"success": 0.25, "between": 0.25, "failure": 0.5}
    ends = end_shares(records)
    assert ends == {"success": 0.25, "failure": 0.5, "goodbye": 0.25, "turn_limit": 0, "format": 0, "context": 0}


def outline(emotions):
    return sources._outline(record(0, "p", emotions), DialogueStore())


def test_lengths_count_the_policys_own_words():
    outlines = [outline([40, 41, 42]), outline([40])]
    assert turn_counts(outlines) == [2, 0]
    assert reply_lengths(outlines) == [len("say 1"), len("say 2")]


def test_the_first_and_the_last_quarter_of_logged_steps_are_compared(tmp_path):
    played = {step: make_records(step * 10, 2) for step in range(1, 12)}
    long = write_run(tmp_path / "long", [row(1, 40.0)], played)
    short = write_run(tmp_path / "short", [row(1, 40.0)], {7: make_records(0, 2)})
    seen = write_evaluation(tmp_path / "seen", make_records(0, 3))
    compared = groups(read_runs([long, short, seen]))
    assert [(g.name, g.run, g.early, len(g.records)) for g in compared] == [
        ("long · steps 1–2", 0, True, 4),
        ("long · steps 10–11", 0, False, 4),
        ("short · step 7", 1, False, 2),
        ("seen", 2, False, 3),
    ]
    assert [r["dialogue"] for r in compared[1].records] == [100, 101, 110, 111]


def test_only_judged_dialogues_have_a_coordinate():
    here = record(0, "p", [40], measures={"coordinate": {"creative": -0.5, "empathy": 1}})
    older = record(2, "p", [40], measures={"coordinate": {"solution": -0.5, "creative": 0.25}})
    others = [record(1, "p", [40]), record(2, "p", [40], measures={"coordinate": {"solution": "?"}})]
    placed = coordinates([*others, here, older])
    assert [(x, y, r["dialogue"]) for x, y, r in placed] == [(-0.5, 1.0, 0), (0.25, 0.5, 2)]


def test_the_table_says_what_each_run_has(small_run, tmp_path):
    summary = {"score": 61.25, "settings": {}, "judges": {"second": {"score": 50.04}}}
    seen = write_evaluation(tmp_path / "seen", make_records(0, 4), summary)
    runs = read_runs([small_run, seen])
    table = dict(overview(runs, groups(runs)))
    # p0..p5 end at 45..50, and 20 higher in the second step
    spread = statistics.pstdev(range(6))
    assert table["final emotion, mean ± deviation"][0] == f"47.5 ± {spread:.1f} → 67.5 ± {spread:.1f}"
    assert table["held-out score"] == ["41.5 → 61.5 (best 61.5, step 2)", ""]
    assert table["held-out score by the gold judge"] == ["40.0 → 50.0 (best 50.0, step 2)", ""]
    assert (table["score"], table["score by second"]) == (["", "61.2"], ["", "50.0"])
    assert table["logged steps compared"] == ["step 1 → step 2", ""]
    assert table["seconds a step, median"] == ["3.0", ""]
    assert table["turns, mean"] == ["2.00 → 2.00", "2.00"]


def test_steps_of_different_profiles_are_called_so(tmp_path):
    rows = [row(1, 45.0), row(2, 55.0)]
    fewer = write_run(tmp_path / "fewer", rows, {1: make_records(0, 6), 2: make_records(6, 5)})
    runs = read_runs([fewer])
    assert dict(overview(runs, groups(runs)))["logged steps compared"] == ["step 1 → step 2, of different profiles"]


@pytest.mark.parametrize(("other", "differ"), [({"a": 1, "b": 3, "c": 0}, ["b"]), ({"a": 1, "b": 2}, [])])
def test_settings_that_differ_come_first(tmp_path, other, differ):
    folders = [
        write_run(tmp_path / str(i), [row(1, 40.0)], {}, settings)
        for i, settings in enumerate(({"a": 1, "b": 2}, other))
    ]
    rows = settings_table(read_runs(folders))
    assert [name for name, _, different in rows if different] == differ
    assert [name for name, _, _ in rows][: len(differ)] == differ
    assert {name: values for name, values, _ in rows}["a"] == ["1", "1"]
