"""Settings that something was begun with against those that it shall go on with, of this version or an older one."""

import functools
import json
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any, NamedTuple

from rlver_jax.config import fields
from rlver_jax.config.credentials import Secrets, redacted
from rlver_jax.config.validate import flatten
from rlver_jax.runs.fingerprints import same

_MAY_HOLD_KEYS = ("remote.policy.extra", "remote.user.extra")
SHOWN = 5  # differences that a message names


class Compared(NamedTuple):
    """What `compare` found, in words."""

    differences: str  # empty: they are the same
    defaults: str  # what an older version did not write down, with the values taken; empty: nothing


def compare(found: Mapping[str, Any], new: Mapping[str, Any], free: Callable[[str], bool]) -> Compared:
    """Compares flat settings, both as JSON has them.

    A field of the config that `found` lacks came with a newer version: until then what its default says was done.

    Args:
        free: whether a field may differ.
    """
    fields, differ, taken = _defaults(), [], []
    for name in (n for n in {**found, **new} if not free(n)):
        if name not in found and name in fields:
            if new[name] == fields[name]:
                taken.append(f"{name}={fields[name]!r}")
            else:
                differ.append(f"{name} did not exist, which was as {fields[name]!r}, is {new[name]!r}")
        elif name not in new and name not in fields and "." in name and not name.startswith("fingerprint."):
            differ.append(f"{name} was {found[name]!r}, but this version of rlver_jax has no such field")
        elif not _equal(name, found.get(name), new.get(name)):
            was, now = (repr(some[name]) if name in some else "no field" for some in (found, new))
            differ.append(f"{name} was {was}, is {now}")
        elif found.get(name) != new.get(name):
            taken.append(f"{name} in its present form")
    return Compared(listed(differ, "; "), listed(taken, ", "))


def _equal(name: str, found: object, new: object) -> bool:
    return same(found, new) if name.startswith("fingerprint.") else found == new


def without_secrets(settings: dict[str, Any], keys: Iterable[str] = ()) -> dict[str, Any]:
    """Settings without what `extra` may hold beside settings: API keys, passwords and the like, by their names.

    Args:
        keys: that are hidden wherever they stand.
    """
    secrets = Secrets(keys)
    found = {name: settings[name] for name in _MAY_HOLD_KEYS if isinstance(settings.get(name), str)}
    return settings | {name: redacted(value, secrets) for name, value in found.items()}


def listed(texts: Sequence[str], separator: str) -> str:
    """The first few, and how many more there are."""
    more = f"{separator}and {len(texts) - SHOWN} more" if len(texts) > SHOWN else ""
    return separator.join(texts[:SHOWN]) + more


@functools.cache
def _defaults() -> dict[str, Any]:
    return json.loads(json.dumps(flatten(fields.get_config())))
