"""Derives every reward of a dialogue log again and says where the log is not what the user model would say.

    python -m rlver_jax.verify DIALOGUES.jsonl [FILE…] --config=configs/x.py [--config.a.b=v …]
                               [--policy=WORKDIR|HF_FOLDER [--step=best|last|N]]
                               [--repeats=N] [--partial]

Each profile costs one reading of its prefix by the user, each dialogue one of the rest, where no turn sees what the
user reasoned in another; nothing is generated. Every appraisal token must be the user's own choice, every
change the readout of its distribution, every emotion the clipped sum, every reward its formula, every spoken word the
one that its key draws. Where two candidates lie so close to each other that rounding decides (`ALLOWED`, by the user's
dtype), that is reported as a tie. Ends, texts, the set of dialogues and all they say of themselves follow from the
config, which must be the one that they were played with. --partial: the logs lack dialogues on purpose. The last line
says what was not derived.

With --policy every word of the policy is derived, too: each token must be the one that its key draws, with both of its
log-probabilities. It takes what evaluate's --checkpoint takes. Of a training run an evaluation is held against the
checkpoint that evaluate would take, or --step; what training step N logs was played by the policy before that step: it
is held against the checkpoint of step N - 1, for step 1 against the model that training began with.

Exit status: 0 all derived, 1 any fault, 2 bad usage.
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

from rlver_jax.config import fields
from rlver_jax.config.flags import config_from_flags, define_path, given_path, local_paths
from rlver_jax.config.validate import ConfigError, reward_settings, validate
from rlver_jax.decoding.replay import Dialogue, Keys
from rlver_jax.decoding.replay_sequence import ReplaySequence
from rlver_jax.dialogues.faults import POLICYS_WORDS, Host, derived_rewards, logged_turns, underived
from rlver_jax.dialogues.known_profiles import KnownProfiles
from rlver_jax.dialogues.trajectory import reactions
from rlver_jax.dialogues.verify_files import plans_of, read_part
from rlver_jax.dialogues.verify_set import Plan
from rlver_jax.dialogues.verify_shape import POLICY, USER, Shape
from rlver_jax.dialogues.verify_tokens import ALLOWED, Allowed, Found, Speaker, hold, users_claim, users_fields
from rlver_jax.evaluation.play import chosen_profiles, eval_spec
from rlver_jax.profiles.schema import Profile
from rlver_jax.profiles.sources import open_each
from rlver_jax.rollout.agents import Agents, load_model
from rlver_jax.rollout.policy_turn import build_policy_tables
from rlver_jax.rollout.sampler import opening_key
from rlver_jax.text.console import consoles
from rlver_jax.text.tokenizer import load_tokenizer
from rlver_jax.training import behaviour_policy
from rlver_jax.user.emotion import CHANGES, EmotionRules
from rlver_jax.user.prompts import load_prompts
from rlver_jax.user.replay import Replayed, replay
from rlver_jax.user.replay_sequence import LoggedTurn, Packer
from rlver_jax.user.turn import build_user_tables, dialogue_key

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
    underived: dict[str, None] = dataclasses.field(default_factory=dict)  # what of the logs nothing was held against

    def take(self, place: str, found: Found) -> None:
        """Takes in what was found of one side's tokens in the dialogue at `place`."""
        self.tokens += found.tokens
        self.moved = max(self.moved, found.moved)
        self.ties += [f"{place}, {tie}" for tie in found.ties]
        self.faults += [f"{place}, {fault}" for fault in found.faults]

    def add(self, other: "Report") -> None:
        """Takes in what was found in other dialogues."""
        self.dialogues += other.dialogues
        self.turns += other.turns
        self.tokens += other.tokens
        self.moved = max(self.moved, other.moved)
        self.ties += other.ties
        self.faults += other.faults
        self.underived |= other.underived


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
    """A line of a log, the words that name it in a report, how it should have been played, and what is wrong so far."""

    place: str
    record: Mapping[str, Any]
    plan: Plan
    faults: Sequence[str] = ()


class _Case(NamedTuple):
    """A dialogue that can be derived."""

    place: str
    record: Mapping[str, Any]
    plan: Plan
    profile: Profile
    turns: Sequence[LoggedTurn]  # empty where its user is behind an endpoint
    faults: list[str]

    @property
    def made_up(self) -> bool:
        """Whether the user made up its first words."""
        return not (self.profile.first_talk or "").strip()

    @property
    def of_user(self) -> bool:
        """Whether there is something that a user on the device has said."""
        return USER not in self.plan.endpoints and (bool(self.turns) or self.made_up)


