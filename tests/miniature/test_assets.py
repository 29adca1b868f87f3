"""A miniature's folder and its manifest."""

import json

import pytest

from rlver_jax.miniature import assets


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
