"""Architectures of language models: the supported families, read from a Hugging Face folder, or a published size."""

import dataclasses
from pathlib import Path
from typing import Any, ClassVar

from rlver_jax.config.hub import local_folder
from rlver_jax.models.hf_config import Family, read_config
from rlver_jax.models.rope import Frequencies, RopeScaling, frequencies

MOST_PARAMS = 10**12  # Qwen2.5 has at most 7.3e10


@dataclasses.dataclass(frozen=True)
class Qwen2Config:
    """Sizes and constants of a Qwen2 decoder (hashable, so it can be a static argument)."""

    model_type: ClassVar[str] = "qwen2"  # key of `FAMILIES`
    qkv_bias: ClassVar[bool] = True  # of query, key and value projections
    qk_norm: ClassVar[bool] = False  # queries and keys are normalized over a head, before they are rotated

    vocab_size: int  # V, of the embedding; may exceed the tokenizer's count
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
        extra = (q + 2 * kv) * self.qkv_bias + 2 * self.head_dim * self.qk_norm
        layer = d * q + 2 * d * kv + q * d + 3 * d * f + 2 * d + extra
        return self.vocab_size * d * (1 if self.tie_embeddings else 2) + self.num_layers * layer + d

    @property
    def family(self) -> Family:
        """The model family that it belongs to."""
        return FAMILIES[self.model_type]

    @property
    def rope(self) -> Frequencies:
        """Of the rotary embedding."""
        return frequencies(self.rope_theta, self.head_dim, self.rope_scaling)

    @property
    def context(self) -> int:
        """Tokens that the model may read: max_positions, or more where its rotary embedding is scaled."""
        return self.max_positions if self.rope_scaling is None else self.rope_scaling.context(self.max_positions)

    def check_context(self, tokens: int, name: str, what: str, remedy: str) -> None:
        """Refuses rows that are longer than the model's context: it would answer, but with ever less sense.

        Args:
            tokens: of a row.
            name: of the model in messages, e.g. "policy".
            what: the setting that needs so many tokens, e.g. "rollout.context=40000".
            remedy: what helps besides a scaled RoPE.

        Raises:
            ValueError: they are more than `context`.
        """
        if tokens > self.context:
            raise ValueError(
                f"{what}, but the model of {name} reads at most {self.context} tokens (max_position_embeddings="
                f"{self.max_positions} in its config.json); {remedy}, or scale its context with YaRN as the "
                f"model cards of Qwen say (rope_scaling in config.json)"
            )

    @staticmethod
    def from_hf(folder: str | Path) -> "Qwen2Config":
        """Reads `config.json` of a Hugging Face folder, or of a name on the hub (the layouts of transformers 4 and 5).

        Raises:
            FileNotFoundError: there is no config.json.
            ValueError: it can't be read, or is of a model that is not supported (see `hf_config`).
        """
        folder = local_folder(folder)
        model_type, fields = read_config(folder, FAMILIES)
        try:
            return FAMILIES[model_type].config(**fields)
        except ValueError as error:
            raise ValueError(f"{folder / 'config.json'}: {error}") from None

    def to_hf(self, dtype: str = "bfloat16") -> dict[str, Any]:
        """The `config.json` that transformers 4 and 5 read."""
        return {
            "architectures": [self.family.architecture],
            "model_type": self.model_type,
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
            **({} if self.qkv_bias else {"attention_bias": False}),
            "use_sliding_window": False,
            "torch_dtype": dtype,
        }


class Qwen3Config(Qwen2Config):
    """A dense Qwen3 decoder (arXiv 2505.09388): norms of queries and keys in place of biases."""

    model_type: ClassVar[str] = "qwen3"
    qkv_bias: ClassVar[bool] = False
    qk_norm: ClassVar[bool] = True


def _preset(
    layers: int, d: int, f: int, heads: int, kv: int, *, vocab: int = 152_064, tied: bool = False
) -> Qwen2Config:
    return Qwen2Config(vocab, d, f, layers, heads, kv, head_dim=d // heads, rms_norm_eps=1e-6, tie_embeddings=tied)


def _qwen3(layers: int, d: int, f: int, heads: int, *, tied: bool = False) -> Qwen3Config:
    return Qwen3Config(151_936, d, f, layers, heads, 8, head_dim=128, max_positions=40_960, tie_embeddings=tied)


# Published sizes of Qwen2.5 (arXiv 2412.15115, table 1) and of dense Qwen3 (arXiv 2505.09388, table 1), and each
# model's config.json.
PRESETS: dict[str, Qwen2Config] = {
    "0.5b": _preset(24, 896, 4864, 14, 2, vocab=151_936, tied=True),
    "1.5b": _preset(28, 1536, 8960, 12, 2, vocab=151_936, tied=True),
    "3b": _preset(36, 2048, 11_008, 16, 2, vocab=151_936, tied=True),
    "7b": _preset(28, 3584, 18_944, 28, 4),
    "14b": _preset(48, 5120, 13_824, 40, 8),
    "32b": _preset(64, 5120, 27_648, 40, 8),
    "72b": _preset(80, 8192, 29_568, 64, 8),
    "qwen3-0.6b": _qwen3(28, 1024, 3072, 16, tied=True),
    "qwen3-1.7b": _qwen3(28, 2048, 6144, 16, tied=True),
    "qwen3-4b": _qwen3(36, 2560, 9728, 32, tied=True),
    "qwen3-8b": _qwen3(36, 4096, 12_288, 32),
    "qwen3-14b": _qwen3(40, 5120, 17_408, 40),
    "qwen3-32b": _qwen3(64, 5120, 25_600, 64),
}


EMBEDDING, HEAD = "model.embed_tokens.weight", "lm_head.weight"
OUTER = {"embed/kernel": EMBEDDING, "norm/scale": "model.norm.weight", "lm_head": HEAD}
LAYER = {
    "attn_norm/scale": "input_layernorm.weight",
    "mlp_norm/scale": "post_attention_layernorm.weight",
    "attn/q/kernel": "self_attn.q_proj.weight",
    "attn/k/kernel": "self_attn.k_proj.weight",
    "attn/v/kernel": "self_attn.v_proj.weight",
    "attn/o/kernel": "self_attn.o_proj.weight",
    "gate/kernel": "mlp.gate_proj.weight",
    "up/kernel": "mlp.up_proj.weight",
    "down/kernel": "mlp.down_proj.weight",
}

# By `model_type` of config.json. A new family is an entry here, and its differences in `qwen.py`.
FAMILIES: dict[str, Family] = {
    "qwen2": Family(
        architecture="Qwen2ForCausalLM",
        models="Qwen2, Qwen2.5, and what is fine-tuned from them",
        config=Qwen2Config,
        transformers_config="Qwen2Config",
        outer=OUTER,
        layer=LAYER | {f"attn/{x}/bias": f"self_attn.{x}_proj.bias" for x in "qkv"},
    ),
    "qwen3": Family(
        architecture="Qwen3ForCausalLM",
        models="dense Qwen3, and what is fine-tuned from it",
        config=Qwen3Config,
        transformers_config="Qwen3Config",
        outer=OUTER,
        layer=LAYER | {f"attn/{x}_norm/scale": f"self_attn.{x}_norm.weight" for x in "qk"},
    ),
}


def preset(name: str) -> Qwen2Config:
    """A published size by name: "7b" (Qwen2.5), "qwen3-8b". An unknown name is an error that lists the known ones."""
    if name not in PRESETS:
        raise ValueError(f"unknown size {name!r}; known: {', '.join(PRESETS)}")
    return PRESETS[name]
