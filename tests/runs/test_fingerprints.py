"""Fingerprints of models: every change that real life brings, quickly, and old evaluations' still known."""

import hashlib
import json
import shutil

import numpy as np
import pytest
from safetensors.numpy import save_file

from configs import debug
from configs.base import get_config
from rlver_jax.evaluation.folder import EvaluationFolder
from rlver_jax.models.safetensors_files import Tensor, find_tensors
from rlver_jax.runs.fingerprints import _PIECE, _byte_ranges, model_fingerprint, model_parts, same

WIDTH = 1024


@pytest.fixture(scope="module")
def large(tmp_path_factory):
    """A folder with 80 MiB of weights, in matrices of 4, 8 and 16 MiB."""
    folder = tmp_path_factory.mktemp("large")
    for file in debug.WORLD.iterdir():
        if file.is_file():
            shutil.copy(file, folder)
    draw = np.random.default_rng(0)
    shapes = {"model.embed_tokens.weight": 4 * WIDTH, "model.norm.weight": 1}
    shapes |= {f"model.layers.{i}.{name}.weight": WIDTH for i in range(5) for name in ("q", "k", "up")}
    tensors = {name: draw.standard_normal((rows, WIDTH), np.float32) for name, rows in shapes.items()}
    save_file(tensors, folder / "model.safetensors")
    return folder


def weights(folder) -> str:
    return model_parts(folder, weights=True)["weights"]


def tensors_of(folder) -> dict[str, Tensor]:
    return find_tensors(folder)


@pytest.fixture
def changed(large, tmp_path):
    """Gives the weights' fingerprint with bytes added to at some places, by (tensor, first, count)."""
    before = weights(large)

    def after(*edits):
        folder = shutil.copytree(large, tmp_path / str(len(list(tmp_path.iterdir()))))
        tensors = tensors_of(folder)
        with (folder / "model.safetensors").open("r+b") as file:
            for name, first, count in edits:
                at = tensors[name].begin + first % (tensors[name].end - tensors[name].begin)
                file.seek(at)
                data = bytes((byte + 1) % 256 for byte in file.read(count))
                file.seek(at)
                file.write(data)
        return weights(folder) != before

    return after


def test_a_step_of_training_is_seen_in_any_matrix(large, changed):
    """All of one matrix changes, as by merging a LoRA adapter of one projection."""
    for name in ("model.layers.3.k.weight", "model.embed_tokens.weight", "model.norm.weight"):
        tensor = tensors_of(large)[name]
        assert changed((name, 0, tensor.end - tensor.begin)), name
    assert not changed()


def test_tokens_that_were_added_are_seen(changed):
    """The last rows of the embedding, of which padding may follow: 250 rows before the end, one row of 4 KiB."""
    assert changed(("model.embed_tokens.weight", -250 * WIDTH * 4, WIDTH * 4))


def test_rows_near_each_other_are_seen(changed):
    """An eighth of a matrix anywhere, as where some heads or experts were replaced."""
    size = 4 * WIDTH * WIDTH
    for first in range(0, size - size // 6, size // 16):
        assert changed(("model.layers.1.up.weight", first, size // 6)), first


def test_single_numbers_of_small_models_and_vectors_are_seen(changed, tmp_path):
    assert changed(("model.norm.weight", 777, 1))
    small = shutil.copytree(debug.WORLD, tmp_path / "small")
    table = np.zeros((3000, 1024), np.float32)  # 12 MiB, read whole
    save_file({"model.embed_tokens.weight": table}, small / "model.safetensors")
    before = weights(small)
    table[1234, 567] = 1e-3
    save_file({"model.embed_tokens.weight": table}, small / "model.safetensors")
    assert weights(small) != before


def test_what_is_read_of_a_large_model_is_little(large):
    """A 72B model has 560 matrices of the kind: within 200 MB."""
    tensor = tensors_of(large)["model.layers.0.q.weight"]
    ranges = list(_byte_ranges(tensor, whole=False))
    assert sum(size for _, size in ranges) == 8 * _PIECE == 131_072
    assert ranges[0][0] == tensor.begin
    assert sum(ranges[-1]) == tensor.end


def first_form(folder) -> str:
    """The fingerprint of version 0.1, written down independently: names, sizes, and 64 pieces of 64 KiB."""
    digest = hashlib.sha256()
    add = lambda data: digest.update(len(data).to_bytes(8, "big") + data)  # noqa: E731
    for file in sorted(f for f in folder.iterdir() if f.suffix in (".safetensors", ".model", ".json")):
        data = file.read_bytes()
        add(file.name.encode())
        add(str(len(data)).encode())
        if len(data) <= 64 * 65536:
            add(data)
        else:
            for i in range(64):
                at = (len(data) - 65536) * i // 63
                add(data[at : at + 65536])
    return digest.hexdigest()[:16]


def test_evaluations_of_older_versions_are_known(large, tmp_path):
    config = get_config().user
    config.path = str(large)
    new = model_fingerprint(config, "user")
    assert new.partition(".")[0] == first_form(large)
    settings = {"fingerprint.user": new, "eval.num_profiles": 3, "eval.seed": 0}
    (tmp_path / "progress.json").write_text(
        json.dumps({"settings": settings | {"fingerprint.user": first_form(large)}, "played": []})
    )
    reports = []
    assert EvaluationFolder.open(tmp_path, settings, report=reports.append).settings["fingerprint.user"] == new
    assert "lack fingerprint.user in its present form" in reports[0]
    with pytest.raises(ValueError, match=r"fingerprint.user was"):
        EvaluationFolder.open(tmp_path, settings | {"fingerprint.user": "0000.1111"})


def test_only_the_second_form_counts_where_both_have_it():
    assert same("a.b", "c.b")
    assert not same("a.b", "a.c")
    assert same("a", "a.c")
    assert not same("b", "a.b")
    assert same(None, None)
    assert not same("a", None)


def test_an_evaluation_goes_on_without_a_field_that_came_later(tmp_path):
    settings = {"eval.num_profiles": 3, "eval.seed": 0, "rollout.top_k": 0, "backend": "cpu"}
    old = {name: value for name, value in settings.items() if name != "rollout.top_k"}
    (tmp_path / "progress.json").write_text(json.dumps({"settings": old, "played": []}))
    reports = []
    assert EvaluationFolder.open(tmp_path, settings, report=reports.append).settings == settings
    assert "settings lack rollout.top_k=0: as here" in reports[0]
    with pytest.raises(ValueError, match="rollout.top_k did not exist, which was as 0, is 5"):
        EvaluationFolder.open(tmp_path, settings | {"rollout.top_k": 5})
    with pytest.raises(ValueError, match="backend was 'cpu', is 'tpu'"):
        EvaluationFolder.open(tmp_path, settings | {"backend": "tpu"})
    (tmp_path / "progress.json").write_text(json.dumps({"settings": settings | {"eval.gone": 1}, "played": []}))
    with pytest.raises(ValueError, match="eval.gone was 1, but this version of rlver_jax has no such field"):
        EvaluationFolder.open(tmp_path, settings)
