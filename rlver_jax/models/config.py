"""Architecture of a Qwen2.5 model: read from a Hugging Face folder, or one of the published sizes."""

import dataclasses
import json
from pathlib import Path
from typing import Any

from rlver_jax.hub import local_folder

ARCHITECTURE = "Qwen2ForCausalLM"


@dataclasses.dataclass(frozen=True)
class Qwen2Config:
    """Sizes and constants of a Qwen2 decoder (hashable, so it can be a static argument)."""

    vocab_size: int  # rows of the embedding, V; may exceed the tokenizer's count
    hidden_size: int  # D
    intermediate_size: int  # F, of the gated MLP
    num_layers: int
    num_heads: int  # H, query heads
    num_kv_heads: int  # K, key and value heads; H is a multiple of K
    head_dim: int
    max_positions: int = 32_768  # context length in tokens
    rope_theta: float = 1_000_000.0
    rms_norm_eps: float = 1e-6
    tie_embeddings: bool = False

    def __post_init__(self):
        if self.num_heads % self.num_kv_heads:
            raise ValueError(f"num_heads={self.num_heads} must be a multiple of num_kv_heads={self.num_kv_heads}")
        if self.head_dim % 2:
            raise ValueError(f"head_dim={self.head_dim} must be even: rotary embedding turns pairs")

    @property
    def num_params(self) -> int:
        """Number of scalar parameters, the head counted once when it is tied."""
        d, f, q, kv = self.hidden_size, self.intermediate_size, self.num_heads, self.num_kv_heads
        q, kv = q * self.head_dim, kv * self.head_dim
        layer = d * q + q + 2 * (d * kv + kv) + q * d + 3 * d * f + 2 * d
        return self.vocab_size * d * (1 if self.tie_embeddings else 2) + self.num_layers * layer + d

    @classmethod
    def from_hf(cls, folder: str | Path) -> "Qwen2Config":
        """Reads `config.json` of a Hugging Face folder, or of a name on the hub (the layouts of transformers 4 and 5).

        Raises:
            FileNotFoundError: there is no config.json.
            ValueError: another architecture, a missing field, or a feature that changes the computation and is not
                implemented (sliding windows, RoPE scaling, another activation).
        """
        file = local_folder(folder) / "config.json"
        if not file.exists():
            raise FileNotFoundError(f"{file}: no such file; expected a Hugging Face folder of a Qwen2.5 model")
        raw = json.loads(file.read_text(encoding="utf-8"))
        names = raw.get("architectures") or [raw.get("model_type")]
        if ARCHITECTURE not in names:
            raise ValueError(
                f"{file}: architecture {names[0]!r}, but only {ARCHITECTURE} (Qwen2, Qwen2.5) is supported"
            )
        _refuse_unsupported(file, raw)
        try:
            heads = raw["num_attention_heads"]
            return cls(
                vocab_size=raw["vocab_size"],
                hidden_size=raw["hidden_size"],
                intermediate_size=raw["intermediate_size"],
                num_layers=raw["num_hidden_layers"],
                num_heads=heads,
                num_kv_heads=raw.get("num_key_value_heads", heads),
                head_dim=raw.get("head_dim") or raw["hidden_size"] // heads,
                max_positions=raw.get("max_position_embeddings", 32_768),
                rope_theta=float(_rope(raw).get("rope_theta") or raw.get("rope_theta") or 10_000.0),
                rms_norm_eps=raw.get("rms_norm_eps", 1e-6),
                tie_embeddings=raw.get("tie_word_embeddings", False),
            )
        except KeyError as missing:
            raise ValueError(f"{file}: field {missing} is missing; expected the config of a {ARCHITECTURE}") from None

    def to_hf(self, dtype: str = "bfloat16") -> dict[str, Any]:
        """The `config.json` that transformers reads."""
        return {
            "architectures": [ARCHITECTURE],
            "model_type": "qwen2",
            "hidden_act": "silu",
            "vocab_size": self.vocab_size,
            "hidden_size": self.hidden_size,
            "intermediate_size": self.intermediate_size,
            "num_hidden_layers": self.num_layers,
            "num_attention_heads": self.num_heads,
            "num_key_value_heads": self.num_kv_heads,
            "head_dim": self.head_dim,
            "max_position_embeddings": self.max_positions,
            "rope_theta": self.rope_theta,
            "rms_norm_eps": self.rms_norm_eps,
            "tie_word_embeddings": self.tie_embeddings,
            "use_sliding_window": False,
            "torch_dtype": dtype,
        }


def _rope(raw: dict[str, Any]) -> dict[str, Any]:
    return raw.get("rope_parameters") or raw.get("rope_scaling") or {}


def _refuse_unsupported(file: Path, raw: dict[str, Any]) -> None:
    kind = _rope(raw).get("rope_type") or _rope(raw).get("type") or "default"
    if kind != "default":
        raise ValueError(f"{file}: RoPE scaling {kind!r} is not supported; use the model without it")
    if raw.get("use_sliding_window"):
        raise ValueError(f"{file}: use_sliding_window=true is not supported; Qwen2.5 checkpoints have it off")
    if raw.get("hidden_act", "silu") != "silu":
        raise ValueError(f"{file}: hidden_act {raw['hidden_act']!r} is not supported; expected 'silu'")


def _preset(
    layers: int, d: int, f: int, heads: int, kv: int, *, vocab: int = 152_064, tied: bool = False
) -> Qwen2Config:
    return Qwen2Config(vocab, d, f, layers, heads, kv, head_dim=d // heads, rms_norm_eps=1e-6, tie_embeddings=tied)


# Published sizes of Qwen2.5 (arXiv 2412.15115, table 1, and each model's config.json).
PRESETS: dict[str, Qwen2Config] = {
    "0.5b": _preset(24, 896, 4864, 14, 2, vocab=151_936, tied=True),
    "1.5b": _preset(28, 1536, 8960, 12, 2, vocab=151_936, tied=True),
    "3b": _preset(36, 2048, 11_008, 16, 2, vocab=151_936, tied=True),
    "7b": _preset(28, 3584, 18_944, 28, 4),
    "14b": _preset(48, 5120, 13_824, 40, 8),
    "32b": _preset(64, 5120, 27_648, 40, 8),
    "72b": _preset(80, 8192, 29_568, 64, 8),
}


def preset(name: str) -> Qwen2Config:
    """A published size by name, e.g. "7b"; an unknown name is an error that lists the known ones."""
    if name not in PRESETS:
        raise ValueError(f"unknown Qwen2.5 size {name!r}; known: {', '.join(PRESETS)}")
    return PRESETS[name]
