"""Recomputes a simulated user's appraisals, changes and words from finished dialogues; see `sampling.replay`."""

import dataclasses
from collections.abc import Iterator, Sequence
from typing import NamedTuple

import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Key

from rlver_jax.decoding import replay as sampling
from rlver_jax.decoding.cache import LM
from rlver_jax.decoding.replay import ReplayInput, Sampler
from rlver_jax.user.emotion import change_readout, sample_noise
from rlver_jax.user.turn import KEY_READOUT, UserTables, part_keys


class Replayed(NamedTuple):
    """What the user says itself: for each query and each choice of a packed dialogue; see `sampling.Replayed`."""

    margin: np.ndarray  # [Q]
    logprob: np.ndarray  # [Q]
    sampled: np.ndarray  # [Q, 2]
    change_logprobs: np.ndarray  # [choices, 21]
    change: np.ndarray  # [choices] the readout
    change_noise: np.ndarray  # [choices, 21] with which `sample` takes the likeliest; zeros for other readouts


@dataclasses.dataclass(frozen=True)
class _Change:
    """Reads a change out of the distribution over its options."""

    readout: str

    def __call__(self, logprobs: Float[Array, "c 21"], turn_keys: Key[Array, "c"]) -> tuple[Array, ...]:
        """(log p of every change, the readout, the noise)."""
        keys = part_keys(turn_keys, KEY_READOUT, 1)[0] if self.readout == "sample" else None
        noise = jnp.zeros_like(logprobs) if keys is None else sample_noise(keys)
        return logprobs, change_readout(logprobs, self.readout, keys), noise


def replay(lm: LM, tables: UserTables, dialogues: Sequence[ReplayInput], readout: str) -> Iterator[Replayed]:
    """Compares every logged token of the dialogues with the user's own; one result a dialogue, in their order.

    Those that share a prefix should follow each other: it is then read once.
    """
    sampler = Sampler(lm, tables.grammar, tables.options, _Change(readout))
    for margin, logprob, sampled, choices in sampling.replay(sampler, dialogues, tie=0.0):
        yield Replayed(margin, logprob, sampled, *choices)
