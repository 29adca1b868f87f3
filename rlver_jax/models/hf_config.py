"""Reads the `config.json` of a model as transformers does: a value means here what it means there, or it is refused.

transformers itself fills in defaults and reads the layouts of its versions; remote code (`auto_map`) is never run. A
refusal names the file, the field, its value and what was expected.
"""

import dataclasses
import json
import math
import reprlib
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, NoReturn, TypeVar

from rlver_jax.config.foreign_weights import is_run, policy_of
from rlver_jax.config.validate import shortened
from rlver_jax.models.rope import ROPE_TYPES, RopeScaling
from rlver_jax.text.advice import without_advice

_T = TypeVar("_T")
MOST = 2**31 - 1  # of a size: tokens and positions are int32
MOST_LAYERS = 10_000  # transformers makes a list of them
MOST_THETA = 1e38  # float32

SIZES = (
    *("vocab_size", "hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads"),
    *("num_key_value_heads", "head_dim", "max_position_embeddings"),
)
MAY_BE_NULL = ("num_key_value_heads", "head_dim")  # null is as if they were absent
STORED = ("dtype", "torch_dtype")  # of the weights; their own files say it
FLAGS = ("tie_word_embeddings", "use_sliding_window")
ROPE_NUMBERS = {
    "default": (),
    "linear": ("factor",),
    "llama3": ("factor", "low_freq_factor", "high_freq_factor"),
    "yarn": ("factor", "attention_factor", "beta_fast", "beta_slow", "mscale", "mscale_all_dim"),
}


@dataclasses.dataclass(frozen=True)
class Family:
    """What distinguishes the checkpoints of one model family. The decoder itself is `qwen.Qwen2`.

    Attributes:
        architecture: in `architectures` of config.json.
        models: that belong to it, for messages.
        config: dataclass of sizes and constants.
        transformers_config: name of the class in transformers that reads config.json.
        outer: Hugging Face tensor of each parameter outside the layers.
        layer: Hugging Face tensor of each parameter of a layer, without `model.layers.N.`.
    """

    architecture: str
    models: str
    config: type[Any]
    transformers_config: str
    outer: Mapping[str, str]
    layer: Mapping[str, str]


def read_config(folder: Path, families: Mapping[str, Family]) -> tuple[str, dict[str, Any]]:
    """(model_type, arguments of its family's `config`) from a Hugging Face folder.

    Args:
        families: that are supported, by model_type.

    Raises:
        FileNotFoundError: there is no config.json.
        ValueError: it can't be read, its values make no sense, or the model is not supported: another architecture, a
            quantized checkpoint, or a feature that changes the computation (windows of attention, a scaling of RoPE
            that is not in `ROPE_TYPES`, another activation).
    """
    file = folder / "config.json"
    if not file.exists():
        raise FileNotFoundError(f"{file}: no such file; expected a Hugging Face folder of a Qwen2.5 or Qwen3 model")
    _check_json(file)
    with without_advice():
        import transformers
    raw, _ = _read(file, lambda: transformers.PreTrainedConfig.get_config_dict(str(folder), local_files_only=True))
    raw = {name: value for name, value in raw.items() if name not in STORED}  # transformers looks them up in torch
    model_type = _model_type(file, raw, families)
    _check_values(file, raw)
    _check_rope(file, raw)
    config_class = getattr(transformers, families[model_type].transformers_config)
    config = _read(file, lambda: config_class.from_dict(raw))
    _read(file, config.standardize_rope_params)  # again, as its model does: fields beside the dictionary move in
    _check_computation(file, config, families[model_type])
    return model_type, _arguments(file, config)


def _arguments(file: Path, config: Any) -> dict[str, Any]:
    """Of a config of transformers that has passed the checks."""
    hidden, heads, kv_heads = config.hidden_size, config.num_attention_heads, config.num_key_value_heads
    head_dim = getattr(config, "head_dim", None)
    if head_dim is None and hidden % heads:
        _refuse(
            file, f"hidden_size={hidden} is not a multiple of num_attention_heads={heads}, and there is no head_dim"
        )
    if heads % kv_heads:
        _refuse(
            file,
            f"num_attention_heads={heads} is not a multiple of num_key_value_heads={kv_heads} (absent, it is 32; null, "
            f"it is num_attention_heads)",
        )
    head_dim = head_dim or hidden // heads
    if head_dim % 2:
        _refuse(file, f"head_dim={head_dim}: expected an even number, as rotary embedding turns pairs")
    theta, scaling = _rope(file, config)
    return {
        "vocab_size": config.vocab_size,
        "hidden_size": hidden,
        "intermediate_size": config.intermediate_size,
        "num_layers": config.num_hidden_layers,
        "num_heads": heads,
        "num_kv_heads": kv_heads,
        "head_dim": head_dim,
        "max_positions": config.max_position_embeddings,
        "rope_theta": theta,
        "rope_scaling": scaling,
        "rms_norm_eps": config.rms_norm_eps,
        "tie_embeddings": config.tie_word_embeddings,
        "init_std": float(config.initializer_range),
    }


