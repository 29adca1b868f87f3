"""Recomputes every reward of a dialogue log, and names each difference.

    rlver verify DIALOGUES.jsonl [FILE…] --config=FILE[:ARG] [--config.a.b=v …]
                 [--policy=WORKDIR|HF_FOLDER [--step=best|last|N]] [--repeats=N] [--partial]

Nothing is generated: the user model replays each dialogue by teacher forcing, in one forward pass (the prefix of a
profile is prefilled once), in which no turn sees the reasoning of another. Every appraisal token must be the user's own
choice, every change the readout of its distribution, every emotion the clipped sum, every reward its formula, every
token of a reply the one that its key draws. Where two candidates lie so close to each other that rounding decides (by
the user's dtype), that is reported as a tie. Ends, texts, the set of dialogues and their other fields follow from the
config, which must be the one that they were played with. --partial: the logs lack dialogues on purpose. The last line
says what was not recomputed.

With --policy the policy's replies are recomputed, too: each token must be the one that its key draws, with both of its
log-probabilities. --policy takes what evaluate's --checkpoint takes. An evaluation of a training run is compared with
the checkpoint that evaluate would take, or --step. The dialogues of training step N were played by the policy before
that step: they are compared with the checkpoint of step N - 1, or for step 1 with the model that training began with.

Exit status: 0 no fault, 1 any fault, 2 bad usage, 130 interrupted.
"""

import dataclasses
import functools
import sys
from collections.abc import Collection, Iterator, Mapping, Sequence
from typing import Any, NamedTuple

import jax
import numpy as np
from absl import flags
from ml_collections import ConfigDict
from rich.console import Console
from rich.progress import track

from rlver_jax.config.flags import config_from_flags, define_path, local_paths, path_override
from rlver_jax.config.validate import ConfigError, reward_settings, validate
from rlver_jax.decoding.replay import Keys, ReplayInput
from rlver_jax.decoding.replay_sequence import ReplaySequence
from rlver_jax.dialogues import two_tokenizers
from rlver_jax.dialogues.faults import (
    POLICY_TOKENS,
    ConsistencyCheck,
    Reward,
    logged_turns,
    recomputed_rewards,
    unchecked,
)
from rlver_jax.dialogues.known_profiles import KnownProfiles
from rlver_jax.dialogues.own_functions import NO_FUNCTIONS, OwnFunctions, logged_reward
from rlver_jax.dialogues.trajectory import reactions
from rlver_jax.dialogues.verify_changes import compare_change
from rlver_jax.dialogues.verify_files import plans_of, read_log_file
from rlver_jax.dialogues.verify_report import Report
from rlver_jax.dialogues.verify_set import Plan, TrainingPlan
from rlver_jax.dialogues.verify_shape import POLICY, USER, RecordSchema
from rlver_jax.dialogues.verify_tokens import (
    TOLERANCES,
    Speaker,
    Tolerance,
    check_tokens,
    user_fields,
    user_logprobs,
)
from rlver_jax.evaluation.play import chosen_profiles, eval_spec
from rlver_jax.profiles.schema import Profile
from rlver_jax.profiles.sources import open_each
from rlver_jax.rollout.agents import Agents, load_model
from rlver_jax.rollout.policy_turn import build_policy_tables
from rlver_jax.rollout.sampler import opening_key
from rlver_jax.text.command import Command, run_command
from rlver_jax.text.tokenizer import load_tokenizer
from rlver_jax.training import behaviour_policy
from rlver_jax.user.prompts import load_prompts
from rlver_jax.user.replay import Replayed, replay
from rlver_jax.user.replay_sequence import LoggedTurn, Packer
from rlver_jax.user.turn import build_user_tables, dialogue_key

SHOWN = 50  # faults and ties that are printed


@dataclasses.dataclass(frozen=True)
class Settings:
    """Settings of the config that the recomputed values depend on."""

    reply_temperature: float
    field_tokens: int
    reply_tokens: int
    readout: str
    reward: Mapping[str, Any]
    own: OwnFunctions = NO_FUNCTIONS
    tolerance: Tolerance = TOLERANCES["float32"]


class LoggedDialogue(NamedTuple):
    """A record of a log, its name in reports, how the config plays it, and its faults so far."""

    where: str
    record: Mapping[str, Any]
    plan: Plan
    faults: Sequence[str] = ()
    whole: Mapping[str, Any] | None = None  # the record with both sides; None: that is `record`