def verify_records(
    agents: Agents, profiles: KnownProfiles, logged: Sequence[Logged], settings: Settings
) -> Iterator[Report]:
    """Derives dialogues again, those of one profile after each other: one report each, by dialogue, turn and field.

    Args:
        agents: without models where every user is behind an endpoint; see `load_agents`.
    """
    cases, shapes = [], {one.plan: Shape.of(agents, one.plan.endpoints) for one in logged}
    for one in logged:
        case = _case(one, shapes[one.plan], profiles)
        if isinstance(case, Report):
            yield case
        else:
            cases.append(case)
    if not cases:
        return
    cases.sort(key=lambda case: (case.profile.id, case.profile.hidden_intention, case.profile.background))
    found = _derived(agents, [case for case in cases if case.of_user], settings)
    rewards = derived_rewards([case.record for case in cases], settings.reward)
    limits = settings.field_tokens, settings.reply_tokens
    hosts = {
        plan: Host.of(agents, plan, limits, settings.reply_temperature, [c.record for c in cases if c.plan is plan])
        for plan in {case.plan for case in cases}
    }
    for case, reward in zip(cases, rewards, strict=True):
        packed, replayed = next(found) if case.of_user else (None, None)
        prefix = packed.prefix if packed else 0 if USER in case.plan.endpoints else len(agents.prefix(case.profile))
        own = hosts[case.plan].faults(case.profile, case.record, reward, prefix)
        report = Report(dialogues=1, faults=[f"{case.place}: {fault}" for fault in (*case.faults, *own)])
        report.turns = sum(1 for _ in reactions(case.record))
        report.underived |= dict.fromkeys(underived(case.record, case.plan.endpoints))
        if packed and replayed:
            _check(agents, case, packed, replayed, settings, report)
        yield report


def _case(one: Logged, shape: Shape, profiles: KnownProfiles) -> _Case | Report:
    """What can be derived of a line, or a report that says why nothing can."""
    place, record, plan, faults = one
    if misfits := list(shape.faults(record)):
        known = [f"{place}: {fault}" for fault in faults]
        return Report(dialogues=1, faults=known + [f"{place}, {fault}" for fault in misfits])
    faults, profile = list(faults), plan.profile(record["dialogue"])
    if profile is None or profile.id != record["profile"]:
        wanted = "none has that number" if profile is None else f"the config plays {profile.id!r} in it"
        faults.append(f"profile is {record['profile']!r}, but {wanted} ({plan.fields['num_profiles']})")
        profile = profiles.of(record)
    if profile is None:
        faults.append(f"profile {record['profile']!r} is not in data.eval or data.train of the config")
        return Report(dialogues=1, faults=[f"{place}: {fault}" for fault in faults])
    turns = [] if USER in plan.endpoints else logged_turns(record)
    return _Case(place, record, plan, profile, turns, faults)


def _derived(agents: Agents, cases: Sequence[_Case], settings: Settings) -> Iterator[tuple[ReplaySequence, Replayed]]:
    """What the user says of every dialogue."""
    if not cases:
        return iter(())
    tables, packer = agents.tables[1], Packer(agents.tables[1], agents.spec.rules.band)
    prefix_of, seed_key = functools.lru_cache(maxsize=1)(agents.prefix), functools.cache(jax.random.key)
    dialogues = []
    for case in cases:
        prefix, key = prefix_of(case.profile), seed_key(case.record["seed"])
        own = dialogue_key(key, np.uint32(case.record["dialogue"]))
        keys = Keys(own, opening_key(key, prefix) if case.made_up else own)
        most = settings.reply_tokens if case.made_up else 0
        packed = packer.dialogue(prefix, case.record["messages"][0]["tokens"], case.turns, most)
        dialogues.append(Dialogue(packed, keys, settings.reply_temperature))
    found = replay(agents.user, tables, dialogues, settings.readout)
    return zip((dialogue.packed for dialogue in dialogues), found, strict=True)


def _check(agents, case: _Case, packed: ReplaySequence, found: Replayed, settings, report: Report) -> None:
    """Holds a dialogue against its derivation."""
    place, record = case.place, case.record
    users = {turn: user for turn, _, user in reactions(record)}
    user = Speaker("user", users_fields(agents), settings.reply_temperature, settings.allowed)
    report.take(place, hold(user, packed, found, functools.partial(users_claim, user.fields, users)))
    for turn, *derived in zip(
        case.turns, found.change_logprobs, found.change.tolist(), found.change_noise, strict=True
    ):
        where = f"{place}, turn {turn.turn + 1}, change"
        _check_change(users[turn.turn], turn.change, derived, agents.spec.rules, settings, where, report)


