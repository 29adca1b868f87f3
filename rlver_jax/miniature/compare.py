"""Prints what training runs in the miniature came to: a row for each kind of run, mean and spread over its seeds.

    python -m rlver_jax.miniature.compare WORKDIR...

A kind is what decides how a run learns: estimator, rank of adapters, mode of the policy, reward, style of the user,
steps, dialogues a step.
"gap" is how much higher the user, from whom the policy learned, scores it than the rule. `launch/compare.sh` makes the
runs. Exit status: 0 done, 2 bad usage.
"""

import collections
import statistics
import sys
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from rich.table import Table

from rlver_jax.config.flags import local_paths, parse_flags
from rlver_jax.config.validate import ConfigError
from rlver_jax.text.command import Command, run_command
from rlver_jax.training.metrics_file import read_metrics
from rlver_jax.training.workdir import RunFolder

USER, RULE = "eval/score", "eval/rule_score"
_NAMES = {"gae": "PPO", "ppo": "PPO", "grpo": "GRPO", "rloo": "RLOO", "reinforce_pp": "REINFORCE++"}


class Outcome(NamedTuple):
    """One run's held-out scores before and after, and what it took."""

    kind: tuple[str, ...]
    seed: int
    user: tuple[float, float]  # by the simulated user, 0..100
    rule: tuple[float, float]  # by the gold judge
    minutes: float  # of playing and learning, compilation included; without evaluations


def outcome(workdir: Path) -> Outcome:
    """What one run came to.

    Raises:
        ValueError, OSError: it is no run, or was not evaluated by both judges.
    """
    run = RunFolder(workdir)
    config, metrics = run.config(), read_metrics(run.metrics)
    rows = [row for row in metrics if USER in row and RULE in row]
    if len(rows) < 2:
        raise ConfigError(f"{workdir}: found {len(rows)} evaluations by user and rule, expected two or more")
    minutes = sum(row.get("time/rollout_s", 0.0) + row.get("time/update_s", 0.0) for row in metrics) / 60
    user, rule = ((rows[0][name], rows[-1][name]) for name in (USER, RULE))
    return Outcome(kind_of(config), config["train.seed"], user, rule, minutes)


def kind_of(config: dict[str, Any]) -> tuple[str, ...]:
    """Estimator (and rank of adapters), mode, reward, user, size of a run."""
    name = _NAMES.get(config["algorithm.estimator"], config["algorithm.estimator"])
    if config.get("lora.rank"):
        name += f", rank {config['lora.rank']}"
    size = f"{config['train.steps']} x {config['rollout.batch']}"
    return name, config["policy.mode"], config["reward.kind"], config["user.style"], size


def spread(values: Sequence[float]) -> str:
    """Mean and, of several, their standard deviation."""
    mean = f"{statistics.mean(values):.1f}"
    return mean if len(values) < 2 else f"{mean} ± {statistics.stdev(values):.1f}"


def table(outcomes: Iterable[Outcome]) -> Table:
    """A row a kind."""
    kinds: dict[tuple[str, ...], list[Outcome]] = collections.defaultdict(list)
    for one in outcomes:
        kinds[one.kind].append(one)
    names = ("runs", "mode", "reward", "user", "steps x dialogues", "seeds")
    result = Table(*names, "before: user", "rule", "after: user", "rule", "gap", "minutes")
    for kind, runs in kinds.items():
        values = [(r.user[0], r.rule[0], r.user[1], r.rule[1], r.user[1] - r.rule[1], r.minutes) for r in runs]
        result.add_row(*kind, str(len(runs)), *map(spread, zip(*values, strict=True)))
    return result


def main(argv: Sequence[str] | None = None) -> int:
    """The command line; returns the exit status."""
    return run_command("compare", _compare, argv)


def _compare(command: Command, argv: Sequence[str]) -> int:
    _, workdirs = parse_flags(argv, __doc__, lambda values: None)
    if not workdirs:
        raise ConfigError("expected folders of training runs; --help shows an example")
    command.console.print(table([outcome(Path(workdir)) for workdir in local_paths(workdirs)]))
    return 0


if __name__ == "__main__":
    sys.exit(main())