class _Case(NamedTuple):
    """A dialogue that can be replayed."""

    where: str
    record: Mapping[str, Any]
    plan: Plan
    profile: Profile
    turns: Sequence[LoggedTurn]  # empty where its user is behind an endpoint
    faults: list[str]
    whole: Mapping[str, Any]  # the record with both sides

    @property
    def opening_generated(self) -> bool:
        """Whether the user generated its first words."""
        return not (self.profile.first_talk or "").strip()

    @property
    def has_user_tokens(self) -> bool:
        """Whether a user on the device generated any token of it."""
        return USER not in self.plan.endpoints and (bool(self.turns) or self.opening_generated)


def verify_records(
    agents: Agents, profiles: KnownProfiles, logged: Sequence[LoggedDialogue], settings: Settings
) -> Iterator[Report]:
    """Verifies dialogues, those of one profile after each other: one report each, by dialogue, turn and field.

    Args:
        agents: without models where every user is behind an endpoint; see `load_agents`.
    """
    cases, schemas = [], {one.plan: RecordSchema.of(agents, one.plan.endpoints) for one in logged}
    for one in logged:
        case = _case(one, schemas[one.plan], profiles)
        if isinstance(case, Report):
            yield case
        else:
            cases.append(case)
    if not cases:
        return
    cases.sort(key=lambda case: (case.profile.id, case.profile.hidden_intention, case.profile.background))
    replays = _replays(agents, [case for case in cases if case.has_user_tokens], settings)
    rewards = _rewards(cases, settings)
    limits = settings.field_tokens, settings.reply_tokens
    checks = {
        plan: ConsistencyCheck.of(
            agents, plan, limits, settings.reply_temperature, [c.record for c in cases if c.plan is plan]
        )
        for plan in {case.plan for case in cases}
    }
    for case, reward in zip(cases, rewards, strict=True):
        case.faults.extend(
            settings.own.faults(case.whole, case.profile, evaluation=not isinstance(case.plan, TrainingPlan))
        )
        sequence, replayed = next(replays) if case.has_user_tokens else (None, None)
        prefix = sequence.prefix if sequence else 0 if USER in case.plan.endpoints else len(agents.prefix(case.profile))
        consistency_errors = checks[case.plan].errors(case.profile, case.record, reward, prefix)
        report = Report(dialogues=1, faults=[f"{case.where}: {fault}" for fault in (*case.faults, *consistency_errors)])
        report.turns = sum(1 for _ in reactions(case.record))
        report.unchecked |= dict.fromkeys(unchecked(case.record, case.plan))
        if sequence and replayed:
            _check(agents, case, sequence, replayed, settings, report)
        yield report


def _case(dialogue: LoggedDialogue, schema: RecordSchema, profiles: KnownProfiles) -> _Case | Report:
    """The dialogue as it can be replayed, or a report that says why it cannot."""
    where, record, plan, faults, whole = dialogue
    if schema_errors := list(schema.errors(record)):
        known = [f"{where}: {fault}" for fault in faults]
        return Report(dialogues=1, faults=known + [f"{where}, {error}" for error in schema_errors])
    faults, profile = list(faults), plan.profile(record["dialogue"])
    if profile is None or profile.id != record["profile"]:
        expected = "none has that number" if profile is None else f"the config plays {profile.id!r} in it"
        faults.append(f"profile is {record['profile']!r}, but {expected} ({plan.fields['num_profiles']})")
        profile = profiles.of(record)
    if profile is None:
        faults.append(f"profile {record['profile']!r} is not in data.eval or data.train of the config")
        return Report(dialogues=1, faults=[f"{where}: {fault}" for fault in faults])
    turns = [] if USER in plan.endpoints else logged_turns(record)
    return _Case(where, record, plan, profile, turns, faults, whole or record)


def _rewards(cases: Sequence[_Case], settings: Settings) -> list[Reward]:
    """Rewards by the formula, or by what the log has of a user's own function, which is itself compared elsewhere."""
    formula = recomputed_rewards([case.record for case in cases], settings.reward)
    if not settings.own.reward:
        return formula
    own = [logged_reward(case.whole) for case in cases]
    return [by_formula if value is None else Reward(value, 0.0) for value, by_formula in zip(own, formula, strict=True)]


