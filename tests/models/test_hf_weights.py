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

from rlver_jax.config.foreign_weights import INDEX_FILE
from rlver_jax.models.families import Qwen2Config
from rlver_jax.models.hf_weights import load_params, save_params
from rlver_jax.models.qwen import Qwen2
from rlver_jax.models.safetensors_files import WeightsError
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


def test_reads_the_norms_of_queries_and_keys():
    raw = load_file(GOLDEN / "qwen3_untied" / "model.safetensors")
    params = load_params(GOLDEN / "qwen3_untied", model("qwen3_untied"))
    assert params["layers"]["attn"].keys() == {"q", "k", "v", "o", "q_norm", "k_norm"}
    for which in ("q", "k"):
        actual = params["layers"]["attn"][f"{which}_norm"]["scale"]
        want = [raw[f"model.layers.{i}.self_attn.{which}_norm.weight"] for i in range(3)]
        np.testing.assert_array_equal(actual, want)
        assert params["layers"]["attn"][which].keys() == {"kernel"}


def test_weights_of_another_family_are_named(tmp_path):
    """A config.json of one family beside the weights of the other."""
    shutil.copytree(GOLDEN / "untied", tmp_path / "m")
    told = json.loads((tmp_path / "m" / "config.json").read_text())
    told |= {"model_type": "qwen3", "architectures": ["Qwen3ForCausalLM"], "head_dim": 12}
    (tmp_path / "m" / "config.json").write_text(json.dumps(told))
    with pytest.raises(WeightsError, match=r"self_attn.k_norm.weight of shape \(12,\) is missing"):
        load_params(tmp_path / "m", Qwen2(Qwen2Config.from_hf(tmp_path / "m")))


@pytest.mark.parametrize("name", ["untied", "qwen3_untied"])
@pytest.mark.parametrize("scan", [True, False])
@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16])
def test_export_then_import_is_bit_equal(tmp_path, scan, dtype, name):
    net = model(name, scan_layers=scan, param_dtype=dtype)
    params = load_params(GOLDEN / name, net)
    save_params(tmp_path / "out", params, net.config, max_shard_bytes=100_000)
    assert Qwen2Config.from_hf(tmp_path / "out") == net.config
    jax.tree.map(np.testing.assert_array_equal, params, load_params(tmp_path / "out", net))


@pytest.mark.parametrize("name", ["tied", "qwen3", "qwen3_gqa"])
def test_export_writes_the_tensors_transformers_wrote(tmp_path, name):
    params = load_params(GOLDEN / name, model(name))
    save_params(tmp_path / "out", params, model(name).config)
    mine, theirs = (load_file(f / "model.safetensors") for f in (tmp_path / "out", GOLDEN / name))
    assert mine.keys() == theirs.keys()
    told = [json.loads((f / "config.json").read_text()) for f in (tmp_path / "out", GOLDEN / name)]
    assert told[0]["architectures"] == told[1]["architectures"]
    assert [config["model_type"] for config in told] == [name.partition("_")[0].replace("tied", "qwen2")] * 2
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


HEAD, EMBEDDING = "lm_head.weight", "model.embed_tokens.weight"


def copy_of(name, tmp_path):
    return Path(shutil.copytree(GOLDEN / name, tmp_path / name))


def split(folder, names, keep_single=False):
    """Moves tensors to a second file and writes the index of both."""
    tensors = load_file(folder / "model.safetensors")
    files = ["model-00001-of-00002.safetensors", "model-00002-of-00002.safetensors"]
    parts = [{n: t for n, t in tensors.items() if (n in names) == second} for second in (False, True)]
    for file, part in zip(files, parts, strict=True):
        save_file(part, folder / file)
    weight_map = {name: file for file, part in zip(files, parts, strict=True) for name in part}
    (folder / INDEX_FILE).write_text(json.dumps({"metadata": {}, "weight_map": weight_map}))
    if not keep_single:
        (folder / "model.safetensors").unlink()
    return [folder / file for file in files]


def load(folder, name="tied", **options):
    return load_params(folder, model(name, **options))


@pytest.mark.parametrize("sharded", [False, True])
def test_a_tied_head_that_is_stored_as_well(tmp_path, sharded):
    folder, want = copy_of("tied", tmp_path), load(GOLDEN / "tied")
    rewrite(folder / "model.safetensors", lambda t: t.update({HEAD: t[EMBEDDING].copy()}))
    files = split(folder, {HEAD}) if sharded else [folder / "model.safetensors"]
    jax.tree.map(np.testing.assert_array_equal, load(folder), want)

    def one_bit(tensors):
        tensors[HEAD].view(np.uint32)[-1, -1] ^= 1

    rewrite(files[-1], one_bit)
    with pytest.raises(WeightsError, match=rf"{HEAD} .*differs from {EMBEDDING} .*tie_word_embeddings") as error:
        load(folder)
    assert files[-1].name in str(error.value)
    rewrite(files[-1], lambda t: t.update({HEAD: t[HEAD][:-1].copy()}))
    with pytest.raises(WeightsError, match=rf"{HEAD} \(F32, \(130, 48\)\) differs from"):
        load(folder)


