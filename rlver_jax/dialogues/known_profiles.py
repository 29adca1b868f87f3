"""The profile that a logged dialogue was played with; a log has only its id."""

import functools
from collections import defaultdict
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from rlver_jax.profiles.indexed import IndexedProfiles
from rlver_jax.profiles.schema import Profile


class KnownProfiles:
    """Profiles of any sets. Ids are unique in one set; training and held-out profiles may share them."""

    def __init__(self, *sets: Iterable[Profile]):
        """Of several profiles with one id the earlier ones are preferred where a dialogue fits both.

        Args:
            sets: gone through when a profile is first asked for; of `IndexedProfiles` only those asked for are read.
        """
        self._sets: Iterable[Iterable[Profile]] = sets

    @classmethod
    def of_sets(cls, sets: Iterable[Iterable[Profile]]) -> "KnownProfiles":
        """Of sets that are opened when a profile is first asked for."""
        known = cls()
        known._sets = sets
        return known

    @functools.cached_property
    def _lookups(self) -> list[IndexedProfiles | dict[str, list[Profile]]]:
        return [one if isinstance(one, IndexedProfiles) else _by_id(one) for one in self._sets]

    def __len__(self) -> int:
        """How many ids there are; those that two sets share count twice where one of them is indexed."""
        listed = {id for lookup in self._lookups if isinstance(lookup, dict) for id in lookup}
        return len(listed) + sum(len(lookup) for lookup in self._lookups if not isinstance(lookup, dict))

    def of(self, record: Mapping[str, Any]) -> Profile | None:
        """The profile with a record's id, and where several have it, the one whose wish and first words it holds."""
        candidates = [profile for lookup in self._lookups for profile in _with_id(lookup, record["profile"])]
        return max(candidates, key=lambda profile: _likeness(profile, record), default=None)


def _by_id(profiles: Iterable[Profile]) -> dict[str, list[Profile]]:
    by_id: dict[str, list[Profile]] = defaultdict(list)
    for profile in profiles:
        by_id[profile.id].append(profile)
    return dict(by_id)


def _with_id(lookup: IndexedProfiles | Mapping[str, list[Profile]], wanted: str) -> Sequence[Profile]:
    if isinstance(lookup, IndexedProfiles):
        profile = lookup.with_id(wanted)
        return [] if profile is None else [profile]
    return lookup.get(wanted, ())


def _likeness(profile: Profile, record: Mapping[str, Any]) -> int:
    first, talk = record["messages"][0], (profile.first_talk or "").strip()
    same_opening = first["content"].strip() == talk if talk else bool(first["generated"])
    return (profile.hidden_intention == record["hidden_intention"]) + same_opening
