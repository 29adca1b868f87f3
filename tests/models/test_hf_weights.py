"""Reading and writing Hugging Face folders: exact values, every fault named."""

import json
import re
import shutil
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

from rlver_jax.models.config import Qwen2Config
from rlver_jax.models.hf_weights import INDEX_FILE, WeightsError, load_params, save_params
from rlver_jax.models.qwen2 import Qwen2
from rlver_jax.parallel.mesh import make_mesh
from rlver_jax.parallel.rules import ShardingError

GOLDEN = Path(__file__).parent / "golden"


def model(name="untied", **options):
    return Qwen2(Qwen2Config.from_hf(GOLDEN / name), **options)


@pytest.fixture
def folder(tmp_path):
    """A sharded copy of a golden model: three files and their index."""
    out = tmp_path / "model"
    source = model()
    save_params(out, load_params(GOLDEN / "untied", source), source.config, max_shard_bytes=150_000)
    assert len(list(out.glob("model-*.safetensors"))) >= 3
    return out


def test_reads_what_the_file_holds():
    """Values against safetensors' own reader."""
    raw = load_file(GOLDEN / "untied" / "model.safetensors")
    params = load_params(GOLDEN / "untied", model())
    np.testing.assert_array_equal(params["embed"]["kernel"], raw["model.embed_tokens.weight"])
    np.testing.assert_array_equal(params["lm_head"], raw["lm_head.weight"])
    for i in range(3):
        got, prefix = jax.tree.map(lambda x, i=i: x[i], params["layers"]), f"model.layers.{i}."
        np.testing.assert_array_equal(got["down"]["kernel"], raw[prefix + "mlp.down_proj.weight"].T)
        np.testing.assert_array_equal(got["attn"]["k"]["bias"], raw[prefix + "self_attn.k_proj.bias"])


@pytest.mark.parametrize("scan", [True, False])
@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16])
def test_export_then_import_is_bit_equal(tmp_path, scan, dtype):
    net = model(scan_layers=scan, param_dtype=dtype)
    params = load_params(GOLDEN / "untied", net)
    save_params(tmp_path / "out", params, net.config, max_shard_bytes=100_000)
    assert Qwen2Config.from_hf(tmp_path / "out") == net.config
    jax.tree.map(np.testing.assert_array_equal, params, load_params(tmp_path / "out", net))


def test_export_writes_the_tensors_transformers_wrote(tmp_path):
    params = load_params(GOLDEN / "tied", model("tied"))
    save_params(tmp_path / "out", params, model("tied").config)
    mine, theirs = (load_file(f / "model.safetensors") for f in (tmp_path / "out", GOLDEN / "tied"))
    assert mine.keys() == theirs.keys()
    for name in theirs:
        np.testing.assert_array_equal(mine[name], theirs[name])


def test_sharded_loading_reads_each_devices_slice(folder):
    """On a mesh each device holds its slice only; values equal the whole."""
    net, mesh = model(), make_mesh(fsdp=8, tensor=1)
    whole, parts = load_params(folder, net), load_params(folder, net, mesh=mesh)
    jax.tree.map(np.testing.assert_array_equal, whole, parts)
    assert {s.data.shape for s in parts["layers"]["up"]["kernel"].addressable_shards} == {(3, 6, 80)}
    exported = folder.parent / "again"
    save_params(exported, parts, net.config)
    jax.tree.map(np.testing.assert_array_equal, whole, load_params(exported, net))


def test_what_cannot_be_divided_is_named(folder):
    with pytest.raises(ShardingError, match=r"embed/kernel \(131, 48\): axis 'vocab' of size 131 .* tensor=2"):
        load_params(folder, model(), mesh=make_mesh(fsdp=4, tensor=2))


def rewrite(file, change):
    tensors = load_file(file)
    change(tensors)
    save_file(tensors, file)


def holder(folder, tensor):
    return folder / json.loads((folder / INDEX_FILE).read_text())["weight_map"][tensor]


UP = "model.layers.1.mlp.up_proj.weight"


def fails(folder, *parts):
    with pytest.raises(WeightsError) as error:
        load_params(folder, model())
    for part in parts:
        assert re.search(part, str(error.value)), f"{part!r} not in {error.value}"


def test_missing_tensor(folder):
    file = holder(folder, UP)
    rewrite(file, lambda t: t.pop(UP))
    fails(folder, UP, file.name, "missing")
    index = json.loads((folder / INDEX_FILE).read_text())
    del index["weight_map"][UP]
    (folder / INDEX_FILE).write_text(json.dumps(index))
    fails(folder, UP, r"\(80, 48\)", "missing")


def test_extra_tensor(folder):
    file = holder(folder, UP)
    rewrite(file, lambda t: t.update(extra=np.zeros(3, np.float32)))
    fails(folder, "extra", file.name)
    index = json.loads((folder / INDEX_FILE).read_text())
    index["weight_map"]["extra"] = file.name
    (folder / INDEX_FILE).write_text(json.dumps(index))
    fails(folder, "extra", file.name, "config.json")


def test_wrong_shape(folder):
    file = holder(folder, UP)
    rewrite(file, lambda t: t.update({UP: t[UP].T.copy()}))
    fails(folder, UP, file.name, r"\(48, 80\)", r"expected \(80, 48\)")


def test_truncated_file(folder):
    file = holder(folder, UP)
    data = file.read_bytes()
    file.write_bytes(data[:-100])
    fails(folder, file.name, r"tensor model\.", "truncated")
    file.write_bytes(data[:20])
    fails(folder, file.name, "truncated")


def test_garbage_and_missing_files(folder):
    file = holder(folder, UP)
    file.write_bytes((2**40).to_bytes(8, "little") + b"x" * 100)
    fails(folder, file.name)
    file.unlink()
    fails(folder, file.name, "no such file")
    shutil.rmtree(folder)
    folder.mkdir()
    fails(folder, "neither")


def test_export_refuses_a_used_folder(folder):
    with pytest.raises(FileExistsError, match="new folder"):
        save_params(folder, load_params(folder, model()), model().config)
