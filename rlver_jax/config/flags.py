"""Flags of the entry points, with help and with errors that say what to do."""

import functools
import importlib
import io
import os
import platform
import re
import sys
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from types import ModuleType
from typing import Any

import jax
from absl import flags
from ml_collections import ConfigDict, config_flags

from rlver_jax.config import files as config_files
from rlver_jax.config.credentials import without_credentials
from rlver_jax.config.extras import install_command
from rlver_jax.config.fields import PATHS, TABLE, get_config
from rlver_jax.config.paths import PathError, cache_folder, check_file_to_write, check_folder_to_write, fault, local
from rlver_jax.config.schema import listing, without_effect
from rlver_jax.config.validate import ConfigError, flatten, shortened, unknown_field

Define = Callable[[flags.FlagValues], None]


class HelpPrinted(SystemExit):
    """Ends a command with status 0 after --help; `values` are its flags, which shells complete."""

    def __init__(self, values: flags.FlagValues):
        super().__init__(0)
        self.values = values


def parse_flags(argv: Sequence[str], usage: str | None, define: Define) -> tuple[flags.FlagValues, list[str]]:
    """Reads an entry point's own flags.

    Each call has flags of its own, so that several entry points can run in one process.

    Args:
        argv: arguments, without the program's name.
        usage: printed by --help above the flags; the entry point's docstring, None under `python -OO`.
        define: adds flags to the given `FlagValues`.

    Returns:
        the flags; what is no flag.

    Raises:
        ConfigError: an unknown or malformed flag or field, or a config file that cannot be loaded.
        HelpPrinted: after --help.
    """
    values = flags.FlagValues()
    flags.DEFINE_boolean("help", False, "show this text", flag_values=values)
    if asked := {"--help", "--helpfull"} & set(argv):  # before the rest, which may be wrong: one asks for help then
        define(values)
        print(_help(usage, values))
        if "--helpfull" in asked and "config" in values:
            print(f"\nfields of the config, with their defaults:\n{listing(TABLE)}")
        raise HelpPrinted(values)
    try:
        define(values)
        return values, values(["", *argv])[1:]
    except SystemExit as error:
        raise ConfigError(f"the config file ends the process (SystemExit: {error}); {_EXPECTED}") from error
    except Exception as error:  # a config file is code and may raise anything
        raise ConfigError(_explained(error, argv)) from error


def define_path(name: str, default: str | None, help: str, values: flags.FlagValues, *, new: str = "") -> None:
    """A flag that takes a local path: no URL, and `~` is the home folder.

    Args:
        new: what will be written there, and must be possible: "file" | "folder"; empty: nothing, or it is seen later.
    """
    flags.DEFINE(PathParser(new), name, default, help, values)


def define_paths(name: str, default: str, help: str, values: flags.FlagValues) -> None:
    """A flag that takes local paths, joined by commas; its value is their text."""
    flags.DEFINE(PathParser(several=True), name, default, help, values)


class PathParser(flags.ArgumentParser):
    """Of flags for local paths."""

    syntactic_help = "a local path"

    def __init__(self, new: str = "", several: bool = False):
        self._new, self._several = new, several

    def parse(self, argument: str) -> str:
        """The path or the paths, with the home folder for `~`.

        Raises:
            PathError: one of them cannot be used.
        """
        if self._several:
            return ",".join(local(path.strip()) for path in argument.split(","))
        path = local(argument)
        if path and self._new:
            (check_file_to_write if self._new == "file" else check_folder_to_write)(path)
        return path


def local_paths(words: Sequence[str]) -> list[str]:
    """What is no flag, as local paths.

    Raises:
        ConfigError: one of them cannot be used.
    """
    located = []
    for word in words:
        try:
            located.append(local(word))
        except PathError as error:
            raise ConfigError(f"{word}: {error}") from error
    return located


