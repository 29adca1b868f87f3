"""Builds the miniature world in a folder, or measures the one that is there.

    python -m rlver_jax.miniature.build --out=DIR
        tokenizer, profiles, simulated user, policy, config, manifest
    python -m rlver_jax.miniature.build --check [--out=DIR]
        measures a folder again, without one the shipped models

The same command resumes an interrupted build.

The simulated user learns to appraise and answer from dialogues of the grammar. The policy learns to follow hints, then
to reply in any style, so that reinforcement has something to teach. Policies are then trained against the user, which
learns from their text too. Replies of another policy to held-out people are kept to measure the user on. Exit status:
0 done, and every gate holds; 1 a gate doesn't, or a file is not the manifest's; 2 bad usage.
"""

import functools
import json
import random
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

from absl import flags
from rich.console import Console

from rlver_jax.config.flags import define_path, parse_flags
from rlver_jax.config.paths import check_folder_to_write
from rlver_jax.config.validate import ConfigError
from rlver_jax.dialogues.log import Record, read_dialogues
from rlver_jax.evaluation import play as evaluation
from rlver_jax.miniature import assets, check, fitting, recipe, texts
from rlver_jax.miniature.fitting import Lesson, learn
from rlver_jax.miniature.settings import STEPS, miniature_config
from rlver_jax.miniature.world import people
from rlver_jax.parallel.mesh import make_mesh
from rlver_jax.runs.files import write_json
from rlver_jax.text.command import Command, Ending, run_command
from rlver_jax.training.alarms import CollapseError
from rlver_jax.training.loop import train
from rlver_jax.training.trained_policy import TrainedPolicy
from rlver_jax.training.workdir import FINISHED, RunFolder
from rlver_jax.user.prompts import load_prompts

USER_SEED, POLICY_SEED = 2, 3
UNTRAINED = f"{assets.RUNS}/untrained"


class Steps(NamedTuple):
    """How long each part learns."""

    user: int
    policy: int
    base: int  # of the policy on its replies before reinforcement
    rl: int  # of each reinforcement run; 0: none
    again: int  # of the user, on the replies of these runs; 0: none


def build(out: Path, steps: Steps, console: Console) -> None:
    """Writes models and profiles into a folder; what an interrupted build has finished there is kept."""
    tokenizer = recipe.train_tokenizer(out / "tokenizer.model", load_prompts("en", assets.PROMPTS))
    assets.write_config(out)
    for name, count, held_out in ((assets.TRAIN, assets.TRAIN_COUNT, False), (assets.EVAL, assets.EVAL_COUNT, True)):
        assets.write_profiles(out / name, people(count, seed=assets.SEED, held_out=held_out))
    fitting.write_untrained(out / UNTRAINED, tokenizer)
    assets.write_profiles(out / assets.RUNS / assets.TRAIN, recipe.crowd())
    learn_user(out, steps, console)
    learn_policy(out, steps, console)
    if steps.rl and not (out / assets.TRAINED).exists():
        learn_from_rl(out, steps, console)


def learn_user(out: Path, steps: Steps, console: Console) -> None:
    """A user that has learned to appraise and to answer."""
    logs = functools.partial(recipe.user_logs, random.Random(USER_SEED), dialogues_of(steps.user), ())
    learn(out, Lesson("user", out / UNTRAINED, logs, steps.user), out / assets.USER, console)


def learn_policy(out: Path, steps: Steps, console: Console) -> None:
    """A policy that has learned to follow hints, and then to mostly ignore them."""
    logs = functools.partial(recipe.policy_logs, random.Random(POLICY_SEED), dialogues_of(steps.policy), texts.TAUGHT)
    taught = out / assets.RUNS / assets.POLICY
    learn(out, Lesson("policy", out / UNTRAINED, logs, steps.policy), taught, console)
    logs = functools.partial(recipe.policy_logs, random.Random(POLICY_SEED + 1), dialogues_of(steps.base), texts.BASE)
    learn(out, Lesson("policy", taught, logs, steps.base, 5e-4), out / assets.POLICY, console)


