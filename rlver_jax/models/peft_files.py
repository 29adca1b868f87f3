"""Adapters in the files of Hugging Face's `peft`: adapter_config.json and adapter_model.safetensors.

PEFT stores A as [r, in] and B as [out, r], one of each for every layer, and the scaling as its config's numbers.
"""

import json
from pathlib import Path
from typing import Any

import jax
import numpy as np
from jax.typing import DTypeLike
from safetensors.numpy import save_file

from rlver_jax.models.architecture import Qwen2Config
from rlver_jax.models.lora import LoRA
from rlver_jax.models.product import LORA_A, LORA_B
from rlver_jax.models.qwen import Params, unstack_layers
from rlver_jax.parallel import distributed

CONFIG_FILE, WEIGHTS_FILE = "adapter_config.json", "adapter_model.safetensors"
_FACTORS = {LORA_A: "lora_A", LORA_B: "lora_B"}


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
    if folder.exists() and any(folder.iterdir()):
        raise FileExistsError(f"{folder}: not empty; export into a new folder")
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
    found = {}
    for i in range(config.num_layers):
        for path, module in module_names(config, lora).items():
            factors: Any = layers[f"layer_{i}"]
            for name in path.split("/"):
                factors = factors[name]
            for ours, theirs in _FACTORS.items():
                name = f"base_model.model.model.layers.{i}.{module}.{theirs}.weight"
                found[name] = np.ascontiguousarray(np.asarray(factors[ours]).T.astype(dtype))
    return found


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
