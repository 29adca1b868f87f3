"""`bench` as a user runs it, and how it compares."""

import json

import pytest

from rlver_jax.bench import SUITES, main
from rlver_jax.benches import dialogue
from rlver_jax.benches.timing import alternate, ratios


def test_ways_are_run_in_turn():
    order, told = [], []
    seconds = alternate({name: lambda name=name: order.append(name) for name in "ab"}, 3, told.append)
    assert order == ["a", "b"] * 3
    assert told[-1] == "b, 3 of 3"
    assert {name: len(some) for name, some in seconds.items()} == {"a": 3, "b": 3}


def test_ratios_are_of_one_round():
    assert ratios([2.0, 9.0, 8.0], [1.0, 3.0, 8.0]) == {"median": 2.0, "least": 1.0, "most": 3.0}


@pytest.mark.parametrize(
    ("arguments", "parts"),
    [
        ([], ["no suite", *SUITES]),
        (["dialog"], ["found dialog", *SUITES]),
        (["dialogue", "--json=/no/such/file.json"], ["/no/such/file.json", "its folder does not exist"]),
        (["dialogue", "--repeats=0"], ["repeats"]),
    ],
)
def test_bad_usage_is_refused(arguments, parts, capsys):
    assert main(arguments) == 2
    message = capsys.readouterr().err
    for part in parts:
        assert part in message, message


@pytest.mark.slow
def test_dialogues_are_measured(tmp_path, capsys, monkeypatch):
    """Few of them; the figures follow from one another."""
    monkeypatch.setattr(dialogue, "DIALOGUES", 6)
    monkeypatch.setattr(dialogue, "ROWS", 2)
    assert main(["dialogue", f"--json={tmp_path / 'f.json'}", "--repeats=2"]) == 0
    found = json.loads((tmp_path / "f.json").read_text())
    assert found["suite"] == "dialogue"
    assert sum(found["turns"].values()) == found["dialogues"] == 6
    turns = sum(int(n) * count for n, count in found["turns"].items())
    assert [way["rows"] for way in found["ways"].values()] == [2, 2, 6]
    for way in found["ways"].values():
        assert turns / way["occupancy"] % way["rows"] == pytest.approx(0, abs=1e-6)
        assert len(way["seconds"]) == 2
        assert way["dialogues_per_s"] == pytest.approx(6 / (sum(way["seconds"]) / 2))
    assert found["ways"]["refill"]["occupancy"] >= found["ways"]["waiting"]["occupancy"]
    assert "x as fast as waiting" in capsys.readouterr().out
