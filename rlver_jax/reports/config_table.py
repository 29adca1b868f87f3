"""Prints fields of configs: beside RLVER's published values, or where several configs differ.

    rlver config --diff=rlver               the four 7B configs beside RLVER's values and their sources
    rlver config CONFIG CONFIG…             fields in which these differ, such as configs/debug.py configs/debug.py:ppo
    rlver config CONFIG                     every field of one
    rlver config --config=CONFIG --config.a.b=v …    the same with fields changed, as other commands take them

CONFIG is FILE or FILE:ARG as --config takes it. A value marked with * is not RLVER's; docs/reproducing.md says why.
Exit status: 0 done, 2 bad usage.
"""

import sys
from collections.abc import Iterable, Iterator, Sequence
from typing import Any

from absl import flags
from rich.table import Table

from rlver_jax.config.fields import FIELDS
from rlver_jax.config.flags import config_from_flags, parse_flags
from rlver_jax.config.published import RLVER, RUNS, Published
from rlver_jax.config.validate import ConfigError, flatten
from rlver_jax.text.command import Command, run_command


def main(argv: Sequence[str] | None = None) -> int:
    """The command line; returns the exit status."""
    return run_command("config", _compare, argv)


def published_config(run: str) -> str:
    """The config that holds RLVER's values of a run, one of RUNS."""
    return f"configs/{run.replace(',', '_')}_7b.py"


def _compare(command: Command, argv: Sequence[str]) -> int:
    if any(word.startswith(("--config=", "--config.")) for word in argv):
        return _changed(command, argv)

    def define(values: flags.FlagValues) -> None:
        flags.DEFINE_enum("diff", "", ("", "rlver"), "published settings to compare with", flag_values=values)

    options, names = parse_flags(argv, __doc__, define)
    if options.diff and names:
        raise ConfigError(f"found {names[0]!r}: --diff=rlver compares the configs of the four published runs")
    if not options.diff and not names:
        raise ConfigError("no config was given; name one, such as configs/debug.py, or --diff=rlver")
    names = names or [published_config(run) for run in RUNS]
    values = [flatten(config_from_flags([f"--config={name}"], None)[0]) for name in names]
    _print(command, _head(names, options.diff), published_rows(values) if options.diff else _rows(values))
    return 0


def _changed(command: Command, argv: Sequence[str]) -> int:
    """Every field of one config, as `train` and the others read it from a command line."""
    config, _, rest = config_from_flags(argv, __doc__)
    if rest:
        raise ConfigError(f"found {rest[0]!r} beside --config; name several configs without it to compare them")
    _print(command, _head(["value"], ""), _rows([flatten(config)]))
    return 0


def _print(command: Command, head: Sequence[str], rows: Iterable[Sequence[str]]) -> None:
    table = Table(*head, box=None, pad_edge=False)
    for row in rows:
        table.add_row(*row)
    command.console.print(table)


def _head(names: Sequence[str], diff: str) -> list[str]:
    if diff:
        return ["field", "config's value", "RLVER's", "source", "why ours differs"]
    return ["field", *names]


def _rows(values: Sequence[dict[str, Any]]) -> Iterator[list[str]]:
    for name in dict.fromkeys(name for one in values for name in one):
        row = [repr(one[name]) if name in one else "" for one in values]
        if len(row) == 1 or len(set(row)) > 1:
            yield [name, *row]


def published_rows(values: Sequence[dict[str, Any]]) -> Iterator[list[str]]:
    """Cells of every field: of the configs of RUNS, and of RLVER's runs, one value where all four agree."""
    for name in FIELDS:
        ours = [one[name] for one in values]
        known: Published | None = RLVER.get(name)
        if known is None:
            yield [name, _joined(ours), "", "not decided by RLVER", ""]
            continue
        theirs = [known.of(run) for run in RUNS]
        differs = ours != theirs
        yield [name, f"{_joined(ours)}{' *' * differs}", _joined(theirs), known.source, known.ours * differs]


def _joined(values: Sequence[Any]) -> str:
    """One value, or one of each run in the order of RUNS."""
    texts = [str(value) for value in values]
    return texts[0] if len(set(texts)) == 1 else " | ".join(texts)


if __name__ == "__main__":
    sys.exit(main())
