"""Whether a run, an evaluation or a judgement resumes with the settings that it was begun with, by any version."""

import functools
import json
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from rlver_jax.config import fields
from rlver_jax.config.credentials import Secrets, redacted
from rlver_jax.config.validate import flatten, shown
from rlver_jax.runs.fingerprints import same

_MAY_HOLD_KEYS = ("remote.policy.extra", "remote.user.extra")
SHOWN = 5  # differences that a message names


class Compared(NamedTuple):
    """What `compare` found, in words."""

    differences: str  # empty: they are the same
    defaults: str  # what an older version did not write down, with the values taken; empty: nothing


def check_same(
    path: Path,
    old: Mapping[str, Any],
    new: Mapping[str, Any],
    free: Callable[[str], bool],
    *,
    fault: str,
    remedy: str,
    report: Callable[[str], None],
) -> None:
    """Refuses to resume what lies at `path` with other settings than it was begun with.

    Args:
        old, new: flat settings, both as JSON has them.
        free: whether a field may differ.
        fault, remedy: what is wrong where they differ, and what to do.
        report: is told what an older version did not write down, and what is taken for it.

    Raises:
        ValueError: they differ.
    """
    compared = compare(old, new, free)
    if compared.differences:
        raise ValueError(f"{path}: {fault} ({compared.differences}); {remedy}")
    if compared.defaults:
        report(f"{path}: begun by an older version of rlver_jax, whose settings lack {compared.defaults}: as here")


def compare(old: Mapping[str, Any], new: Mapping[str, Any], free: Callable[[str], bool]) -> Compared:
    """Compares flat settings, both as JSON has them.

    A field of the config that `old` lacks came with a newer version: until then what its default says was done.

    Args:
        free: whether a field may differ.
    """
    fields, differences, defaults = _defaults(), [], []
    for name in (n for n in {**old, **new} if not free(n)):
        if name not in old and name in fields:
            if new[name] == fields[name]:
                defaults.append(f"{name}={fields[name]!r}")
            else:
                differences.append(f"{name} did not exist, which was as {fields[name]!r}, is {new[name]!r}")
        elif name not in new and name not in fields and "." in name and not name.startswith("fingerprint."):
            differences.append(f"{name} was {old[name]!r}, but this version of rlver_jax has no such field")
        elif not _equal(name, old.get(name), new.get(name)):
            was, now = (shown(settings[name]) if name in settings else "no field" for settings in (old, new))
            differences.append(f"{name} was {was}, is {now}")
        elif old.get(name) != new.get(name):
            defaults.append(f"{name} in its present form")
    return Compared(listed(differences, "; "), listed(defaults, ", "))


def _equal(name: str, old: object, new: object) -> bool:
    return same(old, new) if name.startswith("fingerprint.") else old == new


def without_secrets(settings: dict[str, Any], keys: Iterable[str] = ()) -> dict[str, Any]:
    """Settings without what `extra` may hold beside settings: API keys, passwords and the like, by their names.

    Args:
        keys: that are hidden wherever they stand.
    """
    secrets = Secrets(keys)
    texts = {name: settings[name] for name in _MAY_HOLD_KEYS if isinstance(settings.get(name), str)}
    return settings | {name: redacted(text, secrets) for name, text in texts.items()}


def listed(texts: Sequence[str], separator: str) -> str:
    """The first few, and how many more there are."""
    more = f"{separator}and {len(texts) - SHOWN} more" if len(texts) > SHOWN else ""
    return separator.join(texts[:SHOWN]) + more


@functools.cache
def _defaults() -> dict[str, Any]:
    return json.loads(json.dumps(flatten(fields.get_config())))
