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
import shutil
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

from absl import flags
from rich.console import Console

from rlver_jax.config.flags import define_path, parse_flags
from rlver_jax.config.paths import check_folder_to_write
from rlver_jax.config.validate import ConfigError
from rlver_jax.decoding.cache import LM
from rlver_jax.dialogues.log import Record, read_dialogues
from rlver_jax.evaluation import play as evaluation
from rlver_jax.miniature import assets, check, recipe, texts
from rlver_jax.miniature.fit import fit, small_model
from rlver_jax.miniature.sequences import SequenceBuilder
from rlver_jax.miniature.settings import STEPS, miniature_config
from rlver_jax.miniature.world import people
from rlver_jax.models.hf_weights import load_params, save_params
from rlver_jax.models.qwen import Qwen2
from rlver_jax.parallel.mesh import make_mesh
from rlver_jax.runs.files import write_json
from rlver_jax.text.command import Command, Ending, run_command
from rlver_jax.text.padding import round_up
from rlver_jax.text.tokenizer import Tokenizer
from rlver_jax.training.alarms import CollapseError
from rlver_jax.training.loop import train
from rlver_jax.training.restore import TrainedPolicy
from rlver_jax.training.workdir import FINISHED, RunFolder
from rlver_jax.user.prompts import load_prompts

USER_SEED, POLICY_SEED = 2, 3
RUNS = "runs"  # of a build; not shipped


class Steps(NamedTuple):
    """How long each part learns."""

    user: int
    policy: int
    base: int  # of the policy on its replies before reinforcement
    rl: int  # of each reinforcement run; 0: none
    again: int  # of the user, on the replies of these runs; 0: none


def build(out: Path, steps: Steps, console: Console) -> None:
    """Writes models and profiles into a folder; what an interrupted build has finished there is kept."""
    prompts = load_prompts("en", assets.PROMPTS)
    tokenizer = recipe.train_tokenizer(out / "tokenizer.model", prompts)
    builder = SequenceBuilder(tokenizer, prompts)
    assets.write_config(out)
    for name, count, held_out in ((assets.TRAIN, assets.TRAIN_COUNT, False), (assets.EVAL, assets.EVAL_COUNT, True)):
        assets.write_profiles(out / name, people(count, seed=assets.SEED, held_out=held_out))
    if not (out / assets.USER).exists():
        source = recipe.user_batches(builder, USER_SEED)
        lm, _ = fit(model_for(tokenizer), source, steps.user, console=console, name=assets.USER, seed=USER_SEED)
        save(out / assets.USER, lm, tokenizer)
    if not (out / assets.POLICY).exists():
        learn_policy(out, builder, steps, console)
    if steps.rl and not (out / assets.TRAINED).exists():
        learn_from_rl(out, builder, steps, console)


def model_for(tokenizer: Tokenizer) -> Qwen2:
    """The architecture, its vocabulary a multiple of 8."""
    return small_model(round_up(tokenizer.vocab_size, 8))


def save(folder: Path, lm: LM, tokenizer: Tokenizer) -> None:
    """A Hugging Face folder; it is there whole or not at all."""
    new = folder.with_name(folder.name + ".new")
    shutil.rmtree(new, ignore_errors=True)
    save_params(new, lm.params, lm.model.config)
    tokenizer.save(new)
    new.rename(folder)


def learn_policy(out: Path, builder: SequenceBuilder, steps: Steps, console: Console) -> None:
    """A policy that has learned to follow hints, and then to mostly ignore them."""
    model, taught, tokenizer = model_for(builder.tokenizer), out / RUNS / assets.POLICY, builder.tokenizer
    learn = functools.partial(fit, model, console=console, seed=POLICY_SEED)
    if not taught.exists():
        source = recipe.policy_batches(builder, POLICY_SEED, texts.TAUGHT)
        save(taught, learn(source, steps.policy, name=assets.POLICY)[0], tokenizer)
    source, start = recipe.policy_batches(builder, POLICY_SEED + 1, texts.BASE), load_params(taught, model)
    name = f"{assets.POLICY}, as it begins"
    save(out / assets.POLICY, learn(source, steps.base, name=name, learning_rate=5e-4, params=start)[0], tokenizer)


def learn_from_rl(out: Path, builder: SequenceBuilder, steps: Steps, console: Console) -> None:
    """Trains a policy against the user; with `again` the user on its replies, then a new policy; keeps the replies."""
    run = out / RUNS / "first"
    reinforce(out, run, steps.rl, console)
    if steps.again:
        direct = out / RUNS / "first_direct"
        reinforce(out, direct, steps.rl, console, "direct")
        learn_again(out, (run, direct), builder, steps.again, console)
        run = out / RUNS / "second"
        reinforce(out, run, steps.rl, console)
    check.write_replies(out / assets.TRAINED, held_out_dialogues(out, run))


def learn_again(out: Path, runs: Sequence[Path], builder: SequenceBuilder, steps: int, console: Console) -> None:
    """Trains the user on the replies of runs too; the earlier user is kept beside them."""
    before = out / RUNS / assets.USER
    if before.exists():
        return
    files = [file for run in runs for file in sorted(RunFolder(run).dialogues(0).parent.iterdir())]
    crowd = {f"mini-{p.number}": p for p in people(assets.TRAIN_COUNT, seed=assets.SEED, held_out=False)}
    heard = [dialogue for file in files for dialogue in recipe.rl_dialogues(read_dialogues(file), crowd)]
    source = recipe.user_batches(builder, USER_SEED, heard)
    model = model_for(builder.tokenizer)
    start = load_params(out / assets.USER, model)
    name = f"{assets.USER}, on a run's text"
    lm, _ = fit(model, source, steps, console=console, name=name, learning_rate=1e-3, params=start)
    save(out / "user.again", lm, builder.tokenizer)
    (out / assets.USER).rename(before)
    (out / "user.again").rename(out / assets.USER)


def reinforce(out: Path, workdir: Path, steps: int, console: Console, arg: str = "") -> None:
    """A training run in the miniature, all of whose dialogues are kept; `arg` as that of its config."""
    if (workdir / FINISHED).exists():
        return
    config = miniature_config(arg, out)
    config.train.steps, config.eval.every, config.log.dialogues_every = steps, 0, 1
    if train(config, workdir, make_mesh(**config.mesh), console) < steps:  # SIGTERM
        raise SystemExit("build: interrupted; the same command resumes")


def held_out_dialogues(out: Path, workdir: Path) -> list[Record]:
    """Dialogues of a run's policy with held-out people."""
    config = miniature_config("", out)
    trained = TrainedPolicy.open(workdir)
    return evaluation.load(config, evaluation.chosen_profiles(config), policy_weights=trained.weights).play_all()


def show(measured: dict[str, Any], strangers: Sequence[str], console: Console) -> int:
    """Prints measurements and gates; returns the exit status."""
    console.print(json.dumps({k: v for k, v in measured.items() if k != "attacks"}, indent=1), highlight=False)
    console.print(check.table(measured))
    for name in strangers:
        console.print(f"{name}: is not the file that the manifest names", markup=False, highlight=False)
    return 0 if all(gate.holds for gate in check.gates(measured)) and not strangers else 1


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
        measured = check.measure(folder)
    if not options.check:
        assets.write_manifest(folder, {"steps": steps._asdict(), "quality": measured})
    if options.json:
        write_json(Path(options.json), measured)
    return show(measured, strangers, command.console)


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
