"""Architecture of a Qwen2.5 model: read from a Hugging Face folder, or one of the published sizes."""

import dataclasses
from pathlib import Path
from typing import Any

from rlver_jax.config.hub import local_folder
from rlver_jax.models.hf_config import ARCHITECTURE, read_config
from rlver_jax.models.rope import Frequencies, RopeScaling, frequencies

MOST_PARAMS = 10**12  # Qwen2.5 has at most 7.3e10


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
    max_positions: int = 32_768  # context length in tokens, before it is scaled
    rope_theta: float = 1_000_000.0
    rms_norm_eps: float = 1e-6
    tie_embeddings: bool = False
    rope_scaling: RopeScaling | None = None
    init_std: float = 0.02  # standard deviation of fresh weights (`initializer_range`)

    def __post_init__(self):
        if self.num_heads % self.num_kv_heads:
            raise ValueError(f"num_heads={self.num_heads} must be a multiple of num_kv_heads={self.num_kv_heads}")
        if self.head_dim % 2:
            raise ValueError(f"head_dim={self.head_dim} must be even: rotary embedding turns pairs")
        if self.num_params > MOST_PARAMS:
            raise ValueError(
                f"vocab_size={self.vocab_size}, hidden_size={self.hidden_size}, "
                f"intermediate_size={self.intermediate_size} and {self.num_layers} layers make {self.num_params:.2g} "
                f"parameters; expected at most {MOST_PARAMS:.2g}"
            )

    @property
    def num_params(self) -> int:
        """Number of scalar parameters, the head counted once when it is tied."""
        d, f, q, kv = self.hidden_size, self.intermediate_size, self.num_heads, self.num_kv_heads
        q, kv = q * self.head_dim, kv * self.head_dim
        layer = d * q + q + 2 * (d * kv + kv) + q * d + 3 * d * f + 2 * d
        return self.vocab_size * d * (1 if self.tie_embeddings else 2) + self.num_layers * layer + d

    @property
    def rope(self) -> Frequencies:
        """Of the rotary embedding."""
        return frequencies(self.rope_theta, self.head_dim, self.rope_scaling)

    @property
    def context(self) -> int:
        """Tokens that the model may read: max_positions, or more where its rotary embedding is scaled."""
        return self.max_positions if self.rope_scaling is None else self.rope_scaling.context(self.max_positions)

    def check_context(self, tokens: int, name: str, what: str, remedy: str) -> None:
        """Refuses rows that are longer than what the model was made for: it would answer, but with ever less sense.

        Args:
            tokens: of a row.
            name: the model's in messages, e.g. "policy".
            what: asks for so many tokens, e.g. "rollout.context=40000".
            remedy: what helps beside a scaled RoPE.

        Raises:
            ValueError: they are more than `context`.
        """
        if tokens > self.context:
            raise ValueError(
                f"{what}, but the model of {name} reads at most {self.context} tokens (max_position_embeddings="
                f"{self.max_positions} in its config.json); {remedy}, or scale its context with YaRN as Qwen2.5's "
                f"model card says (rope_scaling in config.json)"
            )

    @classmethod
    def from_hf(cls, folder: str | Path) -> "Qwen2Config":
        """Reads `config.json` of a Hugging Face folder, or of a name on the hub (the layouts of transformers 4 and 5).

        Raises:
            FileNotFoundError: there is no config.json.
            ValueError: it can't be read, or is of a model that is not supported (see `hf_config`).
        """
        folder = local_folder(folder)
        fields = read_config(folder)
        try:
            return cls(**fields)
        except ValueError as error:
            raise ValueError(f"{folder / 'config.json'}: {error}") from None

    def to_hf(self, dtype: str = "bfloat16") -> dict[str, Any]:
        """The `config.json` that transformers 4 and 5 read."""
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
            **({} if self.rope_scaling is None else {"rope_scaling": self.rope_scaling.to_hf()}),
            "rms_norm_eps": self.rms_norm_eps,
            "tie_word_embeddings": self.tie_embeddings,
            **({} if self.init_std == Qwen2Config.init_std else {"initializer_range": self.init_std}),
            "use_sliding_window": False,
            "torch_dtype": dtype,
        }


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