def _replays(agents: Agents, cases: Sequence[_Case], settings: Settings) -> Iterator[tuple[ReplaySequence, Replayed]]:
    """The user's replay of every dialogue."""
    if not cases:
        return iter(())
    tables, packer = agents.tables[1], Packer(agents.tables[1], agents.spec.rules.band)
    prefix_of, seed_key = functools.lru_cache(maxsize=1)(agents.prefix), functools.cache(jax.random.key)
    dialogues = []
    for case in cases:
        prefix, key = prefix_of(case.profile), seed_key(case.record["seed"])
        own_key = dialogue_key(key, np.uint32(case.record["dialogue"]))
        keys = Keys(own_key, opening_key(key, prefix) if case.opening_generated else own_key)
        most = settings.reply_tokens if case.opening_generated else 0
        sequence = packer.dialogue(prefix, case.record["messages"][0]["tokens"], case.turns, most)
        dialogues.append(ReplayInput(sequence, keys, settings.reply_temperature))
    results = replay(agents.user, tables, dialogues, settings.readout)
    return zip((dialogue.sequence for dialogue in dialogues), results, strict=True)


def _check(agents, case: _Case, sequence: ReplaySequence, replayed: Replayed, settings, report: Report) -> None:
    """Compares a dialogue with its replay."""
    where, record = case.where, case.record
    users = {turn: user for turn, _, user in reactions(record)}
    user = Speaker("user", user_fields(agents), settings.reply_temperature, settings.tolerance)
    report.add_tokens(
        where, check_tokens(user, sequence, replayed, functools.partial(user_logprobs, user.fields, users))
    )
    changes = zip(case.turns, replayed.change_logprobs, replayed.change.tolist(), replayed.change_noise, strict=True)
    for turn, *change in changes:
        result = compare_change(users[turn.turn], change, agents.spec.rules, settings.readout, settings.tolerance)
        report.add_tokens(f"{where}, turn {turn.turn + 1}", result)


def settings_of(config: ConfigDict) -> Settings:
    """The settings of a config."""
    return Settings(
        reply_temperature=config.user.reply_temperature,
        field_tokens=config.user.field_tokens,
        reply_tokens=config.user.reply_tokens,
        readout=config.user.readout,
        reward=reward_settings(config),
        own=OwnFunctions.of(config),
        tolerance=TOLERANCES[config.user.dtype],
    )


def verify_logs(
    paths: Sequence[str],
    config: ConfigDict,
    console: Console,
    *,
    repeats: int = 0,
    partial: bool = False,
    policy: behaviour_policy.Choice | None = None,
) -> Report:
    """Verifies every dialogue of logs, with a progress bar; the reports are joined.

    Args:
        repeats: of each profile in an evaluation; 0: as in the logs.
        partial: the logs are parts, so that dialogues may be missing.
        policy: that played them; None: its replies are not recomputed.

    Raises:
        ConfigError: the logs were played with another config.
        ValueError, OSError: a file, the model or the profiles cannot be read.
    """
    total = Report(unchecked={"the set of dialogues (--partial)": None} if partial else {})
    profiles = KnownProfiles.of_sets(open_each(config))
    logged = _read_logs(paths, config, total, repeats=repeats, partial=partial)
    if not logged:
        return total
    played = [one[1:3] for one in logged]
    policies = behaviour_policy.players_of(played, config, policy) if policy else {}
    config = next((one.config for one in policies.values() if isinstance(one, behaviour_policy.Player)), config)
    sides = _by_side(logged, config)
    for side, dialogues in sides.items():
        agents = load_agents(config, {other for one in dialogues for other in one.plan.endpoints})
        reports = verify_records(agents, profiles, dialogues, settings_of(config))
        for one in track(reports, "verifying", len(dialogues), console=console):
            total.add(one if side == USER else dataclasses.replace(one, dialogues=0, turns=0))
        if policies and side == next(iter(sides)):
            results = behaviour_policy.findings(policies, agents, [one[:3] for one in dialogues])
            for where, tokens in track(results, "the policy", len(dialogues), console=console):
                total.add_tokens(where, tokens)
    if policies:
        total.unchecked.pop(POLICY_TOKENS, None)  # absent where no dialogue could be replayed
    total.faults = list(dict.fromkeys(total.faults))  # what both sides find is one fault
    return total


def _read_logs(
    paths: Sequence[str], config: ConfigDict, total: Report, *, repeats: int, partial: bool
) -> list[LoggedDialogue]:
    """The dialogues of files; faults of the files themselves go to `total`."""
    plans = plans_of(config, chosen_profiles(config), repeats=repeats, partial=partial)
    logged = []
    for path in paths:
        part, name = read_log_file(path, plans, config), f"{path}, " if len(paths) > 1 else ""
        total.faults += part.faults
        logged += [LoggedDialogue(f"{name}dialogue {one.record['dialogue']}", *one) for one in part.dialogues]
    return logged


