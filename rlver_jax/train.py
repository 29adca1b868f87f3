"""Trains a policy with PPO or GRPO on the emotions of a simulated user (RLVER, arXiv 2507.03112).

    python -m rlver_jax.train --config=FILE[:ARG] [--config.a.b=v …] --workdir=DIR
                              [--coordinator=HOST:PORT --processes=N --process=I]

DIR holds config.json, metrics.jsonl (a row a step), tensorboard/, checkpoints/, dialogues/ and model/ (of the
base model: config and tokenizer). The same command goes on
after an interruption, with equal results; SIGTERM finishes the step and saves. Exit status: 0 done or stopped by
SIGTERM, 1 an alarm (config.alarms), users behind an endpoint that stay away or have cost remote.budget (saved, to be
resumed; docs/remote_users.md), another process is lost or has taken DIR over, 2 bad usage (also a DIR that another
process uses, or whose run began with other profiles, prompts or models), 130 interrupted.

On several hosts the same command runs on each; on TPU VMs the processes find each other by themselves (docs/pods.md).
"""

import sys
from collections.abc import Sequence
from pathlib import Path

import jax
from absl import flags
from ml_collections import ConfigDict

from rlver_jax.config.flags import config_from_flags, define_path
from rlver_jax.config.hub import fetch
from rlver_jax.config.validate import MODELS, ConfigError, check_training, flatten, validate
from rlver_jax.miniature.gold import gold_judge
from rlver_jax.parallel import distributed
from rlver_jax.parallel.mesh import make_mesh
from rlver_jax.runs.lock import LostLockError
from rlver_jax.text.console import consoles
from rlver_jax.training.alarms import CollapseError
from rlver_jax.training.loop import train
from rlver_jax.training.metrics import missing_steps, read_metrics
from rlver_jax.training.setup import check_learning, folders_of
from rlver_jax.training.stops import StoppedError
from rlver_jax.training.workdir import RunFolder


def main(argv: Sequence[str] | None = None) -> int:
    """The command line; returns the exit status."""
    return distributed.shutdown(_run(sys.argv[1:] if argv is None else argv))


def _run(argv: Sequence[str]) -> int:
    console, errors = consoles()
    say = lambda text: errors.print(f"train: {text}", markup=False, highlight=False)  # noqa: E731
    try:
        config, workdir = _arguments(argv)
        console.quiet = not distributed.is_main()
        done = train(config, workdir, make_mesh(**config.mesh), console, gold_judge(config))
    except (ValueError, OSError) as error:
        say(error)
        return 2
    except StoppedError as stop:
        say(f"stopped {stop}. What was done is saved in {workdir}")
        return 1
    except CollapseError as alarm:
        say(f"stopped by an alarm at {alarm}. Its checkpoints stay in {workdir}")
        return 1
    except LostLockError as error:
        say(error)
        return 1
    except jax.errors.JaxRuntimeError as error:
        if not (text := distributed.peer_failure(error)):
            raise
        say(text)
        return 1
    except KeyboardInterrupt:
        say(f"interrupted; the same command goes on in {workdir}")
        return 130
    if distributed.is_main():
        console.print(_summary(workdir, done, config), markup=False, highlight=False, soft_wrap=True)
    return 0


def _arguments(argv: Sequence[str]) -> tuple[ConfigDict, str]:
    def define(values: flags.FlagValues) -> None:
        define_path("workdir", None, "folder of the run; an interrupted run goes on", values)
        distributed.define_flags(values)

    config, options, rest = config_from_flags(argv, __doc__, define)
    if rest:
        raise ConfigError(f"found {rest[0]!r}, expected flags only, such as --workdir=DIR; --help lists them")
    if not options.workdir:
        raise ConfigError("no --workdir was given; name the folder that metrics and checkpoints are written to")
    distributed.initialize(options, finish_steps=True)
    run = RunFolder(Path(options.workdir))
    needs = [model for model in MODELS if model != "policy" or not run.goes_on_without_base(flatten(config))]
    needs = [model for model in needs if model != "user" or not config.remote.user.url]
    validate(config, jax.device_count(), needs)
    check_training(config)
    check_learning(config)
    fetch({name: found for name, found in folders_of(config).items() if name in needs})
    return config, options.workdir


def _summary(workdir: str, done: int, config: ConfigDict) -> str:
    """The last figures, and where everything lies."""
    steps = config.train.steps
    rows = read_metrics(RunFolder(Path(workdir)).metrics)
    trained = [row for row in rows if "emotion/final_mean" in row]
    scores = [row["eval/score"] for row in rows if "eval/score" in row]
    text = f"{done} of {steps} steps"
    if trained:
        text += f" · emotion {trained[0]['emotion/final_mean']:.1f} → {trained[-1]['emotion/final_mean']:.1f}"
    if scores:
        text += f" · eval/score {_course(scores)}"
    gold = [row["eval/rule_score"] for row in rows if "eval/rule_score" in row]
    if gold:
        text += f" (by the gold judge {_course(gold)})"
    if missing := missing_steps(rows, done, config.eval.every):
        text += f" · the rows of {missing} were lost"
    if done < steps:
        text += " · stopped by a signal: the same command goes on"
    return f"{text}\n{workdir}"


def _course(scores: list[float]) -> str:
    """The first and the last one; where there was one evaluation only, before training, that one."""
    return " → ".join(f"{score:.2f}" for score in ([scores[0], scores[-1]] if len(scores) > 1 else scores))


if __name__ == "__main__":
    sys.exit(main())