def _check_change(user, change: int, found: Sequence[Any], rules: EmotionRules, settings, where: str, report: Report):
    """The change is the readout of the user's distribution over the options, as far as a reply can move an emotion."""
    logprobs, derived, noise = found
    with np.errstate(over="ignore"):  # of a number that no float32 holds
        worst = float(np.abs(np.asarray(user["change_logprobs"], np.float32) - logprobs).max())
    if not worst <= settings.allowed.logprob:
        report.faults.append(f"{where}: logged log-probabilities differ from the derived ones by {worst:.4g}")
    if rules.clamp(derived) == change:
        return
    same = [read for read in CHANGES if rules.clamp(read) == change]
    if any(_is_tie(settings.readout, logprobs + noise, derived, read, settings.allowed.tie) for read in same):
        report.ties.append(f"{where}: rounding decides between {change:+d} and {rules.clamp(derived):+d}")
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


def verify_logs(
    paths: Sequence[str],
    config: ConfigDict,
    console: Console,
    *,
    repeats: int = 0,
    partial: bool = False,
    policy: behaviour_policy.Choice | None = None,
) -> Report:
    """Derives every dialogue of logs, with a progress bar; the reports are joined.

    Args:
        repeats: that an evaluation has of each profile; 0: as the logs have.
        partial: the logs are parts, so that dialogues may be missing.
        policy: that played them; None: nothing of it is derived.

    Raises:
        ConfigError: the logs were played with another config.
        ValueError, OSError: a file, the model or the profiles cannot be read.
    """
    total, logged = Report(), []
    plans = plans_of(config, chosen_profiles(config), repeats=repeats, partial=partial)
    profiles = KnownProfiles.of_sets(open_each(config))
    for path in paths:
        part, name = read_part(path, plans, config), f"{path}, " if len(paths) > 1 else ""
        total.faults += part.faults
        logged += [Logged(f"{name}dialogue {one.record['dialogue']}", *one) for one in part.dialogues]
    if partial:
        total.underived["the set of dialogues (--partial)"] = None
    if not logged:
        return total
    policies = (
        behaviour_policy.players_of([one[1:3] for one in logged], config, fields.get_config(), policy) if policy else {}
    )
    config = next((one.config for one in policies.values() if isinstance(one, behaviour_policy.Player)), config)
    agents = load_agents(config, {side for one in logged for side in one.plan.endpoints})
    reports = verify_records(agents, profiles, logged, settings_of(config))
    for one in track(reports, "verifying", len(logged), console=console):
        total.add(one)
    if policies:
        total.underived.pop(POLICYS_WORDS, None)  # none of it is there where no dialogue could be derived
        derived = behaviour_policy.findings(policies, agents, [one[:3] for one in logged])
        for place, found in track(derived, "the policy", len(logged), console=console):
            total.take(place, found)
    return total


def load_agents(config: ConfigDict, endpoints: Collection[str]) -> Agents:
    """The simulated user alone: no policy is needed to derive a reward, so the user's model stands in its place.

    Where users are behind an endpoint there is no model at all, but the policy's tokenizer if that is on the device.
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
    how = {"style": config.user.style, "scenario": config.user.scenario}
    return Agents.build(user, user, tokenizer, prompts, eval_spec(config), **how)


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
        + (f"; not derived: {', '.join(sorted(report.underived, key=_is_extra))}" if report.underived else ""),
        markup=False,
    )


def _is_extra(name: str) -> bool:
    """Fields that others have added are named last."""
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
    console, errors = consoles(soft_wrap=True)
    try:
        config, options, rest = config_from_flags(sys.argv[1:] if argv is None else argv, __doc__, _define)
        if not rest:
            raise ConfigError("found no file, expected DIALOGUES.jsonl; --help shows the usage")
        files = local_paths(rest)
        here = [side for side in (USER, POLICY) if not config.remote[side].url]
        validate(config, fields.get_config(), needs=here[:1])
        if options.step and not options.policy:
            raise ConfigError(f"--step={options.step} is of the policy; add --policy=WORKDIR")
        policy = behaviour_policy.Choice(options.policy, options.step, given_path(options)) if options.policy else None
        how = {"repeats": options.repeats, "partial": options.partial, "policy": policy}
        report = verify_logs(files, config, console, **how)
    except (ValueError, OSError) as error:
        errors.print(f"verify: {error}", markup=False, highlight=False)
        return 2
    show(report, console)
    return 1 if report.faults else 0


if __name__ == "__main__":
    sys.exit(main())
