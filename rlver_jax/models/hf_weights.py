"""Weights in Hugging Face safetensors: read slice by slice into sharded arrays, and written back.

Every device's slice of every parameter is read straight from its file, so no process ever holds the whole model.
"""

import functools
import json
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.experimental import multihost_utils
from jax.sharding import Mesh, SingleDeviceSharding
from jax.typing import DTypeLike
from safetensors import SafetensorError, safe_open
from safetensors.numpy import save_file

from rlver_jax.config.foreign_weights import INDEX_FILE, SINGLE_FILE
from rlver_jax.config.hub import TEXT_FILES, local_folder
from rlver_jax.models.families import EMBEDDING, HEAD, Qwen2Config
from rlver_jax.models.qwen import Params, Qwen2, abstract_params
from rlver_jax.models.safetensors_files import (
    Tensor,
    WeightsError,
    check_floats,
    find_tensors,
    not_finite,
    same_values,
)
from rlver_jax.parallel import distributed, rules
from rlver_jax.text.template import read_config

__all__ = ["INDEX_FILE", "SINGLE_FILE", "WeightsError", "load_params", "save_params"]

TEXT_IDS = ("bos_token_id", "eos_token_id", "pad_token_id")


class _Source(NamedTuple):
    """The file tensors of one parameter: one, or one for each stacked layer."""

    tensors: tuple[str, ...]
    stacked: bool
    transposed: bool  # Hugging Face stores [out, in], Flax [in, out]

    def hf_shape(self, shape: tuple[int, ...]) -> tuple[int, ...]:
        """Shape of each tensor in the file, from the shape of our leaf."""
        shape = shape[1:] if self.stacked else shape
        return shape[::-1] if self.transposed else shape


def _source(path: str, config: Qwen2Config) -> _Source:
    outer, layer = config.family.outer, config.family.layer
    if path in outer:
        return _Source((outer[path],), False, False)
    first, rest = path.split("/", 1)
    transposed = rest.endswith("kernel")
    if first == "layers":
        return _Source(tuple(f"model.layers.{i}.{layer[rest]}" for i in range(config.num_layers)), True, transposed)
    return _Source((f"model.layers.{first.removeprefix('layer_')}.{layer[rest]}",), False, transposed)


def _leaf_path(path: Any) -> str:
    return jax.tree_util.keystr(path, simple=True, separator="/")


def _check(tensors: dict[str, Tensor], folder: Path, expected: dict[str, tuple[int, ...]]) -> None:
    """Every tensor of the model is there with its shape, and nothing else is."""
    files = ", ".join(sorted({tensor.file.name for tensor in tensors.values()}))
    for name, shape in expected.items():
        if name not in tensors:
            hint = (
                "; config.json says tie_word_embeddings=false, so the model needs a head of its own. Set it to true if "
                "the embedding is the head, else fetch the weights again"
            )
            raise WeightsError(
                f"{folder}: tensor {name} of shape {shape} is missing from {files}{hint if name == HEAD else ''}"
            )
        if (actual := tensors[name].shape) != shape:
            raise WeightsError(f"{tensors[name].file}: tensor {name} has shape {actual}, expected {shape}")
    for name in sorted(set(tensors) - set(expected)):
        raise WeightsError(
            f"{tensors[name].file}: extra tensor {name}, which a model with this config.json does not have"
        )


