"""The user's emotion: how an appraisal's `change` moves it, its bands, and where a dialogue ends.

Every rule works alike on Python ints, NumPy arrays and (traced) int32 JAX arrays, and returns
the same kind: the same lines serve the compiled sampler, the remote user and the check of a log.

Emotion is an integer 0..100 and `change` an integer -10..10 (RLVER, arXiv 2507.03112, and SAGE, 2505.02847).
"""

import itertools
from dataclasses import dataclass
from typing import Any, TypeVar

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int, Key

LOWEST, HIGHEST = 0, 100
BANDS = ("S", "A", "B", "C", "F")
CHANGES = tuple(range(-10, 11))
READOUTS = ("argmax", "sample", "mean")

# One of three kinds of integers; a function returns the kind of its argument.
T = TypeVar("T", int, np.ndarray, Array)


@dataclass(frozen=True)
class EmotionRules:
    """Numbers that a dialogue's emotion obeys.

    initial: emotion before the first reply.
    floor: a dialogue fails, and ends, at `emotion <= floor`; 9 is SAGE's "below 10", -1 means never.
    ceiling: a dialogue succeeds, and ends, at `emotion >= ceiling`; 101 means never.
    max_change: a reply moves the emotion by at most this much either way, 1..10.
    thresholds: lowest emotion of the bands S, A, B, C; what lies below the last is F.

    A run takes them from `config.emotion`; the defaults here are for code that has no config.

    Raises ValueError where the numbers contradict each other.
    """

    initial: int = 30
    floor: int = 9
    ceiling: int = 100
    max_change: int = 10
    thresholds: tuple[int, int, int, int] = (100, 70, 40, 10)

    def __post_init__(self) -> None:
        numbers = (self.initial, self.floor, self.ceiling, self.max_change, *self.thresholds)
        if any(isinstance(n, bool) or not isinstance(n, int) for n in numbers):
            raise ValueError(f"emotion rules must be Python ints, not {numbers}: round them and pass ints")
        if not -1 <= self.floor < self.initial < self.ceiling <= HIGHEST + 1:
            raise ValueError(
                f"floor={self.floor}, initial={self.initial}, ceiling={self.ceiling} must satisfy -1 <= floor"
                f" < initial < ceiling <= {HIGHEST + 1}: otherwise a dialogue would end before it begins"
            )
        if not 1 <= self.max_change <= CHANGES[-1]:
            raise ValueError(f"max_change={self.max_change} must lie in 1..{CHANGES[-1]}, what an appraisal can choose")
        bands = (HIGHEST + 1, *self.thresholds, LOWEST)
        if len(self.thresholds) != len(BANDS) - 1 or any(high <= low for high, low in itertools.pairwise(bands)):
            raise ValueError(
                f"thresholds={self.thresholds} must be four falling numbers in 1..{HIGHEST},"
                " the lowest emotions of S, A, B and C, such as (100, 70, 40, 10)"
            )

    def clamp(self, change: T) -> T:
        """Return `change`, any integer, limited to -max_change..max_change."""
        return _clip(change, -self.max_change, self.max_change)

    def update(self, emotion: T, change: T) -> T:
        """Return clip(emotion + clamp(change), 0, 100), elementwise; integers of any one shape."""
        return _clip(emotion + self.clamp(change), LOWEST, HIGHEST)

    def band(self, emotion: T) -> T:
        """Return the index into BANDS: 0 = S, 1 = A, 2 = B, 3 = C, 4 = F."""
        _check_integers(emotion)
        below: Any = sum((emotion < border) * 1 for border in self.thresholds)
        return below if isinstance(emotion, int) else below.astype(emotion.dtype)

    def succeeded(self, emotion: T) -> Any:
        """Whether `emotion` ends a dialogue well: bool, elementwise for arrays."""
        return emotion >= self.ceiling

    def failed(self, emotion: T) -> Any:
        """Whether `emotion` ends a dialogue badly: bool, elementwise for arrays."""
        return emotion <= self.floor

    def ended(self, emotion: T) -> Any:
        """Whether `emotion` ends a dialogue at all: bool, elementwise for arrays."""
        return self.succeeded(emotion) | self.failed(emotion)

    def outcome(self, emotion: T) -> T:
        """Classify a final emotion: 1 success (band S), -1 failure (band F), 0 neither.

        This is SAGE's count of successes (>= 100) and failures (< 10). It follows the bands and not `floor`,
        so that scores stay comparable between runs that stop early and runs that don't.
        """
        _check_integers(emotion)
        good, bad = emotion >= self.thresholds[0], emotion < self.thresholds[-1]
        result: Any = good * 1 - bad * 1
        return result if isinstance(emotion, int) else result.astype(emotion.dtype)

    def band_name(self, emotion: int) -> str:
        """Name of one emotion's band: "S", "A", "B", "C" or "F"."""
        return BANDS[self.band(emotion)]