def _by_side(logged: list[LoggedDialogue], config: ConfigDict) -> dict[str, list[LoggedDialogue]]:
    """{side: the dialogues as they are checked for it}, the policy first; {USER: all} where both sides go together."""
    if not two_tokenizers.played_as_text([one.record for one in logged], config):
        return {USER: logged}
    plans = two_tokenizers.plans_by_side([one.plan for one in logged])
    return {
        side: [
            one._replace(record=two_tokenizers.seen_by(side, one.record), plan=plans[one.plan][side], whole=one.record)
            for one in logged
        ]
        for side in (POLICY, USER)
    }


def load_agents(config: ConfigDict, endpoints: Collection[str]) -> Agents:
    """The simulated user alone: recomputing rewards needs no policy, so the user's model fills its field.

    Where users are behind an endpoint there is no model at all, only the policy's tokenizer if that is on the device.
    """
    if USER not in endpoints:
        return load_user(config)
    spec, prompts = eval_spec(config), load_prompts(config.data.language, config.user.prompts or None)
    none: Any = None
    if POLICY in endpoints:
        return Agents(none, none, none, prompts, none, config.user.style, config.user.scenario, spec)
    if not config.policy.path:
        raise ConfigError("policy.path is empty; set --config.policy.path to the folder of the policy's tokenizer")
    tokenizer = load_tokenizer(config.policy.path)
    size = tokenizer.vocab_size
    tables = build_policy_tables(tokenizer, prompts, size, spec), build_user_tables(tokenizer, prompts, size)
    return Agents(none, none, tokenizer, prompts, tables, config.user.style, config.user.scenario, spec)


def load_user(config: ConfigDict) -> Agents:
    """See `load_agents`."""
    user, tokenizer = load_model(behaviour_policy.reading(config.user), "user")
    prompts = load_prompts(config.data.language, config.user.prompts or None)
    options = {"style": config.user.style, "scenario": config.user.scenario}
    return Agents.build(user, user, tokenizer, prompts, eval_spec(config), **options)


def show(report: Report, console: Console) -> None:
    """Prints faults and ties, then the summary."""
    for kind, lines in (("fault", report.faults), ("tie", report.ties)):
        for line in lines[:SHOWN]:
            console.print(f"{kind}: {line}", markup=False, highlight=False)
        if len(lines) > SHOWN:
            console.print(f"… and {len(lines) - SHOWN} more {kind}s")
    missing = ", ".join(sorted(report.unchecked, key=_is_extra))
    console.print(
        f"recomputed {report.dialogues} dialogues, {report.turns} turns, {report.tokens} tokens: "
        f"{len(report.ties)} ties, {len(report.faults)} faults, "
        f"log-probabilities within {report.logprob_error:.2g} nats"
        + (f"; not recomputed: {missing}" if missing else ""),
        markup=False,
    )


def _is_extra(name: str) -> bool:
    """Fields that other programs have added come last."""
    return name.startswith("field ")


def _define(values: flags.FlagValues) -> None:
    flags.DEFINE_integer(
        "repeats", 0, "dialogues of each profile in an evaluation; 0: as the log has", lower_bound=0, flag_values=values
    )
    define_path("policy", "", "training run or Hugging Face folder of the policy that played the logs", values)
    flags.DEFINE_string("step", "", "of a training run: best | last | a number", flag_values=values)
    flags.DEFINE_boolean("partial", False, "the logs are parts: dialogues may be missing", flag_values=values)


def main(argv: Sequence[str] | None = None) -> int:
    """The command line; returns the exit status."""
    return run_command("verify", _verify, argv, soft_wrap=True)


def _verify(command: Command, argv: Sequence[str]) -> int:
    config, options, rest = config_from_flags(argv, __doc__, _define)
    if not rest:
        raise ConfigError("found no file, expected DIALOGUES.jsonl; --help shows the usage")
    files = local_paths(rest)
    here = [side for side in (USER, POLICY) if not config.remote[side].url]
    validate(config, needs=here[:1])
    if options.step and not options.policy:
        raise ConfigError(f"--step={options.step} is of the policy; add --policy=WORKDIR")
    policy = behaviour_policy.Choice(options.policy, options.step, path_override(options)) if options.policy else None
    choices = {"repeats": options.repeats, "partial": options.partial, "policy": policy}
    report = verify_logs(files, config, command.console, **choices)
    show(report, command.console)
    return 1 if report.faults else 0


if __name__ == "__main__":
    sys.exit(main())
