"""data.train and data.eval as JSONL and as a prepared data set: the same profiles, order, fingerprints and runs."""

import hashlib
import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from configs import debug
from rlver_jax.config.datasets import DatasetSpecError, locate
from rlver_jax.config.fields import get_config
from rlver_jax.config.validate import ConfigError, validate
from rlver_jax.dialogues.known_profiles import KnownProfiles
from rlver_jax.dialogues.verify_files import plans_of
from rlver_jax.evaluation.play import chosen_profiles
from rlver_jax.profiles import builder
from rlver_jax.profiles.builder import prepare
from rlver_jax.profiles.prepared import PreparedProfiles
from rlver_jax.profiles.reader import ProfileReader, shared_personas
from rlver_jax.profiles.schema import Profile, read_profiles
from rlver_jax.profiles.sources import open_each, open_profiles
from rlver_jax.training.loop import fingerprints_of
from tests.profiles.test_builder import line, write
from tests.training.test_loop import run as train

ROOT = Path(__file__).resolve().parents[2]
COUNT = 43


@pytest.fixture(scope="module")
def world(tmp_path_factory):
    """JSONL files, and sets/ with the data set of splits train and eval."""
    folder = tmp_path_factory.mktemp("world")
    rows = [line(i, first_talk=f"喂 {i}") if i % 3 else line(i) for i in range(COUNT)]
    write(folder / "a.jsonl", rows[:20])
    write(folder / "b.jsonl", rows[20:])
    write(folder / "eval.jsonl", [line(i, player=f"* 姓名：某{i} \n\0tail ") for i in (50, 7, 51)])
    prepare({"train": (folder / "a.jsonl", folder / "b.jsonl"), "eval": folder / "eval.jsonl"}, folder / "sets")
    return folder


def config_of(world, **data):
    config = get_config()
    config.data.dir = str(world / "sets")
    config.data.update(data)
    return config


def files_of(world):
    return config_of(world, train=f"{world}/a.jsonl,{world}/b.jsonl", eval=f"{world}/eval.jsonl")


def sets_of(world):
    return config_of(world, train="tfds:rlver_profiles", eval="tfds:rlver_profiles:1.0.0")


