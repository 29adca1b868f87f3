"""Functions of a user's own on finished dialogues: a reward, metrics, a judge (docs/extending.md).

Each gets a dialogue as its line of a log has it, and its profile, on the host. What it returns stands in the log with
the function's name and a fingerprint of its source, so that `verify` calls it again and names a function that has
changed.
"""

import copy
import functools
import math
import re
import traceback
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from ml_collections import ConfigDict

from rlver_jax.config.own_code import FIELDS, OwnFunction, load_functions
from rlver_jax.config.validate import ConfigError
from rlver_jax.dialogues.log import UNANSWERED, Record, known_fields
from rlver_jax.dialogues.numbers import is_number
from rlver_jax.dialogues.own_sample import sample_dialogues
from rlver_jax.parallel import distributed
from rlver_jax.profiles.schema import Profile

REWARD, METRICS, JUDGE = FIELDS
KEY = "functions"  # of a record
MEASURED, JUDGED = "own/", "judge_score"  # how names of own metrics begin; the name of what an own judge says
Entry = dict[str, Any]  # of KEY's list: field, function, source, value
_NAME = re.compile(r"[\w.-]+(/[\w.-]+)*")  # of a metric
_EXPECTED = {
    REWARD: "a number, or a list with a number for each turn",
    METRICS: "a number, a dict of names and numbers, or None where there is nothing to measure",
    JUDGE: "a number",
}


class OwnFunctionError(ValueError):
    """A function failed, or returned what it must not; the message names it, the dialogue and the line."""


@dataclass(frozen=True)
class OwnFunctions:
    """The functions that a config names; false without any."""

    reward: tuple[OwnFunction, ...] = ()  # one at most
    metrics: tuple[OwnFunction, ...] = ()
    judge: tuple[OwnFunction, ...] = ()  # one at most; of evaluations alone

    @classmethod
    def of(cls, config: ConfigDict) -> "OwnFunctions":
        """The config's functions, tried on sample dialogues.

        Raises:
            ValueError: one of them cannot be had, or fails on a sample.
        """
        return _tried(config.reward.function, config.metrics.functions, config.eval.judge)

    def __bool__(self) -> bool:
        return bool(self.reward or self.metrics or self.judge)

    def sources(self) -> dict[str, str]:
        """{"FIELD=NAME": fingerprint} of each, as runs and evaluations note them."""
        return {f"{f.field}={f.name}": f.source for f in (*self.reward, *self.metrics, *self.judge)}

    def apply(self, records: Sequence[Record], profiles: Sequence[Profile], *, evaluation: bool) -> list[Record]:
        """The records with what the functions say of them; `reward` is that of an own one.

        Of several processes, which all call it, the first one alone calls the functions.

        Args:
            profiles: one for each record.

        Raises:
            OwnFunctionError: a function failed, or returned what it must not.
        """
        if not self:
            return list(records)
        pairs = list(zip(records, profiles, strict=True))
        all_entries = distributed.from_main(lambda: [self.entries(*pair, evaluation=evaluation) for pair in pairs])
        return [with_entries(record, entries) for record, entries in zip(records, all_entries, strict=True)]

    def entries(self, record: Mapping[str, Any], profile: Profile, *, evaluation: bool) -> list[Entry]:
        """What the functions say of a dialogue; of one that stayed unanswered none is asked."""
        if record["end_reason"] == UNANSWERED:
            return []
        plain = {name: record[name] for name in known_fields(None) if name in record and name not in (KEY, "reward")}
        earned = [_called(function, plain, profile) for function in self.reward]
        reward = total(earned[0]["value"]) if earned else record["reward"]
        rest = (*self.metrics, *(self.judge if evaluation else ()))
        return earned + [_called(function, plain | {"reward": reward}, profile) for function in rest]

    def faults(self, record: Mapping[str, Any], profile: Profile, *, evaluation: bool) -> Iterator[str]:
        """Where a log says something else of a dialogue than the functions do."""
        logged = {(one["field"], one["function"]): one for one in entries_of(record)}
        try:
            entries = self.entries(record, profile, evaluation=evaluation)
        except OwnFunctionError as error:
            yield str(error)
            return
        for one in entries:
            known = logged.pop((one["field"], one["function"]), None)
            name = f"{one['field']}={one['function']}"
            if known is None:
                yield f"{name}: the log has nothing of this function"
            elif known["source"] != one["source"]:
                yield f"{name}: has changed since: its file is {one['source']}, it was {known['source']}"
            elif known["value"] != one["value"]:
                yield f"{name}: the log has {known['value']!r:.80}, but the function gives {one['value']!r:.80}"
        for field, name in logged:
            yield f"{field}={name!r:.80}: the log has a value of it, but the config doesn't name this function"


NO_FUNCTIONS = OwnFunctions()


@functools.cache
def _tried(reward: str, metrics: str, judge: str) -> OwnFunctions:
    """Functions that work on the samples; once in a process, for they may cost something."""
    named = {REWARD: reward, METRICS: metrics, JUDGE: judge}
    own = OwnFunctions(*(load_functions(field, value) for field, value in named.items()))
    for field, functions in ((REWARD, own.reward), (JUDGE, own.judge)):
        if len(functions) > 1:
            raise ConfigError(f"{field}={named[field]!r}: names {len(functions)} functions, expected one")
    for record, profile in sample_dialogues() if own else ():
        try:
            own.entries(record, profile, evaluation=True)
            for function in own.reward:
                _try_twice(function, record, profile)
        except OwnFunctionError as error:
            raise ConfigError(f"tried on a made-up dialogue (rlver_jax/dialogues/own_sample.py): {error}") from error
    return own


