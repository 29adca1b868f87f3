"""Derives every reward of a dialogue log again and says where the log is not what the user model would say.

    python -m rlver_jax.verify DIALOGUES.jsonl [FILE…] --config=configs/x.py [--config.a.b=v …]

Each profile costs one reading of its prefix by the user, each dialogue one of the rest, where no turn sees what the
user reasoned in another; nothing is generated. Every appraisal token must be the user's own choice, every
change the readout of its distribution, every emotion the clipped sum, every reward its formula, every spoken word the
one that its key draws. Where two candidates lie so close to each other that rounding decides (`ALLOWED`, by the user's
dtype), that is reported as a tie. Exit status: 0 all derived, 1 any fault, 2 bad usage.
"""

import dataclasses
import functools
import sys
from collections.abc import Iterator, Mapping, Sequence
from typing import Any, NamedTuple

import jax
import numpy as np
from ml_collections import ConfigDict
from rich.console import Console
from rich.progress import track

from rlver_jax.command_line import config_from_flags, local_paths
from rlver_jax.config import ConfigError, profile_files, reward_settings, validate
from rlver_jax.config_files import base
from rlver_jax.output import consoles
from rlver_jax.players import Players, load_model, spec_of
from rlver_jax.profiles.schema import Profile, read_profiles
from rlver_jax.runs.dialogue_log import read_dialogues
from rlver_jax.runs.known_profiles import KnownProfiles
from rlver_jax.runs.log_faults import derived_rewards, logged_turns, misfits, own_faults
from rlver_jax.runs.trajectory import reactions
from rlver_jax.user.emotion import CHANGES
from rlver_jax.user.packed import LoggedTurn, Packed, Packer
from rlver_jax.user.prompts import load_prompts
from rlver_jax.user.rederive import Dialogue, Rederived, rederive
from rlver_jax.user.simulated import dialogue_key

SHOWN = 50  # faults and ties that are printed


@dataclasses.dataclass
class Report:
    """What was derived and what was found."""

    dialogues: int = 0
    turns: int = 0
    tokens: int = 0
    moved: float = 0.0  # the largest difference of a token's log-probability to the log's, in nats
    ties: list[str] = dataclasses.field(default_factory=list)
    faults: list[str] = dataclasses.field(default_factory=list)

    def add(self, other: "Report") -> None:
        """Takes in what was found in other dialogues."""
        self.dialogues += other.dialogues
        self.turns += other.turns
        self.tokens += other.tokens
        self.moved = max(self.moved, other.moved)
        self.ties += other.ties
        self.faults += other.faults


class Allowed(NamedTuple):
    """How far rounding may move what many steps have computed from what one pass computes, in nats."""

    tie: float  # of two candidates against each other
    logprob: float


# By the user's dtype. What bfloat16 moves has no bound; docs/training.md says what an accelerator was seen to.
ALLOWED = {"float32": Allowed(1e-4, 1e-3), "bfloat16": Allowed(0.5, 1.0)}


@dataclasses.dataclass(frozen=True)
class Settings:
    """What of the config decides the derivation."""

    reply_temperature: float
    field_tokens: int
    reply_tokens: int
    readout: str
    reward: Mapping[str, Any]
    allowed: Allowed = ALLOWED["float32"]


class Logged(NamedTuple):
    """A line of a log, and the words that name it in a report."""

    place: str
    record: Mapping[str, Any]


class _Case(NamedTuple):
    """A dialogue that can be derived."""

    place: str
    record: Mapping[str, Any]
    profile: Profile
    turns: Sequence[LoggedTurn]


def verify_records(
    players: Players, profiles: KnownProfiles, logged: Sequence[Logged], settings: Settings
) -> Iterator[Report]:
    """Derives dialogues again, those of one profile after each other: one report each, by dialogue, turn and field."""
    cases = []
    for place, record in logged:
        profile = profiles.of(record)
        faults = [f"{place}, {fault}" for fault in misfits(players, record)]
        if profile is None:
            faults = [f"{place}: profile {record['profile']!r} is not in data.eval or data.train of the config"]
        if faults or profile is None:
            yield Report(dialogues=1, faults=faults)
        else:
            cases.append(_Case(place, record, profile, logged_turns(record)))
    if not cases:
        return
    cases.sort(key=lambda case: (case.profile.id, case.profile.hidden_intention, case.profile.background))
    found = _derived(players, [case for case in cases if case.turns], settings)
    rewards = derived_rewards([case.record for case in cases], settings.reward)
    for case, reward in zip(cases, rewards, strict=True):
        own = own_faults(players, case.profile, case.record, reward)
        report = Report(dialogues=1, faults=[f"{case.place}: {fault}" for fault in own])
        if case.turns:
            _check(players, case, *next(found), settings, report)
        yield report