def _rope(file: Path, config: Any) -> tuple[float, RopeScaling | None]:
    rope = config.rope_parameters
    kind, theta = rope["rope_type"], rope["rope_theta"]
    least = 1 if kind == "yarn" else 0  # YaRN divides by its logarithm
    if not _is_number(theta) or not least < theta <= MOST_THETA:
        _wrong(file, "rope_theta", theta, f"a number above {least}, at most {MOST_THETA:g}; Qwen2.5 has 1000000.0")
    if kind == "default":
        return float(theta), None
    names = [name for name in ROPE_NUMBERS[kind] if rope.get(name) is not None]
    fields: dict[str, Any] = {name: float(rope[name]) for name in names}
    if kind in ("yarn", "llama3"):
        original = rope["original_max_position_embeddings"]
        fields["original_max_position_embeddings"] = original
        fields.setdefault("factor", config.max_position_embeddings / original)  # where it is null
        if fields["factor"] < 1:
            _wrong(file, "factor", None, f"a number: max_position_embeddings / {original} is below 1")
    if kind == "yarn":
        fields["truncate"] = bool(rope.get("truncate", True))
    return float(theta), RopeScaling(kind, **fields)


def _check_json(file: Path) -> None:
    if file.is_dir():
        raise ValueError(f"{file}: is a folder; expected a file, the config of a Qwen2.5 or Qwen3 model")
    try:
        raw = json.loads(file.read_text(encoding="utf-8"))
    except (ValueError, RecursionError) as error:  # also UnicodeDecodeError, and numbers of thousands of digits
        raise ValueError(f"{file}: is not JSON in UTF-8 ({error}); download it again") from None
    if not isinstance(raw, dict):
        raise ValueError(
            f"{file}: holds {reprlib.repr(raw)}; expected a JSON object, the config of a Qwen2.5 or Qwen3 model"
        )


def _model_type(file: Path, raw: dict[str, Any], families: Mapping[str, Family]) -> str:
    """Key of the family that the model belongs to; refuses other models, and quantized weights."""
    kind, named = raw.get("model_type"), raw.get("architectures") or []
    named = named if isinstance(named, list) else [named]
    if not (kind or named) and is_run(file.parent):
        _refuse(file, f"is the config of a training run, not of a model; {policy_of(file.parent)}")
    types = [t for t, f in families.items() if kind in (None, t) and (f.architecture in named or not named)]
    if not types or not (kind or named):
        supported = " or ".join(f"{f.architecture} of model_type {t!r} ({f.models})" for t, f in families.items())
        _refuse(
            file,
            f"architecture {named[0] if named else None!r} of model_type {kind!r}, but only {supported} is supported",
        )
    for field in ("quantization_config", "compression_config", "quantization"):  # the last one is MLX's
        if raw.get(field):
            _refuse(
                file,
                f"{field} says that the checkpoint is quantized ({_quantization(field, raw[field])}), which is not "
                f"supported; use the unquantized model that it was made from, whose weights are bfloat16 or float32",
            )
    return types[0]


def _quantization(field: str, settings: Any) -> str:
    """Its method, such as "awq, 4 bits"."""
    if not isinstance(settings, dict):
        return reprlib.repr(settings)
    method = settings.get("quant_method") or ("mlx" if field == "quantization" else "method not named")
    bits = next((settings[name] for name in ("bits", "w_bit", "nbits") if name in settings), None)
    if settings.get("load_in_4bit") or settings.get("load_in_8bit"):
        method, bits = "bitsandbytes", 4 if settings.get("load_in_4bit") else 8
    return f"{method}, {bits} bits" if bits else str(method)


def _check_values(file: Path, raw: dict[str, Any]) -> None:
    """Types and ranges of the fields that are given."""
    for name in SIZES:
        value, most = raw.get(name, 1), MOST_LAYERS if name == "num_hidden_layers" else MOST
        if not (value is None and name in MAY_BE_NULL) and (type(value) is not int or not 1 <= value <= most):
            _wrong(file, name, value, f"a whole number from 1 to {most}")
    for name in FLAGS:
        if type(raw.get(name, False)) is not bool:
            _wrong(file, name, raw[name], "true or false")
    eps = raw.get("rms_norm_eps", 0.0)
    if type(eps) is not float or not 0 <= eps < math.inf:
        _wrong(file, "rms_norm_eps", eps, "a number with a decimal point, at least 0.0; Qwen2.5 has 1e-06")
    std = raw.get("initializer_range", 0.02)
    if not _is_number(std) or not 0 <= std <= MOST_THETA:
        _wrong(file, "initializer_range", std, "a number of at least 0; Qwen2.5 has 0.02")
    if raw.get("hidden_act", "silu") not in ("silu", "swish"):
        _wrong(file, "hidden_act", raw["hidden_act"], "'silu'; other activations are not supported")


