"""A run's folder goes on with the run it began with, and with no other."""

import json

import pytest

from configs.base import get_config
from rlver_jax.config.validate import ConfigError, flatten, unflatten
from rlver_jax.training.workdir import RunFolder

FREE = ("train.steps", "log")


def config(**fields):
    made = get_config()
    made.update_from_flattened_dict({name.replace("__", "."): value for name, value in fields.items()})
    return made


def opened(path, **fields):
    return RunFolder.open(path, config(**fields), free_fields=FREE)


def test_a_new_folder_holds_the_config(tmp_path):
    folder = opened(tmp_path / "a" / "run", train__seed=4)
    saved = json.loads((tmp_path / "a" / "run" / "config.json").read_text())
    assert saved["train.seed"] == 4
    assert saved["emotion.thresholds"] == [100, 70, 40, 10]
    assert flatten(unflatten(folder.config())) == flatten(config(train__seed=4)), "tuples are tuples again"


def test_the_same_config_goes_on_and_free_fields_may_change(tmp_path):
    opened(tmp_path, train__steps=5)
    folder = opened(tmp_path, train__steps=8, log__dialogues_every=1)
    assert folder.config()["train.steps"] == 8


def test_another_config_is_refused_field_by_field(tmp_path):
    opened(tmp_path).metrics.write_text('{"step": 1}\n')
    with pytest.raises(
        ValueError, match=r"another config \(loss.kl was 0.0, is 0.5; train.seed was 0, is 1\)"
    ) as error:
        opened(tmp_path, train__seed=1, loss__kl=0.5)
    assert "name another --workdir" in str(error.value)
    with pytest.raises(ValueError, match="and 1 more"):
        opened(
            tmp_path, train__seed=1, loss__kl=0.5, rollout__batch=8, train__epochs=2, rollout__group=2, rollout__top_k=1
        )


def test_a_finished_run_is_refused_unless_it_gets_more_steps(tmp_path):
    opened(tmp_path, train__steps=5).mark_finished(5)
    with pytest.raises(ValueError, match=r"holds a finished run of 5 steps.*raise train.steps above 5"):
        opened(tmp_path, train__steps=5)
    assert opened(tmp_path, train__steps=6).config()["train.steps"] == 6


def test_a_folder_of_something_else_is_left_alone(tmp_path):
    (tmp_path / "thesis.tex").write_text("x")
    with pytest.raises(ValueError, match=r"is not empty \(thesis.tex\) and holds no config.json"):
        opened(tmp_path)
    assert sorted(p.name for p in tmp_path.iterdir()) == ["thesis.tex"]


@pytest.mark.parametrize("text", ["", "[1, 2", "3"])
def test_a_broken_config_is_named(tmp_path, text):
    (tmp_path / "config.json").write_text(text)
    with pytest.raises(ValueError, match=r"config.json: is no config of a run"):
        opened(tmp_path)


def test_a_config_of_another_version_is_refused():
    with pytest.raises(ConfigError, match="no_such"):
        unflatten({"rollout.no_such": 3})


def test_no_run_there(tmp_path):
    with pytest.raises(ValueError, match="expected the --workdir of a training run"):
        RunFolder(tmp_path / "none").config()


def test_dialogues_of_later_steps_go(tmp_path):
    folder = opened(tmp_path)
    for step in (1, 9, 10, 11, 200):
        folder.dialogues(step).write_text("{}\n")
    folder.drop_after(10)
    assert [p.name for p in sorted(folder.dialogues(1).parent.iterdir())] == [
        f"step_{step:06d}.jsonl" for step in (1, 9, 10)
    ]