@pytest.mark.parametrize("shuffle", [True, False])
@pytest.mark.parametrize("seed", [0, 7, 2**64 - 1])
def test_the_same_batches_over_epochs_and_after_resuming_with_the_other(world, seed, shuffle):
    listed, prepared = (open_profiles(of(world), "data.train") for of in (files_of, sets_of))
    assert isinstance(prepared, PreparedProfiles)
    options = {"seed": seed, "batch_size": 8, "shuffle": shuffle}
    readers = [ProfileReader(source, **options) for source in (listed, prepared)]
    for _ in range(3 * COUNT // 8):
        a, b = (reader.next_batch() for reader in readers)
        assert a == b
    assert readers[0].state() == readers[1].state()
    resumed = [ProfileReader(source, **options) for source in (prepared, listed)]
    for reader, other in zip(resumed, readers, strict=True):
        reader.restore(json.loads(json.dumps(other.state())))
    for _ in range(2 * COUNT // 8):
        a, b, c, d = (reader.next_batch() for reader in (*readers, *resumed))
        assert a == b == c == d


def test_the_same_evaluation_profiles_and_defaults_of_splits(world):
    files, sets = files_of(world), sets_of(world)
    assert chosen_profiles(files) == list(chosen_profiles(sets)) == read_profiles(world / "eval.jsonl")
    for config in (files, sets):
        config.data.eval, config.eval.num_profiles = "", 5
    assert chosen_profiles(files) == list(chosen_profiles(sets)) == read_profiles(world / "a.jsonl")[:5]
    named = config_of(world, train="tfds:rlver_profiles:1.0.0?split=eval")
    assert list(open_profiles(named, "data.train")) == read_profiles(world / "eval.jsonl")


def test_the_fingerprint_is_that_of_the_files(world):
    """The list of all profiles as JSON, hashed here as runs of earlier versions have it in fingerprints.json."""
    rows = [profile.to_json() for profile in read_profiles((world / "a.jsonl", world / "b.jsonl"))]
    text = json.dumps(rows).encode()
    expected = hashlib.sha256(len(text).to_bytes(8, "big") + text).hexdigest()[:16]
    assert open_profiles(sets_of(world), "data.train").fingerprint == expected
    for config in (files_of(world), sets_of(world)):
        for name in ("policy", "user", "critic"):
            config[name].path, config[name].init = str(debug.WORLD), "random"
        config.eval.every = 1
        contents = fingerprints_of(config)
        assert contents["profiles.data.train"] == expected
        assert contents["profiles.data.eval"] == open_profiles(sets_of(world), "data.eval").fingerprint


def test_profiles_are_found_by_id_and_persona_without_reading_all(world, monkeypatch):
    prepared = open_profiles(sets_of(world), "data.train")
    indices = []
    get = PreparedProfiles.__getitem__
    monkeypatch.setattr(PreparedProfiles, "__getitem__", lambda self, i: indices.append(i) or get(self, i))
    assert prepared.with_id("id33") == read_profiles(world / "b.jsonl")[13]
    assert prepared.with_id("id3") == read_profiles(world / "a.jsonl")[3]
    assert prepared.with_id("nobody") is None
    held_out = read_profiles(world / "eval.jsonl")
    assert shared_personas(prepared, held_out) == [held_out[1].persona]
    assert len(indices) == 3
    record = {"profile": "id41", "hidden_intention": "x", "messages": [{"content": "", "generated": False}]}
    known = KnownProfiles.of_sets(open_each(sets_of(world)))
    assert known.of(record) == read_profiles(world / "b.jsonl")[21]
    assert len(indices) == 4
    assert known.of(record | {"profile": "nobody"}) is None


def test_of_two_profiles_with_one_id_the_one_that_a_record_fits(world):
    """id7 is in both splits, with first words in training alone."""
    messages = [{"content": "喂 7", "generated": False}]
    record = {"profile": "id7", "hidden_intention": line(7)["task"], "messages": messages}
    for config in (files_of(world), sets_of(world)):
        known = KnownProfiles.of_sets(open_each(config))
        assert known.of(record).first_talk == "喂 7"
        made_up = record | {"messages": [{"content": "?", "generated": True}]}
        assert known.of(made_up).first_talk is None


def test_verify_plans_the_same_dialogues(world):
    plans = []
    for config in (files_of(world), sets_of(world)):
        config.rollout.batch, config.rollout.group = 8, 4
        plans.append(plans_of(config, chosen_profiles(config)))
    for a, b in zip(*plans, strict=True):
        assert [a.profile(i) for i in range(200)] == [b.profile(i) for i in range(200)]


@pytest.mark.parametrize(
    ("value", "parts"),
    [
        ("tfds:", ["is malformed, expected tfds:rlver_profiles[:VERSION][?split=NAME]"]),
        ("tfds:rlver_profiles:latest", ["is malformed"]),
        ("tfds:rlver_profiles:1.0", ["is malformed"]),
        ("tfds:rlver_profiles?part=train", ["is malformed"]),
        ("tfds:rlver_profiles?split=", ["is malformed"]),
        ("tfds:rlver_profiles?split=train[:10]", ["is malformed", "a part of a split is none"]),
        ("tfds:rlver_profile", ["unknown data set 'rlver_profile'", "did you mean rlver_profiles?"]),
        ("tfds:imdb", ["unknown data set 'imdb'", "profiles are prepared as rlver_profiles"]),
        ("tfds:rlver_profiles:9.9.9", ["has no version 9.9.9", "which holds 1.0.0"]),
        ("tfds:rlver_profiles/mine:1.0.0", ["has no config mine", "which holds sha256_"]),
        ("tfds:rlver_profiles?split=test", ["has no split 'test'", "but eval, train", "?split=eval"]),
        ("a.jsonl,tfds:rlver_profiles", ["names more than one data set, or files beside it"]),
        ("tfds:rlver_profiles,tfds:rlver_profiles?split=eval", ["names more than one data set"]),
        ("tfds://rlver_profiles", ["tfds://rlver_profiles"]),
    ],
)
@pytest.mark.parametrize("field", ["train", "eval"])
def test_what_names_no_split_is_refused_with_the_config(world, field, value, parts):
    with pytest.raises(ConfigError) as caught:
        validate(config_of(world, **{field: value}), needs=())
    for part in (f"data.{field}={value!r}", *parts):
        assert part in str(caught.value)


def test_what_is_not_prepared_is_told_with_the_command(world, tmp_path, monkeypatch):
    monkeypatch.setenv("TFDS_DATA_DIR", str(tmp_path / "none"))
    cases = {
        "": f"no rlver_profiles is prepared in {tmp_path}/none; prepare it with python -m rlver_jax.profiles.builder "
        f"--profiles=FILE, or name the folder of --data_dir in data.dir",
        f"{tmp_path}/other": f"prepare it with python -m rlver_jax.profiles.builder --profiles=FILE "
        f"--data_dir={tmp_path}/other",
        "gs://bucket/sets": "data.dir='gs://bucket/sets': is a URL",
        str(world / "a.jsonl"): "no rlver_profiles is prepared",
    }
    for folder, told in cases.items():
        with pytest.raises(ConfigError) as caught:
            validate(config_of(world, train="tfds:rlver_profiles", dir=folder), needs=())
        assert told in str(caught.value)
    prepare({"train": world / "a.jsonl"}, tmp_path / "one")
    with pytest.raises(ConfigError, match=r"no split 'eval' .*, but train; .*--eval=FILE"):
        validate(config_of(world, eval="tfds:rlver_profiles", dir=f"{tmp_path}/one"), needs=())


def test_of_several_sets_the_one_with_the_split_and_else_it_must_be_named(world, tmp_path):
    prepare({"train": world / "a.jsonl"}, tmp_path)
    prepare({"eval": world / "eval.jsonl"}, tmp_path)
    assert locate("tfds:rlver_profiles", str(tmp_path), "eval").split == "eval"
    prepare({"train": world / "b.jsonl"}, tmp_path)
    with pytest.raises(DatasetSpecError, match=r"several rlver_profiles .* name one of tfds:\S+, tfds:\S+") as caught:
        locate("tfds:rlver_profiles:1.0.0", str(tmp_path), "train")
    for spec in str(caught.value).split("name one of ")[1].split(", "):
        config = config_of(world, train=spec, dir=str(tmp_path))
        validate(config, needs=())
        assert len(open_profiles(config, "data.train")) in (20, 23)


def test_a_set_that_lacks_files_or_is_broken(world, tmp_path):
    shutil.copytree(world / "sets", tmp_path / "sets")
    (ids,) = (tmp_path / "sets").rglob("*train.ids.npy")
    ids.unlink()
    config = config_of(world, train="tfds:rlver_profiles", dir=str(tmp_path / "sets"))
    with pytest.raises(ValueError, match=r"lack files of split 'train'; delete that folder, and prepare it again"):
        open_profiles(config, "data.train")
    (info,) = (tmp_path / "sets").rglob("dataset_info.json")
    info.write_text("{")
    with pytest.raises(ConfigError, match=r"dataset_info.json cannot be read .* prepare it again"):
        validate(config, needs=())


def command(*arguments, **environment):
    words = [sys.executable, "-m", "rlver_jax.profiles.builder", *map(str, arguments)]
    return subprocess.run(words, cwd=ROOT, env=os.environ | environment, capture_output=True, text=True, check=False)


def test_the_command_prepares_what_its_last_line_names(world, tmp_path):
    flags = [f"--profiles={world}/a.jsonl,{world}/b.jsonl", f"--eval={world}/eval.jsonl"]
    done = command(*flags, TFDS_DATA_DIR=str(tmp_path))
    assert (done.returncode, done.stderr) == (0, "")
    first, fields = done.stdout.splitlines()
    assert first.startswith(f"43 train, 3 eval profiles in {tmp_path}/rlver_profiles/sha256_")
    named = dict(field.removeprefix("--config.data.").split("=", 1) for field in fields.split())
    config = config_of(world, **named, dir=str(tmp_path))
    assert list(open_profiles(config, "data.train")) == read_profiles((world / "a.jsonl", world / "b.jsonl"))
    assert list(open_profiles(config, "data.eval")) == read_profiles(world / "eval.jsonl")


def test_bad_usage_of_the_command(world, tmp_path, capsys):
    bad = write(tmp_path / "bad.jsonl", [line(0), line(0), line(1, player="")])
    sets, good = f"--data_dir={tmp_path}/sets", f"--profiles={world}/a.jsonl"
    cases = [
        ([sets], "no --profiles was given"),
        ([sets, good, "more"], "found 'more', expected flags only"),
        ([sets, good, "--evil=x"], "evil"),
        ([sets, f"--profiles={tmp_path}/none.jsonl"], "none.jsonl: found no such file"),
        ([sets, f"--profiles={bad}"], "2 faults in the profiles, none was loaded"),
        ([sets, good, f"--eval={bad}"], f"{bad}:2: found id 'id0' again, which {bad}:1 has already"),
        (["--data_dir=gs://bucket/sets", good], "is a URL"),
        ([f"--data_dir={bad}", good], "can't write the data set"),
    ]
    for arguments, told in cases:
        assert builder.main(arguments) == 2, arguments
        out, err = capsys.readouterr()
        assert out == ""
        assert err.startswith("profiles.builder: ")
        assert told in err.replace("\n", " ").replace("  ", " ") or told in err
    assert not list((tmp_path / "sets").rglob("*.array_record*"))
    with pytest.raises(SystemExit) as ended:
        builder.main(["--help"])
    assert ended.value.code == 0
    assert "--data_dir" in capsys.readouterr().out


@pytest.mark.slow
def test_training_from_the_data_set_is_training_from_its_files(tmp_path, monkeypatch):
    """A step of debug.py: dialogues byte for byte, metrics but for times; then each goes on with the other's."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    profiles = debug.WORLD / "profiles.jsonl"
    prepare({"train": profiles, "eval": profiles}, tmp_path / "data")
    common = {"log.dialogues_every": 1, "checkpoint.every": 1, "data.dir": str(tmp_path / "data")}
    names = {f"data.{split}": "tfds:rlver_profiles" for split in ("train", "eval")}
    for folder, fields in (("files", {}), ("sets", names)):
        train(tmp_path / folder, **{"train.steps": 1}, **common, **fields)
    assert logs_of(tmp_path / "files", 1) == logs_of(tmp_path / "sets", 1)
    for folder, fields in (("files", names), ("sets", {})):
        train(tmp_path / folder, **{"train.steps": 2}, **common, **fields)
    assert logs_of(tmp_path / "files", 2) == logs_of(tmp_path / "sets", 2)


def logs_of(workdir, steps):
    """(metrics but for times, dialogues)."""
    rows = [json.loads(row) for row in (workdir / "metrics.jsonl").read_text().splitlines()]
    files = sorted((workdir / "dialogues").glob("*.jsonl"))
    assert len(files) == steps
    return [{k: v for k, v in row.items() if not k.startswith("time/")} for row in rows], [
        f.read_bytes() for f in files
    ]


def test_a_stranger_is_in_no_set(world):
    prepared = open_profiles(sets_of(world), "data.train")
    assert not prepared.has_persona("somebody else")
    assert shared_personas(prepared, [Profile("x", "somebody else", "s", "w", "c")]) == []
