"""Compares two training runs bit for bit: metrics but for times, logged dialogues, and what each checkpoint holds.

    python -m tests.compare_runs RUN OTHER

For runs before and after a change that must not change results (CONTRIBUTING.md). Exit status: 0 equal, 1 not, 2 bad
usage.
"""

import sys
from pathlib import Path

from rlver_jax.training.checkpoints import Checkpoints
from rlver_jax.training.metrics_file import read_metrics


def contents(run: Path) -> dict[str, object]:
    """{what: its value} of everything that equal runs have in common."""
    values: dict[str, object] = {}
    for row in read_metrics(run / "metrics.jsonl"):
        values |= {f"step {row['step']}: {name}": x for name, x in row.items() if not name.startswith("time/")}
    values |= {f"dialogues/{file.name}": file.read_bytes() for file in (run / "dialogues").glob("*.jsonl")}
    checkpoints = Checkpoints.reader(run / "checkpoints")
    values |= {f"checkpoint of step {step}": checkpoints.fingerprint(step) for step in checkpoints.steps()}
    checkpoints.close()
    return values


def differences(run: Path, other: Path) -> list[str]:
    """What is not equal, or is in one of them alone."""
    mine, theirs = contents(run), contents(other)
    missing = object()
    names = dict.fromkeys([*mine, *theirs])
    return [name for name in names if repr(mine.get(name, missing)) != repr(theirs.get(name, missing))]


def main(arguments: list[str]) -> int:
    """The command line; returns the exit status."""
    if len(arguments) != 2 or not all((Path(run) / "metrics.jsonl").is_file() for run in arguments):
        print("compare_runs: expected two folders of training runs, with a metrics.jsonl in each", file=sys.stderr)
        return 2
    names = differences(*map(Path, arguments))
    print(*(f"differs: {name}" for name in names), "not equal" if names else "equal to the bit", sep="\n")
    return bool(names)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
