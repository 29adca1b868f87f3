"""The tensors of a model's folder: safetensors headers and indices, checked before any weight is read.

Headers are not trusted: every offset is compared with the file's size here, so that later reads return what the header
describes.
"""

import json
import math
import os
import re
import stat
from pathlib import Path
from typing import Any, NamedTuple

import jax.numpy as jnp
import numpy as np

from rlver_jax.config.foreign_weights import INDEX_FILE, SINGLE_FILE, quantized, without_safetensors
from rlver_jax.text.strict_json import repeats

# Bits of every dtype of the format; the first line is what weights may be stored in.
FLOATS = {"F16": 16, "BF16": 16, "F32": 32, "F64": 64}
_BITS = FLOATS | {
    **{"F4": 4, "F6_E2M3": 6, "F6_E3M2": 6},
    **{f"F8_{kind}": 8 for kind in ("E4M3", "E5M2", "E8M0", "E4M3FNUZ", "E5M2FNUZ")},
    **{"BOOL": 8, "I8": 8, "U8": 8, "I16": 16, "U16": 16, "I32": 32, "U32": 32, "I64": 64, "U64": 64, "C64": 64},
}
_NUMPY = {"F16": np.float16, "BF16": jnp.bfloat16, "F32": np.float32, "F64": np.float64}
# Computed from the config by whoever loads a model; old checkpoints hold them, and transformers ignores them too.
_RECOMPUTED = re.compile(r"(^|\.)rotary_emb\.(inv_freq|original_inv_freq|cos_cached|sin_cached)$")
# What an index may leave out or list in vain: those, and a head that is tied.
_OPTIONAL = re.compile(rf"{_RECOMPUTED.pattern}|^lm_head\.weight$")
_PREFIX, _EMBEDDING = "model.", "embed_tokens.weight"
_HEADLESS = re.compile(r"(embed_tokens|layers|norm)\.")  # the parts of a model without its head
_LONGEST = 100_000_000  # bytes of a header or an index: the limit of the safetensors library
_DIMENSIONS = 64  # of a NumPy array
_PIECE = 1 << 22  # elements compared at a time


class WeightsError(ValueError):
    """A checkpoint folder does not hold the model that its config describes."""


class Tensor(NamedTuple):
    """One tensor as its file's header describes it."""

    file: Path
    name: str
    dtype: str  # as safetensors writes it, e.g. "BF16"
    shape: tuple[int, ...]
    begin: int  # bytes from the start of the file
    end: int

    def __str__(self) -> str:
        return f"{self.name} in {self.file.name}"


def find_tensors(folder: Path) -> dict[str, Tensor]:
    """Every tensor of a folder by name, without the buffers that are recomputed from the config.

    The single file is taken where there is one, as transformers does. An index beside it is a leftover or an equal
    copy: shards of it that exist must hold the very same tensors.

    Raises:
        WeightsError: no safetensors, a file that is missing or malformed, or two different sets of weights.
    """
    single, index = folder / SINGLE_FILE, folder / INDEX_FILE
    if not _named(index):
        if not _named(single):
            raise WeightsError(without_safetensors(folder))
        tensors = read_header(single)
    elif not _named(single):
        tensors = _indexed(folder, read_index(index))
    else:
        tensors = read_header(single)
        try:
            listed = read_index(index)
        except WeightsError as error:
            raise WeightsError(f"{error}, or remove it if {SINGLE_FILE} beside it is the whole model") from None
        _check_same(tensors, folder, listed)
    return _as_named({name: tensor for name, tensor in tensors.items() if not _RECOMPUTED.search(name)})