def _derived(players: Players, cases: Sequence[_Case], settings: Settings) -> Iterator[tuple[Packed, Rederived]]:
    """What the user says of every dialogue."""
    tables, packer = players.tables[1], Packer(players.tables[1], players.spec.rules.band)
    prefix_of, seed_key = functools.lru_cache(maxsize=1)(players.prefix), functools.cache(jax.random.key)
    dialogues = []
    for case in cases:
        key = dialogue_key(seed_key(case.record["seed"]), np.uint32(case.record["dialogue"]))
        packed = packer.dialogue(prefix_of(case.profile), case.record["messages"][0]["tokens"], case.turns)
        dialogues.append(Dialogue(packed, key))
    found = rederive(players.user, tables, dialogues, settings.reply_temperature, settings.readout)
    return zip((packed for packed, _ in dialogues), found, strict=True)


def _check(players, case: _Case, packed: Packed, found: Rederived, settings, report: Report) -> None:
    """Holds a dialogue against its derivation."""
    place, record, _, turns = case
    report.turns, report.tokens = len(turns), len(packed.queries)
    _check_tokens(players, record, packed, found, settings, place, report)
    users = {turn: user for turn, _, user in reactions(record)}
    for turn, *derived in zip(turns, found.change_logprobs, found.change.tolist(), found.change_noise, strict=True):
        where = f"{place}, turn {turn.turn + 1}, change"
        _check_change(users[turn.turn], turn.change, derived, settings, where, report)


def _check_tokens(players, record, packed: Packed, found: Rederived, settings, place: str, report: Report) -> None:
    """Every generated token is the user's own choice, with the log-probability that the log gives it."""
    names = [*players.tables[1].appraisal.names[:-1], *players.tables[1].reply.names]
    users = {turn: user for turn, _, user in reactions(record)}
    for query, margin, logprob in zip(packed.queries, found.margin, found.logprob, strict=True):
        name = names[query.field]
        where = f"{place}, turn {query.turn + 1}, {name!r}, token {query.step + 1}"
        if not margin <= settings.allowed.tie:  # NaN is a fault
            report.faults.append(f"{where}: not the user's own choice, which lies {margin:.4g} nats above it")
        elif margin > 0:
            report.ties.append(f"{where}: {margin:.2g} nats")
        logged = _logged_logprobs(users[query.turn], name)[query.step]
        report.moved = max(report.moved, abs(logged - logprob))
        if not abs(logged - logprob) <= settings.allowed.logprob:
            report.faults.append(f"{where}: logged log-probability {logged:.5f}, derived {logprob:.5f}")
    for turn, user in users.items():
        for name, tokens, stopped in _lines(user, names[-1]):
            limit = settings.reply_tokens if name == names[-1] else settings.field_tokens
            if not tokens or (not stopped and len(tokens) != limit):
                report.faults.append(f"{place}, turn {turn + 1}, {name!r}: {len(tokens)} tokens and no end of line")


def _lines(user: Mapping[str, Any], reply: str) -> Iterator[tuple[str, Sequence[int], bool]]:
    for name, tokens in user["appraisal_tokens"].items():
        yield name, tokens, user["appraisal_stopped"][name]
    if user["content"] is not None:
        for name, tokens in user["consideration_tokens"].items():
            yield name, tokens, user["consideration_stopped"][name]
        yield reply, user["all_tokens"], user["stopped"]


def _logged_logprobs(user: Mapping[str, Any], name: str) -> Sequence[float]:
    for kind in ("appraisal", "consideration"):
        if name in user[f"{kind}_logprobs"]:
            return user[f"{kind}_logprobs"][name]
    return user["raw_logprobs"]


def _check_change(user, change: int, found: Sequence[Any], settings, where: str, report: Report) -> None:
    """The change is the readout of the user's distribution over the options."""
    logprobs, derived, noise = found
    worst = float(np.abs(np.asarray(user["change_logprobs"], np.float32) - logprobs).max())
    if not worst <= settings.allowed.logprob:
        report.faults.append(f"{where}: logged log-probabilities differ from the derived ones by {worst:.4g}")
    if derived == change:
        return
    if _is_tie(settings.readout, logprobs + noise, derived, change, settings.allowed.tie):
        report.ties.append(f"{where}: rounding decides between {change:+d} and {derived:+d}")
    else:
        report.faults.append(f"{where}: logged {change:+d}, but the user's {settings.readout} is {derived:+d}")


