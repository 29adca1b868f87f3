"""Headers and indices that no library wrote: each fault is said, and nothing is read."""

import json
import os
import re

import ml_dtypes
import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

from rlver_jax.config.foreign_weights import INDEX_FILE, SINGLE_FILE
from rlver_jax.models.safetensors_files import WeightsError, check_floats, find_tensors, not_finite, same_values

A = {"dtype": "F32", "shape": [2, 3], "data_offsets": [0, 24]}
B = {"dtype": "BF16", "shape": [4], "data_offsets": [24, 32]}


def write(file, header, data=bytes(32)):
    """A file of a header given as an object, as text or as bytes."""
    text = header if isinstance(header, bytes) else (header if isinstance(header, str) else json.dumps(header)).encode()
    file.write_bytes(len(text).to_bytes(8, "little") + text + data)


def refused(folder, *parts, check=find_tensors):
    with pytest.raises(WeightsError) as error:
        check(folder)
    for part in parts:
        assert re.search(part, str(error.value)), f"{part!r} not in {error.value}"


def test_reads_what_the_library_wrote(tmp_path):
    tensors = {"b": np.arange(6, dtype=np.float32).reshape(2, 3), "a": np.ones(5, ml_dtypes.bfloat16)}
    save_file(tensors, tmp_path / SINGLE_FILE, metadata={"format": "pt"})
    by_name = find_tensors(tmp_path)
    data = (tmp_path / SINGLE_FILE).read_bytes()
    for name, array in tensors.items():
        one = by_name[name]
        assert (one.shape, one.dtype) == (array.shape, {"b": "F32", "a": "BF16"}[name])
        assert data[one.begin : one.end] == array.tobytes()


def test_notes_may_be_null(tmp_path):
    """As for the safetensors library."""
    header = json.dumps({"__metadata__": None, "a": {"dtype": "F32", "shape": [2], "data_offsets": [0, 8]}}).encode()
    data = len(header).to_bytes(8, "little") + header + np.array([3, 4], np.float32).tobytes()
    (tmp_path / SINGLE_FILE).write_bytes(data)
    np.testing.assert_array_equal(load_file(tmp_path / SINGLE_FILE)["a"], [3, 4])
    assert find_tensors(tmp_path)["a"].begin == len(data) - 8


HEADERS = {
    "not an object": ([A], ["expected a JSON object"]),
    "a number": ("12", ["expected a JSON object"]),
    "not JSON": ('{"a": ', ["is not JSON"]),
    "not UTF-8": (b'{"\xff\xfe": 1}', ["is not UTF-8", "byte 2"]),
    "nested too deeply": ("[" * 100_000, ["nested too deeply|is not JSON"]),
    "huge number": ('{"a": {"dtype": "F32", "shape": [' + "9" * 5000 + '], "data_offsets": [0, 24]}}', ["is not JSON"]),
    "no dtype": ({"a": {k: v for k, v in A.items() if k != "dtype"}}, ["tensor a has no dtype"]),
    "no shape": ({"a": {k: v for k, v in A.items() if k != "shape"}}, ["tensor a has no shape"]),
    "no offsets": ({"a": {k: v for k, v in A.items() if k != "data_offsets"}}, ["tensor a has no data_offsets"]),
    "entry of another kind": ({"a": [1]}, ["tensor a is \\[1\\], expected an object"]),
    "unknown dtype": ({"a": A | {"dtype": "F31"}}, ["tensor a", "unknown dtype 'F31'"]),
    "dtype of another kind": ({"a": A | {"dtype": ["F32"]}}, ["tensor a", "unknown dtype"]),
    "shape of floats": ({"a": A | {"shape": [2.0, 3]}}, ["tensor a has shape \\[2.0, 3\\]"]),
    "shape of bools": ({"a": A | {"shape": [True, 6]}}, ["tensor a has shape"]),
    "negative shape": ({"a": A | {"shape": [-2, -3]}}, ["tensor a has shape \\[-2, -3\\]"]),
    "shape is a number": ({"a": A | {"shape": 6}}, ["tensor a has shape 6"]),
    "endless shape": ({"a": A | {"shape": [2**62] * 5000}}, ["tensor a has shape"]),
    "overflowing shape": ({"a": A | {"shape": [2**62, 2**62]}}, ["tensor a", "takes \\d{30,} bytes"]),
    "negative offsets": ({"a": A | {"data_offsets": [-24, 0]}}, ["tensor a has data_offsets \\[-24, 0\\]"]),
    "falling offsets": ({"a": A | {"data_offsets": [24, 0]}}, ["tensor a has data_offsets \\[24, 0\\]"]),
    "three offsets": ({"a": A | {"data_offsets": [0, 24, 30]}}, ["tensor a has data_offsets"]),
    "null offsets": ({"a": A | {"data_offsets": None}}, ["tensor a has data_offsets None"]),
    "shape and offsets": ({"a": A | {"shape": [2, 2]}}, ["tensor a", "takes 16 bytes", "hold 24"]),
    "overlap": ({"a": A, "b": B | {"data_offsets": [20, 28]}}, ["tensor b at byte \\d+ overlaps a"]),
    "gap": ({"a": A, "b": B | {"data_offsets": [26, 34]}}, ["tensor b", "gap of 2|truncated"]),
    "bytes of none": ({"a": A}, ["8 bytes after the last tensor, a"]),
    "beyond the end": ({"a": A, "b": B | {"shape": [9], "data_offsets": [24, 42]}}, ["tensor b", "truncated"]),
    "a name twice": (f'{{"a": {json.dumps(A)}, "a": {json.dumps(A)}}}', ["'a' stands there twice"]),
    "a field twice": ('{"a": {"dtype": "F32", "dtype": "F16"}}', ["'dtype' stands there twice"]),
    "no tensors": ({"__metadata__": {"format": "pt"}}, ["holds no tensors"]),
    "notes of another kind": ({"__metadata__": {"n": 1}, "a": A}, ["__metadata__"]),
}  # fmt: skip


