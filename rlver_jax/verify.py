"""Derives every reward of a dialogue log again and says where the log is not what the user model would say.

    python -m rlver_jax.verify DIALOGUES.jsonl --config=configs/x.py [--config.a.b=v …]

Each profile costs one forward pass of the user over its prefix, each dialogue one over its packed turns. Every
appraisal token must be the user's own choice, every change the readout of its distribution, every emotion the clipped
sum, every reward its formula, every spoken word the one that its key draws. Where two candidates lie within TIE of each
other, float32 rounding decides: that is reported as a tie. Exit status: 0 all derived, 1 any fault, 2 bad usage.
"""

import dataclasses
import functools
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from ml_collections import ConfigDict
from rich.console import Console
from rich.progress import track

from configs import base
from rlver_jax import rewards
from rlver_jax.command_line import config_from_flags
from rlver_jax.config import ConfigError, profile_files, reward_settings, validate
from rlver_jax.players import Players, load_model, spec_of
from rlver_jax.profiles.schema import Profile, read_profiles
from rlver_jax.runs.dialogue_log import read_dialogues
from rlver_jax.runs.trajectory import emotion_faults, emotions_of, reactions
from rlver_jax.sampling.cache import Cache
from rlver_jax.user.emotion import CHANGES, change_readout
from rlver_jax.user.prompts import load_prompts
from rlver_jax.user.rederive import LoggedTurn, Packed, Rederived, Said, pack_dialogue, read_prefix, rederive
from rlver_jax.user.simulated import KEY_READOUT, dialogue_key

TIE = 1e-4  # in nats
LOGPROB_TOLERANCE = 1e-3  # between a logged log-probability and its derivation, float32 (see `tolerance`)
SHOWN = 50  # faults and ties that are printed


@dataclasses.dataclass
class Report:
    """What was derived and what was found."""

    dialogues: int = 0
    turns: int = 0
    tokens: int = 0
    ties: list[str] = dataclasses.field(default_factory=list)
    faults: list[str] = dataclasses.field(default_factory=list)


@dataclasses.dataclass(frozen=True)
class Settings:
    """What of the config decides the derivation."""

    reply_temperature: float
    field_tokens: int
    reply_tokens: int
    max_turns: int
    reward: Mapping[str, Any]
    tolerance: float


def verify_dialogue(
    players: Players,
    profile: Profile | None,
    record: Mapping[str, Any],
    settings: Settings,
    prefix_of: Callable[[Profile], Cache],
    width: int = 0,
) -> Report:
    """Derives one dialogue again; the report's lines name dialogue, turn and field.

    Args:
        prefix_of: see `prefix_reader`.
        width: tokens to pad the packed row to at least, so that a whole log compiles once.
    """
    report = Report(dialogues=1)
    place = f"dialogue {record['dialogue']}"
    if profile is None:
        report.faults.append(f"{place}: profile {record['profile']!r} is not in data.eval or data.train of the config")
        return report
    report.faults += [f"{place}: {fault}" for fault in check_record(players, profile, record, settings)]
    turns = logged_turns(record)
    if not turns:
        return report
    packed = _packed(players, profile, record, turns)
    key = dialogue_key(jax.random.key(record["seed"]), jnp.uint32(record["dialogue"]))
    temperature = settings.reply_temperature
    found = rederive(players.user, players.tables[1], prefix_of(profile), packed, key, temperature, width)
    report.turns, report.tokens = len(turns), len(packed.queries)
    _check_tokens(players, record, packed, found, settings, place, report)
    for index, turn in enumerate(turns):
        turn_key = jax.random.fold_in(key, turn.turn)
        _check_change(record, turn, found.change_logprobs[index], turn_key, settings, place, report)
    return report


def _packed(players: Players, profile: Profile, record: Mapping[str, Any], turns: Sequence[LoggedTurn]) -> Packed:
    first_talk, start = record["messages"][0]["tokens"], len(players.prefix(profile))
    return pack_dialogue(players.tables[1], start, first_talk, turns, players.spec.rules.band)


