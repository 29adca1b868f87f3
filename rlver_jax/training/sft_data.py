"""What `rlver sft` learns from: dialogues of files, chosen by outcome, and split by the ids of their profiles."""

import collections
import dataclasses
from collections.abc import Mapping, Sequence
from typing import NamedTuple

from ml_collections import ConfigDict

from rlver_jax.config.datasets import profile_files
from rlver_jax.config.validate import ConfigError, shown
from rlver_jax.dialogues.known_profiles import KnownProfiles
from rlver_jax.dialogues.trajectory import reactions
from rlver_jax.dialogues.verify_shape import POLICY, USER
from rlver_jax.evaluation.transcripts import Transcript, TranscriptFiles, with_profile
from rlver_jax.learning.sft_rows import Example
from rlver_jax.profiles.held_out import held_out
from rlver_jax.profiles.sources import open_each
from rlver_jax.rollout.agents import Agents
from rlver_jax.text.padding import longest
from rlver_jax.training.sft_examples import Examples, LoggedModeExamples, PolicyExamples, UserExamples
from rlver_jax.user.prompts import MODES, SCENARIOS, STYLES, Prompts
from rlver_jax.user.prompts.shorten import with_fields


class End(NamedTuple):
    """How a dialogue ended."""

    profile: str  # id
    emotion: int


@dataclasses.dataclass
class Source:
    """The dialogues of files, all of them checked, and what they have."""

    dialogues: TranscriptFiles
    ends: list[End]
    appraisal: set[str]  # names of fields of which any dialogue has a text
    considerations: set[str]


@dataclasses.dataclass(frozen=True)
class Dialogues:
    """What is learned from, and what it is measured on."""

    learned: Sequence[Example]
    held_out: Sequence[Example]  # those of sft.eval_dialogues
    summary: str


def open_dialogues(config: ConfigDict) -> Source:
    """Reads and checks all dialogues of `config.sft.data`.

    Raises:
        ValueError: no dialogues, a line that is none, or one that was played with other prompts.
    """
    source = Source(TranscriptFiles(profile_files(config.sft.data)), [], set(), set())
    for _, one in source.dialogues.scan():
        check_prompts(one, config)
        source.ends.append(End(one.record["profile"], one.record["emotion"]))
        for _, _, user in reactions(one.record):
            source.appraisal |= {name for name, text in user["appraisal"].items() if text}
            source.considerations |= {name for name, text in user["considerations"].items() if text}
    return source


def fitting_prompts(config: ConfigDict, prompts: Prompts, source: Source) -> Prompts:
    """The user's prompts with the fields that it can learn: those that no dialogue has are left out of its scripts."""
    if config.sft.role == POLICY:
        return prompts
    appraisal = source.appraisal if config.sft.appraisal else frozenset[str]()
    return with_fields(prompts, appraisal.__contains__, source.considerations.__contains__)


def examples_of(config: ConfigDict, agents: Agents) -> Examples:
    """What makes examples of the config's role."""
    c = config.sft
    if c.role == USER:
        limits = {"field_tokens": config.user.field_tokens, "reply_tokens": config.user.reply_tokens}
        make = UserExamples(agents, **limits, soft=c.soft)
        weights = dict(zip(make.fields, field_weights(c.weights, make.fields), strict=True))
        make.replies = any(weights[name] for name in agents.tables[1].reply.names)
        return make
    limits = {"min_change": c.min_change, "say_tokens": config.rollout.say_tokens}
    if c.logged_mode:
        return LoggedModeExamples({mode: _in_mode(agents, mode) for mode in MODES}, **limits)
    return PolicyExamples(agents, **limits)


def _in_mode(agents: Agents, mode: str) -> Agents:
    if mode == agents.spec.mode:
        return agents
    spec = dataclasses.replace(agents.spec, mode=mode)
    same = agents.policy, agents.user, agents.tokenizer, agents.prompts
    return Agents.build(*same, spec, style=agents.style, scenario=agents.scenario)