@pytest.mark.parametrize("name", HEADERS)
def test_a_malformed_header(tmp_path, name):
    header, parts = HEADERS[name]
    write(tmp_path / SINGLE_FILE, header)
    refused(tmp_path, SINGLE_FILE, *parts)


def test_lengths_of_headers(tmp_path):
    file = tmp_path / SINGLE_FILE
    for data, message in (
        (b"", "is empty"),
        (b"\x08\x00", "truncated"),
        ((2**63).to_bytes(8, "little") + b"{}", "header claims 9223372036854775808 bytes"),
        ((99_999_999).to_bytes(8, "little") + b"{}", "end inside the header"),
        ((0).to_bytes(8, "little"), "not JSON"),
        (b"<html><body>404 Not Found</body></html>", "header claims"),
        (b"version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 9\n", "pointer of Git LFS"),
    ):
        file.write_bytes(data)
        refused(tmp_path, message, "fetch")


def test_what_is_no_file(tmp_path):
    file = tmp_path / SINGLE_FILE
    file.mkdir()
    refused(tmp_path, "is a folder, expected a file")
    file.rmdir()
    os.mkfifo(file)  # opening it would wait for ever
    refused(tmp_path, "no regular file")
    file.unlink()
    file.symlink_to("../../blobs/0123")
    refused(tmp_path, "a link to ../../blobs/0123", "No such file")
    file.unlink()
    file.symlink_to(SINGLE_FILE)
    refused(tmp_path, "Too many levels of symbolic links")


INDICES = {
    "not JSON": (b'{"weight_map": {', ["is not JSON"]),
    "empty": (b"", ["is not JSON"]),
    "not UTF-8": (b'{"weight_map": {"\xe4": "x.safetensors"}}', ["is not UTF-8"]),
    "a list": (b"[1]", ["expected a JSON object"]),
    "no weight_map": (b'{"metadata": {}}', ["weight_map is None"]),
    "an empty weight_map": (b'{"weight_map": {}}', ["weight_map is {}"]),
    "weight_map is a list": (b'{"weight_map": ["a"]}', ["weight_map is"]),
    "a file is a number": (b'{"weight_map": {"a": 1}}', ["places a in 1"]),
    "a file is null": (b'{"weight_map": {"a": null}}', ["places a in None"]),
    "a path upwards": (b'{"weight_map": {"a": "../x.safetensors"}}', ["places a in '../x.safetensors'"]),
    "an absolute path": (b'{"weight_map": {"a": "/etc/x.safetensors"}}', ["places a in '/etc/x.safetensors'"]),
    "a path": (b'{"weight_map": {"a": "sub\\\\x.safetensors"}}', ["places a in"]),
    "a NUL": (b'{"weight_map": {"a": "x\\u0000.safetensors"}}', ["places a in"]),
    "pickled shards": (b'{"weight_map": {"a": "pytorch_model.bin"}}', ["places a in 'pytorch_model.bin'"]),
    "a name twice": (b'{"weight_map": {"a": "x.safetensors", "a": "y.safetensors"}}', ["'a' stands there twice"]),
    "a shard that is missing": (b'{"weight_map": {"a": "x.safetensors"}}', ["x.safetensors: no such file", "fetch it"]),
}


@pytest.mark.parametrize("name", INDICES)
def test_a_malformed_index(tmp_path, name):
    data, parts = INDICES[name]
    (tmp_path / INDEX_FILE).write_bytes(data)
    refused(tmp_path, *parts)


def test_an_index_that_is_a_folder_and_two_shards_with_one_tensor(tmp_path):
    (tmp_path / INDEX_FILE).mkdir()
    refused(tmp_path, INDEX_FILE, "is a folder")
    (tmp_path / INDEX_FILE).rmdir()
    one = {"a": np.zeros(2, np.float32)}
    save_file(one | {"b": np.zeros(1, np.float32)}, tmp_path / "x.safetensors")
    save_file(one, tmp_path / "y.safetensors")
    (tmp_path / INDEX_FILE).write_text(json.dumps({"weight_map": {"a": "y.safetensors", "b": "x.safetensors"}}))
    refused(tmp_path, "x.safetensors: extra tensor a", "places in y.safetensors")