def _tied(tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    """The tensors of a model whose head is its embedding, which may be stored under both names or either one."""
    head, embedding = tensors.get(HEAD), tensors.get(EMBEDDING)
    if head is None:
        return tensors
    if embedding is not None and not same_values(head, embedding):
        raise WeightsError(
            f"{head.file}: {HEAD} ({head.dtype}, {head.shape}) differs from {EMBEDDING} ({embedding.dtype}, "
            f"{embedding.shape}) in {embedding.file.name}, but config.json says tie_word_embeddings=true; set it "
            f"to false if the head is the model's own, else remove {HEAD}"
        )
    return {name: tensor for name, tensor in tensors.items() if name != HEAD} | {EMBEDDING: embedding or head}


def _read(tensor: Tensor, index: tuple[slice, ...], transposed: bool, dtype: np.dtype) -> np.ndarray:
    # Opened anew each time: closing unmaps the file's pages, which would otherwise count as resident memory.
    try:
        with safe_open(tensor.file, framework="numpy") as opened:
            part = opened.get_slice(tensor.name)[index[::-1] if transposed else index]
    except SafetensorError as error:
        raise WeightsError(f"{tensor.file}: not a readable safetensors file ({error}); fetch it again") from None
    with np.errstate(over="ignore"):  # reported below
        out = part.astype(dtype, copy=False)
    if not_finite(out):
        what = "holds NaN or infinity" if not_finite(part) else f"holds numbers too large for {dtype.name}"
        raise WeightsError(f"{tensor.file}: tensor {tensor.name} {what}; the weights are damaged: use other ones")
    return out.T if transposed else out


def _copy(out: np.ndarray, part: np.ndarray) -> None:
    """out[...] = part for equal dtypes; as plain words, because NumPy copies bfloat16 element by element."""
    word = np.dtype(f"u{out.dtype.itemsize}")
    out.view(word)[...] = part.view(word)


def load_params(
    folder: str | Path, model: Qwen2, *, dtype: DTypeLike | None = None, mesh: Mesh | None = None
) -> Params:
    """Parameters of `model` from a Hugging Face folder, each created with its sharding on the mesh.

    Args:
        folder: holds model.safetensors, or model.safetensors.index.json with its shards; or a name on the Hugging
            Face hub. Tensors may be stored in different floating-point dtypes.
        model: decides the tree (scanned or unrolled) and the shapes.
        dtype: of the result; default `model.param_dtype`.
        mesh: every leaf is sharded by `parallel.rules`; None: on the default device.

    Raises:
        WeightsError: a tensor is missing, extra, of another shape, cut off, no floats or not finite, or a file is
            malformed; the message names tensor and file.
        rules.ShardingError: a parameter cannot be divided over the mesh.
    """
    load = functools.partial(_load, folder, model, dtype, mesh)
    return load() if mesh is None else distributed.all_or_none(load)  # each process sees its own slices


def _load(folder: str | Path, model: Qwen2, dtype: DTypeLike | None, mesh: Mesh | None) -> Params:
    folder = local_folder(folder, weights=True)
    tensors = find_tensors(folder)
    check_floats(tensors)
    if model.config.tie_embeddings:
        tensors = _tied(tensors)
    shapes, axes = abstract_params(model)
    flat, tree = jax.tree_util.tree_flatten_with_path(shapes)
    by_path = {_leaf_path(path): leaf for path, leaf in flat}
    sources = {path: _source(path, model.config) for path in by_path}
    _check(tensors, folder, {n: s.hf_shape(by_path[p].shape) for p, s in sources.items() for n in s.tensors})
    default = SingleDeviceSharding(jax.local_devices()[0])
    placements = [default] * len(flat) if mesh is None else jax.tree.leaves(rules.tree_shardings(axes, shapes, mesh))
    dtype = jnp.dtype(dtype or model.param_dtype)

    def leaf(path: str, shape: tuple[int, ...], placement: Any) -> jax.Array:
        source = sources[path]

        def device_slice(index: Any) -> np.ndarray:
            size = tuple(len(range(*s.indices(n))) for s, n in zip(index, shape, strict=True))
            out = np.empty(size, dtype)
            names, inner = (source.tensors[index[0]], index[1:]) if source.stacked else (source.tensors, index)
            for row, name in zip(out if source.stacked else [out], names, strict=True):
                _copy(row, _read(tensors[name], inner, source.transposed, dtype))
            return out

        return jax.make_array_from_callback(shape, placement, device_slice)

    leaves = [leaf(p, by_path[p].shape, placement) for p, placement in zip(by_path, placements, strict=True)]
    return jax.tree_util.tree_unflatten(tree, leaves)


def _fetch(x: jax.Array) -> np.ndarray:
    """The whole array on this host, also when other processes hold parts of it."""
    return np.asarray(x if x.is_fully_addressable else multihost_utils.process_allgather(x, tiled=True))


def save_params(
    folder: str | Path,
    params: Params,
    config: Qwen2Config,
    *,
    dtype: DTypeLike | None = None,
    tokenizer_from: str | Path | None = None,
    max_shard_bytes: int = 4 * 2**30,
) -> None:
    """Writes a folder that `transformers` loads: config, sharded safetensors, index, tokenizer files.

    Every process must call it (arrays may be spread over hosts); process 0 writes. One shard is held at a time.

    Args:
        folder: new or empty.
        dtype: of the file, default each array's own.
        tokenizer_from: model whose tokenizer and generation files are copied along, and whose config.json says which
            ids begin, end and pad a text.

    Raises:
        FileExistsError: the folder already holds files.
    """
    folder = Path(folder)
    check_new(folder)
    folder.mkdir(parents=True, exist_ok=True)
    shards: list[list[str]] = []
    saved_dtype, total = "", 0
    writes = jax.process_index() == 0
    for shard in _shards(_host_tensors(params, config, dtype), max_shard_bytes):
        if writes:
            save_file(shard, folder / f"shard-{len(shards)}.tmp", metadata={"format": "pt"})
        shards.append(list(shard))
        total += sum(array.nbytes for array in shard.values())
        saved_dtype = str(next(iter(shard.values())).dtype)
    if writes:
        _finish(folder, shards, total)
        _write_settings(folder, config.to_hf(saved_dtype), tokenizer_from)


def check_new(folder: Path) -> None:
    """Raises FileExistsError where an export would mix its files with others."""
    if folder.exists() and any(folder.iterdir()):
        raise FileExistsError(f"{folder}: not empty; export into a new folder")


def _write_settings(folder: Path, config: dict[str, Any], tokenizer_from: str | Path | None) -> None:
    """Writes config.json, and the tokenizer's files with the ids that they use."""
    if tokenizer_from:
        source = local_folder(tokenizer_from)
        config |= _text_ids(source)
        copy_tokenizer(source, folder)
    (folder / "config.json").write_text(json.dumps(config, indent=2) + "\n", encoding="utf-8")


def copy_tokenizer(source: Path, folder: Path) -> None:
    """Copies a model's tokenizer, chat templates and generation config, without their links and permissions."""
    for file in (file for kind in TEXT_FILES for file in source.glob(kind) if file.is_file()):
        copy = folder / file.relative_to(source)
        copy.parent.mkdir(exist_ok=True)
        shutil.copyfile(file, copy)


def _text_ids(source: Path) -> dict[str, Any]:
    """What a folder's config.json says of the ids that begin, end and pad a text."""
    config = read_config(source, "config.json")
    return {name: config[name] for name in TEXT_IDS if name in config}


def _host_tensors(params: Params, config: Qwen2Config, dtype: DTypeLike | None) -> Iterator[tuple[str, np.ndarray]]:
    """(Hugging Face name, array as the file holds it), one layer of one parameter on the host at a time."""
    for path, leaf in jax.tree_util.tree_flatten_with_path(params)[0]:
        source = _source(_leaf_path(path), config)
        for i, name in enumerate(source.tensors):
            part = _fetch(leaf[i] if source.stacked else leaf)
            part = part if dtype is None else part.astype(jnp.dtype(dtype))
            out = np.empty(part.shape[::-1] if source.transposed else part.shape, part.dtype)
            _copy(out, part.T if source.transposed else part)
            yield name, out


def _shards(tensors: Iterator[tuple[str, np.ndarray]], max_bytes: int) -> Iterator[dict[str, np.ndarray]]:
    """Groups tensors, in order, into dictionaries of at most `max_bytes` (a larger tensor gets its own)."""
    shard: dict[str, np.ndarray] = {}
    for name, array in tensors:
        if shard and sum(a.nbytes for a in shard.values()) + array.nbytes > max_bytes:
            yield shard
            shard = {}
        shard[name] = array
    yield shard


def _finish(folder: Path, shards: list[list[str]], total: int) -> None:
    """Gives the shards their final names, which hold their count, and writes the index."""
    count = len(shards)
    names = [SINGLE_FILE] if count == 1 else [f"model-{i + 1:05}-of-{count:05}.safetensors" for i in range(count)]
    for i, name in enumerate(names):
        (folder / f"shard-{i}.tmp").rename(folder / name)
    if count > 1:
        weight_map = {tensor: name for name, tensors in zip(names, shards, strict=True) for tensor in tensors}
        index = {"metadata": {"total_size": total}, "weight_map": weight_map}
        (folder / INDEX_FILE).write_text(json.dumps(index, indent=2) + "\n", encoding="utf-8")
