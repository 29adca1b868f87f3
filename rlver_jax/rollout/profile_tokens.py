"""Profiles in tokens: encoded when a batch needs them, in arrays of one shape whatever their number."""

import contextlib
import dataclasses
import functools
import hashlib
import json
import logging
import os
from collections.abc import Callable, Iterable, Sequence
from typing import NamedTuple

import numpy as np
from jax.sharding import Mesh
from jaxtyping import Int

from rlver_jax.config.paths import cache_folder
from rlver_jax.parallel.distributed import rows_on
from rlver_jax.profiles.indexed import IndexedProfiles
from rlver_jax.profiles.schema import Profile
from rlver_jax.rollout.sampler import Profiles
from rlver_jax.rollout.spec import RolloutConfig
from rlver_jax.text.padding import pad_rows, round_up

WIDTH_STEP = 128  # widths are multiples of it, so that other profiles rarely mean another compilation
WIDEST = 4  # times the longest reply or field of a user: words of a user by text that a policy hears
KEPT = 4096  # profiles that stay in tokens; some 10 kB each
_log = logging.getLogger(__name__)


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


class Widths(NamedTuple):
    """What is known of all profiles' tokens together: the most of each kind, and which profile has the most in all."""

    prefix: int
    first_talk: int
    total: int
    longest: int


def measure_profiles(
    profiles: Sequence[Profile], encode: Callable[[Profile], EncodedProfile], context: Sequence[str] = ()
) -> tuple[ProfileTokens, Profile, int]:
    """The tokens of profiles, the longest profile, and its length.

    All profiles are encoded once, and `KEPT` of them stay. Of `IndexedProfiles`, which may be a million, the widths are
    kept in the user's cache, so that the next start encodes none.

    Args:
        context: all that decides tokens beside the profiles.
    """

    @functools.lru_cache(KEPT)
    def encoded(index: int) -> EncodedProfile:
        return encode(profiles[index])

    lengths = (tuple(map(len, encoded(index))) for index in range(len(profiles)))
    if isinstance(profiles, IndexedProfiles):
        widths = _cached_widths(json.dumps([profiles.fingerprint, *context]), len(profiles), lengths)
    else:
        widths = _widths(lengths)
    first_width = round_up(max(widths.first_talk, 1), WIDTH_STEP)
    tokens = ProfileTokens(encoded, len(profiles), round_up(widths.prefix, WIDTH_STEP), first_width)
    return tokens, profiles[widths.longest], widths.total


def _widths(lengths: Iterable[tuple[int, ...]]) -> Widths:
    prefix = first_talk = total = longest = 0
    for index, (prefix_length, talk_length) in enumerate(lengths):
        prefix, first_talk = max(prefix, prefix_length), max(first_talk, talk_length)
        if prefix_length + talk_length > total:
            total, longest = prefix_length + talk_length, index
    return Widths(prefix, first_talk, total, longest)


def _cached_widths(key: str, count: int, lengths: Iterable[tuple[int, ...]]) -> Widths:
    folder = cache_folder("profile_widths")
    file = folder and folder / f"{hashlib.sha256(key.encode()).hexdigest()[:32]}.json"
    if file and file.exists():
        with contextlib.suppress(OSError, ValueError, TypeError):
            return Widths(**json.loads(file.read_text(encoding="utf-8")))
    if count > KEPT:
        _log.warning("encoding %s profiles to find the longest, which later starts need not do", f"{count:,}")
    widths = _widths(lengths)
    if file:
        with contextlib.suppress(OSError):
            own = file.with_name(f"{file.name}.{os.getpid()}")
            own.write_text(json.dumps(widths._asdict()), encoding="utf-8")
            own.replace(file)
    return widths


def widest_words(spec: RolloutConfig, first_words: int) -> int:
    """Tokens, of the policy, of the longest words that it hears from a user who answers by text.

    Args:
        first_words: tokens of the longest first words of a profile.
    """
    return round_up(max(WIDEST * spec.user_tokens, first_words, 1), WIDTH_STEP)