def keep_compiled() -> None:
    """Has compiled programs outlive the process, so that the next start of the same run takes seconds.

    They lie in ~/.cache/rlver_jax/compiled, in a folder for each machine: a home may be shared by machines that cannot
    run each other's. JAX_COMPILATION_CACHE_DIR names another folder; where it is empty, nothing is kept.

    Raises:
        ConfigError: JAX_COMPILATION_CACHE_DIR can be no folder; gs:// and s3:// are left to JAX.
    """
    named = os.environ.get("JAX_COMPILATION_CACHE_DIR")
    if named is not None and not named.startswith(("gs://", "s3://")):
        if what := fault(named):
            raise ConfigError(f"JAX_COMPILATION_CACHE_DIR={named}: {what}")
        if named.startswith("~"):  # JAX would make a folder of that name
            jax.config.update("jax_compilation_cache_dir", os.path.expanduser(named))
    if named is not None:
        return  # JAX has read it
    if folder := cache_folder("compiled", platform.node()):
        jax.config.update("jax_compilation_cache_dir", str(folder))
    else:
        _report_no_cache()


@functools.cache
def _report_no_cache() -> None:
    told = "no cache folder can be written, so what is compiled is not kept; JAX_COMPILATION_CACHE_DIR names one"
    print(told, file=sys.stderr)


def import_remote(name: str) -> ModuleType:
    """A module that speaks with endpoints.

    Raises:
        ConfigError: a package of the extra `remote` is missing.
    """
    try:
        return importlib.import_module(name)
    except ModuleNotFoundError as error:
        raise ConfigError(f"endpoints need {error.name}: {install_command('remote')}") from error


def config_from_flags(
    argv: Sequence[str], usage: str | None, define: Define | None = None
) -> tuple[ConfigDict, flags.FlagValues, list[str]]:
    """Reads `--config=FILE[:ARG] [--config.a.b=v …]` and an entry point's own flags; see `parse_flags`.

    A FILE configs/NAME.py that the working folder doesn't have is that of the installed package.

    Who reads a config is about to compile: programs are kept from here on (see `keep_compiled`).

    Returns:
        the config, not yet validated; the flags; what is no flag.
    """
    argv, file = _with_config_located(_with_files_read(argv))

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

    with config_files.imports_of(file):
        values, rest = parse_flags(argv, usage, define_all)
    if not file:
        raise ConfigError("no --config was given; name one, e.g. --config=configs/base.py (--help lists all flags)")
    if not isinstance(values.config, ConfigDict):
        raise ConfigError(f"{file}: its get_config returns {shortened(repr(values.config))}; {_EXPECTED}")
    try:
        flatten(values.config)
    except TypeError as error:  # names of fields are sorted
        raise ConfigError(f"{file}: a field of its config has no text for its name ({error}); {_EXPECTED}") from error
    keep_compiled()
    _expand_home(values.config)
    for line in without_effect(TABLE, flatten(values.config), config_flags.get_override_values(values["config"])):
        print(line, file=sys.stderr)
    return values.config, values, rest


def load_config(file: str, fields: Mapping[str, Any] | None = None) -> ConfigDict:
    """The config of a file, for scripts; commands have `config_from_flags`.

    Args:
        file: as FILE or FILE:ARG; configs/NAME.py that the working folder doesn't have is that of the package.
        fields: {"a.b": value} to be changed.

    Raises:
        ConfigError: the file cannot be loaded, or has no such field, or one of another type.
    """
    config = config_from_flags([f"--config={file}"], "")[0]
    if unknown := sorted((fields or {}).keys() - flatten(config).keys()):
        raise ConfigError("; ".join(f"{name}: {unknown_field(name)}" for name in unknown))
    try:
        config.update_from_flattened_dict(dict(fields or {}))
    except TypeError as error:
        raise ConfigError(f"{file}: {error}") from error
    return config


def path_override(options: flags.FlagValues) -> str:
    """The config's `policy.path` where the command line sets it; empty where it is the config file's."""
    overrides = config_flags.get_override_values(options["config"])
    overridden = "policy.path" in overrides or "path" in overrides.get("policy", {})
    return options.config.policy.path if overridden else ""


def _with_files_read(argv: Sequence[str]) -> list[str]:
    """The arguments with those that --flagfile=FILE holds in its place."""
    try:
        return flags.FlagValues().read_flags_from_files(list(argv), force_gnu=False)
    except flags.Error as error:
        raise ConfigError(f"{error}; --flagfile names a local file with a flag a line") from error