TRAINING = EmotionRules(initial=30)
SAGE = EmotionRules(initial=40)


def sample_noise(key: Key[Array, "..."]) -> Float[Array, "... 21"]:
    """Gumbel noise, float32, of each row's own typed key: the likeliest option after adding it is a sample."""
    noise = jax.vmap(lambda k: jax.random.gumbel(k, (len(CHANGES),), jnp.float32))(key.reshape(-1))
    return noise.reshape(*key.shape, len(CHANGES))


def change_readout(
    log_probs: Float[Array, "... 21"], readout: str = "argmax", key: Key[Array, "..."] | None = None
) -> Int[Array, "..."]:
    """Read one change, int32 in -10..10, from each distribution over the options -10, -9, .., 10.

    `argmax` takes the likeliest option; of exactly equal ones the lowest, so that no tie can raise a reward.
    `mean` takes the expectation under the renormalized probabilities, rounded to the nearest integer, halves
    to the even one.
    `sample` draws one option a row with that row's own typed key, whatever else the batch holds.

    log_probs need not be normalized, and options may be -inf as long as one of a row is finite.
    Raises ValueError for an unknown `readout`, a wrong number of options, or keys that are missing, untyped,
    misshaped or not called for.
    """
    _check_readout(log_probs, readout, key)
    if readout == "sample":
        assert key is not None
        log_probs = log_probs + sample_noise(key)
    if readout == "mean":
        probs = jax.nn.softmax(log_probs.astype(jnp.float32), axis=-1)
        expected = jnp.sum(probs * jnp.asarray(CHANGES, jnp.float32), axis=-1)
        return jnp.round(expected).astype(jnp.int32)
    return jnp.argmax(log_probs, axis=-1).astype(jnp.int32) + CHANGES[0]


def _check_readout(log_probs: Array, readout: str, key: Array | None) -> None:
    if readout not in READOUTS:
        raise ValueError(f"change readout {readout!r} is unknown: use one of {', '.join(READOUTS)}")
    if not log_probs.shape or log_probs.shape[-1] != len(CHANGES):
        raise ValueError(f"log_probs has shape {log_probs.shape}, its last axis must hold the {len(CHANGES)} options")
    if readout != "sample":
        if key is not None:
            raise ValueError(
                f"readout {readout!r} is deterministic and takes no key: pass key=None or readout='sample'"
            )
        return
    if key is None or not jnp.issubdtype(key.dtype, jax.dtypes.prng_key):
        got = "none" if key is None else f"dtype {key.dtype}"
        raise ValueError(f"readout 'sample' needs a typed key for each row, got {got}: make them with jax.random.key")
    if key.shape != log_probs.shape[:-1]:
        raise ValueError(
            f"readout 'sample' needs one key for each row: log_probs has rows {log_probs.shape[:-1]},"
            f" key has shape {key.shape}; fold or split the key per row"
        )


def _clip(value: T, low: int, high: int) -> T:
    _check_integers(value)
    if isinstance(value, int):
        return min(max(value, low), high)
    if isinstance(value, Array):
        return jnp.clip(value, low, high)
    return np.clip(value, low, high)


def _check_integers(value: Any) -> None:
    # A fraction would silently break the promise of integers 0..100, so it's refused; static, by dtype only.
    if isinstance(value, int):
        return
    dtype = getattr(value, "dtype", None)
    if dtype is None or not jnp.issubdtype(dtype, jnp.integer):
        raise TypeError(
            f"emotions and changes are integers, got {type(value).__name__}"
            + (f" of dtype {dtype}" if dtype is not None else "")
            + ": round it and cast it to int32 first"
        )
