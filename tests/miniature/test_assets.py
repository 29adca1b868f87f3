"""A miniature's folder and its manifest."""

import json
import shutil

import pytest

from configs.miniature import get_config
from rlver_jax.config.validate import check_training, validate
from rlver_jax.miniature import assets, check


@pytest.fixture
def folder(tmp_path):
    for name in (assets.POLICY, assets.USER):
        (tmp_path / name).mkdir()
        (tmp_path / name / "model.safetensors").write_bytes(name.encode())
    for name in (assets.TRAIN, assets.EVAL):
        (tmp_path / name).write_text(f"{name}\n")
    assets.write_manifest(tmp_path, {"steps": {"user": 1}})
    return tmp_path


def test_the_manifest_tells_what_was_changed_added_and_lost(folder):
    assert assets.changed_files(folder) == []
    manifest = json.loads((folder / assets.MANIFEST).read_text())
    assert manifest["sha256"]["user/model.safetensors"] == (
        "04f8996da763b7a969b1028ee3007569eaf3a635486ddab211d512c85b9df8fb"  # sha256sum of "user"
    )
    assert manifest["steps"] == {"user": 1}
    (folder / "user" / "model.safetensors").write_bytes(b"other")
    (folder / "policy" / "more.json").write_text("{}")
    (folder / assets.EVAL).unlink()
    assert assets.changed_files(folder) == ["eval.jsonl", "policy/more.json", "user/model.safetensors"]


@pytest.mark.parametrize("arg", ["", "ppo", "direct", "final", "challenging", "ppo,direct,final,challenging"])
def test_the_shipped_config_is_valid_with_no_path_given(arg):
    config = get_config(arg)
    validate(config, 1)
    check_training(config)
    assert (config.algorithm.estimator == "gae") == ("ppo" in arg)
    assert (config.policy.mode == "direct") == ("direct" in arg)
    assert (config.reward.kind, config.algorithm.credit == "turn") == (
        ("final", False) if "final" in arg else ("per_turn", "ppo" not in arg)
    )
    assert (config.user.style == "challenging") == ("challenging" in arg)


def test_what_is_shipped_is_what_the_manifest_says_holds_every_gate_and_is_small():
    folder = assets.shipped()
    assert assets.changed_files(folder) == []
    quality = json.loads((folder / assets.MANIFEST).read_text())["quality"]
    assert [gate.name for gate in check.gates(quality) if not gate.holds] == []
    assert sum(file.stat().st_size for file in folder.rglob("*") if file.is_file()) <= 12e6


def test_a_missing_folder_says_how_to_get_it(folder, monkeypatch):
    shutil.rmtree(folder)
    monkeypatch.setattr(assets, "SHIPPED", folder)
    with pytest.raises(FileNotFoundError, match="install the package again"):
        assets.shipped()
