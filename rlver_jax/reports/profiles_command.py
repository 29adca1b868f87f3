"""Looks at profiles before anything is played with them: what is odd, and what both models will read.

    rlver profiles check [FILE…] [--eval=FILE,…] [--config=FILE[:ARG] [--config.a.b=v …]]
    rlver profiles show [FILE…] --config=FILE[:ARG] [--config.a.b=v …] [--profile=ID]
    rlver profiles generate --seeds=FILE.json --count=N --out=DIR --config=FILE[:ARG] [--config.a.b=v …]
                            [--held_out=SHARE] [--against=FILE,…]

`check` reads FILEs in RLVER's or SAGE's schema, or what the config's data.train and data.eval name. Beyond faults of
the schema it warns of profiles in another language than the prompts', of tasks that are no known hidden intention, of
profiles that are there twice, of personas that --eval shares, and, with a config that names both models, of profiles
that leave no room for a turn in rollout.context. Without a config the prompts are ours, in the
profiles' language.
`show` prints the prompts of both sides for one profile, as they are rendered, with their tokens by the config's
models, of which it reads the tokenizers alone; then the scripts that the user completes.
`generate` has a model write profiles into DIR/train.jsonl and DIR/test.jsonl, from personas, topics and hidden
intentions: the config's user.path on the device, or remote.user at an endpoint. See docs/profiles.md.

Exit status: 0 nothing is odd, 1 there are warnings, or fewer profiles than wanted, 2 bad usage or profiles that cannot
be used.
"""

import collections
import difflib
import statistics
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path

from absl import flags
from ml_collections import ConfigDict

from rlver_jax.config.datasets import profile_files
from rlver_jax.config.flags import config_from_flags, define_path, define_paths, local_paths, parse_flags
from rlver_jax.config.validate import ConfigError
from rlver_jax.decoding.cache import LM
from rlver_jax.profiles.check import LOOKED_AT, is_chinese, likely_language
from rlver_jax.profiles.schema import Profile, read_profiles
from rlver_jax.profiles.seeds import read_seeds
from rlver_jax.profiles.sources import open_profiles
from rlver_jax.reports.profiles_generate import generate
from rlver_jax.rollout.agents import Agents, emotion_rules, make_model, tokenizers_differ
from rlver_jax.text.chat import ChatTemplate
from rlver_jax.text.command import Command, run_command
from rlver_jax.text.tokenizer import Tokenizer, load_tokenizer
from rlver_jax.training.setup import rollout_spec
from rlver_jax.user.profile_warnings import check
from rlver_jax.user.prompts import Prompts, load_prompts
from rlver_jax.user.prompts.shorten import script_text


def main(argv: Sequence[str] | None = None) -> int:
    """The command line; returns the exit status."""
    return run_command("profiles", _run, argv, soft_wrap=True)


def _run(command: Command, argv: Sequence[str]) -> int:
    actions = {"check": _check, "show": _show, "generate": _generate}
    name, *rest = argv or [""]
    if name.startswith("-"):  # among them --help
        _flags(argv)
    if name not in actions:
        raise ConfigError(f"found {name!r}, expected check, show or generate; --help shows their usage")
    return actions[name](command, rest)


def _define(values: flags.FlagValues) -> None:
    define_paths("eval", "", "held-out profiles, to be checked too, and for personas that they share", values)
    define_path("seeds", "", "generate: JSON file with lists of personas, topics and intentions", values)
    flags.DEFINE_integer("count", 0, "generate: profiles that are wanted", lower_bound=0, flag_values=values)
    define_path("out", "", "generate: folder for the profiles; one that is there is continued", values)
    what = "generate: share of the personas that test.jsonl is about, and train.jsonl is not"
    flags.DEFINE_float("held_out", 0.2, what, 0.0, 1.0, flag_values=values)
    define_paths("against", "", "generate: profiles that new ones must not resemble, and are measured beside", values)
    flags.DEFINE_string(
        "profile", "", "show: id of the profile to be shown; default: the first one", flag_values=values
    )