def _with_config_located(argv: Sequence[str]) -> tuple[list[str], str]:
    """(the arguments with the config file's real place, that place)."""
    words, file = list(argv), ""
    for i, word in enumerate(words):
        flag, equals, value = word.partition("=")
        if flag not in ("--config", "-config"):
            continue
        at = i if equals else i + 1
        value = value if equals else "".join(words[at : at + 1])
        try:
            name, *arg = local(value).split(":", 1)
        except PathError as error:
            raise ConfigError(f"--config={value}: {error}") from error
        file = config_files.located(name)
        if not Path(file).is_file():
            raise ConfigError(f"--config={value}: {config_files.missing(name)}")
        words[at : at + 1] = [flag * bool(equals) + equals + ":".join([file, *arg])]
    return words, file


def _expand_home(config: Any) -> None:
    """The home folder for `~` in fields that hold paths; `config.validate` finds what cannot be one."""
    fields = flatten(config) if isinstance(config, ConfigDict) else {}
    for name in PATHS:
        paths = fields[name].split(",") if isinstance(fields.get(name), str) else []
        if any(path.startswith("~") for path in paths):
            config.update_from_flattened_dict({name: ",".join(map(os.path.expanduser, paths))})


def _help(usage: str | None, values: flags.FlagValues) -> str:
    text = io.StringIO()
    for name in sorted(values):
        if name not in ("help", "flagfile", "undefok") and values[name].help:
            print(f"  --{name}: {values[name].help}", file=text)
    more = "\n  --helpfull: show this text and every field of the config" * ("config" in values)
    return f"{(usage or '').strip()}\n\nflags:\n{text.getvalue()}  --help: show this text{more}"


def _explained(error: BaseException, argv: Sequence[str]) -> str:
    if isinstance(error.__context__, PathError):
        return str(error)
    text = str(error.args[0] if error.args else error)
    if _TRACED in text:  # how ml_collections reports what a config file raised
        while _TRACED in str(error) and error.__context__ is not None:
            error = error.__context__
        return _not_loaded(error)
    overrides = [arg.lstrip("-").removeprefix("config.") for arg in argv if re.match(r"--?config\.", arg)]
    unknown = [field for field in overrides if _base_value(field) is None]
    if unknown and not isinstance(error, OSError):
        return "; ".join(f"{without_credentials(one)}: {unknown_field(one.split('=')[0])}" for one in unknown)
    if isinstance(error, flags.Error | OSError):
        match = re.match(r"flag --config\.([\w.]+)=", text)
        wanted = f"; expected {_WANTED[type(_base_value(match[1]))]}" if match else ""
        return f"{shortened(str(error))}{wanted}; --help lists the flags, configs/base.py the fields"
    # Whatever else a value can do to the parser.
    fields = f" with {', '.join(map(shortened, overrides))}" if overrides else ""
    return _not_loaded(error, fields)


def _not_loaded(error: BaseException, fields: str = "") -> str:
    text = f"{type(error).__name__}: {shortened(str(error.args[0] if error.args else error))}"
    wanted = "" if "expected" in text else f"; {_EXPECTED}"
    return f"the config file cannot be loaded{fields}: {text}{wanted}"


_TRACED = "Error whilst parsing config file"
_EXPECTED = "expected a Python file whose get_config(arg) returns a ConfigDict with the fields of configs/base.py"

_WANTED = {
    str: "a text",
    bool: "true or false",
    int: "a whole number",
    float: "a number",
    tuple: "a tuple, such as --config.emotion.thresholds='(100, 70, 40, 10)'",
    ConfigDict: "its fields one by one, as --config.SECTION.FIELD=VALUE",
}


def _base_value(override: str) -> Any:
    """What `configs/base.py` has where `FIELD=VALUE` sets a field; None where it has nothing there."""
    value: Any = get_config()
    for part in override.split("=")[0].split("."):
        value = value.get(part) if isinstance(value, ConfigDict) else None
    return value
