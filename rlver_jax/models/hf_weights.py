"""Qwen2 weights in Hugging Face safetensors: read slice by slice into sharded arrays, and written back.

Every device's slice of every parameter is read straight from its file, so no process ever holds the whole model.
"""

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

from rlver_jax.models.config import Qwen2Config
from rlver_jax.models.qwen2 import Params, Qwen2, abstract_params
from rlver_jax.parallel import rules

SINGLE_FILE, INDEX_FILE = "model.safetensors", "model.safetensors.index.json"
TOKENIZER_FILES = (
    "tokenizer.json",
    "tokenizer_config.json",
    "tokenizer.model",
    "vocab.json",
    "merges.txt",
    "special_tokens_map.json",
    "added_tokens.json",
    "chat_template.jinja",
    "generation_config.json",
)

_OUTER = {
    "embed/kernel": "model.embed_tokens.weight",
    "norm/scale": "model.norm.weight",
    "lm_head": "lm_head.weight",
}
_LAYER = {
    "attn_norm/scale": "input_layernorm.weight",
    "mlp_norm/scale": "post_attention_layernorm.weight",
    "attn/q/kernel": "self_attn.q_proj.weight",
    "attn/k/kernel": "self_attn.k_proj.weight",
    "attn/v/kernel": "self_attn.v_proj.weight",
    "attn/q/bias": "self_attn.q_proj.bias",
    "attn/k/bias": "self_attn.k_proj.bias",
    "attn/v/bias": "self_attn.v_proj.bias",
    "attn/o/kernel": "self_attn.o_proj.weight",
    "gate/kernel": "mlp.gate_proj.weight",
    "up/kernel": "mlp.up_proj.weight",
    "down/kernel": "mlp.down_proj.weight",
}


class WeightsError(ValueError):
    """A checkpoint folder does not hold the model that its config describes."""


class _Source(NamedTuple):
    """Where one of our leaves comes from: one tensor, or one for each stacked layer."""

    tensors: tuple[str, ...]
    stacked: bool
    transposed: bool  # Hugging Face keeps [out, in], Flax [in, out]

    def hf_shape(self, shape: tuple[int, ...]) -> tuple[int, ...]:
        """Shape of each tensor in the file, from the shape of our leaf."""
        shape = shape[1:] if self.stacked else shape
        return shape[::-1] if self.transposed else shape


def _source(path: str, num_layers: int) -> _Source:
    if path in _OUTER:
        return _Source((_OUTER[path],), False, False)
    first, rest = path.split("/", 1)
    transposed = rest.endswith("kernel")
    if first == "layers":
        return _Source(tuple(f"model.layers.{i}.{_LAYER[rest]}" for i in range(num_layers)), True, transposed)
    return _Source((f"model.layers.{first.removeprefix('layer_')}.{_LAYER[rest]}",), False, transposed)


def _leaf_path(path: Any) -> str:
    return jax.tree_util.keystr(path, simple=True, separator="/")


def _check_complete(file: Path) -> None:
    """Names the first tensor that a truncated file no longer holds."""
    size = file.stat().st_size
    with file.open("rb") as stream:
        length = int.from_bytes(stream.read(8), "little")
        if size < 8 or size < 8 + length:
            raise WeightsError(f"{file}: {size} bytes end inside the header; the file is truncated: fetch it again")
        header = json.loads(stream.read(length))
    for name, entry in header.items():
        end = 0 if name == "__metadata__" else 8 + length + entry["data_offsets"][1]
        if end > size:
            raise WeightsError(
                f"{file}: tensor {name} of shape {tuple(entry['shape'])} ends at byte {end}, but the file has only "
                f"{size}; it is truncated: fetch it again"
            )


def _tensor_files(folder: Path) -> dict[str, Path]:
    """Tensor name -> file, from the index or the single file; checks that every file is there and whole."""
    index, single = folder / INDEX_FILE, folder / SINGLE_FILE
    if index.exists():
        weight_map = json.loads(index.read_text(encoding="utf-8"))["weight_map"]
        files = {name: folder / file for name, file in weight_map.items()}
    elif single.exists():
        _check_complete(single)
        with _open(single) as opened:
            return dict.fromkeys(opened.keys(), single)
    else:
        raise WeightsError(f"{folder}: neither {SINGLE_FILE} nor {INDEX_FILE}; expected safetensors weights")
    for file in sorted(set(files.values())):
        wanted = [name for name, f in files.items() if f == file]
        if not file.exists():
            raise WeightsError(
                f"{file}: no such file, but {INDEX_FILE} places {len(wanted)} tensors in it, e.g. {wanted[0]}"
            )
        _check_complete(file)
        with _open(file) as opened:
            held = set(opened.keys())
        for name in wanted:
            if name not in held:
                raise WeightsError(f"{file}: tensor {name} is missing, though {INDEX_FILE} places it here")
        for name in sorted(held - set(files)):
            raise WeightsError(f"{file}: extra tensor {name}, which {INDEX_FILE} does not list")
    return files