def _as_named(tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    """Names as a Qwen2ForCausalLM has them, where the model was saved without its head, or within another one.

    transformers knows these two as well; under other names it finds nothing, and leaves the weights random.

    Raises:
        WeightsError: they begin in another way.
    """
    embedding = next((name for name in tensors if name.endswith(_EMBEDDING)), _PREFIX + _EMBEDDING)
    prefix = embedding.removesuffix(_EMBEDDING)
    if prefix == _PREFIX:
        return tensors
    if prefix == _PREFIX * 2:
        return {name.removeprefix(_PREFIX): tensor for name, tensor in tensors.items()}
    if prefix == "":
        return {_PREFIX + name if _HEADLESS.match(name) else name: tensor for name, tensor in tensors.items()}
    raise WeightsError(
        f"{tensors[embedding].file}: tensor {embedding} is named as in another model, expected "
        f"{_PREFIX}{_EMBEDDING}; save the Qwen2ForCausalLM within it (its save_pretrained), or rename the tensors"
    )


def check_floats(tensors: dict[str, Tensor]) -> None:
    """Refuses weights that are no floating-point numbers of 16 bits or more.

    Raises:
        WeightsError: names the first one, and what to use instead.
    """
    for tensor in tensors.values():
        named = quantized(tensor.name)
        if tensor.dtype in FLOATS and not named:
            continue
        kind = f"float{_BITS[tensor.dtype]}" if tensor.dtype.startswith("F") else "no floating-point numbers"
        what = f"belongs to {named}" if named else f"is {tensor.dtype} ({kind}), expected {', '.join(FLOATS)}"
        if named or (_BITS[tensor.dtype] <= 8 and tensor.dtype != "BOOL"):
            advice = (
                "quantized checkpoints are not supported: use the one that it was made from, in bfloat16 (a user's "
                "weights can be rounded when they are loaded: user.param_dtype=int8)"
            )
        else:
            advice = "use a checkpoint in bfloat16, or fetch this one again"
        raise WeightsError(f"{tensor.file}: tensor {tensor.name} {what}; {advice}")


def same_values(one: Tensor, other: Tensor) -> bool:
    """Whether two tensors have one shape and equal bytes, or equal numbers where their dtypes differ.

    A piece of each is in memory at a time.
    """
    known = one.dtype in FLOATS and other.dtype in FLOATS
    if one.shape != other.shape or (one.dtype != other.dtype and not known):
        return False
    bits = [_BITS[tensor.dtype] for tensor in (one, other)]
    count = (one.end - one.begin) * 8 // bits[0]
    with one.file.open("rb") as first, other.file.open("rb") as second:
        first.seek(one.begin)
        second.seek(other.begin)
        for at in range(0, count, _PIECE):
            a, b = (file.read(min(_PIECE, count - at) * n // 8) for file, n in zip((first, second), bits, strict=True))
            if a != b if one.dtype == other.dtype else (_numbers(a, one.dtype) != _numbers(b, other.dtype)).any():
                return False
    return True


def _numbers(data: bytes, dtype: str) -> np.ndarray:
    return np.frombuffer(data, _NUMPY[dtype]).astype(np.float64)


def not_finite(values: np.ndarray) -> bool:
    """Whether NaN or an infinity is among floats of 16, 32 or 64 bits.

    Their exponents are all ones, so as integers they are the largest, with and without the sign: two reductions that
    need no memory, where isfinite of bfloat16 goes element by element.
    """
    bits = values.dtype.itemsize * 8
    exponent = {"bfloat16": 8, "float16": 5, "float32": 8, "float64": 11}[values.dtype.name]
    infinity = ((1 << exponent) - 1) << (bits - 1 - exponent)
    signed, unsigned = values.view(f"i{bits // 8}"), values.view(f"u{bits // 8}")
    return bool(values.size) and bool(signed.max() >= infinity or unsigned.max() >= infinity + (1 << (bits - 1)))


def read_header(file: Path) -> dict[str, Tensor]:
    """Tensors of a safetensors file by name, in the order of their bytes.

    Raises:
        WeightsError: it is no such file, or ends early; the message names file and tensor.
    """
    size = _size(file)
    with file.open("rb") as stream:
        first = stream.read(8)
        length = int.from_bytes(first, "little")
        if size == 0:
            raise WeightsError(f"{file}: is empty (0 bytes); fetch it again")
        if first == b"version ":
            raise WeightsError(f"{file}: is a pointer of Git LFS, not the weights; fetch them: git lfs pull")
        if size >= 8 and length > _LONGEST:
            raise WeightsError(
                f"{file}: its header claims {length} bytes, of {_LONGEST} that are allowed; it is no safetensors "
                f"file, or a damaged one: fetch it again"
            )
        if size < 8 + length:
            raise WeightsError(f"{file}: {size} bytes end inside the header; the file is truncated: fetch it again")
        header = _json(file, stream.read(length), "its header")
    notes = header.pop("__metadata__", None) or {}
    if not isinstance(notes, dict) or not all(isinstance(value, str) for value in notes.values()):
        raise _malformed(file, f"__metadata__ is {_short(notes)}, expected an object of strings")
    tensors = sorted(
        (_tensor(file, *item, 8 + length, size) for item in header.items()), key=lambda t: (t.begin, t.end)
    )
    if not tensors:
        raise WeightsError(f"{file}: holds no tensors; fetch it again")
    at = 8 + length
    for tensor, before in zip(tensors, (None, *tensors), strict=False):
        if tensor.begin != at:
            what = f"overlaps {before.name}" if before and tensor.begin < at else f"leaves a gap of {tensor.begin - at}"
            raise _malformed(file, f"tensor {tensor.name} at byte {tensor.begin} {what}; expected byte {at}")
        at = tensor.end
    if at != size:
        raise _malformed(file, f"{size - at} bytes after the last tensor, {tensors[-1].name}, belong to none")
    return {tensor.name: tensor for tensor in tensors}


def _tensor(file: Path, name: str, entry: Any, start: int, size: int) -> Tensor:
    """One entry of a header, its claims checked."""
    if not isinstance(entry, dict):
        raise _malformed(file, f"tensor {name} is {_short(entry)}, expected an object")
    for field in ("dtype", "shape", "data_offsets"):
        if field not in entry:
            raise _malformed(file, f"tensor {name} has no {field}")
    dtype, shape, offsets = entry["dtype"], entry["shape"], entry["data_offsets"]
    if not isinstance(dtype, str) or dtype not in _BITS:
        raise _malformed(file, f"tensor {name} has the unknown dtype {_short(dtype)}")
    if not _whole(shape) or len(shape) > _DIMENSIONS:
        raise _malformed(file, f"tensor {name} has shape {_short(shape)}, expected a short list of whole numbers")
    if not _whole(offsets) or len(offsets) != 2 or offsets[0] > offsets[1]:
        raise _malformed(file, f"tensor {name} has data_offsets {_short(offsets)}, expected two rising whole numbers")
    bits = math.prod(shape) * _BITS[dtype]
    if bits != (offsets[1] - offsets[0]) * 8:
        raise _malformed(
            file,
            f"tensor {name} of shape {_short(tuple(shape))} and dtype {dtype} takes {-(-bits // 8)} bytes, but its "
            f"data_offsets {_short(offsets)} hold {offsets[1] - offsets[0]}",
        )
    if start + offsets[1] > size:
        raise WeightsError(
            f"{file}: tensor {name} of shape {tuple(shape)} ends at byte {start + offsets[1]}, but the file has only "
            f"{size}; it is truncated: fetch it again"
        )
    return Tensor(file, name, dtype, tuple(shape), start + offsets[0], start + offsets[1])


def give_usual_mode(file: Path) -> None:
    """Gives a file the mode that `open` would: `safetensors` writes files that none but their owner reads."""
    mask = os.umask(0o077)  # the only way to read it
    os.umask(mask)
    file.chmod(0o666 & ~mask)


def read_index(file: Path) -> dict[str, str]:
    """{tensor: name of a file beside the index}.

    Raises:
        WeightsError: it is no index.
    """
    if _size(file) > _LONGEST:
        raise WeightsError(f"{file}: has {_size(file)} bytes, of {_LONGEST} that are allowed; fetch it again")
    weight_map = _json(file, file.read_bytes(), "it").get("weight_map")
    if not isinstance(weight_map, dict) or not weight_map:
        raise _malformed(file, f"weight_map is {_short(weight_map)}, expected an object of tensors and their files")
    for name, shard in weight_map.items():
        if not isinstance(shard, str) or not re.fullmatch(r"[^/\\\0]+\.safetensors", shard):
            raise _malformed(
                file, f"weight_map places {name} in {_short(shard)}, expected the name of a .safetensors file beside it"
            )
    return weight_map


def _indexed(folder: Path, weight_map: dict[str, str]) -> dict[str, Tensor]:
    """Tensors of an index's shards, which must hold what the index says and nothing else."""
    tensors: dict[str, Tensor] = {}
    for shard in sorted(set(weight_map.values())):
        names = [name for name, file in weight_map.items() if file == shard]
        if not _named(folder / shard):
            raise WeightsError(
                f"{folder / shard}: no such file, but {INDEX_FILE} places {len(names)} tensors in it, e.g. "
                f"{names[0]}; fetch it (an interrupted download resumes)"
            )
        shard_tensors = read_header(folder / shard)
        for name in names:
            if name not in shard_tensors and not _OPTIONAL.search(name):
                raise WeightsError(f"{folder / shard}: tensor {name} is missing, though {INDEX_FILE} places it here")
        for name in shard_tensors:
            if weight_map.get(name) != shard and not _OPTIONAL.search(name):
                where = f"places in {weight_map[name]}" if name in weight_map else "does not list"
                raise WeightsError(f"{folder / shard}: extra tensor {name}, which {INDEX_FILE} {where}")
        tensors |= shard_tensors
    return tensors


def _check_same(single: dict[str, Tensor], folder: Path, weight_map: dict[str, str]) -> None:
    """That what exists of an index's shards holds what the single file holds."""
    shards = sorted({file for file in weight_map.values() if file != SINGLE_FILE and _named(folder / file)})
    remedy = f"so it is unclear which is the model: remove either {SINGLE_FILE}, or {INDEX_FILE} and its shards"
    for shard in shards:
        try:
            tensors = read_header(folder / shard)
        except WeightsError as error:
            raise WeightsError(f"{error}. There is a {SINGLE_FILE} too, {remedy}") from None
        for name, tensor in tensors.items():
            if name not in single:
                raise WeightsError(f"{folder / shard}: holds {name}, which {SINGLE_FILE} does not, {remedy}")
            if not same_values(tensor, single[name]):
                raise WeightsError(f"{folder / shard}: its {name} differs from that in {SINGLE_FILE}, {remedy}")
    whole = set(weight_map.values()) == set(shards)
    if extra := next((name for name in single if whole and name not in weight_map), None):
        raise WeightsError(f"{folder / SINGLE_FILE}: holds {extra}, which the shards of {INDEX_FILE} do not, {remedy}")


def _named(file: Path) -> bool:
    """Whether there is such a name in the folder, be it a link that leads nowhere."""
    return os.path.lexists(file)


def _size(file: Path) -> int:
    """Bytes of a file that is one, so that opening it cannot wait for a pipe's writer."""
    try:
        status = file.stat()
    except OSError as error:
        link = f" (a link to {os.readlink(file)})" if file.is_symlink() else ""
        raise WeightsError(f"{file}{link}: cannot be read ({error.strerror}); fetch it again") from None
    if not stat.S_ISREG(status.st_mode):
        kind = "a folder" if stat.S_ISDIR(status.st_mode) else "no regular file"
        raise WeightsError(f"{file}: is {kind}, expected a file; fetch it again")
    return status.st_size


def _json(file: Path, data: bytes, what: str) -> dict[str, Any]:
    """The object that a file's bytes are; a name twice is a fault, since readers differ in which one they take."""

    def single(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
        fields = dict(pairs)
        if len(fields) < len(pairs):
            raise _malformed(file, f"{_short(next(repeats(pairs)))} stands there twice")
        return fields

    try:
        value = json.loads(data.decode("utf-8"), object_pairs_hook=single)
    except WeightsError:
        raise
    except UnicodeDecodeError as error:
        raise _malformed(file, f"{what} is not UTF-8 (byte {error.start})") from None
    except RecursionError:
        raise _malformed(file, f"{what} is nested too deeply") from None
    except ValueError as error:
        raise _malformed(file, f"{what} is not JSON ({_short(str(error))})") from None
    if not isinstance(value, dict):
        raise _malformed(file, f"{what} is {_short(value)}, expected a JSON object")
    return value


def _whole(value: Any) -> bool:
    """Whether it is a list of whole numbers that fit 64 bits, none negative."""
    return isinstance(value, list) and all(type(n) is int and 0 <= n < 1 << 63 for n in value)


def _malformed(file: Path, what: str) -> WeightsError:
    return WeightsError(f"{file}: {what}; the file is malformed: fetch it again")


def _short(value: Any) -> str:
    text = repr(value)
    return text if len(text) <= 80 else f"{text[:77]}…"