def logged_turns(record: Mapping[str, Any]) -> list[LoggedTurn]:
    """The log's turns as the derivation wants them."""
    turns, emotion = [], record["messages"][0]["emotion"]
    for turn, spoken, user in reactions(record):
        appraisal = [Said(user["appraisal_tokens"][n], user["appraisal_stopped"][n]) for n in user["appraisal_tokens"]]
        reply = [
            Said(user["consideration_tokens"][n], user["consideration_stopped"][n])
            for n in user["consideration_tokens"]
        ]
        if user["content"] is None:
            reply = []
        else:
            reply.append(Said(user["all_tokens"], user["stopped"]))
        turns.append(LoggedTurn(turn, emotion, user["emotion"], spoken["say_tokens"], appraisal, user["change"], reply))
        emotion = user["emotion"]
    return turns


def check_record(players: Players, profile: Profile, record: Mapping[str, Any], settings: Settings) -> Iterator[str]:
    """Faults that need no model: arithmetic of emotions and reward, and texts that are not their tokens."""
    rules, decode = players.spec.rules, players.tokenizer.decode
    first = record["messages"][0]
    if profile.first_talk and first["tokens"] != players.tokenizer.encode(profile.first_talk.strip()):
        yield "the first utterance is not the profile's"
    yield from emotion_faults(record, rules)
    for turn, spoken, user in reactions(record):
        where = f"turn {turn + 1}"
        texts = [("say", spoken["content"], spoken["say_tokens"]), ("reply", user["content"] or "", user["tokens"])]
        for kind in ("appraisal", "consideration"):
            fields = user["appraisal"] if kind == "appraisal" else user["considerations"]
            for name, text in fields.items():
                said = Said(user[f"{kind}_tokens"][name], user[f"{kind}_stopped"][name])
                texts.append((name, text, said.text_tokens))
        for name, text, tokens in texts:
            if text != decode(tokens):
                yield f"{where}: the text of {name!r} is not what its tokens say"
        if list(user["all_tokens"][: len(user["tokens"])]) != list(user["tokens"]):
            yield f"{where}: the reply's tokens are not those that were generated"
    yield from _check_policy_tokens(players, record)
    yield from _check_ending(record, settings)


def _check_policy_tokens(players: Players, record: Mapping[str, Any]) -> Iterator[str]:
    """Say tokens are a run of the generated tokens, up to the end."""
    turn = 0
    for message in record["messages"]:
        if message["role"] != "assistant":
            continue
        turn += 1
        if message["tokens"] is None:  # said at an endpoint; what the user read of it are its say tokens
            continue
        tokens, say = list(message["tokens"]), list(message["say_tokens"])
        end = len(tokens) - message["stopped"]
        if not message["violation"] and tokens[end - len(say) : end] != say:
            yield f"turn {turn}: the say's tokens are not the end of what the policy generated"
        thought = message["thought"]
        if thought is not None and thought.strip() not in players.tokenizer.decode(tokens):
            yield f"turn {turn}: the thought is not in what the policy generated"


def _check_ending(record: Mapping[str, Any], settings: Settings) -> Iterator[str]:
    if record["turns"] != sum(m["role"] == "assistant" for m in record["messages"]):
        yield f"{record['turns']} turns, but another number of policy messages"
    emotions = emotions_of(record)
    padded = np.full((1, settings.max_turns + 1), emotions[-1], np.int32)
    padded[0, : len(emotions)] = emotions
    turns, violation = jnp.array([record["turns"]], jnp.int32), jnp.array([record["violation"]])
    found = rewards.reward(emotions=jnp.asarray(padded), n_turns=turns, violation=violation, **settings.reward)
    if np.float32(record["reward"]) != np.asarray(found.reward)[0]:
        yield f"reward {record['reward']}, but its formula gives {float(found.reward[0])}"


def _check_tokens(players, record, packed: Packed, found: Rederived, settings, place: str, report: Report) -> None:
    """Every generated token is the user's own choice, with the log-probability that the log gives it."""
    names = [*players.tables[1].appraisal.names[:-1], *players.tables[1].reply.names]
    users = {turn: user for turn, _, user in reactions(record)}
    for query, margin, logprob in zip(packed.queries, found.margin, found.logprob, strict=True):
        name = names[query.field]
        where = f"{place}, turn {query.turn + 1}, {name!r}, token {query.step + 1}"
        if not margin <= TIE:  # NaN is a fault
            report.faults.append(f"{where}: not the user's own choice, which lies {margin:.4g} nats above it")
        elif margin > 0:
            report.ties.append(f"{where}: {margin:.2g} nats")
        logged = _logged_logprobs(users[query.turn], name)[query.step]
        if abs(logged - logprob) > settings.tolerance:
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


