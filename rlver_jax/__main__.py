"""All commands as one: `rlver train …` is `python -m rlver_jax.train …`, and `python -m rlver_jax` is `rlver`.

    rlver COMMAND [FLAGS]       runs a command; rlver COMMAND --help shows its usage
    rlver completion bash       prints a script that completes commands, flags and fields of a config
    rlver --version             prints the versions of rlver_jax, Python and JAX

Neither JAX nor a command is imported before it is needed: a command may set variables that JAX reads as it is imported.
Exit status: that of the command; 2 for an unknown one, 1 where a package that it needs is not installed.
"""

import contextlib
import difflib
import importlib
import importlib.metadata
import io
import platform
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

try:
    from rlver_jax import __version__
except ImportError:  # Python takes a folder without __init__.py for a package without contents
    sys.exit(
        "rlver_jax: the folder rlver_jax in the working folder, probably a clone, hides the installed package; "
        "use the command `rlver`, or change into that folder"
    )
from rlver_jax.text.console import consoles

PACKAGE = "rlver_jax"
# Command -> its module, whose docstring's first line describes it.
COMMANDS = {
    "train": "train",
    "sft": "sft",
    "evaluate": "evaluate",
    "verify": "verify",
    "report": "report",
    "chat": "chat",
    "serve": "serve",
    "export": "export",
    "config": "reports.config_table",
    "profiles": "reports.profiles_command",
    "prepare": "profiles.builder",
    "plan": "plan",
    "bench": "bench",
    "doctor": "perf.doctor",
}


def main(argv: Sequence[str] | None = None) -> int:
    """The command line; returns the exit status."""
    name, *rest = (sys.argv[1:] if argv is None else [*argv]) or ["--help"]
    console, errors = consoles(soft_wrap=True)
    if name in COMMANDS:
        try:
            command = _module(name)
        except ModuleNotFoundError as error:
            if (error.name or PACKAGE).startswith(PACKAGE):
                raise
            told = f"rlver {name}: the package {error.name} is not installed; pip install --upgrade -e . in the clone"
            errors.print(told, markup=False, highlight=False)
            return 1
        return command.main(rest)
    texts = {"--help": usage, "-h": usage, "help": usage, "--version": versions}
    if name == "completion" and rest == ["bash"]:
        console.print(completion(), markup=False, highlight=False, end="")
    elif name in texts:
        console.print(texts[name](), markup=False, highlight=False)
    else:
        errors.print(f"rlver: {_fault(name, rest)}", markup=False, highlight=False)
        return 2
    return 0


def usage() -> str:
    """Every command with the first line of its docstring, read from its source: importing one takes seconds."""
    described = {name: _summary(module) for name, module in COMMANDS.items()}
    described["completion"] = "Prints a script by which bash completes all of this: rlver completion bash"
    width = max(map(len, described))
    lines = [f"    {name:{width}}  {text}" for name, text in described.items()]
    ends = ["rlver COMMAND --help shows its flags; python -m rlver_jax is rlver.", "rlver --version shows versions."]
    return "\n".join(["rlver COMMAND [FLAGS]", "", *lines, "", *ends])


def completion() -> str:
    """The script for bash, made from what every command's --help lists."""
    commands = {name: _flags(name) for name in COMMANDS}  # first: `plan` sets a variable before JAX is imported
    from rlver_jax.config.fields import TABLE
    from rlver_jax.config.files import shipped
    from rlver_jax.config.schema import flat_fields
    from rlver_jax.text.completion import bash_script

    return bash_script(commands, dict(flat_fields(TABLE)), shipped())


def versions() -> str:
    """Of this package, Python and JAX, on one line."""
    try:
        jax = importlib.metadata.version("jax")
    except importlib.metadata.PackageNotFoundError:
        jax = "is not installed"
    return f"rlver_jax {__version__} · Python {platform.python_version()} · JAX {jax}"


def _fault(name: str, rest: Sequence[str]) -> str:
    """What is wrong with a command line that names no command."""
    if name == "completion":
        return f"completion: found {' '.join(rest) or 'no shell'}, expected bash"
    known = [*COMMANDS, "completion"]
    close = difflib.get_close_matches(name, known, 1)
    hint = f"did you mean {close[0]}?" if close else f"the commands are {', '.join(known)}"
    return f"{name}: no such command; {hint}"


def _module(name: str) -> Any:
    return importlib.import_module(f"{PACKAGE}.{COMMANDS[name]}")


def _flags(name: str) -> Any:
    """The flags that a command defines."""
    try:
        with contextlib.redirect_stdout(io.StringIO()):
            _module(name).main(["--help"])
    except SystemExit as printed:
        return printed.values  # type: ignore[attr-defined]  # config.flags.HelpPrinted; importing it imports JAX
    raise AssertionError(f"{name} --help did not end {name}")


def _summary(module: str) -> str:
    source = Path(__file__).parent.joinpath(*module.split(".")).with_suffix(".py")
    try:
        return source.read_text(encoding="utf-8").partition('"""')[2].partition("\n")[0]
    except OSError:  # an installation without sources
        return ""


if __name__ == "__main__":
    sys.exit(main())
