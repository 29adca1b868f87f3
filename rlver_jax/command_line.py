"""Flags of the entry points, with help and with errors that say what to do."""

import importlib
import io
import os
import platform
import re
from collections.abc import Callable, Sequence
from pathlib import Path
from types import ModuleType
from typing import Any

import jax
from absl import flags
from ml_collections import ConfigDict, config_flags

from configs import base
from rlver_jax.config import ConfigError, shortened

Define = Callable[[flags.FlagValues], None]


def parse_flags(argv: Sequence[str], usage: str, define: Define) -> tuple[flags.FlagValues, list[str]]:
    """Reads an entry point's own flags.

    Each call has flags of its own, so that several entry points can run in one process.

    Args:
        argv: arguments, without the program's name.
        usage: printed by --help above the flags; the entry point's docstring.
        define: adds flags to the given `FlagValues`.

    Returns:
        the flags; what is no flag.

    Raises:
        ConfigError: an unknown or malformed flag or field, or a config file that cannot be loaded.
        SystemExit: with 0, after --help.
    """
    values = flags.FlagValues()
    flags.DEFINE_boolean("help", False, "show this text", flag_values=values)
    define(values)
    if "--help" in argv:  # before the rest, which may be wrong: that is when one asks for help
        print(_help(usage, values))
        raise SystemExit(0)
    try:
        return values, values(["", *argv])[1:]
    except Exception as error:  # a config file is code and may raise anything
        raise ConfigError(_explained(error, argv)) from error


def keep_compiled() -> None:
    """Has compiled programs outlive the process, so that the next start of the same run takes seconds.

    They lie in ~/.cache/rlver_jax/compiled, in a folder for each machine: a home may be shared by machines that cannot
    run each other's. JAX_COMPILATION_CACHE_DIR names another folder; where it is empty, nothing is kept.
    """
    if "JAX_COMPILATION_CACHE_DIR" in os.environ:
        return  # JAX has read it
    cache = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache")
    jax.config.update("jax_compilation_cache_dir", str(cache / "rlver_jax" / "compiled" / platform.node()))


def import_remote(name: str) -> ModuleType:
    """A module that speaks with endpoints.

    Raises:
        ConfigError: a package of the extra `remote` is missing.
    """
    try:
        return importlib.import_module(name)
    except ModuleNotFoundError as error:
        raise ConfigError(f"endpoints need {error.name}: pip install 'rlver_jax[remote]'") from error


def config_from_flags(
    argv: Sequence[str], usage: str, define: Define | None = None
) -> tuple[ConfigDict, flags.FlagValues, list[str]]:
    """Reads `--config=FILE[:ARG] [--config.a.b=v …]` and an entry point's own flags; see `parse_flags`.

    A FILE configs/NAME.py that the working folder doesn't have is that of the installed package.

    Who reads a config is about to compile: programs are kept from here on (see `keep_compiled`).

    Returns:
        the config, not yet validated; the flags; what is no flag.
    """

    argv = [_installed(arg) for arg in argv]

    def define_all(values: flags.FlagValues) -> None:
        config_flags.DEFINE_config_file(
            "config",
            None,
            "Python file with get_config(arg), as FILE or FILE:ARG; --config.a.b=v sets a field",
            flag_values=values,
            sys_argv=["", *argv],
        )
        if define is not None:
            define(values)

    values, rest = parse_flags(argv, usage, define_all)
    keep_compiled()
    if values.config is None:
        raise ConfigError("no --config was given; name one, e.g. --config=configs/base.py (--help lists all flags)")
    return values.config, values, rest


def given_path(options: flags.FlagValues) -> str:
    """The config's `policy.path` where the command line sets it; empty where it is the config file's."""
    overrides = config_flags.get_override_values(options["config"])
    given = "policy.path" in overrides or "path" in overrides.get("policy", {})
    return options.config.policy.path if given else ""


def _installed(arg: str) -> str:
    """`--config=configs/NAME.py` with the file's place in the package, where there is none in the working folder."""
    found = re.fullmatch(r"(--?config=|)(configs/\w+\.py)(:.*|)", arg)
    if not found or Path(found[2]).exists():
        return arg
    file = Path(base.__file__).parent.parent / found[2]
    return f"{found[1]}{file}{found[3]}" if file.exists() else arg


def _help(usage: str, values: flags.FlagValues) -> str:
    text = io.StringIO()
    for name in sorted(values):
        if name not in ("help", "flagfile", "undefok") and values[name].help:
            print(f"  --{name}: {values[name].help}", file=text)
    return f"{usage.strip()}\n\nflags:\n{text.getvalue()}  --help: show this text"


def _explained(error: Exception, argv: Sequence[str]) -> str:
    text = str(error.args[0] if error.args else error)
    overrides = [arg.lstrip("-").removeprefix("config.") for arg in argv if re.match(r"--?config\.", arg)]
    unknown = [field for field in overrides if _place(field) is None]
    if unknown and not isinstance(error, OSError):
        close = re.search(r'Did you mean "(\w+)"', text)  # how ml_collections reports --config.no.such=field
        hint = f"did you mean {close[1]}? " if close else ""
        return f"{', '.join(unknown)}: unknown field; {hint}configs/base.py has all fields"
    if isinstance(error, flags.Error | OSError):
        found = re.match(r"flag --config\.([\w.]+)=", text)
        wanted = f"; expected {_WANTED[type(_place(found[1]))]}" if found else ""
        return f"{shortened(str(error))}{wanted}; --help lists the flags, configs/base.py the fields"
    # Whatever else a value can do to the parser.
    fields = f" with {', '.join(map(shortened, overrides))}" if overrides else ""
    return f"the config file cannot be loaded{fields}: {type(error).__name__}: {shortened(text)}"


_WANTED = {
    str: "a text",
    bool: "true or false",
    int: "a whole number",
    float: "a number",
    tuple: "a tuple, such as --config.emotion.thresholds='(100, 70, 40, 10)'",
    ConfigDict: "its fields one by one, as --config.SECTION.FIELD=VALUE",
}


def _place(override: str) -> Any:
    """What `configs/base.py` has where `FIELD=VALUE` sets a field; None where it has nothing there."""
    found: Any = base.get_config()
    for part in override.split("=")[0].split("."):
        found = found.get(part) if isinstance(found, ConfigDict) else None
    return found