def _check_change(record, turn: LoggedTurn, logprobs: np.ndarray, key, settings, place: str, report: Report) -> None:
    """The change is the readout of the user's distribution over the options."""
    where = f"{place}, turn {turn.turn + 1}, change"
    logged = next(user for t, _, user in reactions(record) if t == turn.turn)["change_logprobs"]
    worst = float(np.abs(np.asarray(logged, np.float32) - logprobs).max())
    if not worst <= settings.tolerance:
        report.faults.append(f"{where}: logged log-probabilities differ from the derived ones by {worst:.4g}")
    readout = record["readout"]
    row_key = jax.random.fold_in(key, KEY_READOUT)[None] if readout == "sample" else None
    derived = int(change_readout(jnp.asarray(logprobs)[None], readout, row_key)[0])
    if derived == turn.change:
        return
    if _is_tie(readout, logprobs, derived, turn.change):
        report.ties.append(f"{where}: {turn.change:+d} and {derived:+d} are equally likely")
    else:
        report.faults.append(f"{where}: logged {turn.change:+d}, but the user's {readout} is {derived:+d}")


def _is_tie(readout: str, logprobs: np.ndarray, derived: int, logged: int) -> bool:
    if readout == "argmax":
        return bool(logprobs[derived - CHANGES[0]] - logprobs[logged - CHANGES[0]] <= TIE)
    if readout == "mean":
        p = np.exp(logprobs - logprobs.max())
        mean = float((p / p.sum() * np.array(CHANGES)).sum())
        return abs(derived - logged) == 1 and abs(mean - (derived + logged) / 2) <= TIE
    return False


def tolerance(dtype: str) -> float:
    """Allowed difference of log-probabilities: one pass and many steps round differently, in bfloat16 much more."""
    return LOGPROB_TOLERANCE if dtype == "float32" else 0.5


def settings_of(config: ConfigDict, records: Sequence[Mapping[str, Any]]) -> Settings:
    """What of a config decides the derivation."""
    return Settings(
        reply_temperature=config.user.reply_temperature,
        field_tokens=config.user.field_tokens,
        reply_tokens=config.user.reply_tokens,
        max_turns=max((record["turns"] + 1 for record in records), default=1),
        reward=reward_settings(config),
        tolerance=tolerance(config.user.dtype),
    )


def verify_log(path: str, config: ConfigDict, console: Console) -> Report:
    """Derives every dialogue of a log, with a progress bar; the reports are joined."""
    records = read_dialogues(path)
    check_settings(records, config)
    players = load_user(config)
    files = profile_files(config.data.eval, config.data.train)
    profiles = {profile.id: profile for file in files for profile in read_profiles(file)}
    settings, total = settings_of(config, records), Report()
    known = [(profiles[record["profile"]], record) for record in records if record["profile"] in profiles]
    prefix_of = prefix_reader(players, max((len(players.prefix(profile)) for profile, _ in known), default=0))
    width = max((len(_packed(players, *pair, logged_turns(pair[1])).tokens) for pair in known), default=0)
    for record in track(records, "verifying", console=console):
        one = verify_dialogue(players, profiles.get(record["profile"]), record, settings, prefix_of, width)
        total = Report(*(getattr(total, f.name) + getattr(one, f.name) for f in dataclasses.fields(Report)))
    return total


def prefix_reader(players: Players, width: int = 0) -> Callable[[Profile], Cache]:
    """Reads a profile's prefix with the user, once for a group: its dialogues stand side by side in a log."""
    return functools.lru_cache(maxsize=1)(lambda profile: read_prefix(players.user, players.prefix(profile), width))


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
        f"{len(report.ties)} ties, {len(report.faults)} faults"
    )


def main(argv: Sequence[str] | None = None) -> int:
    """The command line; returns the exit status."""
    console, errors = Console(soft_wrap=True), Console(stderr=True, soft_wrap=True)
    try:
        config, _, rest = config_from_flags(sys.argv[1:] if argv is None else argv, __doc__)
        if len(rest) != 1:
            raise ConfigError(f"found {len(rest)} files {rest}, expected one DIALOGUES.jsonl; --help shows the usage")
        validate(config, base.get_config())
        report = verify_log(rest[0], config, console)
    except (ValueError, OSError) as error:
        errors.print(f"verify: {error}", markup=False, highlight=False)
        return 2
    show(report, console)
    return 1 if report.faults else 0


if __name__ == "__main__":
    sys.exit(main())
