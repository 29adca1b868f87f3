"""Dialogues that are larger than a page: cut with a mark, and the others stay whole."""

import json
import random
import re

import numpy as np
import pytest

from rlver_jax.report import main
from rlver_jax.reports import page
from rlver_jax.reports.shorten import evenly, level, short_text, shortened
from rlver_jax.reports.sources import read_runs
from tests.reports.conftest import make_records, record, row, write_evaluation, write_run
from tests.reports.test_page import dialogues_of

MARK = re.compile(r" \[…([\d,]+) characters left out…\] ")


def noise(length, seed=0):
    """Text that hardly compresses."""
    return random.Random(seed).randbytes(length).hex()[:length]


def whole_length(text):
    """Characters of a text before it was cut."""
    return len(MARK.sub("", text)) + sum(int(n.replace(",", "")) for n in MARK.findall(text))


@pytest.mark.parametrize("filler", [noise(48_000_000), "word " * 9_600_000], ids=["noise", "repetition"])
@pytest.mark.slow
def test_a_dialogue_of_48_megabytes_is_cut_and_all_others_are_whole(filler, tmp_path, capsys):
    records = make_records(0, 30)
    records[7]["messages"][1]["content"] = filler
    folder = write_evaluation(tmp_path / "seen", records)
    assert main([str(folder), f"--out={tmp_path / 'r.html'}"]) == 0
    assert capsys.readouterr().out.strip().endswith("MB, 30 of 30 dialogues, 1 of them shortened")
    text = (tmp_path / "r.html").read_text(encoding="utf-8")
    assert len(text.encode()) <= 5_000_000
    assert "1 of them is shortened" in text
    shown = dialogues_of(text)["dialogues"]
    assert [d["number"] for d in shown] == list(range(30))
    assert all(d["messages"][1]["say"] == "say 1" for d in shown if d["number"] != 7)
    shown_text = shown[7]["messages"][1]["say"]
    assert whole_length(shown_text) == 48_000_000
    assert shown_text.startswith(filler[:1000])
    assert shown_text.endswith(filler[-1000:])
    assert len(shown_text) > 200_000, "as much as there is room for"
    assert [m.get("user") for m in shown[7]["messages"]][2] == "reply 1", "short texts of it are whole"


def test_a_small_page_has_room_for_parts_of_several_giants(tmp_path):
    records = make_records(0, 10)
    for i in (2, 5, 6):
        records[i]["messages"][2]["appraisal"]["feeling"] = noise(3_000_000, i)
    text, packed = page.render(read_runs([write_evaluation(tmp_path / "seen", records)]), 150_000)
    assert len(text.encode()) <= 150_000
    assert (packed.included, packed.all, packed.shortened) == (10, 10, 3)
    for i in (2, 5, 6):
        (_, feeling) = dialogues_of(text)["dialogues"][i]["messages"][2]["appraisal"][0]
        assert whole_length(feeling) == 3_000_000


def test_many_turns_lose_their_middle(tmp_path):
    emotions = [50 + i % 2 for i in range(6_001)]
    records = [*make_records(0, 3), record(3, "p3", emotions, words=noise_of(3))]
    text, packed = page.render(read_runs([write_evaluation(tmp_path / "seen", records)]), 300_000)
    assert len(text.encode()) <= 300_000
    assert (packed.included, packed.shortened) == (4, 1)
    messages = dialogues_of(text)["dialogues"][3]["messages"]
    (skipped,) = [m["skipped"] for m in messages if "skipped" in m]
    assert sum("say" in m for m in messages) + skipped == 6_000
    position = next(i for i, m in enumerate(messages) if "skipped" in m)
    assert "user" in messages[position - 1], "turns are left out whole"
    assert "say" in messages[position + 1]
    assert "turns after the 100th are not drawn" in text


def noise_of(number):
    """Other words for every dialogue."""
    return lambda what: f"{what} {noise(200, f'{number} {what}')}"


def test_one_profile_alone_may_be_too_much(tmp_path):
    """Its dialogues are thinned out, the first and the last kept; it used to leave the page empty."""
    played = {
        step: [record(number, "p0", [40, 45], words=noise_of(number)) for number in range(step * 4, step * 4 + 4)]
        for step in range(1, 101)
    }
    text, packed = page.render(read_runs([write_run(tmp_path / "run", [row(1, 45.0)], played)]), 200_000)
    assert len(text.encode()) <= 200_000
    assert 20 < packed.included < packed.all == 400
    steps = [d["step"] for d in dialogues_of(text)["dialogues"]]
    assert (steps[0], steps[-1]) == (1, 100)


@pytest.mark.parametrize("most", [3_000, 10_000, 100_000])
def test_any_dialogue_is_cut_to_about_its_size(most):
    notes = [[f"name {i}", noise(500, i)] for i in range(40)]
    turn = [{"say": noise(9_000), "violation": False}, {"user": "u", "emotion": 5, "change": 1, "appraisal": notes}]
    whole = {"profile": noise(50_000), "emotions": [5] * 401, "messages": [{"user": "a", "emotion": 5}, *turn * 400]}
    cut = shortened(whole, most)
    assert len(json.dumps(cut, ensure_ascii=False)) <= 2 * most
    assert len(cut["emotions"]) <= max(most // 40, 2)
    assert whole_length(cut["profile"]) == 50_000
    assert ["…", f"{40 - len(cut['messages'][2]['appraisal']) + 1} notes left out"] in cut["messages"][2]["appraisal"]


@pytest.mark.parametrize(
    ("sizes", "room", "height"),
    [([1, 2, 3], 6, np.inf), ([1, 2, 3], 5, 2), ([10, 10], 8, 4), ([1, 100, 50], 41, 20), ([5], 2, 2)],
)
def test_the_level_is_that_of_water(sizes, room, height):
    assert level(sizes, room) == height
    assert sum(min(size, height) for size in sizes) <= room


def test_a_text_keeps_its_ends():
    text = "a" * 700 + "b" * 300
    cut = short_text(text, 100)
    assert cut == "a" * 45 + " […940 characters left out…] " + "b" * 15
    assert short_text(text, 1000) == text
    assert evenly(list(range(100)), 3) == [0, 50, 99]