def _flags(argv: Sequence[str]) -> tuple[ConfigDict | None, flags.FlagValues, list[str]]:
    """A config where one is named, the flags, and what is no flag."""
    if any(word.startswith(("--config", "-config", "--help")) for word in argv):
        return config_from_flags(argv, __doc__, _define)
    return None, *parse_flags(argv, __doc__, _define)


def _check(command: Command, argv: Sequence[str]) -> int:
    config, options, words = _flags(argv)
    sets = _sets(config, local_paths(words), options.eval)
    if config is not None:
        prompts = load_prompts(config.data.language, config.user.prompts or None)
    else:
        prompts = load_prompts(likely_language(next(iter(sets.values()))))
    agents = config and _agents(config)
    warnings = []
    for field, profiles in sets.items():
        command.print(f"{field}: {_summary(prompts, profiles)}")
        others = [other for other in sets if other != field]
        held_out = sets[others[0]] if others and field == next(iter(sets)) else ()
        warnings += [*check(prompts, profiles, field, held_out), *_too_long(agents, profiles, field)]
    for text in warnings:
        command.print(f"warning: {text}")
    command.print(f"{len(warnings)} warning{'s' * (len(warnings) != 1)}" if warnings else "nothing is odd")
    return 1 if warnings else 0


def _sets(config: ConfigDict | None, files: Sequence[str], held_out: str) -> dict[str, Sequence[Profile]]:
    """Profiles by what names them, those that are trained on first."""
    if files or held_out:
        named = {"the profiles": list(files), "--eval": profile_files(held_out)}
        return {name: read_profiles(paths) for name, paths in named.items() if paths}
    fields = [f for f in ("data.train", "data.eval") if config is not None and config.data[f.removeprefix("data.")]]
    if config is None or not fields:
        raise ConfigError("no profiles were given; name JSONL files, or a config with data.train")
    return {field: open_profiles(config, field) for field in fields}


def _summary(prompts: Prompts, profiles: Sequence[Profile]) -> str:
    """What a set of profiles is like; of a large data set its first ones."""
    seen = profiles[:LOOKED_AT]
    tasks: collections.Counter[str] = collections.Counter()
    for profile in seen:
        known = prompts.intention(profile.hidden_intention)
        tasks[known.key if known else "(unknown)"] += 1
    sizes = [len(profile.persona) + len(profile.background) for profile in seen]
    chinese, silent = sum(map(is_chinese, seen)), sum(profile.first_talk is None for profile in seen)
    return (
        f"{len(profiles)} profiles, {chinese} in Chinese characters · hidden intentions: "
        f"{', '.join(f'{name} {count}' for name, count in tasks.most_common())} · persona and scene: "
        f"{statistics.median(sizes):.0f} characters in the median, at most {max(sizes)} · {silent} without first words"
    )


def _show(command: Command, argv: Sequence[str]) -> int:
    config, options, words = config_from_flags(argv, __doc__, _define)
    sets = _sets(config, local_paths(words), options.eval)
    selected = (profile for one in sets.values() for profile in (one if options.profile else one[:LOOKED_AT]))
    profiles = list({profile.id: profile for profile in selected}.values())  # two fields may name one file
    wanted = [profile for profile in profiles if options.profile in ("", profile.id)]
    if not wanted:
        raise ConfigError(f"--profile={options.profile}: no profile has that id; {_meant(options.profile, profiles)}")
    prompts = load_prompts(config.data.language, config.user.prompts or None)
    if prompts.sage:
        raise ConfigError(
            "user.prompts is a clone of SAGE's repository, whose prompts change in every turn (docs/sage.md)"
        )
    tokenizers = {side: _tokenizer(config, side) for side in ("user", "policy")}
    for title, messages, side in _read_by_both(config, prompts, wanted[0]):
        command.print(f"=== {title}: {_counted(tokenizers[side], messages)}")
        for message in messages:
            command.print(f"[{message['role']}]\n{message['content']}\n")
    for name, script in (("appraisal", prompts.appraisal), ("reply", prompts.reply)):
        command.print(f"=== {name}.script, which the user completes in every turn\n{script_text(script)}\n")
    warnings = _too_long(_agents(config), profiles, "warning")
    for text in (*warnings, _widths(config, prompts, profiles[:LOOKED_AT], tokenizers["user"])):
        command.print(text)
    return 1 if warnings else 0


