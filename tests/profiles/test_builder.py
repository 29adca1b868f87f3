"""Preparing profiles as a dataset: to the letter, once per content, and by several processes at once."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from rlver_jax.profiles import builder
from rlver_jax.profiles.builder import default_data_dir, prepare
from rlver_jax.profiles.reader import ProfileReader, shared_personas
from rlver_jax.profiles.schema import ProfileError, read_profiles

SAGE_FILES = ("gpt-4.1_result.jsonl", "llama3.3-70b_result.jsonl", "qwen2.5-72b_result.jsonl")


def line(number, **changes):
    return {
        "id": f"id{number}",
        "player": f"* 姓名：某{number} \n\0tail ",
        "scene": "雨。",
        "main_cha": "被动型",
        "cha_group": ["静", "慢", "真"][: number % 4],
        "task": "你希望对方用心倾听你的情绪宣泄",
    } | changes


def write(path, rows):
    path.write_text("".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows), encoding="utf-8")
    return path


def contents(folder):
    """Every file below a folder, with its bytes and the time it was written."""
    return {p: (p.read_bytes(), p.stat().st_mtime_ns) for p in sorted(folder.rglob("*")) if p.is_file()}


def test_what_was_written_is_read_back_by_index(tmp_path, capfd):
    rows = [line(i) for i in range(7)]
    rows[3]["first_talk"] = "喂？"
    rows[5]["topic"] = "雨"
    test_rows = [line(i) for i in range(2)]
    files = {
        "train": [write(tmp_path / "a.jsonl", rows[:4]), write(tmp_path / "b.jsonl", rows[4:])],
        "test": str(write(tmp_path / "t.jsonl", test_rows)),
    }
    sources = prepare(files, tmp_path / "data")
    assert capfd.readouterr() == ("", "")
    assert {split: len(source) for split, source in sources.items()} == {"train": 7, "test": 2}
    assert [profile.to_json() for profile in sources["train"]] == rows
    assert [sources["test"][i].to_json() for i in (1, 0, -1)] == [test_rows[1], test_rows[0], test_rows[1]]
    assert [profile.to_json() for profile in sources["train"][2:4]] == rows[2:4]
    for outside in (7, -8):
        with pytest.raises(IndexError, match="below 7"):
            sources["train"][outside]
    assert list((tmp_path / "data").rglob("*.array_record-*"))
    batch = ProfileReader(sources["train"], seed=0, batch_size=3).next_batch()
    assert [profile.to_json() for _, profile in batch] == [rows[index] for index, _ in batch]


def test_same_contents_are_reused_and_changed_ones_prepared_anew(tmp_path, monkeypatch):
    data, path = tmp_path / "data", write(tmp_path / "a.jsonl", [line(0), line(1)])
    prepare({"train": path}, data)
    before = contents(data)
    renamed = path.rename(tmp_path / "renamed.jsonl")
    with monkeypatch.context() as patch:
        patch.setattr(builder, "read_profiles", None)  # a second preparation would fail
        assert [p.id for p in prepare({"train": renamed}, data)["train"]] == ["id0", "id1"]
    assert contents(data) == before
    size = renamed.stat().st_size
    assert write(renamed, [line(0), line(5)]).stat().st_size == size  # not even its length tells
    assert [p.id for p in prepare({"train": renamed}, data)["train"]] == ["id0", "id5"]
    after = contents(data)
    assert before.items() <= after.items()
    assert len(after) == 2 * len(before)
    assert set(prepare({"test": renamed}, data)) == {"test"}  # same contents, another split
    assert len(contents(data)) == 3 * len(before)


def test_faults_of_all_splits_are_reported_and_leave_nothing(tmp_path):
    data = tmp_path / "data"
    files = {
        "train": write(tmp_path / "a.jsonl", [line(0), line(1, player="")]),
        "test": write(tmp_path / "b.jsonl", [line(0), line(0)]),
    }
    with pytest.raises(ProfileError) as caught:
        prepare(files, data)
    assert [fault.split(": ")[0] for fault in caught.value.faults] == [
        f"{files['train']}:2",
        f"{files['test']}:2",
    ]
    assert list(data.rglob("*")) == []
    with pytest.raises(ProfileError) as caught:
        prepare(files | {"more": tmp_path / "missing.jsonl"}, data)
    assert len(caught.value.faults) == 3
    assert "missing.jsonl: found no such file" in caught.value.faults[2]


def test_bad_splits_and_folders(tmp_path):
    path = write(tmp_path / "a.jsonl", [line(0)])
    for split in ("all", "train[:3]", ""):
        with pytest.raises(ValueError, match="expected letters, digits and _"):
            prepare({split: path}, tmp_path / "data")
    with pytest.raises(ValueError, match="no split was given"):
        prepare({}, tmp_path / "data")
    with pytest.raises(RuntimeError, match="name a folder that can be written"):
        prepare({"train": path}, path)


def test_a_dataset_that_lost_a_file_is_named(tmp_path):
    path = write(tmp_path / "a.jsonl", [line(0)])
    prepare({"train": path}, tmp_path / "data")
    (records,) = (tmp_path / "data").rglob("*.array_record-*")
    records.unlink()
    with pytest.raises(RuntimeError, match=r"lack files of split 'train'; delete that folder"):
        prepare({"train": path}, tmp_path / "data")


def test_default_folder_is_that_of_tfds(monkeypatch, tmp_path):
    monkeypatch.setenv("TFDS_DATA_DIR", str(tmp_path / "sets"))
    assert default_data_dir() == tmp_path / "sets"
    prepare({"train": write(tmp_path / "a.jsonl", [line(0)])})
    assert list((tmp_path / "sets").rglob("*.array_record-*"))
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    monkeypatch.setenv("TFDS_DATA_DIR", "~/own")
    assert default_data_dir() == tmp_path / "home" / "own"
    monkeypatch.delenv("TFDS_DATA_DIR")
    assert default_data_dir() == tmp_path / "home" / "tensorflow_datasets"


RACER = """
import random, sys
from importlib.machinery import PathFinder
class WithoutTensorFlow(PathFinder):  # as if it were not installed, also where it is
    @classmethod
    def find_spec(cls, name, path=None, target=None):
        return None if name.split(".")[0] == "tensorflow" else super().find_spec(name, path, target)
