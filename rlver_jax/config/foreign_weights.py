"""Weights in other formats than whole safetensors, known by their files' names: what they are, and what to do."""

import re
from collections.abc import Iterable
from pathlib import Path

SINGLE_FILE, INDEX_FILE = "model.safetensors", "model.safetensors.index.json"

_CONVERT = (
    'python -c "from transformers import AutoModelForCausalLM as M; '
    "M.from_pretrained({given}).save_pretrained('NEW')\" (needs torch), copy the tokenizer files to NEW, and name that"
)
_ORIGINAL = "name the model's folder in Hugging Face format instead (config.json and *.safetensors)"
# (files, what they are, what to do)
_KINDS = (
    (
        r"adapter_(model\.(safetensors|bin)|config\.json)",
        "a LoRA adapter, not a model",
        "name its base model as path, and this folder as policy.adapter or user.adapter, or "
        'merge it into its base model, python -c "from peft import AutoPeftModelForCausalLM as M; '
        "M.from_pretrained('{folder}').merge_and_unload().save_pretrained('NEW')\", copy the base model's tokenizer "
        "files to NEW, and name that",
    ),
    (
        r"pytorch_model.*\.bin(\.index\.json)?",
        "PyTorch weights (pickled), not safetensors",
        "convert them once: " + _CONVERT.replace("{given}", "'{folder}'"),
    ),
    (
        r".*\.gguf",
        "weights of llama.cpp (GGUF)",
        _ORIGINAL + ", or convert them once: " + _CONVERT.replace("{given}", "'{folder}', gguf_file='{file}'"),
    ),
    (r"consolidated.*|params\.json", "weights in their maker's own layout (consolidated)", _ORIGINAL),
    (
        r"mp_rank_.*|.*\.distcp|latest_checkpointed_iteration\.txt",
        "shards of a trainer's checkpoint",
        "export them with that trainer",
    ),
    (r"tf_model.*|.*\.h5", "TensorFlow weights", _ORIGINAL),
    (r"flax_model.*|.*\.msgpack", "Flax weights", _ORIGINAL),
    (r".*\.onnx(_data)?", "an ONNX graph", _ORIGINAL),
    (r".*\.(bin|pt|pth|ckpt)", "pickled weights, not safetensors", _ORIGINAL),
    (r".*\.(incomplete|part|crdownload|aria2)", "an unfinished download", "fetch it again"),
    (
        r".*-of-\d+\.safetensors",
        "shards without their index, model.safetensors.index.json",
        "fetch the index too",
    ),
    (r".*\.safetensors", "a file of another name than model.safetensors", "rename it if it is the whole model"),
)
_QUANTIZED = {
    "qweight": "a GPTQ or AWQ checkpoint",
    "qzeros": "a GPTQ or AWQ checkpoint",
    "g_idx": "a GPTQ checkpoint",
    "weight_scale_inv": "an FP8 checkpoint",
    "weight_scale": "an FP8 or compressed-tensors checkpoint",
    "weight_packed": "a compressed-tensors checkpoint",
    "absmax": "a bitsandbytes checkpoint",
    "quant_map": "a bitsandbytes checkpoint",
    "SCB": "a bitsandbytes checkpoint",
}


def quantized(tensor: str) -> str:
    """What kind of quantized checkpoint a tensor of this name belongs to; empty where it may be a model's own."""
    return _QUANTIZED.get(tensor.rpartition(".")[2], "")


def without_safetensors(folder: Path) -> str:
    """What to say of a folder that has neither model.safetensors nor its index."""
    expected = f"{folder}: neither {SINGLE_FILE} nor {INDEX_FILE}"
    if not folder.is_dir():
        return f"{expected}: it is no folder; expected the folder of a model in Hugging Face format"
    names = sorted(file.name for file in folder.iterdir())
    if kind := foreign_kind(names, folder):
        return f"{expected}, but {kind}"
    if is_run(folder.parent):
        return f"{expected}: it is what a training run keeps of its base model; {policy_of(folder.parent)}"
    return f"{expected}; expected safetensors weights, found {', '.join(names[:10]) or 'nothing'}"


def is_run(folder: str | Path) -> bool:
    """Whether it is the folder of a training run, not of a model: both hold a config.json."""
    return Path(folder, "checkpoints").is_dir()


def policy_of(run: Path) -> str:
    """How to name what a run has trained, where a model is expected."""
    return (
        f"take its policy with --checkpoint={run} (evaluate, serve), or write it as a model: python -m "
        f"rlver_jax.export --workdir={run} --out=NEW"
    )


def foreign_kind(names: Iterable[str], model: str | Path) -> str:
    """What else than a model with safetensors files of these names are, and the remedy; empty where that is unknown.

    Args:
        model: what `from_pretrained` finds them by.
    """
    names = list(names)
    if SINGLE_FILE in names or INDEX_FILE in names:
        return ""
    for pattern, what, remedy in _KINDS:
        if match := next((name for name in names if re.fullmatch(pattern, name)), None):
            return f"{match} is there: {what}; {remedy.replace('{folder}', str(model)).replace('{file}', match)}"
    return ""
