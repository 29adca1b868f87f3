"""Where a log was played with other settings than a config's."""

from collections.abc import Collection, Iterator, Mapping, Sequence
from typing import Any

from ml_collections import ConfigDict

from rlver_jax.config.validate import ConfigError, shown
from rlver_jax.dialogues.log import Record
from rlver_jax.dialogues.verify_shape import POLICY, USER

LONGEST = 60  # characters of a value in a message
TEXT = "text"  # readout of a user behind an endpoint
_FIELDS = {
    "language": "data.language",
    "style": "user.style",
    "scenario": "user.scenario",
    "readout": "user.readout",
    "mode": "policy.mode",
}


def check_settings(records: Sequence[Mapping[str, Any]], config: ConfigDict) -> list[list[str]]:
    """Refuses a config under which the log was not played: every appraisal would look forged.

    Returns:
        faults of each record: of those that disagree with the config where others do not.

    Raises:
        ConfigError: all of them are: naming the first dialogue, the field and both values.
    """
    faults: list[list[str]] = [[] for _ in records]
    for name in _FIELDS:
        wrong = [_mismatch(record, name, config) for record in records]
        if records and all(wrong):
            raise ConfigError(_remedy(records[0], name, config))
        for record_faults, fault in zip(faults, wrong, strict=True):
            record_faults += [fault] if fault else []
    return faults


def _expected(name: str, config: ConfigDict) -> Any:
    section, key = _FIELDS[name].split(".")
    return TEXT if name == "readout" and config.remote.user.url else config[section][key]


def _mismatch(record: Mapping[str, Any], name: str, config: ConfigDict) -> str:
    expected = _expected(name, config)
    return "" if record[name] == expected else f"{name} is {shown(record[name])}, but the config's is {expected!r}"


def _remedy(record: Mapping[str, Any], name: str, config: ConfigDict) -> str:
    field, logged, expected = _FIELDS[name], record[name], _expected(name, config)
    if name == "readout" and logged == TEXT:
        return (
            f"dialogue {record['dialogue']}: its user was behind an endpoint, but the config has none; add "
            f"--config.remote.user.url=… and --config.remote.user.model=… to check what needs no model"
        )
    if expected == TEXT:
        return (
            f"dialogue {record['dialogue']} was played with a user on the device (readout {shown(logged)}), but the "
            f"config has remote.user.url={config.remote.user.url!r}; leave it out"
        )
    plain = isinstance(logged, str) and logged.isprintable() and len(logged) <= LONGEST  # what a terminal may be given
    remedy = f"add --config.{field}={logged}" if plain else "give the config that it was played with"
    played = f"dialogue {record['dialogue']} was played with {field}={shown(logged)}"
    return f"{played}, but the config has {expected!r}; {remedy}"


def endpoints_of(records: Sequence[Record], config: ConfigDict) -> list[str]:
    """Which of "policy" and "user" are behind an endpoint in a log.

    Both as in the config. The policy also where no dialogue has a token of it and each has counts of its endpoint:
    nothing of it is recomputed in any case.

    Raises:
        ConfigError: the config's policy is behind an endpoint, but no dialogue's is.
    """
    remote = [USER] if config.remote.user.url else []
    replies = [[message["tokens"] for message in record["messages"][1::2]] for record in records]
    on_device = [any(tokens is not None for tokens in of_one) for of_one in replies]
    if config.remote.policy.url:
        if records and all(on_device):
            raise ConfigError(
                f"dialogue {records[0]['dialogue']} was played with a policy on the device, but the config has "
                f"remote.policy.url={config.remote.policy.url!r}; leave it out"
            )
        return [POLICY, *remote]
    counted = [isinstance(record.get("remote"), dict) and POLICY in record["remote"] for record in records]
    return [POLICY, *remote] if records and all(counted) and not any(on_device) else remote


def remote_faults(record: Mapping[str, Any], endpoints: Collection[str]) -> Iterator[str]:
    """Of the field with the counts of endpoints, which only dialogues with an endpoint have."""
    counts_by_side = record.get("remote")
    if "remote" not in record or not endpoints:
        if "remote" in record or endpoints:
            yield f"remote is {'there' if 'remote' in record else 'missing'}: endpoints are {list(endpoints) or 'none'}"
        return
    if not isinstance(counts_by_side, dict) or not set(counts_by_side) <= set(endpoints):
        yield f"remote has other sides than the endpoints, {', '.join(endpoints)}"
        return
    for side, used in counts_by_side.items():
        counts = ("requests", "asked_again", "prompt_tokens", "completion_tokens")
        if not isinstance(used, dict) or any(type(used.get(n)) is not int or used[n] < 0 for n in counts):
            yield f"remote.{side} has no whole numbers {', '.join(counts)}"
