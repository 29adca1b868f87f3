"""One fingerprint for profiles, however they are stored: SHA-256 of the JSON list of them, in their order."""

import hashlib
import json
from collections.abc import Iterable, Sequence

from rlver_jax.profiles.schema import Profile


def json_of(profile: Profile) -> bytes:
    """A profile's item of the list."""
    return json.dumps(profile.to_json()).encode()


class ListDigest:
    """The digest of a JSON list whose items come one after another; its length comes first, so it must be known."""

    def __init__(self, sizes: Iterable[int]):
        """`sizes` are the lengths of the items in bytes."""
        total, count = 0, 0
        for size in sizes:
            total, count = total + size, count + 1
        length = total + len("[]") + len(", ") * max(count - 1, 0)
        self._digest = hashlib.sha256(length.to_bytes(8, "big") + b"[")
        self._between = b""

    def add(self, item: bytes) -> None:
        """Takes the next item in."""
        self._digest.update(self._between + item)
        self._between = b", "

    def finish(self) -> str:
        """16 hexadecimal digits of the whole list."""
        self._digest.update(b"]")
        return self._digest.hexdigest()[:16]


def profiles_fingerprint(profiles: Sequence[Profile]) -> str:
    """Of profiles in their order; the texts are made twice rather than kept."""
    digest = ListDigest(len(json_of(profile)) for profile in profiles)
    for profile in profiles:
        digest.add(json_of(profile))
    return digest.finish()
