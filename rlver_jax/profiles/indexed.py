"""Profiles that are read by index: what is known of them without going through them all."""

import abc
from collections.abc import Sequence

from rlver_jax.profiles.schema import Profile


class IndexedProfiles(Sequence[Profile], abc.ABC):
    """A set of profiles that need not fit into memory; `fingerprint` is the `profiles_fingerprint` of them all."""

    fingerprint: str

    @abc.abstractmethod
    def with_id(self, wanted: str) -> Profile | None:
        """The profile with an id; None: there is none."""

    @abc.abstractmethod
    def has_persona(self, persona: str) -> bool:
        """Whether a profile has this persona, to the letter."""
