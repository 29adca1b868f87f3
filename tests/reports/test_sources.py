"""Folders as they stand on disk, finished or not."""

import json

import pytest

from rlver_jax.reports.sources import intention_label, intention_labels, read_runs
from tests.reports.conftest import make_records, record, row, write_evaluation, write_lines, write_run


def test_a_training_run_is_read_with_its_steps(small_run):
    (run,) = read_runs([small_run])
    assert (run.name, run.training, run.settings) == ("small", True, {"train.steps": 2})
    assert run.metrics.steps == [0, 1, 2]
    assert [(log.step, len(log.records)) for log in run.logs] == [(1, 6), (2, 6)]


def test_tokens_are_left_out_and_texts_stay(small_run):
    (run,) = read_runs([small_run])
    stored = json.loads(run.store.get(run.logs[0].records[0]["text"]))
    assert stored["messages"][1] == {"thought": "thought 1", "say": "say 1", "violation": False}
    assert "messages" not in run.logs[0].records[0]


def test_an_evaluation_that_goes_on_is_read_up_to_its_last_whole_line(tmp_path):
    folder = write_evaluation(tmp_path / "played", make_records(0, 3))
    with (folder / "dialogues.jsonl").open("a") as file:
        file.write('{"dialogue": 3, "prof')
    (folder / "progress.json").write_text(json.dumps({"settings": {"eval.seed": 3}, "played": []}))
    (run,) = read_runs([folder])
    assert (run.training, run.settings, run.summary, len(run.logs[0].records)) == (False, {"eval.seed": 3}, {}, 3)


def test_a_run_without_dialogues_is_one(tmp_path):
    (run,) = read_runs([write_run(tmp_path / "run", [row(1, 40.0)], {})])
    assert run.logs == []


def test_names_tell_folders_apart(tmp_path):
    folders = [write_run(tmp_path / part / "run", [row(1, 40.0)], {}) for part in ("a", "b")]
    assert [run.name for run in read_runs(folders)] == ["a/run", "b/run"]


def test_the_files_are_watched(small_run):
    seen = []
    read_runs([small_run], lambda files, name: seen.append((name, [f.name for f in files])) or files)
    assert seen == [("small", ["step_000001.jsonl", "step_000002.jsonl"])]


@pytest.mark.parametrize(
    ("make", "says"),
    [
        (lambda p: None, "holds neither metrics.jsonl nor dialogues.jsonl"),
        (lambda p: write_run(p, [], {}), "holds no step yet"),
        (lambda p: write_evaluation(p, []), "holds no dialogue"),
        (lambda p: write_lines(p / "dialogues.jsonl", [{"dialogue": 1}]), "dialogues.jsonl:1: no field profile"),
        (lambda p: (write_run(p, [row(1, 1.0)], {}), (p / "metrics.jsonl").write_text("{}\n")), "line 1 is no row"),
        (lambda p: (write_run(p, [row(1, 1.0)], {}), (p / "config.json").unlink()), "holds no config.json"),
        (lambda p: (write_evaluation(p, make_records(0, 1)), (p / "summary.json").write_text("[1]")), "no JSON object"),
    ],
)
def test_what_cannot_be_shown_is_refused(tmp_path, make, says):
    make(tmp_path / "x")
    with pytest.raises(ValueError, match=says):
        read_runs([tmp_path / "x"])


def test_too_many_folders_and_the_same_twice_are_refused(small_run):
    with pytest.raises(ValueError, match="found 9 folders, expected 1 to 8"):
        read_runs([small_run] * 9)
    with pytest.raises(ValueError, match="the same folder as"):
        read_runs([small_run, small_run.parent / "." / "small"])


def label(sentence):
    return intention_label({"hidden_intention": sentence})


def test_intentions_of_ones_own_have_their_ids(tmp_path):
    """Whether a profile names one by its key, its sentence or an alias."""
    entry = {"kind": "rational", "sentence": "You want it settled", "aliases": ["Settle it"]}
    entry |= {"reaction": "r", "raises": "u", "lowers": "d"}
    (tmp_path / "prompts").mkdir()
    (tmp_path / "prompts" / "hidden_intentions.json").write_text(json.dumps({"be_settled": entry}))
    wishes = ("be_settled", "You want it settled.", "Settle it", "Another wish")
    played = [record(i, "p", [40, 45]) | {"hidden_intention": wish} for i, wish in enumerate(wishes)]
    settings = {"user.prompts": str(tmp_path / "prompts"), "data.language": "en"}
    seen = write_evaluation(tmp_path / "seen", played, {"settings": settings})
    records = read_runs([seen])[0].logs[0].records
    assert [intention_label(one) for one in records] == ["be settled"] * 3 + ["Another wish"]


def test_intentions_have_short_names_in_the_published_order():
    assert label("你希望对方用心倾听你的情绪宣泄") == "listening"
    assert label("You want sincere praise for particular things that you did") == "praise"
    assert label("w " * 40) == "w w w w w w w w w w w w w w…"
    records = [record(0, "p", [40], wish=wish) for wish in ("to be <b>left</b> alone", "listening", "advice")]
    assert intention_labels(records) == ["advice", "listening", "to be <b>left</b> alone"]