def test_a_tied_head_stored_instead_of_the_embedding(tmp_path):
    folder, want = copy_of("tied", tmp_path), load(GOLDEN / "tied")
    rewrite(folder / "model.safetensors", lambda t: t.update({HEAD: t.pop(EMBEDDING)}))
    jax.tree.map(np.testing.assert_array_equal, load(folder), want)


def test_an_untied_head_that_is_missing(tmp_path):
    folder = copy_of("untied", tmp_path)
    rewrite(folder / "model.safetensors", lambda t: t.pop(HEAD))
    with pytest.raises(WeightsError, match=rf"{HEAD} of shape \(131, 48\) is missing.*tie_word_embeddings=false"):
        load(folder, "untied")


def test_an_index_left_beside_the_single_file(tmp_path):
    """Its shards are missing: the file. They are there: they must be equal, each tensor of them."""
    folder, want = copy_of("untied", tmp_path), load(GOLDEN / "untied", "untied")
    files = split(folder, {UP, HEAD}, keep_single=True)
    same = lambda: jax.tree.map(np.testing.assert_array_equal, load(folder, "untied"), want)  # noqa: E731
    same()
    original = files[1].read_bytes()
    rewrite(files[1], lambda t: t[UP].__setitem__((3, 4), 7))
    fails(folder, files[1].name, f"its {re.escape(UP)} differs from that in model.safetensors", "remove either")
    files[1].write_bytes(original[:-8])  # an interrupted download of the shards
    fails(folder, files[1].name, "truncated", "There is a model.safetensors too", "remove either")
    files[1].unlink()
    same()
    rewrite(files[0], lambda t: t.update(more=np.zeros(2, np.float32)))
    fails(folder, files[0].name, "holds more, which model.safetensors does not")
    files[0].unlink()
    same()
    (folder / INDEX_FILE).write_text('{"weight_map": {"old": "model.safetensors"}}')
    same()


def test_shards_with_a_tensor_less_than_the_single_file(tmp_path):
    folder = copy_of("untied", tmp_path)
    split(folder, {UP}, keep_single=True)
    index = json.loads((folder / INDEX_FILE).read_text())
    del index["weight_map"][UP]
    (folder / INDEX_FILE).write_text(json.dumps(index))
    (folder / "model-00002-of-00002.safetensors").unlink()
    fails(folder, f"holds {re.escape(UP)}, which the shards of", "remove either")


@pytest.mark.parametrize("prefix", ["", "model.model."])
@pytest.mark.parametrize("name", ["tied", "untied"])
def test_names_of_a_model_saved_without_its_head_or_within_another(tmp_path, name, prefix):
    folder, want = copy_of(name, tmp_path), load(GOLDEN / name, name)

    def rename(tensors):
        for old in list(tensors):
            head = old == HEAD
            new = old if head and not prefix else f"model.{old}" if head else prefix + old.removeprefix("model.")
            tensors[new] = tensors.pop(old)

    rewrite(folder / "model.safetensors", rename)
    jax.tree.map(np.testing.assert_array_equal, load(folder, name), want)


def test_names_of_another_model_are_refused(tmp_path):
    """transformers leaves all of its weights random."""
    folder = copy_of("tied", tmp_path)
    rewrite(folder / "model.safetensors", lambda t: [t.update({f"module.{n}": t.pop(n)}) for n in list(t)])
    with pytest.raises(WeightsError, match=rf"module\.{EMBEDDING} is named as in another model, expected {EMBEDDING}"):
        load(folder)


@pytest.mark.parametrize("listed", [False, True])
def test_an_index_may_differ_in_buffers_and_a_tied_head(tmp_path, listed):
    """Held by a shard and not listed, or listed and not held."""
    folder, want = copy_of("tied", tmp_path), load(GOLDEN / "tied")
    buffer = "model.layers.0.self_attn.rotary_emb.inv_freq"
    _, second = split(folder, {UP})
    if listed:
        index = json.loads((folder / INDEX_FILE).read_text())
        index["weight_map"] |= {HEAD: second.name, buffer: second.name}
        (folder / INDEX_FILE).write_text(json.dumps(index))
    else:
        head = load_file(GOLDEN / "tied" / "model.safetensors")[EMBEDDING]
        rewrite(second, lambda t: t.update({HEAD: head, buffer: np.ones(6, np.float32)}))
    jax.tree.map(np.testing.assert_array_equal, load(folder), want)


