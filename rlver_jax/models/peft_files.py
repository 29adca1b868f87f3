"""Adapters in the files of Hugging Face's `peft`: adapter_config.json and adapter_model.safetensors.

PEFT stores A as [r, in] and B as [out, r], one of each for every layer, and the scaling as its config's numbers.
"""

import dataclasses
import json
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh
from jax.typing import DTypeLike
from safetensors import SafetensorError
from safetensors.numpy import load_file, save_file

from rlver_jax.config.lora_fields import CONFIG_FILE, TARGETS, WEIGHTS_FILE
from rlver_jax.models.families import Qwen2Config
from rlver_jax.models.hf_weights import check_new
from rlver_jax.models.lora import LoRA, abstract_adapter, applied, merged
from rlver_jax.models.product import LORA_A, LORA_B
from rlver_jax.models.qwen import Params, Qwen2, unstack_layers
from rlver_jax.parallel import distributed, rules

_FACTORS = {LORA_A: "lora_A", LORA_B: "lora_B"}
# Settings of peft that would change what is computed: what they are in a plain adapter.
_PLAIN: dict[str, tuple[Any, ...]] = {
    "peft_type": ("LORA",),
    "bias": ("none",),
    "fan_in_fan_out": (False, None),
    "use_dora": (False, None),
    "lora_bias": (False, None),
    "modules_to_save": (None, []),
    "layers_to_transform": (None, []),
    "layer_replication": (None, []),
    "rank_pattern": ({}, None),
    "alpha_pattern": ({}, None),
    "target_parameters": (None, []),
    "trainable_token_indices": (None, [], {}),
}


def module_names(config: Qwen2Config, lora: LoRA) -> dict[str, str]:
    """{path in a layer, such as "attn/q": name of the module there, such as "self_attn.q_proj"} of all targets."""
    kernels = {path.removesuffix("/kernel"): name for path, name in config.family.layer.items() if "/kernel" in path}
    return {path: name.removesuffix(".weight") for path, name in kernels.items() if path.split("/")[-1] in lora.targets}


def save_adapter(
    folder: str | Path, adapter: Params, config: Qwen2Config, lora: LoRA, *, base: str, dtype: DTypeLike = np.float32
) -> None:
    """Writes a folder that `peft.PeftModel.from_pretrained` puts on its base model.

    Every process must call it (arrays may be spread over hosts); process 0 writes.

    Args:
        folder: new or empty.
        base: folder or name of the base model, noted for whoever loads the adapter.
        dtype: of the file.

    Raises:
        FileExistsError: the folder already holds files.
    """
    folder = Path(folder)
    check_new(folder)
    fetched = distributed.fetch(adapter)
    if jax.process_index():
        return
    folder.mkdir(parents=True, exist_ok=True)
    tensors = _tensors(fetched, config, lora, dtype)
    save_file(tensors, folder / WEIGHTS_FILE, metadata={"format": "pt"})
    settings = json.dumps(_settings(config, lora, base), indent=2, sort_keys=True)
    (folder / CONFIG_FILE).write_text(settings + "\n", encoding="utf-8")


def _tensors(adapter: Params, config: Qwen2Config, lora: LoRA, dtype: DTypeLike) -> dict[str, np.ndarray]:
    layers = unstack_layers(adapter) if "layers" in adapter else adapter
    tensors = {}
    for i in range(config.num_layers):
        for path, module in module_names(config, lora).items():
            factors: Any = layers[f"layer_{i}"]
            for name in path.split("/"):
                factors = factors[name]
            for ours in _FACTORS:
                tensors[_name(i, module, ours)] = np.ascontiguousarray(np.asarray(factors[ours]).T.astype(dtype))
    return tensors


def _settings(config: Qwen2Config, lora: LoRA, base: str) -> dict[str, Any]:
    return {
        "peft_type": "LORA",
        "task_type": "CAUSAL_LM",
        "base_model_name_or_path": base,
        "r": lora.rank,
        "lora_alpha": lora.alpha,
        "use_rslora": lora.rank_stabilized,
        "target_modules": sorted(name.split(".")[-1] for name in module_names(config, lora).values()),
        "bias": "none",
        "lora_dropout": 0.0,
        "fan_in_fan_out": False,
        "inference_mode": True,
    }


class AdapterError(ValueError):
    """A folder that holds no adapter that can be used; the message names it, why, and what to do."""