def read_dialogues(config: ConfigDict, source: Source, make: Examples) -> Dialogues:
    """Chooses dialogues, makes examples of them and splits these.

    Raises:
        ValueError: a profile that is not known, or too few dialogues to learn from.
    """
    files = source.dialogues
    chosen = _chosen(source.ends, config) if config.sft.role == POLICY else range(len(files))
    known = KnownProfiles.of_sets(open_each(config))
    learned: list[Example] = []
    unseen: list[Example] = []
    for index in chosen:
        one = files[index]
        example = make.example(with_profile(one, known) if config.sft.role == USER else one)
        if example is None:
            make.left_out["dialogues with nothing to learn"] += 1
        else:
            (unseen if held_out(example.profile, config.sft.held_out) else learned).append(example)
    _check_enough(config, learned, unseen, len(files), make)
    summary = _summary(learned, unseen, len(files), make.left_out)
    evaluated = evenly(unseen, config.sft.eval_dialogues)
    if len(evaluated) < len(unseen):
        summary += f"\nmeasured: {len(evaluated)} of the {len(unseen)} held out"
    return Dialogues(learned, evaluated, summary)


def evenly(examples: Sequence[Example], count: int) -> Sequence[Example]:
    """So many of the examples, evenly spread over all; 0: all."""
    if not 0 < count < len(examples):
        return examples
    return [examples[i * len(examples) // count] for i in range(count)]


def check_prompts(one: Transcript, config: ConfigDict) -> None:
    """Refuses a log of ours that was played in another language, or with a style, scenario or mode that there is not.

    Raises:
        ConfigError: it was.
    """
    language = (config.data.language,)
    for name, known in (("language", language), ("style", STYLES), ("scenario", SCENARIOS), ("mode", MODES)):
        value = one.record[name]
        if value not in (None, *known):
            raise ConfigError(
                f"{one.source}: was played with {name} {shown(value)}, expected {' or '.join(known)}"
                + (" as in data.language; set that field, or leave the file out" if name == "language" else "")
            )


def _chosen(ends: Sequence[End], config: ConfigDict) -> Sequence[int]:
    """Indices of the dialogues that end as the config wants, in their order; of equal ends the first ones."""
    c = config.sft
    chosen = [i for i, end in enumerate(ends) if end.emotion >= c.min_emotion]
    if not c.best_of_profile:
        return chosen
    by_profile = collections.defaultdict(list)
    for i in chosen:
        by_profile[ends[i].profile].append(i)
    best = lambda indices: sorted(indices, key=lambda i: -ends[i].emotion)[: c.best_of_profile]  # noqa: E731
    return sorted(i for indices in by_profile.values() for i in best(indices))


def _check_enough(config: ConfigDict, learned: Sequence, held_out: Sequence, count: int, make: Examples) -> None:
    if len(learned) < config.sft.batch:
        left_out = ", ".join(f"{number} {what}" for what, number in make.left_out.items())
        raise ConfigError(
            f"sft.batch={config.sft.batch}: only {len(learned)} of {count} dialogues are learned from, "
            f"{len(held_out)} are held out{f'; left out: {left_out}' * bool(left_out)}; give more, choose a smaller "
            f"batch, hold out fewer (sft.held_out={config.sft.held_out}), or mend what leaves them out"
        )


def _summary(learned: Sequence[Example], held_out: Sequence[Example], count: int, left_out: Mapping[str, int]) -> str:
    def told(examples: Sequence[Example]) -> str:
        profiles = len({one.profile for one in examples})
        return f"{len(examples)} dialogues with {profiles} profiles ({sum(len(one.at) for one in examples)} targets)"

    most = longest([one.tokens for one in (*learned, *held_out)])
    text = f"{count} dialogues read, the longest {most} tokens; learned: {told(learned)}; held out: {told(held_out)}"
    return text + "".join(f"\nleft out: {number} {what}" for what, number in sorted(left_out.items()))


def field_weights(text: str, fields: Sequence[str]) -> list[float]:
    """The weights of `fields` that `sft.weights` names, 1 for the others.

    Raises:
        ConfigError: it names another field, or gives no number of at least 0, or leaves none above 0.
    """
    weights = dict.fromkeys(fields, 1.0)
    for part in filter(None, text.split(",")):
        name, _, value = part.partition("=")
        try:
            number = float(value)
        except ValueError:
            number = -1.0
        if name.strip() not in weights or not 0 <= number < float("inf"):
            raise ConfigError(
                f"sft.weights={shown(text)}: found {shown(part)}, expected NAME=NUMBER of at least 0, joined by "
                f"commas; the names are {', '.join(fields)}"
            )
        weights[name.strip()] = number
    if not any(weights.values()):
        raise ConfigError(f"sft.weights={shown(text)}: leaves nothing to learn; give one field a weight above 0")
    return list(weights.values())
