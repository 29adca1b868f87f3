"""Checks whether this machine can train: Python, packages, devices, memory, folders and disk.

    rlver doctor [--workdir=DIR]

What can be tried is tried: the training program is imported, another is compiled and run on each device, a file is
written where checkpoints go: --workdir, or the working folder. Of each extra the packages that it lacks are named. The
last lines say what to do about each fault.
Exit status: 0 training can start, 1 something that it needs is broken, 2 bad usage, 130 interrupted.
"""

import importlib
import os
import platform
import shutil
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence
from importlib import metadata
from pathlib import Path
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from absl import flags
from huggingface_hub import constants, get_token
from packaging.requirements import Requirement
from rich.markup import escape
from rich.table import Table

from rlver_jax.config.extras import REINSTALL, install_command
from rlver_jax.config.flags import define_path, keep_compiled, parse_flags
from rlver_jax.config.paths import PathError, check_folder_to_write
from rlver_jax.config.validate import ConfigError, shortened
from rlver_jax.text.command import Command, run_command
from rlver_jax.text.console import plain_line

PACKAGE = "rlver_jax"
LITTLE_DISK, LITTLE_MEMORY = 2e9, 4e9  # bytes below which a word is said
NO_DISK = 1e8  # bytes below which not even the miniature's checkpoints fit
STATES = {"ok": "green", "absent": "dim", "note": "yellow", "broken": "red"}
EXTRAS = {"test": "the report's tests also need a browser (playwright install chromium); nothing else does"}


class Finding(NamedTuple):
    """A row of the table."""

    state: str  # one of STATES
    what: str
    detail: str
    remedy: str = ""  # what to do, or what to know


def main(argv: Sequence[str] | None = None) -> int:
    """The command line; returns the exit status."""
    return run_command("doctor", _doctor, argv)


def _doctor(command: Command, argv: Sequence[str]) -> int:
    workdir = _arguments(argv)
    with command.errors.status("looking and trying"):
        findings = [*python(), *packages(), *devices(), *machine(), *folders(workdir), *extras()]
    table = Table(show_header=False)
    for state, what, detail, remedy in findings:
        text = f"{detail}; {remedy}" if detail and remedy else detail or remedy
        table.add_row(f"[{STATES[state]}]{state}[/]", escape(what), escape(text))
    command.console.print(table)
    broken = [finding for finding in findings if finding.state == "broken"]
    for finding in broken:
        command.error(f"{finding.what}: {finding.detail}; {finding.remedy}")
    if not broken:
        command.print("training can start")
    return 1 if broken else 0


def _arguments(argv: Sequence[str]) -> str:
    def define(values: flags.FlagValues) -> None:
        define_path("workdir", "", "folder of a run, where its checkpoints go; default: the working folder", values)

    options, rest = parse_flags(argv, __doc__, define)
    if rest:
        raise ConfigError(f"found {rest[0]!r}, expected flags only, such as --workdir=DIR; --help lists them")
    return options.workdir or os.getcwd()


def python() -> Iterator[Finding]:
    """The interpreter, and whether the training program can be imported by it."""
    yield Finding("ok", "Python", f"{platform.python_version()}, {sys.executable}")
    began = time.monotonic()
    try:
        importlib.import_module(f"{PACKAGE}.train")
    except Exception as error:  # whatever a package raises that is damaged, or of the wrong version
        yield Finding(
            "broken",
            f"{PACKAGE}.train",
            _line(error),
            f"reinstall: {REINSTALL}",
        )
    else:
        yield Finding("ok", f"{PACKAGE}.train", f"imported in {time.monotonic() - began:.1f} s")


def packages() -> Iterator[Finding]:
    """This package and each that it requires: its version, or what is wrong with it."""
    try:
        yield Finding("ok", PACKAGE, metadata.version(PACKAGE))
    except metadata.PackageNotFoundError:
        yield Finding("note", PACKAGE, "runs from a folder, so its packages are not known", "pip install -e FOLDER")
    for requirement in _requirements(""):
        if lacking := list(_lacking(requirement)):
            yield Finding("broken", requirement.name, ", ".join(lacking), f"pip install '{requirement}'")
        else:
            yield Finding("ok", requirement.name, metadata.version(requirement.name))


def extras() -> Iterator[Finding]:
    """Each extra: whether all of it is installed, and how to install it."""
    try:
        names = metadata.metadata(PACKAGE).get_all("Provides-Extra") or []
    except metadata.PackageNotFoundError:
        return
    for name in sorted(names):
        lacking = [text for requirement in _requirements(name) for text in _lacking(requirement)]
        note = EXTRAS.get(name, "")
        if lacking:
            install = install_command(name)
            yield Finding("absent", f"extra {name}", ", ".join(lacking), f"{install}; {note}" if note else install)
        else:
            yield Finding("ok", f"extra {name}", "installed", note)


def _requirements(extra: str, package: str = PACKAGE) -> list[Requirement]:
    """What a package requires; of an extra, what it requires in addition. None where the package isn't installed."""
    try:
        parsed = map(Requirement, metadata.requires(package) or [])
    except metadata.PackageNotFoundError:
        return []
    wanted = [one for one in parsed if one.marker is None or one.marker.evaluate({"extra": extra})]
    return [one for one in wanted if not extra or not (one.marker is None or one.marker.evaluate({"extra": ""}))]


def _lacking(requirement: Requirement) -> Iterator[str]:
    """What of a requirement is not installed, or in another version; with the extras that it names."""
    name, wanted = requirement.name, requirement.specifier
    try:
        version = metadata.version(name)
    except metadata.PackageNotFoundError:
        yield f"{name} is not installed"
        return
    if not wanted.contains(version, prereleases=True):
        yield f"{name} {version} is installed, expected {wanted}"
    for extra in requirement.extras:
        for one in _requirements(extra, name):
            yield from _lacking(one)