def with_adapter(params: Params, model: Qwen2, folder: str | Path, mesh: Mesh | None = None) -> Params:
    """Parameters of `model` with the adapter of a `peft` folder merged into them: summed in float32, rounded once.

    Args:
        params: on the mesh; their buffers are given up.

    Raises:
        AdapterError: as `read_adapter`.
    """
    lora, adapter = read_adapter(folder, model, mesh)

    def merge(params: Params, adapter: Params) -> Params:
        return jax.tree.map(lambda new, old: new.astype(old.dtype), merged(applied(params, adapter, lora)), params)

    program = jax.jit(merge, donate_argnums=0, out_shardings=jax.tree.map(lambda x: x.sharding, params))
    return program(params, adapter)


def read_adapter(folder: str | Path, model: Qwen2, mesh: Mesh | None = None) -> tuple[LoRA, Params]:
    """The adapter of a `peft` folder, for `model`, each leaf sharded by `parallel.rules`.

    Raises:
        AdapterError: it is none, or of another kind or model; or a file is damaged.
    """
    folder = Path(folder)
    try:
        settings = json.loads((folder / CONFIG_FILE).read_text(encoding="utf-8"))
        tensors = load_file(folder / WEIGHTS_FILE)
    except (OSError, ValueError, SafetensorError) as error:
        raise AdapterError(
            f"{folder}: no adapter can be read ({error}); expected {CONFIG_FILE} and {WEIGHTS_FILE}, as peft saves them"
        ) from None
    lora = _lora_of(folder / CONFIG_FILE, settings, model.config, tensors)
    arrays = {name: _array(folder, name, x) for name, x in tensors.items()}
    shapes, axes = abstract_adapter(model.clone(scan_layers=False), lora)
    layers = _layers(folder / WEIGHTS_FILE, arrays, model.config, lora, shapes)
    if not model.scan_layers:
        return lora, _placed(layers, shapes, axes, mesh)
    stacked = {"layers": jax.tree.map(lambda *x: np.stack(x), *layers.values())}
    return lora, _placed(stacked, *abstract_adapter(model, lora), mesh)


def _placed(adapter: Params, shapes: Params, axes: Params, mesh: Mesh | None) -> Params:
    if mesh is None:
        return jax.tree.map(jnp.asarray, adapter)
    return jax.device_put(adapter, rules.tree_shardings(axes, shapes, mesh))


def _lora_of(file: Path, settings: dict[str, Any], config: Qwen2Config, tensors: dict[str, Any]) -> LoRA:
    for name, plain in _PLAIN.items():
        if settings.get(name, plain[0]) not in plain:
            raise AdapterError(
                f"{file}: {name}={settings[name]!r}, expected {plain[0]!r}; merge the adapter into its base model with "
                f"peft (merge_and_unload), and name that model"
            )
    rank, alpha = settings.get("r"), settings.get("lora_alpha")
    if not (isinstance(rank, int) and rank > 0 and isinstance(alpha, int | float)):
        raise AdapterError(f"{file}: r={rank!r} and lora_alpha={alpha!r}; expected a rank above 0, and a number")
    every = LoRA(rank, float(alpha), rank_stabilized=bool(settings.get("use_rslora")))
    paths = [path for path, module in module_names(config, every).items() if _name(0, module, LORA_A) in tensors]
    if not paths:
        raise AdapterError(f"{file.parent}: holds nothing for {_name(0, 'self_attn.q_proj', LORA_A)} and the like")
    names = {path.split("/")[-1] for path in paths}
    return dataclasses.replace(every, targets=tuple(name for name in TARGETS if name in names))


def _layers(
    file: Path, arrays: dict[str, np.ndarray], config: Qwen2Config, lora: LoRA, shapes: Params
) -> dict[str, Params]:
    """{"layer_0": …} of an unrolled model."""
    left = dict(arrays)

    def leaf(path: Any, like: Any) -> np.ndarray:
        layer, *inner, factor = (key.key for key in path)
        name = _name(int(layer.removeprefix("layer_")), module_names(config, lora)["/".join(inner)], factor)
        if name not in left:
            raise AdapterError(f"{file}: {name} is missing; expected an adapter of the same matrices in every layer")
        if (array := left.pop(name).T).shape != like.shape:
            raise AdapterError(
                f"{file}: {name} has shape {array.T.shape}, expected {like.shape[::-1]}: it is of another model"
            )
        return array

    layers = jax.tree_util.tree_map_with_path(leaf, shapes)
    for name in sorted(left):
        raise AdapterError(f"{file}: holds {name}, which is no factor of a matrix of a layer (lora.targets)")
    return layers


def _array(folder: Path, name: str, x: np.ndarray) -> np.ndarray:
    array = x.astype(np.float32)
    if not np.isfinite(array).all():
        raise AdapterError(f"{folder / WEIGHTS_FILE}: {name} holds NaN or infinity; the adapter is damaged")
    return array


def _name(layer: int, module: str, factor: str) -> str:
    return f"base_model.model.model.layers.{layer}.{module}.{_FACTORS[factor]}.weight"