def _open(file: Path) -> Any:
    try:
        return safe_open(file, framework="numpy")
    except SafetensorError as error:
        raise WeightsError(f"{file}: not a readable safetensors file ({error}); fetch it again") from None


def _check(files: dict[str, Path], sources: dict[str, _Source], shapes: dict[str, Any]) -> None:
    """Every tensor of the model is there with its shape, and nothing else is."""
    expected = {name: s.hf_shape(shapes[path].shape) for path, s in sources.items() for name in s.tensors}
    some_file = next(iter(files.values()))
    for name, shape in expected.items():
        if name not in files:
            raise WeightsError(
                f"{some_file.parent}: tensor {name} of shape {shape} is missing from "
                f"{', '.join(sorted({f.name for f in files.values()}))}"
            )
    for name in sorted(set(files) - set(expected)):
        raise WeightsError(f"{files[name]}: extra tensor {name}, which a model with this config.json does not have")
    for file in sorted(set(files.values())):
        with _open(file) as opened:
            for name in opened.keys():  # noqa: SIM118 (not a dict)
                found = tuple(opened.get_slice(name).get_shape())
                if found != expected[name]:
                    raise WeightsError(f"{file}: tensor {name} has shape {found}, expected {expected[name]}")


def _read(file: Path, name: str, index: tuple[slice, ...], transposed: bool, dtype: np.dtype) -> np.ndarray:
    # Opened anew each time: closing unmaps the file's pages, which would otherwise count as resident memory.
    with _open(file) as opened:
        part = opened.get_slice(name)[index[::-1] if transposed else index]
    part = part.astype(dtype, copy=False)
    return part.T if transposed else part


def _copy(out: np.ndarray, part: np.ndarray) -> None:
    """out[...] = part for equal dtypes; as plain words, because NumPy copies bfloat16 element by element."""
    word = np.dtype(f"u{out.dtype.itemsize}")
    out.view(word)[...] = part.view(word)


def load_params(
    folder: str | Path, model: Qwen2, *, dtype: DTypeLike | None = None, mesh: Mesh | None = None
) -> Params:
    """Parameters of `model` from a Hugging Face folder, created where the mesh wants them.

    Args:
        folder: holds model.safetensors, or model.safetensors.index.json with its shards.
        model: decides the tree (scanned or unrolled) and the shapes.
        dtype: of the result; default `model.param_dtype`.
        mesh: places every leaf by `parallel.rules`; None: on the default device.

    Raises:
        WeightsError: a tensor is missing, extra, of another shape or cut off; the message names tensor and file.
        rules.ShardingError: a parameter cannot be divided over the mesh.
    """
    files = _tensor_files(Path(folder))
    shapes, axes = abstract_params(model)
    flat, tree = jax.tree_util.tree_flatten_with_path(shapes)
    by_path = {_leaf_path(path): leaf for path, leaf in flat}
    sources = {path: _source(path, model.config.num_layers) for path in by_path}
    _check(files, sources, by_path)
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
                _copy(row, _read(files[name], name, inner, source.transposed, dtype))
            return out

        return jax.make_array_from_callback(shape, placement, device_slice)

    leaves = [leaf(p, by_path[p].shape, place) for p, place in zip(by_path, placements, strict=True)]
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
        tokenizer_from: folder whose tokenizer files are copied along.

    Raises:
        FileExistsError: the folder already holds files.
    """
    folder = Path(folder)
    if folder.exists() and any(folder.iterdir()):
        raise FileExistsError(f"{folder}: not empty; export into a new folder")
    folder.mkdir(parents=True, exist_ok=True)
    shards: list[list[str]] = []
    saved_dtype = ""
    total = 0
    for shard in _shards(_host_tensors(params, config, dtype), max_shard_bytes):
        if jax.process_index() == 0:
            save_file(shard, folder / f"shard-{len(shards)}.tmp", metadata={"format": "pt"})
        shards.append(list(shard))
        total += sum(array.nbytes for array in shard.values())
        saved_dtype = str(next(iter(shard.values())).dtype)
    if jax.process_index() == 0:
        _finish(folder, shards, total)
        (folder / "config.json").write_text(json.dumps(config.to_hf(saved_dtype), indent=2) + "\n")
        for file in TOKENIZER_FILES if tokenizer_from else ():
            if (Path(str(tokenizer_from)) / file).exists():
                shutil.copyfile(Path(str(tokenizer_from)) / file, folder / file)


def _host_tensors(params: Params, config: Qwen2Config, dtype: DTypeLike | None) -> Iterator[tuple[str, np.ndarray]]:
    """(Hugging Face name, array as the file holds it), one layer of one parameter on the host at a time."""
    for path, leaf in jax.tree_util.tree_flatten_with_path(params)[0]:
        source = _source(_leaf_path(path), config.num_layers)
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
        weight_map = {tensor: name for name, held in zip(names, shards, strict=True) for tensor in held}
        index = {"metadata": {"total_size": total}, "weight_map": weight_map}
        (folder / INDEX_FILE).write_text(json.dumps(index, indent=2) + "\n")
