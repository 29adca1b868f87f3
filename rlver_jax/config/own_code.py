"""Python functions that a config names: `FILE.py:FUNCTION` or `PACKAGE.MODULE:FUNCTION` (docs/extending.md)."""

import contextlib
import difflib
import functools
import hashlib
import importlib
import importlib.util
import inspect
import os
import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from types import ModuleType
from typing import Any

from rlver_jax.config.paths import nearest
from rlver_jax.config.validate import ConfigError

FIELDS = ("reward.function", "metrics.functions", "eval.judge")  # that name such functions


@dataclass(frozen=True)
class OwnFunction:
    """A function that a config names.

    Attributes:
        field: of the config, one of FIELDS.
        name: as the config has it.
        call: the function.
        source: fingerprint of the file that it is defined in, helpers included; 16 hexadecimal digits.
    """

    field: str
    name: str
    call: Callable[..., Any]
    source: str

    @property
    def short_name(self) -> str:
        """The function's own name."""
        return self.name.rpartition(":")[2]


def load_functions(field: str, value: str) -> tuple[OwnFunction, ...]:
    """The functions that a field names, joined by commas; one file is run once in a process.

    Raises:
        ConfigError: one of them cannot be had; the message says which and why.
    """
    names = [name for part in value.split(",") if (name := part.strip())]
    return tuple(_load(field, name, os.getcwd()) for name in names)


@functools.cache
def _load(field: str, name: str, folder: str) -> OwnFunction:
    where, _, function = name.rpartition(":")
    if not where or not function.isidentifier():
        raise ConfigError(f"{field}={name!r}: expected FILE.py:FUNCTION or PACKAGE.MODULE:FUNCTION")
    file, module = _module(field, name, os.path.expanduser(where), folder)
    attribute = getattr(module, function, None)
    if not callable(attribute):
        own = {n: value for n, value in vars(module).items() if getattr(value, "__module__", "") == module.__name__}
        known = [n for n, value in own.items() if callable(value)]
        close = difflib.get_close_matches(function, known, 1)
        hint = f"did you mean {close[0]}?" if close else f"it defines {', '.join(known) or 'no function'}"
        what = "is no function" if hasattr(module, function) else "is not there"
        raise ConfigError(f"{field}={name!r}: {function} {what}; {hint}")
    _check_arguments(field, name, attribute)
    return OwnFunction(field, name, attribute, hashlib.sha256(file.read_bytes()).hexdigest()[:16])


def _check_arguments(field: str, name: str, function: Callable[..., Any]) -> None:
    try:
        signature = inspect.signature(function)
    except (TypeError, ValueError):
        return  # some that are written in C don't tell it
    try:
        signature.bind({}, None)
    except TypeError as error:
        raise ConfigError(
            f"{field}={name!r}: takes {signature}, expected two arguments, (dialogue, profile): {error}"
        ) from None


@functools.cache
def _module(field: str, name: str, where: str, folder: str) -> tuple[Path, ModuleType]:
    """The file and the module, run."""
    if where.endswith(".py"):
        file = Path(folder, where)
        if not file.is_file():
            close = nearest(file)
            hint = f"did you mean {close}?" if close else "expected FILE.py:FUNCTION"
            raise ConfigError(f"{field}={name!r}: {file} is no file; {hint}")
        own = f"rlver_jax_own_{hashlib.sha256(str(file).encode()).hexdigest()[:8]}"
        spec = importlib.util.spec_from_file_location(own, file)
        assert spec is not None
        assert spec.loader is not None
        sys.modules[own] = module = importlib.util.module_from_spec(spec)
        with _explained(field, name), _importable(str(file.parent)):
            spec.loader.exec_module(module)
        return file, module
    with _explained(field, name), _importable(folder):
        module = importlib.import_module(where)
    if not getattr(module, "__file__", None):
        raise ConfigError(f"{field}={name!r}: {where} is a folder of modules; name the one that defines the function")
    return Path(str(module.__file__)), module


@contextlib.contextmanager
def _importable(folder: str) -> Iterator[None]:
    """Within it modules of a folder can be imported: `rlver` lacks the working folder, which python -m has."""
    sys.path.insert(0, folder)
    try:
        yield
    finally:
        with contextlib.suppress(ValueError):
            sys.path.remove(folder)


@contextlib.contextmanager
def _explained(field: str, name: str) -> Iterator[None]:
    try:
        yield
    except Exception as error:  # it is code and may raise anything
        raise ConfigError(f"{field}={name!r}: cannot be imported: {type(error).__name__}: {error}") from error