def dialogues_of(steps: int) -> int:
    """How many dialogues are learned from: each is read twice."""
    return max(steps // 2, 1) * fitting.BATCH


def learn_from_rl(out: Path, steps: Steps, console: Console) -> None:
    """Trains a policy against the user; with `again` the user on its replies, then a new policy; keeps the replies."""
    run = out / assets.RUNS / "first"
    reinforce(out, run, steps.rl, console)
    if steps.again:
        direct = out / assets.RUNS / "first_direct"
        reinforce(out, direct, steps.rl, console, "direct")
        learn_again(out, (run, direct), steps.again, console)
        run = out / assets.RUNS / "second"
        reinforce(out, run, steps.rl, console)
    check.write_replies(out / assets.TRAINED, held_out_dialogues(out, run))


def learn_again(out: Path, runs: Sequence[Path], steps: int, console: Console) -> None:
    """Trains the user on the replies of runs too; the earlier user is kept beside them."""
    before, new = out / assets.RUNS / assets.USER, out / "user.again"
    if before.exists():
        return
    files = [file for run in runs for file in sorted(RunFolder(run).dialogues(0).parent.iterdir())]
    persons = {f"mini-{p.number}": p for p in people(assets.TRAIN_COUNT, seed=assets.SEED, held_out=False)}
    heard = [dialogue for file in files for dialogue in recipe.rl_dialogues(read_dialogues(file), persons)]
    logs = functools.partial(recipe.user_logs, random.Random(USER_SEED + 1), 2 * len(heard), heard)
    learn(out, Lesson("user", out / assets.USER, logs, steps, 1e-3), new, console)
    (out / assets.USER).rename(before)
    new.rename(out / assets.USER)


def reinforce(out: Path, workdir: Path, steps: int, console: Console, arg: str = "") -> None:
    """A training run in the miniature, all of whose dialogues are kept; `arg` as that of its config."""
    if (workdir / FINISHED).exists():
        return
    config = miniature_config(arg, out)
    config.train.steps, config.eval.every, config.log.dialogues_every = steps, 0, 1
    fitting.check_finished(train(config, workdir, make_mesh(**config.mesh), console), steps)


def held_out_dialogues(out: Path, workdir: Path) -> list[Record]:
    """Dialogues of a run's policy with held-out people."""
    config = miniature_config("", out)
    trained = TrainedPolicy.open(workdir)
    return evaluation.load(config, evaluation.chosen_profiles(config), policy_weights=trained.weights).play_all()


def show(quality: dict[str, Any], strangers: Sequence[str], console: Console) -> int:
    """Prints measurements and gates; returns the exit status."""
    console.print(json.dumps({k: v for k, v in quality.items() if k != "attacks"}, indent=1), highlight=False)
    console.print(check.table(quality))
    for name in strangers:
        console.print(f"{name}: is not the file that the manifest names", markup=False, highlight=False)
    return 0 if all(gate.holds for gate in check.gates(quality)) and not strangers else 1


def main(argv: Sequence[str] | None = None) -> int:
    """The command line; returns the exit status."""
    alarm = Ending(1, "a run against the user was stopped by an alarm at {error}")
    return run_command("build", _build, argv, {CollapseError: alarm})


def _build(command: Command, argv: Sequence[str]) -> int:
    options = _arguments(argv)
    folder, strangers = Path(options.out) if options.out else assets.shipped(), []
    if options.check:
        strangers = assets.changed_files(folder)  # before minutes of measuring: there may be no manifest
    else:
        if (folder / assets.MANIFEST).exists():
            raise ConfigError(f"{folder}: holds a finished miniature; name another folder")
        check_folder_to_write(folder)
        steps = Steps(*(int(options[f"{field}_steps"].value or 0) for field in Steps._fields))
        build(folder, steps, command.console)
    with command.console.status("measuring"):
        quality = check.measure(folder)
    if not options.check:
        assets.write_manifest(folder, {"steps": steps._asdict(), "quality": quality})
    if options.json:
        write_json(Path(options.json), quality)
    return show(quality, strangers, command.console)


def _arguments(argv: Sequence[str]) -> flags.FlagValues:
    def define(values: flags.FlagValues) -> None:
        what = "folder to be written, or to be measured (default: the shipped one)"
        define_path("out", "", what, values)
        flags.DEFINE_boolean("check", False, "measure the folder instead of building it", flag_values=values)
        define_path("json", "", "file for all results", values, new="file")
        for field, count, what in (
            ("user", 2000, "of the simulated user"),
            ("policy", 1200, "of the policy on dialogues in which hints are met"),
            ("base", 300, "of the policy on what it is to say before reinforcement"),
            ("rl", STEPS, "of each reinforcement run; 0: none"),
            ("again", 400, "of the user on what such runs said, before another; 0: it learns from the grammar alone"),
        ):
            flags.DEFINE_integer(f"{field}_steps", count, f"steps {what}", flag_values=values)

    options, rest = parse_flags(argv, __doc__, define)
    if rest or not (options.out or options.check):
        raise ConfigError("expected --out=DIR, or --check; --help lists the flags")
    return options


if __name__ == "__main__":
    sys.exit(main())
