"""Trains a policy with PPO or GRPO on the emotions of a simulated user (RLVER, arXiv 2507.03112).

    rlver train --config=FILE[:ARG] [--config.a.b=v …] --workdir=DIR
                [--coordinator=HOST:PORT --processes=N --process=I]

DIR holds config.json, metrics.jsonl (a record for each step), tensorboard/, checkpoints/, dialogues/ and model/ (config
and tokenizer of the base model). The same command resumes an interrupted run, with equal results; SIGTERM finishes the
step and saves.

On several hosts the same command runs on each; on TPU VMs the processes find each other by themselves (docs/pods.md).

Exit status: 0 done or stopped by SIGTERM, 1 an alarm (config.alarms), users behind an endpoint that stay away or have
cost remote.budget (saved, to be resumed: docs/remote_users.md), another process is lost or has taken DIR over, 2 bad
usage (also a DIR that another process uses, or whose run began with other profiles, prompts or models), 130
interrupted.
"""

import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import jax
from ml_collections import ConfigDict

from rlver_jax.config.hub import fetch
from rlver_jax.config.validate import MODELS, PLAYED, check_training, flatten, validate
from rlver_jax.miniature.gold import gold_judge
from rlver_jax.parallel import distributed
from rlver_jax.parallel.mesh import make_mesh
from rlver_jax.text.command import Command, run_command
from rlver_jax.training.arguments import run_arguments
from rlver_jax.training.loop import train
from rlver_jax.training.metrics_file import missing_steps, read_metrics
from rlver_jax.training.setup import check_learning, folders_of
from rlver_jax.training.stops import ENDINGS
from rlver_jax.training.workdir import RunFolder


def main(argv: Sequence[str] | None = None) -> int:
    """The command line; returns the exit status."""
    return distributed.shutdown(run_command("train", _train, argv, ENDINGS))


def _train(command: Command, argv: Sequence[str]) -> int:
    config, workdir = _arguments(argv)
    command.output, command.console.quiet = workdir, not distributed.is_main()
    done = train(config, workdir, make_mesh(**config.mesh), command.console, gold_judge(config))
    if distributed.is_main():
        command.print(_summary(workdir, done, config))
    return 0


def _arguments(argv: Sequence[str]) -> tuple[ConfigDict, str]:
    config, options = run_arguments(argv, __doc__)
    run = RunFolder(Path(options.workdir))
    needs = [model for model in MODELS if model != "policy" or not run.resumes_without_base(flatten(config))]
    needs = [model for model in needs if model != "user" or not config.remote.user.url]
    validate(config, jax.device_count(), needs, PLAYED if config.eval.every else PLAYED[:1])
    check_training(config)
    check_learning(config)
    fetch({name: folder for name, folder in folders_of(config).items() if name in needs})
    return config, options.workdir


def _summary(workdir: str, done: int, config: ConfigDict) -> str:
    """The metrics before and after, and the folder of the run."""
    steps = config.train.steps
    records = read_metrics(RunFolder(Path(workdir)).metrics)
    trained = [record for record in records if "emotion/final_mean" in record]
    scores = _scores(records, "eval/score")
    text = f"{done} of {steps} steps"
    if trained:
        text += f" · emotion {trained[0]['emotion/final_mean']:.1f} → {trained[-1]['emotion/final_mean']:.1f}"
    if scores:
        text += f" · eval/score {_course(scores)} ({_at(scores)})"
    gold = _scores(records, "eval/rule_score")
    if gold:
        text += f" (by the gold judge {_course(gold)})"
    if missing := missing_steps(records, done, config.eval.every):
        text += f" · the rows of {missing} were lost"
    if done < steps:
        text += " · stopped by a signal: the same command resumes"
    return f"{text}\n{workdir}"


def _scores(records: Sequence[Mapping[str, Any]], name: str) -> list[tuple[int, float]]:
    """(step, score) of each evaluation."""
    return [(record["step"], record[name]) for record in records if name in record]


def _course(scores: Sequence[tuple[int, float]]) -> str:
    """The first and the last one; where there was one evaluation only, before training, that one."""
    ends = [scores[0], scores[-1]] if len(scores) > 1 else scores
    return " → ".join(f"{score:.2f}" for _, score in ends)


def _at(scores: Sequence[tuple[int, float]]) -> str:
    """The steps of `_course`'s scores."""
    first, last = scores[0][0], scores[-1][0]
    return f"step {first}" if len(scores) == 1 else f"steps {first} and {last}"


if __name__ == "__main__":
    sys.exit(main())
