"""The profile that a logged dialogue was played with; a log has only its id."""

import functools
from collections import defaultdict
from collections.abc import Iterable, Mapping
from typing import Any

from rlver_jax.profiles.schema import Profile


class KnownProfiles:
    """Profiles of any files. Ids are unique in one set of files; training and held-out profiles may share them."""

    def __init__(self, profiles: Iterable[Profile]):
        """Of several with one id the earlier ones are preferred where a dialogue fits both.

        Args:
            profiles: gone through when one is first asked for.
        """
        self._profiles = profiles

    @functools.cached_property
    def _by_id(self) -> dict[str, list[Profile]]:
        by_id: dict[str, list[Profile]] = defaultdict(list)
        for profile in self._profiles:
            by_id[profile.id].append(profile)
        return by_id

    def __len__(self) -> int:
        """How many ids there are."""
        return len(self._by_id)

    def of(self, record: Mapping[str, Any]) -> Profile | None:
        """The profile with a record's id, and where several have it, the one whose wish and first words it holds."""
        return max(self._by_id.get(record["profile"], ()), key=lambda profile: _likeness(profile, record), default=None)


def _likeness(profile: Profile, record: Mapping[str, Any]) -> int:
    first, talk = record["messages"][0], (profile.first_talk or "").strip()
    same_opening = first["content"].strip() == talk if talk else bool(first["generated"])
    return (profile.hidden_intention == record["hidden_intention"]) + same_opening