def devices() -> Iterator[Finding]:
    """JAX's devices: each compiles and runs a program, and says how much memory it has."""
    try:
        local = jax.local_devices()
    except Exception as error:  # RuntimeError, but AssertionError where a platform's plug-in is not installed
        platforms = os.environ.get("JAX_PLATFORMS", "")
        remedy = f"unset JAX_PLATFORMS={platforms}, or install it" if platforms else "end what else uses the devices"
        yield Finding("broken", "JAX", _line(error), remedy)
        return
    backend = f"{jax.default_backend()}, devices here: {len(local)}"
    hint = _unused_accelerator() if jax.default_backend() == "cpu" else ""
    yield Finding("note" if hint else "ok", "JAX backend", backend, hint)
    for device in local:
        what = f"device {device.id}"
        try:
            seconds = _run_on(device)
        except Exception as error:  # a driver that doesn't fit, no memory, a product that is wrong
            yield Finding(
                "broken",
                what,
                _line(error),
                "end what else uses it, or update its driver and JAX",
            )
            continue
        memory = (device.memory_stats() or {}).get("bytes_limit")
        size = f", {memory / 1e9:.1f} GB" if memory else ""
        yield Finding("ok", what, f"{device.device_kind}{size}, compiled and ran a program in {seconds:.2f} s")


def _line(error: Exception) -> str:
    """Its kind and message on one line."""
    return plain_line(shortened(" ".join(f"{type(error).__name__}: {error}".split())))


def _run_on(device: jax.Device) -> float:
    """Seconds that a product of two matrices takes there, with its compilation."""
    began = time.monotonic()
    ones = jax.device_put(jnp.ones((128, 128), jnp.float32), device)
    product = jax.jit(jnp.matmul)(ones, ones)
    if not np.array_equal(product, np.full((128, 128), 128, np.float32)):
        raise ArithmeticError("a product of two matrices of ones is wrong")
    return time.monotonic() - began


def _unused_accelerator() -> str:
    """What to do where an accelerator seems to be here, but JAX uses the CPU."""
    if "cpu" in os.environ.get("JAX_PLATFORMS", ""):
        return "JAX_PLATFORMS asks for it"
    if Path("/dev/nvidia0").exists():
        return "an NVIDIA GPU is here, but JAX has no plug-in for it: pip install 'jax[cuda13]'"
    if Path("/dev/accel0").exists() or Path("/dev/vfio/0").exists():
        return f"a TPU may be here: {install_command('tpu')}"
    return ""


def machine() -> Iterator[Finding]:
    """Cores and memory that this process may use."""
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
    yield Finding("ok", "cores", str(cores))
    memory = os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    limit = Path("/sys/fs/cgroup/memory.max")  # of a container
    if limit.is_file() and (text := limit.read_text().strip()).isdigit():
        memory = min(memory, int(text))
    remedy = "little even for the miniature" if memory < LITTLE_MEMORY else ""
    yield Finding("note" if remedy else "ok", "host memory", f"{memory / 1e9:.1f} GB", remedy)


def folders(workdir: str) -> Iterator[Finding]:
    """Where checkpoints, compiled programs and models of the hub go."""
    yield from _checkpoints(Path(workdir).absolute())
    yield _compiled()
    try:
        check_folder_to_write(constants.HF_HUB_CACHE)
        token = get_token()
    except (PathError, OSError) as error:
        yield Finding("note", "models of the hub", str(error), "HF_HOME names another; local folders need none")
    else:
        yield Finding("ok", "models of the hub", constants.HF_HUB_CACHE)
        told = "is set" if token else "is not set; only gated models need one: hf auth login"
        yield Finding("ok", "token of the hub", told)
    if constants.HF_HUB_OFFLINE:
        yield Finding("note", "HF_HUB_OFFLINE", "is set", "models that are named, not given by folder, must be cached")


def _checkpoints(workdir: Path) -> Iterator[Finding]:
    try:
        check_folder_to_write(workdir)
        there = next(parent for parent in (workdir, *workdir.parents) if parent.is_dir())
        with tempfile.TemporaryFile(dir=there) as file:
            file.write(bytes(1 << 20))
            file.flush()
            os.fsync(file.fileno())
        free = shutil.disk_usage(there).free
    except (ValueError, OSError) as error:
        text = f"{workdir}: {error.strerror}" if isinstance(error, OSError) else str(error)
        yield Finding("broken", "checkpoints", text, "name a folder that can be written with --workdir=DIR")
        return
    state = "broken" if free < NO_DISK else "note" if free < LITTLE_DISK else "ok"
    remedy = "" if state == "ok" else "free some, or name a folder on another disk with --workdir=DIR"
    yield Finding(state, "checkpoints", f"{workdir} can be written, {free / 1e9:.1f} GB free", remedy)


def _compiled() -> Finding:
    what = "compiled programs"
    try:
        keep_compiled()
        folder = jax.config.jax_compilation_cache_dir  # type: ignore[attr-defined]
        if not folder:
            return Finding("note", what, "are not kept", "JAX_COMPILATION_CACHE_DIR names a folder for them")
        if "://" not in folder:
            check_folder_to_write(folder)
        return Finding("ok", what, folder)
    except PathError as error:
        return Finding("note", what, f"are not kept: {error}", "JAX_COMPILATION_CACHE_DIR names another folder")
    except ConfigError as error:
        return Finding("broken", what, str(error), "set or unset this variable")


if __name__ == "__main__":
    sys.exit(main())
