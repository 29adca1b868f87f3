"""Frequencies of the rotary position embedding (arXiv 2104.09864) and how they are scaled for longer contexts.

Computed once on the host, in float32, each step rounded where transformers rounds it: at position 30,000 one ulp of a
frequency is 1e-3 of a radian.
"""

import dataclasses
import math
from typing import Any, NamedTuple

import numpy as np
from jaxtyping import Float

ROPE_TYPES = ("default", "linear", "llama3", "yarn")  # those whose frequencies don't depend on a row's length


class Frequencies(NamedTuple):
    """What rotates queries and keys."""

    inverse: Float[np.ndarray, "half"]  # float32, radians a position
    scale: float = 1.0  # of the cosines and sines


@dataclasses.dataclass(frozen=True)
class RopeScaling:
    """Fields of Hugging Face's `rope_scaling` (`rope_parameters` of transformers 5), by the names that they have there.

    YaRN is arXiv 2309.00071, linear scaling arXiv 2306.15595; "llama3" came with Llama 3.1.
    """

    rope_type: str  # linear | llama3 | yarn
    factor: float  # how much longer contexts become, at least 1
    original_max_position_embeddings: int = 0  # yarn, llama3: context of pretraining, in tokens
    attention_factor: float | None = (
        None  # yarn: of cosines and sines; None: from `factor`, `mscale` and `mscale_all_dim`
    )
    beta_fast: float = 32.0  # yarn: frequencies with more turns than this within the original context stay
    beta_slow: float = 1.0  # yarn: those with fewer turns than this are divided by `factor`
    mscale: float | None = None  # yarn
    mscale_all_dim: float | None = None  # yarn
    truncate: bool = True  # yarn: bounds between kept and divided frequencies are whole
    low_freq_factor: float = 0.0  # llama3: waves that turn less often than this in the original context are divided
    high_freq_factor: float = 0.0  # llama3: those that turn more often than this stay

    def __post_init__(self):
        if self.rope_type not in ROPE_TYPES[1:]:
            raise ValueError(f"rope_type={self.rope_type!r}; expected one of {', '.join(ROPE_TYPES[1:])}")

    def to_hf(self) -> dict[str, Any]:
        """The object that transformers reads, without the fields that have their default."""
        required = ("rope_type", "factor")
        fields = dataclasses.fields(self)
        return {f.name: value for f in fields if (value := getattr(self, f.name)) != f.default or f.name in required}

    def context(self, max_positions: int) -> int:
        """Tokens that a model may read.

        YaRN's configs keep the original context or have the longer one as `max_position_embeddings`; with linear
        scaling it is the original one.
        """
        if self.rope_type == "yarn":
            return max(max_positions, int(self.factor * self.original_max_position_embeddings))
        return int(self.factor * max_positions) if self.rope_type == "linear" else max_positions


def frequencies(theta: float, dim: int, scaling: RopeScaling | None = None) -> Frequencies:
    """Frequencies of a head of `dim` components, as `transformers.modeling_rope_utils` has them."""
    exponent = np.arange(0, dim, 2, dtype=np.float32) / np.float32(dim)
    power = (theta ** exponent.astype(np.float64)).astype(np.float32)
    inverse, scale = np.float32(1) / power, 1.0
    if scaling is not None:
        if scaling.rope_type == "linear":
            inverse = inverse / np.float32(scaling.factor)
        elif scaling.rope_type == "llama3":
            inverse = _llama3(inverse, scaling)
        else:
            inverse, scale = _yarn(power, theta, dim, scaling), yarn_attention_factor(scaling)
    return Frequencies(inverse, scale)


def _yarn(power: np.ndarray, theta: float, dim: int, scaling: RopeScaling) -> np.ndarray:
    """Fast frequencies as they are, slow ones divided by the factor, a ramp in between (arXiv 2309.00071, 3.2)."""

    def dimension(turns: float) -> float:
        """Index of the frequency that makes so many turns within the original context."""
        context = scaling.original_max_position_embeddings
        return dim * math.log(context / (turns * 2 * math.pi)) / (2 * math.log(theta))

    low, high = dimension(scaling.beta_fast), dimension(scaling.beta_slow)
    if scaling.truncate:
        low, high = math.floor(low), math.ceil(high)
    low, high = max(low, 0), min(high, dim - 1)
    width = high - low if high != low else 0.001
    ramp = np.clip((np.arange(dim // 2, dtype=np.float32) - np.float32(low)) / np.float32(width), 0, 1)
    unscaled = np.float32(1) - ramp
    one = np.float32(1)
    return one / (np.float32(scaling.factor) * power) * (one - unscaled) + one / power * unscaled


def yarn_attention_factor(scaling: RopeScaling) -> float:
    """What YaRN multiplies cosines and sines by (arXiv 2309.00071, equation 22; `mscale` as DeepSeek-V2 has it)."""
    if scaling.attention_factor is not None:
        return scaling.attention_factor
    grown = lambda m: 0.1 * m * math.log(scaling.factor) + 1.0 if scaling.factor > 1 else 1.0  # noqa: E731
    if scaling.mscale and scaling.mscale_all_dim:
        return grown(scaling.mscale) / grown(scaling.mscale_all_dim)
    return grown(1)


def _llama3(inverse: np.ndarray, scaling: RopeScaling) -> np.ndarray:
    """Long waves divided by the factor, short ones as they are, smooth in between."""
    low, high = scaling.low_freq_factor, scaling.high_freq_factor
    context = scaling.original_max_position_embeddings
    wave = np.float32(2 * math.pi) / inverse
    divided = np.where(wave > np.float32(context / low), inverse / np.float32(scaling.factor), inverse)
    smooth = (np.float32(context) / wave - np.float32(low)) / np.float32(high - low)
    between = (np.float32(1) - smooth) * divided / np.float32(scaling.factor) + smooth * divided
    is_between = ~(wave < np.float32(context / high)) & ~(wave > np.float32(context / low))
    return np.where(is_between, between, divided)