def _check_rope(file: Path, raw: dict[str, Any]) -> None:
    """Rotary embedding, as far as it is given in a dictionary of its own, by transformers 4 or 5."""
    field = "rope_scaling" if raw.get("rope_scaling") else "rope_parameters"
    rope = raw.get(field) or {}
    if not isinstance(rope, dict):
        _wrong(file, field, rope, "an object, or null")
    if any(isinstance(value, dict) for value in rope.values()):
        _refuse(file, f"{field} differs by type of layer ({', '.join(map(str, rope))}), which is not supported")
    kind = rope.get("rope_type", rope.get("type", "default"))
    if kind not in ROPE_TYPES:
        _refuse(file, f"{field}: type {kind!r} is not supported; expected one of {', '.join(ROPE_TYPES)}")
    if kind == "default" and rope.get("factor", 1) not in (None, 1):
        _refuse(file, f"{field} has a factor but no type; expected one of {', '.join(ROPE_TYPES)}")
    if rope.get("partial_rotary_factor", raw.get("partial_rotary_factor")) not in (None, 1):
        _refuse(file, "partial_rotary_factor is not supported; Qwen rotates all of a head")
    for name in ROPE_NUMBERS[kind]:
        value, least = rope.get(name, 1), 1 if name == "factor" else 0
        if value is None and kind == "yarn":
            continue
        if not _is_number(value) or not (least <= value <= MOST_THETA) or value == 0:
            _wrong(file, f"{field}.{name}", value, f"a number of at least {least}" if least else "a number above 0")
    for fields in (raw, rope) if kind in ("yarn", "llama3") else ():
        value = fields.get("original_max_position_embeddings", 1)
        if type(value) is not int or not 1 <= value <= MOST:
            _wrong(file, "original_max_position_embeddings", value, f"a whole number from 1 to {MOST}, of tokens")
    low, high = ("beta_slow", "beta_fast") if kind == "yarn" else ("low_freq_factor", "high_freq_factor")
    if kind in ("yarn", "llama3") and (rope.get(low) or 1) >= (rope.get(high) or 32):
        _refuse(file, f"{field}: {low}={rope.get(low)!r} must lie below {high}={rope.get(high)!r}")
    if type(rope.get("truncate", True)) is not bool and rope["truncate"] is not None:
        _wrong(file, f"{field}.truncate", rope["truncate"], "true or false")


def _check_computation(file: Path, config: Any, family: Family) -> None:
    """Refuses features of transformers that are not supported, by its own reading of the fields that enable them."""
    other = [i for i, kind in enumerate(config.layer_types) if kind != "full_attention"]
    if other:
        _refuse(
            file,
            f"layer {other[0]} of {config.num_hidden_layers} has {config.layer_types[other[0]]} (layer_types, or "
            f"use_sliding_window with max_window_layers={config.max_window_layers} and "
            f"sliding_window={config.sliding_window}), which is not supported; Qwen has full attention in all",
        )
    if not getattr(config, "is_causal", True):
        _refuse(file, "is_causal=false is not supported: the model reads text in both directions and can't write any")
    if getattr(config, "attention_bias", False) and not family.config.qkv_bias:
        _refuse(file, "attention_bias=true is not supported: no published model of the family has such biases")
    if config.is_heterogeneous:
        _refuse(file, "per_layer_config is not supported; expected layers of one shape")


def _is_number(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool)


def _wrong(file: Path, name: str, value: Any, expected: str) -> NoReturn:
    text = json.dumps(value) if value is None or isinstance(value, bool) else reprlib.repr(value)
    _refuse(file, f"{name}={text}: expected {expected}")


def _refuse(file: Path, message: str) -> NoReturn:
    raise ValueError(f"{file}: {message}")


def _read(file: Path, call: Callable[[], _T]) -> _T:
    """The result of transformers for a file that anybody may have written: it raises many types of errors."""
    try:
        return call()
    except Exception as error:
        reason = shortened(" ".join(str(error).split()), 400)
        raise ValueError(f"{file}: transformers can't read it: {reason}") from error
