"""Shows training runs and evaluations on one HTML page, which any browser opens without a network.

    rlver report DIR… --out=report.html [--max_mb=5]
    rlver report DIR… --curve=emotion.svg

DIR is the --workdir of a training run or the --out of an evaluation; several are compared. The page holds emotion,
reward and held-out score by step, successes, failures and ends, emotion over the turns by hidden intention, lengths,
the social-cognition coordinate where a judge has placed the dialogues, every setting, and a browser of the logged
dialogues. --curve writes the emotion curve alone. Exit status: 0 done, 2 bad usage, 130 interrupted.
"""

import math
import sys
from collections.abc import Iterable, Sequence
from pathlib import Path

from absl import flags
from rich.markup import escape
from rich.progress import track

from rlver_jax.config.flags import define_path, local_paths, parse_flags
from rlver_jax.config.validate import ConfigError
from rlver_jax.reports import page
from rlver_jax.reports.sources import read_runs
from rlver_jax.runs.files import write_text
from rlver_jax.text.command import Command, run_command
from rlver_jax.text.console import plain_line


def main(argv: Sequence[str] | None = None) -> int:
    """The command line; returns the exit status."""
    return run_command("report", _report, argv)


def _report(command: Command, argv: Sequence[str]) -> int:
    console = command.console

    def watch(files: Sequence[Path], name: str) -> Iterable[Path]:
        what = f"reading {escape(plain_line(name))}"
        return track(files, what, console=console, transient=True, disable=not console.is_terminal)

    def write(path: str, text: str, what: str) -> None:
        write_text(Path(path), text)
        command.print(f"{path}: {len(text.encode('utf-8')) / 1e6:.2f} MB, {what}")

    options, folders = _arguments(argv)
    runs = read_runs(folders, watch)
    if options.curve:
        write(options.curve, page.curve(runs), "the emotion curve")
    if options.out:
        with console.status("drawing"):
            text, packed = page.render(runs, int(options.max_mb * 1e6))
        cut = f", {packed.shortened} of them shortened" * bool(packed.shortened)
        write(options.out, text, f"{packed.included} of {packed.all} dialogues{cut}")
    return 0


def _arguments(argv: Sequence[str]) -> tuple[flags.FlagValues, list[str]]:
    def define(values: flags.FlagValues) -> None:
        define_path("out", "", "HTML file to be written", values, new="file")
        define_path("curve", "", "SVG file of the emotion curve to be written", values, new="file")
        flags.DEFINE_float("max_mb", 5.0, "largest page, in MB of 10^6 bytes", 0.1, flag_values=values)

    options, folders = parse_flags(argv, __doc__, define)
    if not folders:
        raise ConfigError("no folder was given; name --workdir of training runs or --out of evaluations")
    if not options.out and not options.curve:
        raise ConfigError("neither --out nor --curve was given; name the file to be written, such as --out=report.html")
    if not math.isfinite(options.max_mb):
        raise ConfigError(f"--max_mb={options.max_mb}: expected a number, such as 5")
    return options, local_paths(folders)


if __name__ == "__main__":
    sys.exit(main())
