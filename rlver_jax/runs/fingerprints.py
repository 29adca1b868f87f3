"""Fingerprints of what runs and evaluations read: models, prompts and profiles, told by content, wherever it lies."""

import concurrent.futures
import dataclasses
import hashlib
import json
import os
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path

from ml_collections import ConfigDict

from rlver_jax.config.hub import local_folder
from rlver_jax.config.lora_fields import CONFIG_FILE, WEIGHTS_FILE
from rlver_jax.models.families import Qwen2Config
from rlver_jax.models.safetensors_files import Tensor, find_tensors
from rlver_jax.profiles.fingerprint import profiles_fingerprint
from rlver_jax.profiles.indexed import IndexedProfiles
from rlver_jax.profiles.intentions import HIDDEN_INTENTIONS
from rlver_jax.profiles.schema import Profile
from rlver_jax.text.template import read_config
from rlver_jax.user.prompts import Prompts, load_prompts

# Files of a tokenizer and its chat template, as far as a folder has them; without those for other readers.
_TOKENIZER = (
    *("tokenizer.json", "*.model", "tokenizer_config.json", "special_tokens_map.json", "added_tokens.json"),
    *("chat_template.jinja", "additional_chat_templates/*.jinja"),
)
OWN = "functions"  # how names of the sources of a user's own functions begin, which runs note too
_WHOLE = 64 << 20  # bytes of weights that are read whole
_WHOLE_TENSOR = 1 << 20  # bytes of a tensor of larger weights that is read whole
_PIECES, _PIECE = 8, 16 << 10  # of a larger one: evenly spread pieces, and bytes of each
_ROWS, _LAST_ROWS = ("embed_tokens.weight", "lm_head.weight"), 4 << 20  # whose last bytes are those of added tokens
_SAMPLES, _SAMPLE_BYTES = 64, 64 << 10  # of each file, in the first form of a model's fingerprint


def same(old: object, new: object) -> bool:
    """Whether two fingerprints are of one content; `old` may be of an older version.

    A model's has two parts, FIRST.SECOND, in two forms. Older versions wrote the first one alone.
    """
    if not isinstance(old, str) or not isinstance(new, str) or "." not in new:
        return old == new
    first, _, second = new.partition(".")
    return old.partition(".")[2] == second if "." in old else old == first


def model_fingerprint(config: ConfigDict, name: str) -> str:
    """Of a model's config, tokenizer and weights, as evaluations note it; see `same`.

    Args:
        config: `config.policy` or `config.user`; with init="random" there may be no weights.

    Raises:
        ValueError: no folder is named, or it holds no model.
    """
    folder = config.path
    if not folder:
        raise ValueError(
            f"{name}.path is empty; set --config.{name}.path to a Hugging Face folder of a Qwen2.5 or Qwen3 model"
        )
    weights = config.init != "random"
    held = local_folder(folder, weights=weights)
    if weights and not any(held.glob("*.safetensors")):
        raise ValueError(f"{name}.path={folder!r} holds no *.safetensors; expected a Hugging Face folder of a model")
    parts = model_parts(held, weights=weights) | adapter_part(config.adapter if weights else "")
    return f"{_sampled(held, weights)}.{_digest(json.dumps(parts, sort_keys=True).encode())}"


def model_parts(folder: Path, *, weights: bool) -> dict[str, str]:
    """{"config": …, "tokenizer": …, "weights": …} of a model's folder, each as it is read, however files are cut.

    The config is that of the architecture: notes in config.json don't count, nor how many positions it claims. Weights
    up to 64 MiB are read whole; of larger ones each tensor up to 1 MiB, and of larger tensors eight pieces, the first
    and the last among them (and of embeddings the last 4 MiB, which hold tokens that were added). So whatever changes a
    model as training, merging or abliterating does is seen; an edit of a few numbers between the pieces is not.

    Raises:
        ValueError, OSError: it holds no such model.
    """
    architecture = dataclasses.asdict(Qwen2Config.from_hf(folder))
    default = {field.name: field.default for field in dataclasses.fields(Qwen2Config)}
    known = {name: value for name, value in architecture.items() if value != default[name] and name != "max_positions"}
    ends = [read_config(folder, name).get("eos_token_id") for name in ("generation_config.json", "config.json")]
    files = sorted(file for kind in _TOKENIZER for file in folder.glob(kind))
    contents = [data for file in files for data in (file.name.encode(), file.read_bytes())]
    parts = {
        "config": _digest(json.dumps(known, sort_keys=True, default=repr).encode()),
        "tokenizer": _digest(json.dumps(next((e for e in ends if e is not None), None)).encode(), *contents),
    }
    return parts | ({"weights": _weights(folder)} if weights else {})


def adapter_part(folder: str) -> dict[str, str]:
    """{"adapter": fingerprint} of an adapter's folder; without one nothing.

    Raises:
        OSError: it cannot be read.
    """
    if not folder:
        return {}
    files = [Path(folder) / name for name in (CONFIG_FILE, WEIGHTS_FILE)]
    return {"adapter": _digest(*(file.read_bytes() for file in files))}


def _weights(folder: Path) -> str:
    tensors = find_tensors(folder)
    whole = sum(tensor.end - tensor.begin for tensor in tensors.values()) <= _WHOLE
    with concurrent.futures.ThreadPoolExecutor(min(16, 4 * (os.cpu_count() or 1))) as pool:  # network folders wait
        hashed = pool.map(lambda tensor: _tensor(tensor, whole), tensors.values())
        digests = dict(zip(tensors, hashed, strict=True))
    return _digest(*(f"{name} {digests[name]}".encode() for name in sorted(digests)))