def _try_twice(function: OwnFunction, record: Record, profile: Profile) -> None:
    """A reward that is not the same for the same dialogue can't be re-derived from a log."""
    once, twice = (_called(function, record, profile)["value"] for _ in range(2))
    if once != twice:
        raise OwnFunctionError(
            f"{function.field}={function.name}: returned {once!r:.200}, and then {twice!r:.200}, for one dialogue; "
            "expected the same value, or no log can be verified"
        )


def with_entries(record: Record, entries: Sequence[Entry]) -> Record:
    """A record with what functions say of it."""
    if not entries:
        return record
    rewards = [total(one["value"]) for one in entries if one["field"] == REWARD]
    return record | {KEY: list(entries)} | ({"reward": rewards[0]} if rewards else {})


def total(value: float | Sequence[float]) -> float:
    """A dialogue's reward: the number, or the sum of its turns'; the shortest decimal of its float32."""
    return float(str(np.float32(math.fsum(value) if isinstance(value, Sequence) else value)))


def entries_of(record: Mapping[str, Any]) -> list[Entry]:
    """What a log has of functions, as far as it has the form; a log may come from anywhere."""
    entries = record.get(KEY)
    texts = ("field", "function", "source")
    return [
        one
        for one in (entries if isinstance(entries, list) else ())
        if isinstance(one, dict) and all(isinstance(one.get(name), str) for name in texts) and "value" in one
    ]


def logged_reward(record: Mapping[str, Any]) -> float | None:
    """A dialogue's reward by what a log has of an own reward function; None: nothing that could be."""
    values = [_value(REWARD, one["value"], record["turns"]) for one in entries_of(record) if one["field"] == REWARD]
    return total(values[0]) if values and values[0] is not _WRONG else None


def numbers_of(record: Mapping[str, Any]) -> dict[str, float]:
    """What functions have measured of a dialogue: {"own/NAME": number} of metrics, {"judge_score": number}."""
    numbers: dict[str, float] = {}
    for one in entries_of(record):
        name, value = one["function"].rpartition(":")[2], one["value"]
        if one["field"] == JUDGE and is_number(value):
            numbers[JUDGED] = value
        elif one["field"] == METRICS:
            parts = value if isinstance(value, dict) else {name: value}
            numbers |= {f"{MEASURED}{key}": number for key, number in parts.items() if is_number(number)}
    return numbers


def of_functions(metrics: Mapping[str, Any]) -> dict[str, Any]:
    """Those of an evaluation's figures that functions have measured."""
    return {name: x for name, x in metrics.items() if name == JUDGED or name.startswith(MEASURED)}


def means_of(records: Sequence[Mapping[str, Any]]) -> dict[str, float]:
    """Means of `numbers_of` over the dialogues that have one."""
    values: dict[str, list[float]] = {}
    for record in records:
        for name, number in numbers_of(record).items():
            values.setdefault(name, []).append(number)
    return {name: math.fsum(numbers) / len(numbers) for name, numbers in values.items()}


def _called(function: OwnFunction, record: Mapping[str, Any], profile: Profile) -> Entry:
    where = f"{function.field}={function.name}, dialogue {record['dialogue']} (profile {profile.id})"
    try:
        value = function.call(copy.deepcopy(dict(record)), profile)  # a copy: what it changes is in no log
    except Exception as error:
        line = traceback.extract_tb(error.__traceback__)[-1]
        location = f"{line.filename}:{line.lineno}"
        raise OwnFunctionError(f"{where}: raised {type(error).__name__}: {error} ({location})") from error
    checked = _value(function.field, value, record["turns"])
    if checked is _WRONG:
        turns, count = record["turns"], f", {len(value)} long" if isinstance(value, list | tuple) else ""
        each = f" ({turns} here: of emotions the first one was before any turn)" if function.field == REWARD else ""
        raise OwnFunctionError(f"{where}: returned {value!r:.200}{count}, expected {_EXPECTED[function.field]}{each}")
    return {"field": function.field, "function": function.name, "source": function.source, "value": checked}


_WRONG = object()


def _value(field: str, value: Any, turns: int) -> Any:
    """What a function returned, in JSON's types; _WRONG where it must not be."""
    if field == METRICS and value is None:
        return None
    if field == METRICS and isinstance(value, Mapping):
        fine = all(isinstance(name, str) and _NAME.fullmatch(name) for name in value)
        numbers = {name: None if number is None else _number(number) for name, number in value.items()}
        return numbers if fine and _WRONG not in numbers.values() else _WRONG
    if field == REWARD and (isinstance(value, list | tuple) or (isinstance(value, np.ndarray) and value.ndim == 1)):
        by_turn = [_number(number) for number in value]
        return by_turn if len(by_turn) == turns and _WRONG not in by_turn else _WRONG
    return _number(value)


def _number(value: Any) -> Any:
    """A finite float32 as a Python float of few digits; _WRONG for anything else."""
    if isinstance(value, bool | np.bool_ | np.floating):
        value = float(value)
    elif isinstance(value, np.integer):
        value = int(value)
    if not is_number(value) or not math.isfinite(np.float32(value)):
        return _WRONG
    return float(str(np.float32(value)))
