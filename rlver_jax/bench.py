"""Measures this program on this machine, each way of doing something against its alternative.

    rlver bench SUITE [--json=FILE] [--repeats=N] [--against=CHECKOUT]

Suites:
    dialogue   the miniature's dialogues in slots that take the next one when theirs has ended, and in slots that wait
    rollout    the policy's side of dialogues with a model of 39 million weights; decoding against copying what it reads
    update     gradients of whole dialogues: one sequence for each dialogue against one for each turn
    logprob    log-probabilities over 151,936 tokens: in chunks of the vocabulary against all logits at once
    load       weights of the size of Qwen2.5-0.5B onto the device, against reading the file alone
    step       a whole training step of the miniature: playing and learning
    compile    the miniature from the command to its first step, with nothing compiled before, and once more

Each way runs once first, for compilation, then all of them in turn, N times. Times are medians. Where other programs
share the machine, ratios say more than seconds. With --against the suite is measured here and in another checkout of
this project, in turn: each time and rate beside the other's. Exit status: 0 done, 2 bad usage, 130 interrupted.
"""

import functools
import importlib
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from absl import flags

from rlver_jax.config.flags import define_path, parse_flags
from rlver_jax.config.validate import ConfigError
from rlver_jax.perf import bench_against
from rlver_jax.perf.bench_timing import machine
from rlver_jax.runs.files import write_json
from rlver_jax.text.command import Command, run_command

# Suite -> its module in perf/, which has `measure(repeats, tell)`, returning results, and `lines(results)`, their text.
SUITES = {
    "dialogue": "bench_dialogue",
    "rollout": "bench_rollout",
    "update": "bench_update",
    "logprob": "bench_logprob",
    "load": "bench_load",
    "step": "bench_step",
    "compile": "bench_compile",
}


def main(argv: Sequence[str] | None = None) -> int:
    """The command line; returns the exit status."""
    return run_command("bench", _bench, argv)


def _bench(command: Command, argv: Sequence[str]) -> int:
    suite, options = _arguments(argv)
    results = {"suite": suite, "repeats": options.repeats, "machine": machine()}
    module: Any = importlib.import_module(f"rlver_jax.perf.{SUITES[suite]}")
    measure = module.measure
    if options.against:
        checkout = bench_against.check_checkout(Path(options.against))
        module, measure = bench_against, functools.partial(bench_against.measure, suite, SUITES[suite], checkout)
    errors = command.errors
    with errors.status(suite) as status:

        def tell(text: str) -> None:
            status.update(f"{suite}: {text}")
            if not errors.is_terminal:
                errors.print(f"{suite}: {text}", markup=False, highlight=False)

        results |= measure(options.repeats, tell)
    if options.json:
        write_json(Path(options.json), results)
    for line in module.lines(results):
        command.print(line)
    return 0


def _arguments(argv: Sequence[str]) -> tuple[str, flags.FlagValues]:
    def define(values: flags.FlagValues) -> None:
        define_path("json", "", "file for all results", values, new="file")
        define_path("against", "", "another checkout of this project, to measure in turn", values)
        flags.DEFINE_integer("repeats", 3, "runs of each way", 1, flag_values=values)

    options, suites = parse_flags(argv, __doc__, define)
    if len(suites) != 1 or suites[0] not in SUITES:
        raise ConfigError(f"found {' '.join(suites) or 'no suite'}, expected one of {', '.join(SUITES)}")
    return suites[0], options


if __name__ == "__main__":
    sys.exit(main())
