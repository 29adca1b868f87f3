"""Trains the user or the policy on logged dialogues: supervised fine-tuning on the next token.

    rlver sft --config=FILE[:ARG] [--config.a.b=v …] --role=user|policy --data=FILE[,FILE…] --workdir=DIR
              [--coordinator=HOST:PORT --processes=N --process=I]

--data takes logs of ours, SAGE's result files and RLVER's logs. The user learns its appraisals, changes, considerations
and replies; the policy its thoughts and replies, from dialogues that config.sft chooses by their outcome. The model is
that of user.path or policy.path, with the settings of config.policy; train.*, mesh.*, checkpoint.* and log.* are those
of `train`. Profiles are held out by a hash of their ids (sft.held_out); losses on their dialogues are in metrics.jsonl.

DIR holds what a run of `train` leaves there. The same command resumes an interrupted run, with equal results; SIGTERM
finishes the step and saves. `export` writes the model as a folder that user.path or policy.path reads
(docs/fitting.md).

Exit status: 0 done or stopped by SIGTERM, 1 a loss or a gradient is no number, another process is lost or has taken DIR
over, 2 bad usage (also a DIR that another process uses, or whose run began with other dialogues, prompts or models),
130 interrupted.
"""

import sys
from collections.abc import Sequence
from pathlib import Path

from absl import flags
from ml_collections import ConfigDict

from rlver_jax.config.flags import define_paths
from rlver_jax.config.hub import fetch
from rlver_jax.config.validate import flatten, validate
from rlver_jax.parallel import distributed
from rlver_jax.parallel.mesh import make_mesh
from rlver_jax.text.command import Command, run_command
from rlver_jax.training.arguments import run_arguments
from rlver_jax.training.metrics_file import read_metrics
from rlver_jax.training.sft import check_fitting, fit, settle_role
from rlver_jax.training.sft_data import POLICY, USER
from rlver_jax.training.stops import ENDINGS
from rlver_jax.training.workdir import RunFolder


def main(argv: Sequence[str] | None = None) -> int:
    """The command line; returns the exit status."""
    return distributed.shutdown(run_command("sft", _fit, argv, ENDINGS))


def _fit(command: Command, argv: Sequence[str]) -> int:
    config, workdir = _arguments(argv)
    command.output, command.console.quiet = workdir, not distributed.is_main()
    done = fit(config, workdir, make_mesh(**config.mesh), command.console)
    if distributed.is_main():
        command.print(_summary(workdir, done, config.train.steps))
    return 0


def _arguments(argv: Sequence[str]) -> tuple[ConfigDict, str]:
    def define(values: flags.FlagValues) -> None:
        define_paths("data", "", "dialogues to learn from, joined by commas", values)
        flags.DEFINE_enum("role", None, [USER, POLICY], "who learns", flag_values=values)

    config, options = run_arguments(argv, __doc__, define)
    config.sft.role, config.sft.data = options.role or config.sft.role, options.data or config.sft.data
    validate(config, needs=(), plays=())
    settle_role(config)
    check_fitting(config)
    if not RunFolder(Path(options.workdir)).resumes_without_base(flatten(config)):
        validate(config, needs=("policy", config.sft.role), plays=())
        fetch({"policy": (config.policy.path, config.policy.init == "path")})
    return config, options.workdir


def _summary(workdir: str, done: int, steps: int) -> str:
    """Losses and the change's error before and after, and the folder of the run."""
    records = read_metrics(RunFolder(Path(workdir)).metrics)
    text = f"{done} of {steps} steps"
    names = {"sft/loss": "loss", "held_out/loss": "held-out loss"}
    for name in dict.fromkeys(name for record in records for name in record if name.startswith("held_out/change_mae")):
        names[name] = f"error of the change{', given the appraisal,' * name.endswith('appraisal')}"
    for name, told in names.items():
        values = [record[name] for record in records if record.get(name) is not None]
        if values:
            text += f" · {told} {values[0]:.3f}" + (f" → {values[-1]:.3f}" if len(values) > 1 else "")
    if done < steps:
        text += " · stopped by a signal: the same command resumes"
    return f"{text}\n{workdir}"


if __name__ == "__main__":
    sys.exit(main())