def _is_tie(readout: str, scores: np.ndarray, derived: int, logged: int, tie: float) -> bool:
    """Whether `logged` would be the readout of log-probabilities (with noise) that lie within `tie` of the derived."""
    if readout != "mean":
        return bool(scores[derived - CHANGES[0]] - scores[logged - CHANGES[0]] <= tie)
    p, values = np.asarray(jax.nn.softmax(scores)), np.array(CHANGES)
    mean = float((p * values).sum())
    reach = tie * float((p * np.abs(values - mean)).sum())  # d mean / d log p(c) = p(c) (c - mean)
    return abs(mean - logged) <= 0.5 + reach


def settings_of(config: ConfigDict) -> Settings:
    """What of a config decides the derivation."""
    return Settings(
        reply_temperature=config.user.reply_temperature,
        field_tokens=config.user.field_tokens,
        reply_tokens=config.user.reply_tokens,
        readout=config.user.readout,
        reward=reward_settings(config),
        allowed=ALLOWED[config.user.dtype],
    )


def verify_logs(paths: Sequence[str], config: ConfigDict, console: Console) -> Report:
    """Derives every dialogue of logs, with a progress bar; the reports are joined."""
    logged = []
    for path in paths:
        records = read_dialogues(path)
        check_settings(records, config)
        name = f"{path}, " if len(paths) > 1 else ""
        logged += [Logged(f"{name}dialogue {record['dialogue']}", record) for record in records]
    if not logged:
        raise ConfigError(f"{', '.join(paths)}: no dialogue in it; expected a file of dialogues, as evaluate writes")
    players = load_user(config)
    files = profile_files(config.data.eval, config.data.train)
    profiles = KnownProfiles(profile for file in dict.fromkeys(files) for profile in read_profiles(file))
    reports, total = verify_records(players, profiles, logged, settings_of(config)), Report()
    for one in track(reports, "verifying", len(logged), console=console):
        total.add(one)
    return total


def check_settings(records: Sequence[Mapping[str, Any]], config: ConfigDict) -> None:
    """Refuses a config under which the log was not played: every appraisal would look forged.

    Raises:
        ConfigError: naming the first dialogue, the field and both values.
    """
    fields = {
        "language": "data.language",
        "style": "user.style",
        "scenario": "user.scenario",
        "readout": "user.readout",
        "mode": "policy.mode",
    }
    for record in records:
        if record["readout"] == "text":
            raise ConfigError(
                f"dialogue {record['dialogue']}: its user was behind an endpoint, so nothing can be derived again; "
                f"expected a log of a user on the device"
            )
        for name, field in fields.items():
            section, key = field.split(".")
            if record[name] != config[section][key]:
                raise ConfigError(
                    f"dialogue {record['dialogue']} was played with {field}={record[name]!r}, but the config has "
                    f"{config[section][key]!r}; add --config.{field}={record[name]}"
                )


def load_user(config: ConfigDict) -> Players:
    """The simulated user alone: no policy is needed to derive a reward, so the user's model stands in its place."""
    scanned = config.user.copy_and_resolve_references()
    scanned.scan_layers = True  # unrolling pays for single tokens; a long row only compiles longer
    if jax.default_backend() == "cpu":  # the scores of so few queries stay in the cores' caches
        scanned.attention, scanned.attention_chunk = "chunked", 32
    user, tokenizer = load_model(scanned, "user")
    spec = spec_of(config, group=1, max_turns=1, initial_emotion=config.eval.initial_emotion)
    prompts = load_prompts(config.data.language, config.user.prompts or None)
    how = {"style": config.user.style, "scenario": config.user.scenario}
    return Players.build(user, user, tokenizer, prompts, spec, **how)


def show(report: Report, console: Console) -> None:
    """Prints faults and ties, then the summary."""
    for kind, lines in (("fault", report.faults), ("tie", report.ties)):
        for line in lines[:SHOWN]:
            console.print(f"{kind}: {line}", markup=False, highlight=False)
        if len(lines) > SHOWN:
            console.print(f"… and {len(lines) - SHOWN} more {kind}s")
    console.print(
        f"derived {report.dialogues} dialogues, {report.turns} turns, {report.tokens} tokens: "
        f"{len(report.ties)} ties, {len(report.faults)} faults, log-probabilities within {report.moved:.2g} nats"
    )


def main(argv: Sequence[str] | None = None) -> int:
    """The command line; returns the exit status."""
    console, errors = consoles(soft_wrap=True)
    try:
        config, _, rest = config_from_flags(sys.argv[1:] if argv is None else argv, __doc__)
        if not rest:
            raise ConfigError("found no file, expected DIALOGUES.jsonl; --help shows the usage")
        files = local_paths(rest)
        validate(config, base.get_config(), needs=["user"])
        report = verify_logs(files, config, console)
    except (ValueError, OSError) as error:
        errors.print(f"verify: {error}", markup=False, highlight=False)
        return 2
    show(report, console)
    return 1 if report.faults else 0


if __name__ == "__main__":
    sys.exit(main())
