"""The page as a file: whole, within its size, with nothing in it that could run or load anything."""

import base64
import gzip
import hashlib
import html
import itertools
import json
import re
import xml.etree.ElementTree as ET
from html.parser import HTMLParser

import pytest

from rlver_jax.reports import page
from rlver_jax.reports.browser import pack
from rlver_jax.reports.sources import read_runs
from tests.reports.conftest import HOSTILE, make_records, record, row, write_evaluation, write_run


class Parser(HTMLParser):
    """Collects tags with their attributes, and what stands in scripts."""

    def __init__(self, text):
        super().__init__()
        self.tags, self.scripts = [], []
        self.feed(text)

    def handle_starttag(self, tag, attrs):
        self.tags.append((tag, dict(attrs)))

    def handle_data(self, data):
        if self.tags and self.tags[-1][0] == "script" and self.get_starttag_text().startswith("<script"):
            self.scripts.append(data)


def unpacked(text):
    return json.loads(gzip.decompress(base64.b64decode(text)))


def dialogues_of(text):
    return unpacked(re.search(r'id="dialogues">([^<]+)</script>', text)[1])


def test_the_page_loads_nothing_and_allows_only_its_own_script(small_run):
    text, _ = page.render(read_runs([small_run]), 5_000_000)
    for tag, attrs in Parser(text).tags:
        for name, value in attrs.items():
            assert name not in ("src", "srcset", "action", "background") or tag == "never"
            assert not name.startswith("on"), (tag, name)
            assert name != "href" or value == "data:,", "the empty icon"
    assert not re.search(r"https?://(?!www\.w3\.org/2000/svg)|@import|url\(", text)
    (script,) = re.findall(r"<script>(.*?)</script>", text, re.DOTALL)
    digest = base64.b64encode(hashlib.sha256(script.encode()).digest()).decode()
    policy = html.unescape(re.search(r'Content-Security-Policy" content="([^"]+)"', text)[1])
    assert "default-src 'none'" in policy
    assert f"script-src 'sha256-{digest}'" in policy


def test_all_dialogues_come_back_out_of_the_page(small_run):
    text, packed = page.render(read_runs([small_run]), 5_000_000)
    assert (packed.included, packed.all) == (12, 12)
    data = dialogues_of(text)
    assert data["runs"] == ["small"]
    assert data["intentions"] == ["advice", "listening", "to be <b>left</b> alone"]
    assert [(d["step"], d["number"], d["profile"]) for d in data["dialogues"]][6:8] == [(2, 6, "p0"), (2, 7, "p1")]
    assert data["dialogues"][6]["emotions"] == [40, 50, 65]
    assert data["dialogues"][6]["messages"] == [
        {"user": "first", "emotion": 40},
        {"thought": "thought 1", "say": "say 1", "violation": False},
        {
            "user": "reply 1",
            "emotion": 50,
            "change": 10,
            "appraisal": [["feeling", "feeling 1"]],
            "considered": [["tone", "tone 1"]],
        },
        {"thought": "thought 2", "say": "say 2", "violation": False},
        {"user": "", "emotion": 65, "change": 15, "appraisal": [["feeling", "feeling 2"]]},
    ]


def test_an_emotion_of_zero_and_a_change_of_none_are_kept(tmp_path):
    records = [record(0, "p", [4, 4, 0], "failure")]
    data = unpacked(pack(read_runs([write_evaluation(tmp_path / "low", records)]), 10_000).text)
    reactions = [m for m in data["dialogues"][0]["messages"] if "change" in m]
    assert [(m["emotion"], m["change"]) for m in reactions] == [(4, 0), (0, -4)]
    assert data["outcomes"][data["dialogues"][0]["outcome"]] == "failure"


def test_what_models_and_people_wrote_is_never_markup(tmp_path):
    name = "<img src=x onerror=alert(1)>"
    records = [
        record(0, HOSTILE, [40, 45], words=lambda _: HOSTILE, measures={"coordinate": {"creative": 0, "empathy": 0}})
    ]
    run = write_run(tmp_path / name, [row(1, 45.0)], {1: records}, {"policy.path": HOSTILE})
    text, _ = page.render(read_runs([run]), 5_000_000)
    tags = [tag for tag, _ in Parser(text).tags]
    assert (tags.count("img"), tags.count("script")) == (0, 2)
    assert html.escape(name, quote=False) in text
    assert dialogues_of(text)["dialogues"][0]["messages"][1]["say"] == HOSTILE