def test_a_broken_index_beside_the_single_file(tmp_path):
    folder = copy_of("tied", tmp_path)
    (folder / INDEX_FILE).write_text("")
    with pytest.raises(WeightsError, match=r"index\.json: it is not JSON .*or remove it if model.safetensors"):
        load(folder)


def test_buffers_that_are_recomputed(tmp_path):
    folder, want = copy_of("untied", tmp_path), load(GOLDEN / "untied", "untied")
    extra = {f"model.layers.{i}.self_attn.rotary_emb.inv_freq": np.ones(6, np.float32) for i in range(3)}
    rewrite(folder / "model.safetensors", lambda t: t.update(extra))
    jax.tree.map(np.testing.assert_array_equal, load(folder, "untied"), want)


@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16])
def test_mixed_precisions(tmp_path, dtype):
    """Each tensor is rounded once, from what it is stored in: float32, bfloat16, float16, float64."""
    folder = copy_of("untied", tmp_path)
    kinds = (np.float32, jnp.bfloat16, np.float16, np.float64)

    def change(tensors):
        for i, name in enumerate(sorted(tensors)):
            tensors[name] = tensors[name].astype(kinds[i % 4])

    rewrite(folder / "model.safetensors", change)
    raw = load_file(folder / "model.safetensors")
    assert {t.dtype for t in raw.values()} == {np.dtype(k) for k in kinds}
    params = load(folder, "untied", param_dtype=dtype)
    for i in range(3):
        for mine, name in ((("up",), "mlp.up_proj"), (("down",), "mlp.down_proj"), (("attn", "q"), "self_attn.q_proj")):
            kernel = params["layers"]
            for part in mine:
                kernel = kernel[part]
            want = raw[f"model.layers.{i}.{name}.weight"].astype(np.float32).astype(dtype).T
            np.testing.assert_array_equal(np.asarray(kernel["kernel"][i]), want)


@pytest.mark.parametrize("bad", [np.nan, np.inf, -np.inf])
@pytest.mark.parametrize("mesh", [False, True])
def test_weights_that_are_not_finite(folder, bad, mesh):
    file = holder(folder, UP)
    rewrite(file, lambda t: t[UP].__setitem__((79, 47), bad))
    with pytest.raises(WeightsError, match=f"{file.name}: tensor {re.escape(UP)} holds NaN or infinity"):
        load_params(folder, model(), mesh=make_mesh(fsdp=8, tensor=1) if mesh else None)


def test_weights_that_overflow_when_they_are_rounded(folder):
    file = holder(folder, UP)
    rewrite(file, lambda t: t.update({UP: t[UP].astype(np.float64) * 1e300}))
    fails(folder, file.name, UP, "too large for float32")


def test_integers_and_float8_are_refused(folder):
    file = holder(folder, UP)
    rewrite(file, lambda t: t.update({UP: t[UP].astype(np.int64)}))
    fails(folder, file.name, f"{re.escape(UP)} is I64", "expected F16")
    rewrite(file, lambda t: t.update({UP: t[UP].astype(np.float32).astype(jnp.float8_e4m3fn)}))
    fails(folder, file.name, f"{re.escape(UP)} is F8_E4M3", "quantized")


def test_export_keeps_the_ids_that_end_a_text(tmp_path):
    folder = copy_of("untied", tmp_path)
    raw = json.loads((folder / "config.json").read_text())
    ids = {"bos_token_id": 5, "eos_token_id": [7, 9], "pad_token_id": None}
    (folder / "config.json").write_text(json.dumps(raw | ids))
    (folder / "generation_config.json").write_text(json.dumps({"eos_token_id": [7, 9], "temperature": 0.7}))
    net = model("untied")
    save_params(tmp_path / "out", load(folder, "untied"), net.config, tokenizer_from=folder)
    config = json.loads((tmp_path / "out" / "config.json").read_text())
    assert {name: config[name] for name in ids} == ids
    from transformers import AutoConfig, GenerationConfig

    for name in ids:
        assert getattr(AutoConfig.from_pretrained(tmp_path / "out"), name) == ids[name]
    theirs, ours = (GenerationConfig.from_pretrained(f).to_dict() for f in (folder, tmp_path / "out"))
    assert theirs == ours
    assert theirs["eos_token_id"] == [7, 9]