def _meant(given: str, profiles: Sequence[Profile]) -> str:
    close = difflib.get_close_matches(given, [profile.id for profile in profiles[:LOOKED_AT]], 1)
    return f"did you mean {close[0]}?" if close else f"the first one has {profiles[0].id}"


def _generate(command: Command, argv: Sequence[str]) -> int:
    config, options, words = config_from_flags(argv, __doc__, _define)
    if words or not (options.seeds and options.count and options.out):
        raise ConfigError(
            "generate needs --seeds, --count and --out, and nothing else but flags; --help shows its usage"
        )
    prompts = load_prompts(config.data.language, config.user.prompts or None)
    seeds = read_seeds(options.seeds, options.held_out, list(prompts.intentions))
    wanted = config, prompts, seeds, options.count, Path(options.out), profile_files(options.against)
    return 0 if generate(command, *wanted) else 1


def _read_by_both(
    config: ConfigDict, prompts: Prompts, profile: Profile
) -> list[tuple[str, list[Mapping[str, str]], str]]:
    """(title, messages, side) of what each side reads before the first reply."""
    policy = [{"role": "system", "content": prompts.policy_system(config.policy.mode, config.policy.prompt)}]
    first = [{"role": "user", "content": profile.first_talk.strip()}] if profile.first_talk else []
    return [
        (f"the user, {profile.id}", _prefix(config, prompts, profile), "user"),
        (f"the policy ({config.policy.mode})", [*policy, *first], "policy"),
    ]


def _prefix(config: ConfigDict, prompts: Prompts, profile: Profile) -> list[Mapping[str, str]]:
    rules = emotion_rules(config, config.emotion.initial)
    return prompts.before_first_turn(profile, style=config.user.style, scenario=config.user.scenario, rules=rules)


def _tokenizer(config: ConfigDict, side: str) -> Tokenizer | None:
    """Of the model on the device; None where there is none."""
    path = config[side].path
    return load_tokenizer(path) if path and not config.remote[side].url else None


def _counted(tokenizer: Tokenizer | None, messages: Sequence[Mapping[str, str]]) -> str:
    if tokenizer is None:
        return "tokens unknown, no model is named"
    return f"{len(ChatTemplate(tokenizer).conversation(messages))} tokens"


def _agents(config: ConfigDict) -> Agents | None:
    """Both models without weights, as a training would play them; None where tokens don't pass between two models."""
    at_endpoint = any(config.remote[side].url for side in ("user", "policy"))
    if at_endpoint or not (config.policy.path and config.user.path) or tokenizers_differ(config):
        return None

    def load(section: ConfigDict, name: str, *_: object) -> tuple[LM, Tokenizer]:
        return LM({}, make_model(section, name)), load_tokenizer(section.path)

    return Agents.load(config, rollout_spec(config), load=load, adapt=lambda *_: {})


def _too_long(agents: Agents | None, profiles: Sequence[Profile], field: str) -> list[str]:
    """What a training would say of profiles that leave no room for a turn."""
    try:
        if agents is not None:
            agents.tokens(profiles[:LOOKED_AT])
    except ValueError as error:
        return [f"{field}: {error}"]
    return []


def _widths(config: ConfigDict, prompts: Prompts, profiles: Sequence[Profile], tokenizer: Tokenizer | None) -> str:
    """How long the user's prompt is over all profiles, and how much of it every profile has in common."""
    if tokenizer is None:
        return "set --config.user.path to a model to count tokens"
    count = lambda messages: len(ChatTemplate(tokenizer).conversation(messages))  # noqa: E731
    lengths = [count(_prefix(config, prompts, profile)) for profile in profiles]
    own = [len(tokenizer.encode(profile.persona + profile.background)) for profile in profiles]
    return (
        f"{len(profiles)} profiles: the user's prompt takes {min(lengths)} to {max(lengths)} tokens, "
        f"{statistics.median(lengths):.0f} in the median, of which persona and scene are {statistics.median(own):.0f}; "
        f"rollout.context is {config.rollout.context}"
    )


if __name__ == "__main__":
    sys.exit(main())