def _tensor(tensor: Tensor, whole: bool) -> str:
    shape = f"{tensor.dtype} {tensor.shape}".encode()
    with tensor.file.open("rb") as stream:
        return _digest(shape, *(_read(stream.fileno(), *part) for part in _byte_ranges(tensor, whole)))


def _byte_ranges(tensor: Tensor, whole: bool) -> Iterator[tuple[int, int]]:
    """(first byte, number of bytes) of what is read of a tensor."""
    size = tensor.end - tensor.begin
    if whole or size <= _WHOLE_TENSOR:
        for begin in range(tensor.begin, tensor.end, _WHOLE_TENSOR):
            yield begin, min(_WHOLE_TENSOR, tensor.end - begin)
        return
    for i in range(_PIECES):
        yield tensor.begin + (size - _PIECE) * i // (_PIECES - 1), _PIECE
    if tensor.name.endswith(_ROWS):
        last = min(size, _LAST_ROWS)
        yield tensor.end - last, last


def _read(file: int, offset: int, size: int) -> bytes:
    return os.pread(file, size, offset)


def _sampled(folder: Path, weights: bool) -> str:
    """The first form: 64 pieces of each large file, every other whole. Evaluations of older versions have it."""
    files = sorted(file for kind in ("*.safetensors", "*.model", "*.json") for file in folder.glob(kind))
    files = [file for file in files if weights or file.suffix != ".safetensors"]
    return _digest(*(data for file in files for data in (file.name.encode(), *_samples(file))))


def _samples(file: Path) -> Iterable[bytes]:
    size = file.stat().st_size
    yield str(size).encode()
    with file.open("rb") as stream:
        if size <= _SAMPLES * _SAMPLE_BYTES:
            yield stream.read()
            return
        for i in range(_SAMPLES):
            stream.seek((size - _SAMPLE_BYTES) * i // (_SAMPLES - 1))
            yield stream.read(_SAMPLE_BYTES)


def texts_fingerprint(config: ConfigDict, profiles: Sequence[Profile]) -> str:
    """Of all prompts as the models read them, and of the profiles in their order."""
    prompts = load_prompts(config.data.language, config.user.prompts or None)
    texts = [prompts.policy_system(config.policy.mode, config.policy.prompt), *_texts_for_user(prompts)]
    if config.remote.user.url:
        texts += [prompts.form("", say=""), *(prompts.form("", missing=missing) for missing in ("change", "reply"))]
    for p in profiles:
        texts += [p.id, p.first_talk or "", _system(prompts, p, config)]
    return _digest(json.dumps(texts).encode())


def _texts_for_user(prompts: Prompts) -> list[str]:
    return [prompts.opening, repr(prompts.appraisal), repr(prompts.reply), *([repr(prompts.sage)] * bool(prompts.sage))]


def _system(prompts: Prompts, profile: Profile, config: ConfigDict) -> str:
    return prompts.user_system(
        profile.persona,
        profile.background,
        profile.hidden_intention,
        style=config.user.style,
        scenario=config.user.scenario,
    )


def run_fingerprints(
    config: ConfigDict, profiles: Mapping[str, Sequence[Profile]], models: Mapping[str, tuple[Path, bool]]
) -> dict[str, str]:
    """{"what.part": fingerprint} of all that a training run reads.

    Args:
        profiles: by the name of their field, "data.train" and "data.eval", in the order in which they are read.
        models: for what, e.g. "user": (folder, whether its weights are read).

    Raises:
        ValueError, OSError: prompts or a model that cannot be used.
    """
    prompts = load_prompts(config.data.language, config.user.prompts or None)
    # The user's system prompt as it is written for each known wish, and for another one.
    wishes = [one.chinese for one in HIDDEN_INTENTIONS] + [one.sentence for one in prompts.intentions.values()]
    probes = [Profile("", "persona", "scene", wish, "") for wish in (*wishes, "wish")]
    user = [*_texts_for_user(prompts), *(_system(prompts, probe, config) for probe in probes)]
    fingerprints = {
        "prompts.policy": _digest(prompts.policy_system(config.policy.mode, config.policy.prompt).encode()),
        "prompts.user": _digest(json.dumps(user).encode()),
    }
    for name, source in profiles.items():
        stored = source.fingerprint if isinstance(source, IndexedProfiles) else None
        fingerprints[f"profiles.{name}"] = stored or profiles_fingerprint(source)
    by_folder: dict[tuple[Path, bool], dict[str, str]] = {}
    for name, (folder, weights) in models.items():
        key = (folder.resolve(), weights)
        by_folder[key] = by_folder.get(key) or model_parts(folder, weights=weights)
        parts = by_folder[key] | adapter_part(config[name].get("adapter", "") if weights else "")
        fingerprints |= {f"{name}.{part}": digest for part, digest in parts.items()}
    return fingerprints


def described(name: str, config: ConfigDict) -> str:
    """What a part of `run_fingerprints` is of, in words, and where it lies now."""
    what, _, part = name.partition(".")
    if what == "profiles":
        kind = "training" if part == "data.train" else "held-out"
        value = config.data.train if part == "data.train" else config.data.eval or config.data.train
        return f"the {kind} profiles ({part}={value!r})"
    if what == OWN:
        return f"the source of {part}"
    if what == "prompts":
        return f"the prompts of the {part} (user.prompts={config.user.prompts!r}, data.language={config.data.language})"
    path = config[what].path or config.policy.path
    return f"the {part} of the {what} model ({what}.path={path!r})"


def _digest(*parts: bytes) -> str:
    digest = hashlib.sha256()
    for part in parts:
        digest.update(len(part).to_bytes(8, "big") + part)
    return digest.hexdigest()[:16]
