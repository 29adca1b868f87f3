"""Profiles in tokens: encoded when a batch needs them, in arrays of one shape whatever their number."""

import dataclasses
import functools
from collections.abc import Callable, Sequence
from typing import NamedTuple

import numpy as np
from jax.sharding import Mesh
from jaxtyping import Int

from rlver_jax.parallel.distributed import rows_on
from rlver_jax.profiles.schema import Profile
from rlver_jax.rollout.sampler import Profiles
from rlver_jax.text.padding import pad_rows, round_up

WIDTH_STEP = 128  # widths are multiples of it, so that other profiles rarely mean another compilation
KEPT = 4096  # profiles that stay in tokens; some 10 kB each


class EncodedProfile(NamedTuple):
    """One profile in tokens."""

    prefix: Int[np.ndarray, " P"]
    first_talk: Int[np.ndarray, " R"]


@dataclasses.dataclass(frozen=True)
class ProfileTokens:
    """Profiles in tokens, encoded when they are asked for; all as wide as the longest, so that batches have one shape.

    `encode` gives those of profile i; it keeps the last `KEPT`.
    """

    encode: Callable[[int], EncodedProfile]
    count: int
    prefix_width: int
    first_width: int

    def batch(
        self,
        indices: Sequence[int],
        dialogue_ids: Sequence[int],
        count: int | None = None,
        mesh: Mesh | None = None,
    ) -> Profiles:
        """The given profiles, padded to `count` of them with rows that don't play.

        Args:
            dialogue_ids: below 2**32; equally many for each profile, those of one profile together.
            mesh: over which the rows are spread; each process encodes those of its own devices alone.

        Raises:
            ValueError: another number of ids.
        """
        count, group = count or len(indices), max(len(dialogue_ids) // len(indices), 1)
        if len(dialogue_ids) != len(indices) * group:
            raise ValueError(f"{len(dialogue_ids)} dialogue ids for {len(indices)} profiles: expected groups of a size")
        rows = np.resize(np.asarray(indices), count)
        ids = np.zeros(count * group, np.uint32)
        ids[: len(dialogue_ids)] = dialogue_ids
        active = np.arange(count * group) < len(dialogue_ids)
        real = np.arange(count) < len(indices)
        encoded = functools.cache(lambda index: self.encode(int(index)))  # of this batch, however large
        lengths = lambda texts: np.array([*map(len, texts)], np.int32)  # noqa: E731
        prefixes = lambda part: [encoded(index).prefix for index in rows[part]]  # noqa: E731
        talks = lambda part: [encoded(index).first_talk for index in rows[part]]  # noqa: E731
        padded = lambda texts, width: rows_on(mesh, count, lambda part: pad_rows(texts(part), width)[0])  # noqa: E731
        counts = lambda texts: rows_on(mesh, count, lambda part: lengths(texts(part)) * real[part])  # noqa: E731
        each = lambda values: rows_on(mesh, len(values), lambda part: values[part])  # noqa: E731
        prefix = padded(prefixes, self.prefix_width), counts(prefixes)
        first = padded(talks, self.first_width), counts(talks)
        return Profiles(*prefix, *first, each(ids), each(active))


def measure_profiles(
    profiles: Sequence[Profile], encode: Callable[[Profile], EncodedProfile]
) -> tuple[ProfileTokens, Profile, int]:
    """The tokens of profiles, the longest profile, and its length; goes through them once and keeps `KEPT` of them."""

    @functools.lru_cache(KEPT)
    def encoded(index: int) -> EncodedProfile:
        return encode(profiles[index])

    prefix = first = length = longest = 0
    for index in range(len(profiles)):
        prefix_count, talk_count = map(len, encoded(index))
        prefix, first = max(prefix, prefix_count), max(first, talk_count)
        if prefix_count + talk_count > length:
            longest, length = index, prefix_count + talk_count
    widths = round_up(prefix, WIDTH_STEP), round_up(max(first, 1), WIDTH_STEP)
    return ProfileTokens(encoded, len(profiles), *widths), profiles[longest], length
