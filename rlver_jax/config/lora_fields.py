"""Fields of low-rank adapters (docs/lora.md), and what is wrong with their values."""

from collections.abc import Iterator, Mapping
from typing import Any

from rlver_jax.config.schema import COUNT, Field

TARGETS = ("q", "k", "v", "o", "gate", "up", "down")  # weight matrices of a layer
CONFIG_FILE, WEIGHTS_FILE = "adapter_config.json", "adapter_model.safetensors"  # of a folder of `peft`
_FULL = {"lora.rank": (0,)}

LORA = {
    "rank": Field(
        0,
        "of the adapters that are trained on frozen models of policy and critic (arXiv 2106.09685); 0: all parameters "
        "are trained",
        range=COUNT,
    ),
    "alpha": Field(16.0, "adapters count alpha / rank times", range=(1e-6, None), unused=_FULL),
    "targets": Field(
        ",".join(TARGETS), f"weight matrices with an adapter, of {', '.join(TARGETS)}, comma-separated", unused=_FULL
    ),
    "rank_stabilized": Field(False, "adapters count alpha / sqrt(rank) times (rsLoRA, arXiv 2312.03732)", unused=_FULL),
}


def named_targets(text: str) -> tuple[str, ...]:
    """The weight matrices that `lora.targets` names, in the order of a layer."""
    names = {name.strip() for name in text.split(",")}
    return tuple(name for name in TARGETS if name in names)


def target_faults(values: Mapping[str, Any]) -> Iterator[str]:
    """What is wrong with `lora.targets`, in {"section.name": value}."""
    text = values["lora.targets"]
    unknown = sorted({name.strip() for name in text.split(",")} - set(TARGETS))
    if unknown:
        yield (
            f"lora.targets={text[:100]!r}: expected some of {', '.join(TARGETS)}, comma-separated, found "
            f"{', '.join(map(repr, unknown[:3]))}; leave it out for all of them"
        )


def rounding_faults(values: Mapping[str, Any]) -> Iterator[str]:
    """Weights in int8 that would have to be trained, or that play without a correction."""
    if values["rollout.param_dtype"] and values["lora.rank"]:
        yield (
            f"rollout.param_dtype={values['rollout.param_dtype']!r}: rounds a policy whose weights change, but with "
            f"lora.rank={values['lora.rank']} they are frozen; set policy.param_dtype=int8, which rounds them once, or "
            f"leave it out"
        )
    elif values["rollout.param_dtype"] and not (values["loss.recompute"] and values["loss.importance_cap"]):
        yield (
            f"rollout.param_dtype={values['rollout.param_dtype']!r}: the policy that plays isn't quite the one that is "
            f"trained; set loss.recompute=True and loss.importance_cap, e.g. 2, which correct that"
        )
    for model in ("policy", "critic"):
        if values[f"{model}.param_dtype"] == "int8" and not values["lora.rank"]:
            yield (
                f"{model}.param_dtype='int8': weights in int8 can't be trained themselves; set lora.rank, e.g. 16, to "
                f"train an adapter on them, or {model}.param_dtype to float32 or bfloat16 (rollout.param_dtype=int8 "
                f"rounds the policy while it plays)"
            )