UNSEEN = re.compile(
    r"[\x00-\x08\x0b-\x1f\x7f-\x9f\u061c\u180e\u200b\u200e\u200f\u202a-\u202e\u2060-\u206f]"
    r"|[\ufeff\ufff9-\uffff\ud800-\udfff]"
)
_CODES = (range(9), range(11, 32), range(0x7F, 0xA0), range(0x202A, 0x202F), range(0x2066, 0x206A))
CONTROLS = "".join(chr(code) for codes in _CODES for code in codes)
NASTY = f"<b>\x1b[2J{CONTROLS}\ud800\u200b\ufeff\uffff\U000e0041good 👩\u200d👧"


def test_controls_are_taken_out_everywhere(tmp_path):
    """Escapes, half characters and directions in every text of a run: on the page, in its JSON and in the curve."""
    folder = tmp_path / "run\x1b[31m\u202e\udcff\nscore 100"
    marks = {"capabilities": {NASTY: 2.0}, "coordinate": {"creative": 0.5, "empathy": 0.5}}
    records = [record(0, NASTY, [40, 45], words=lambda _: NASTY, measures=marks) | {"hidden_intention": NASTY}]
    records[0]["messages"][2]["appraisal"] = {NASTY: NASTY}
    lines = "".join(json.dumps(one) + "\n" for one in records)  # JSON may hold half characters, as escapes
    (folder / "dialogues").mkdir(parents=True)
    (folder / "dialogues" / "step_000001.jsonl").write_text(lines)
    (folder / "metrics.jsonl").write_text(json.dumps(row(1, 45.0)) + "\n")
    (folder / "config.json").write_text(json.dumps({NASTY: NASTY}))
    seen = tmp_path / "seen\x1b\x07"
    seen.mkdir()
    (seen / "dialogues.jsonl").write_text(lines)
    (seen / "summary.json").write_text(json.dumps({"settings": {"a": NASTY}, "judges": {NASTY: {"score": 5.0}}}))
    runs = read_runs([folder, seen])
    text, _ = page.render(runs, 5_000_000)
    for shown in (text, json.dumps(dialogues_of(text), ensure_ascii=False), page.curve(runs)):
        assert not UNSEEN.findall(shown)
        assert shown.encode("utf-8")
    (shown, _) = dialogues_of(text)["dialogues"]
    good = "<b>[2Jgood 👩\u200d👧"
    assert (shown["profile"], shown["hidden"], shown["messages"][1]["say"]) == (good, good, good)
    assert shown["messages"][2]["appraisal"] == [[good, good]]
    assert dialogues_of(text)["runs"] == ["run[31m score 100", "seen"]
    assert f"score by {html.escape(good)}" in text
    ET.fromstring(page.curve(runs))


def test_text_keeps_its_lines_and_joined_emoji(tmp_path):
    records = [record(0, "p", [40, 45], words=lambda _: "a\tb\r\nc\u2028d 👩\u200d👧 \u0645\u06cc\u200c\u062e")]
    text, _ = page.render(read_runs([write_evaluation(tmp_path / "seen", records)]), 100_000)
    say = dialogues_of(text)["dialogues"][0]["messages"][1]["say"]
    assert say == "a    b\nc\nd 👩\u200d👧 \u0645\u06cc\u200c\u062e"


def test_sixty_steps_take_less_than_five_megabytes(sixty_steps):
    text, packed = page.render(read_runs([sixty_steps]), 5_000_000)
    assert len(text.encode()) <= 5_000_000
    assert packed.included == packed.all == 7 * 64


def test_a_small_page_keeps_whole_profiles_evenly(sixty_steps):
    runs = read_runs([sixty_steps])
    everything = pack(runs, 10**9)
    text, packed = page.render(runs, 400_000)
    assert len(text.encode()) <= 400_000
    included = dialogues_of(text)["dialogues"]
    assert 0 < len(included) == packed.included < everything.included == 448
    profiles = {d["profile"] for d in included}
    assert len(included) == 7 * len(profiles), "each with its dialogues of all steps"
    numbers = sorted(int(name[1:]) for name in profiles)
    gaps = {b - a for a, b in itertools.pairwise(numbers)}
    assert max(gaps) - min(gaps) <= 1, "spread over all profiles"
    assert f"{packed.included} of 448 dialogues are in this page" in text
    assert "dialogues in its logs" in text, "the table counts all"
    assert re.search(r"dialogues in its logs</th><td>448</td>", text)