sys.meta_path[sys.meta_path.index(PathFinder)] = WithoutTensorFlow
from pathlib import Path
from rlver_jax.profiles.builder import prepare
random.seed(0)  # as a training program may: TFDS names its temporary folders with this generator
print("ready", flush=True)
sys.stdin.readline()
print(",".join(profile.id for profile in prepare({"train": sys.argv[1]}, sys.argv[2])["train"]))
"""


def test_processes_that_prepare_at_once(tmp_path):
    path, data = write(tmp_path / "a.jsonl", [line(i) for i in range(300)]), tmp_path / "data"
    command = [sys.executable, "-c", RACER, str(path), str(data)]
    pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True}
    environment = os.environ | {"PYTHONPATH": str(Path(__file__).resolve().parents[2])}
    racers = [subprocess.Popen(command, env=environment, **pipes) for _ in range(2)]
    assert [racer.stdout.readline() for racer in racers] == ["ready\n"] * 2
    for racer in racers:
        racer.stdin.write("go\n")
        racer.stdin.flush()
    for racer in racers:
        out, err = racer.communicate(timeout=60)
        assert racer.returncode == 0, err
        assert out.strip() == ",".join(f"id{i}" for i in range(300))
    assert len(list(data.rglob("dataset_info.json"))) == 1
    assert list(data.glob(".preparing-*")) == []


def test_losing_the_race_uses_the_winner(tmp_path, monkeypatch):
    """The loser finds the target in place just when it renames: played out step by step, as no timing can."""
    path, data = write(tmp_path / "a.jsonl", [line(0), line(1)]), tmp_path / "data"
    rename = os.rename

    def overtaken(source, target):
        monkeypatch.setattr(os, "rename", rename)
        prepare({"train": path}, data)
        rename(source, target)

    monkeypatch.setattr(os, "rename", overtaken)
    assert [p.id for p in prepare({"train": path}, data)["train"]] == ["id0", "id1"]
    assert os.rename is rename
    assert list(data.glob(".preparing-*")) == []


def test_all_published_profiles_to_the_letter(tmp_path, published):
    files = {"train": published / "train_profile.jsonl", "test": published / "test_profile_first50.jsonl"}
    sources = prepare(files, tmp_path)
    for split, count in (("train", 500), ("test", 50)):
        rows = [json.loads(row) for row in files[split].read_text(encoding="utf-8").split("\n") if row]
        assert len(rows) == len(sources[split]) == count
        for i, row in enumerate(rows):
            profile = sources[split][i]
            assert profile.to_json() == row
            assert profile.scene == f"{profile.background}\n####隐藏主题:\n***{row['task']}"
            assert profile.kind in ("rational", "emotional")


def test_all_of_sage_results_with_their_first_talks(tmp_path, published):
    folder = published.parent / "sage"
    if not all((folder / name).exists() for name in SAGE_FILES):
        pytest.skip(f"no SAGE results in {folder}")
    files = {f"results_{i}": folder / name for i, name in enumerate(SAGE_FILES)}
    for split, source in prepare(files, tmp_path).items():
        rows = [json.loads(row) for row in files[split].read_text(encoding="utf-8").split("\n") if row]
        expected = [
            (
                r["id"],
                r["player"],
                r["scene"],
                r["task"],
                r["character"],
                r["topic"],
                r["history"][0]["content"],
            )
            for r in rows
        ]
        assert expected == [
            (p.id, p.persona, p.scene, p.hidden_intention, p.main_character, p.topic, p.first_talk) for p in source
        ]
        assert len(expected) == len({first_talk for *_, first_talk in expected}) == 100
        # SAGE's profiles are RLVER's whole test set: almost half of its personas are trained on.
        assert len(shared_personas(read_profiles(published / "train_profile.jsonl"), source)) == 47