@pytest.mark.parametrize(
    ("files", "parts"),
    [
        (["pytorch_model.bin", "config.json"], ["pytorch_model.bin", "not safetensors", "save_pretrained"]),
        (["pytorch_model.bin.index.json", "pytorch_model-00001-of-00002.bin"], ["PyTorch", "save_pretrained"]),
        (["model-q4_k_m.gguf"], ["GGUF", "gguf_file='model-q4_k_m.gguf'"]),
        (["consolidated.00.pth", "params.json"], ["consolidated", "Hugging Face format"]),
        (["consolidated.safetensors"], ["consolidated", "Hugging Face format"]),
        (["adapter_model.safetensors", "adapter_config.json"], ["LoRA adapter", "merge_and_unload"]),
        (["tf_model.h5"], ["TensorFlow"]),
        (["flax_model.msgpack"], ["Flax"]),
        (["model-00001-of-00002.safetensors"], ["without their index"]),
        (["model.safetensors.incomplete"], ["unfinished download"]),
        (["qwen.safetensors"], ["another name than model.safetensors"]),
        (["README.md"], ["found README.md"]),
        ([], ["found nothing"]),
    ],
)
def test_weights_in_other_formats(tmp_path, files, parts):
    for name in files:
        (tmp_path / name).write_bytes(b"x")
    refused(tmp_path, "neither model.safetensors nor model.safetensors.index.json", *parts)


@pytest.mark.parametrize(
    ("dtype", "name", "parts"),
    [
        ("F8_E4M3", "q.weight", ["q.weight is F8_E4M3 \\(float8\\)", "quantized", "use the one that it was made from"]),
        ("F8_E5M2", "q.weight", ["q.weight is F8_E5M2 \\(float8\\)", "quantized"]),
        ("F4", "q.weight", ["q.weight is F4 \\(float4\\)", "quantized"]),
        ("I8", "q.weight", ["q.weight is I8 \\(no floating-point", "quantized"]),
        ("I32", "q.qweight", ["q.qweight belongs to a GPTQ or AWQ checkpoint", "quantized"]),
        ("F32", "q.weight_scale_inv", ["q.weight_scale_inv belongs to an FP8 checkpoint"]),
        ("I64", "q.weight", ["q.weight is I64 \\(no floating-point numbers\\), expected F16, BF16, F32, F64"]),
        ("BOOL", "q.weight", ["q.weight is BOOL \\(no floating-point"]),
        ("C64", "q.weight", ["q.weight is C64 \\(no floating-point"]),
    ],
)
def test_what_is_no_float_is_refused_by_name(tmp_path, dtype, name, parts):
    bits = {"F8_E4M3": 8, "F8_E5M2": 8, "F4": 4, "I8": 8, "I32": 32, "F32": 32, "I64": 64, "BOOL": 8, "C64": 64}[dtype]
    write(
        tmp_path / SINGLE_FILE, {name: {"dtype": dtype, "shape": [4], "data_offsets": [0, bits // 2]}}, bytes(bits // 2)
    )
    refused(find_tensors(tmp_path), SINGLE_FILE, *parts, check=check_floats)


@pytest.mark.parametrize("dtype", [ml_dtypes.bfloat16, np.float16, np.float32, np.float64])
def test_finite_or_not(dtype):
    """Against what NumPy says of float64."""
    limits = ml_dtypes.finfo(dtype)
    fine = np.array([limits.max, -float(limits.max), 0.0, -0.0, limits.smallest_subnormal, -1.5], dtype)
    assert np.isfinite(fine.astype(np.float64)).all()
    assert not not_finite(fine)
    assert not not_finite(fine[:0])
    for bad in (np.inf, -np.inf, np.nan, np.copysign(np.nan, -1)):
        for at in range(len(fine)):
            values = fine.copy()
            values[at] = bad
            assert not_finite(values)


def test_equal_values_of_other_dtypes(tmp_path):
    draw = np.random.default_rng(0).normal(size=(300, 7)).astype(ml_dtypes.bfloat16)
    other = draw.astype(np.float32)
    other[-1, -1] = np.nextafter(other[-1, -1], np.float32(9))
    arrays = {"a": draw, "b": draw.astype(np.float32), "c": other, "d": draw.T.copy(), "e": draw.copy()}
    save_file(arrays, tmp_path / SINGLE_FILE)
    tensors = find_tensors(tmp_path)
    same = {name for name in arrays if same_values(tensors["a"], tensors[name])}
    assert same == {"a", "b", "e"}


def test_recomputed_buffers_are_left_out(tmp_path):
    names = ["model.layers.0.self_attn.rotary_emb.inv_freq", "model.rotary_emb.inv_freq", "rotary_emb.cos_cached", "w"]
    save_file({name: np.zeros(2, np.float32) for name in names}, tmp_path / SINGLE_FILE)
    assert set(find_tensors(tmp_path)) == {"w"}