def test_a_page_that_can_hold_nothing_is_refused(small_run):
    with pytest.raises(ValueError, match=r"a page without dialogues takes \d+ bytes; expected at most 10000"):
        page.render(read_runs([small_run]), 10_000)


def test_a_run_without_dialogues_has_its_curves_and_no_browser(tmp_path):
    runs = read_runs([write_run(tmp_path / "run", [row(1, 40.0), row(2, 50.0)], {})])
    text, packed = page.render(runs, 5_000_000)
    assert packed.all == 0
    assert "Emotion at the end of a dialogue" in text
    assert 'id="browser"' not in text


def test_rows_that_were_lost_are_named_above_the_curves(tmp_path):
    whole = write_run(tmp_path / "whole", [row(step, 30.0) for step in range(1, 8)], {})
    torn = write_run(tmp_path / "torn", [row(step, 30.0) for step in (2, 3, 7)], {})
    text, _ = page.render(read_runs([whole, torn]), 5_000_000)
    assert "Of torn the rows of steps 1, 4–6 were lost." in text
    assert "Of whole" not in text


def test_rows_that_were_lost_at_the_end_are_told_by_checkpoints_and_the_finish(tmp_path):
    cut = write_run(tmp_path / "cut", [row(1, 30.0), row(2, 30.0)], {1: make_records(0, 2)})
    (cut / "checkpoints" / "000004").mkdir(parents=True)
    ended = write_run(tmp_path / "ended", [row(1, 30.0)], {1: make_records(0, 2)})
    (ended / "finished.json").write_text('{"step": 3}')
    emptied = write_run(tmp_path / "emptied", [], {1: make_records(0, 2)}, {"eval.every": 3})
    (emptied / "finished.json").write_text('{"step": 3}')
    text, _ = page.render(read_runs([cut, ended, emptied]), 5_000_000)
    assert "Of cut the rows of steps 3–4 were lost." in text
    assert "Of ended the rows of steps 2–3 were lost." in text
    assert "Of emptied the rows of steps 0–3 were lost." in text
    alone, _ = page.render(read_runs([emptied]), 5_000_000)
    assert "Of emptied the rows of steps 0–3 were lost." in alone


def test_a_run_whose_metrics_are_yet_to_come_shows_its_dialogues(tmp_path):
    """Dialogues of a step are written before its row."""
    runs = read_runs([write_run(tmp_path / "run", [], {1: make_records(0, 3)})])
    text, packed = page.render(runs, 5_000_000)
    assert packed.included == 3
    assert "Emotion at the end of a dialogue" not in text


def test_several_runs_are_compared(small_run, tmp_path):
    seen = write_evaluation(tmp_path / "seen", make_records(0, 3), {"score": 47.0, "settings": {"eval.seed": 1}})
    text, _ = page.render(read_runs([small_run, seen]), 5_000_000)
    table = re.search(r'<table id="overview">.*?</table>', text, re.DOTALL)[0]
    assert re.search(r"<th scope=\"row\">kind</th><td>training run</td><td>evaluation</td>", table)
    assert re.search(r"<th scope=\"row\">score</th><td></td><td>47.0</td>", table)
    assert "eval.seed" in text


def test_two_profiles_of_one_id_are_told_apart(tmp_path):
    """Held-out and training profiles may share ids: only the wish and given first words say who it is."""
    records = [record(n, "p0", [40, 50], wish=wish) for n, wish in enumerate(("advice", "listening", "advice"))]
    records[2]["messages"][0]["content"] = "something else"
    again = [record(3, "p0", [40, 60])]
    run = write_run(tmp_path / "run", [row(1, 50.0), row(2, 60.0)], {1: records, 2: again})
    text, _ = page.render(read_runs([run]), 10**9)
    assert [d["who"] for d in dialogues_of(text)["dialogues"]] == [0, 1, 2, 0]
