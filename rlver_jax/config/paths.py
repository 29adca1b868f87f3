"""Paths that users give: what a local path is, and what is said where something else was given.

Files are read and written by many libraries, most of which know nothing of URLs: TensorBoard and Orbax fail at the
first checkpoint, and `Path("gs://…")` is a folder called `gs:`. So only local paths are taken, buckets mounted.
"""

import contextlib
import difflib
import os
import re
from collections.abc import Callable
from pathlib import Path

# One slash is left of two where a URL went through `Path`. Any scheme is one with two; with one only those that exist.
# Before it may stand a quote that no shell took away, or the folder that a program joined it to.
_URL = re.compile(
    r"(?:[\s'\"]*|.*/)(?:(?P<any>[a-z][a-z0-9+.-]+)://|"
    r"(?P<known>gs|gcs|s3a?|hf|file|https?|ftps?|sftp|hdfs|abfss?|az|wasbs?|adl|oss|cos|r2|dbfs|ssh|scp|data):/)"
    r"/*(?P<rest>.*)",
    re.IGNORECASE | re.DOTALL,
)
_HUB = re.compile(r"(?:hf://|https?://(?:www\.)?(?:huggingface|hf)\.co/)([\w.-]+/[\w.-]+)", re.IGNORECASE)
_SUFFIX = re.compile(r"\.[a-z]+$")  # in which two names should not resemble each other
_LONGEST_NAME, _LONGEST = 255, 4095  # bytes: NAME_MAX and PATH_MAX of Linux
_BESIDE = ".tmp"  # what `runs.files` appends to a file's name while it writes


class PathError(ValueError):
    """What was given is no path that can be used; the message says what to do."""


def fault(path: str) -> str | None:
    """Why `path` is no local path, and what to do; None where it is one, whether or not anything lies there."""
    if match := _URL.match(path):
        return _no_url((match["any"] or match["known"]).lower(), match["rest"])
    if path and not path.strip():
        return "is blank; name a file or a folder"
    if "\0" in path or not _is_utf8(path):
        return (
            "holds a zero byte, or characters that this locale doesn't write as UTF-8; expected a file's name without "
            "them; rename it, or start with PYTHONUTF8=1"
        )
    if os.path.expanduser(path).startswith("~"):
        return f"there is no home folder {path.split('/')[0]}; write the whole path, or ./{path} for such a name"
    name = max((len(part) for part in os.fsencode(path).split(b"/")), default=0)
    if name > _LONGEST_NAME or len(os.fsencode(path)) > _LONGEST:
        return f"is too long ({name} bytes in one name, of {_LONGEST_NAME} that are possible); name a shorter one"
    return None


def local(path: str) -> str:
    """The path, with the home folder for `~`, which shells leave as it is in --flag=~/folder.

    Raises:
        PathError: it is a URL, or cannot be a path.
    """
    if problem := fault(path):
        raise PathError(problem)
    return os.path.expanduser(path)


def check_folder_to_write(path: str | os.PathLike[str]) -> None:
    """That a folder is there to be written to, or can be made.

    Raises:
        PathError: it is a file or lies in one, or may not be written.
    """
    folder = Path(path).absolute()
    there = next(parent for parent in (folder, *folder.parents) if os.path.lexists(parent))
    if not there.is_dir():
        what = "is no folder" if there == folder else f"cannot be made, since {there} is no folder"
        raise PathError(f"{path}: {what}; name another one")
    if not os.access(there, os.W_OK | os.X_OK):
        raise PathError(f"{path}: {there} may not be written to; name another folder, or change its permissions")


def check_file_to_write(path: str | os.PathLike[str]) -> None:
    """That a file can be written, in a folder that is there.

    Raises:
        PathError: its folder is missing or may not be written, or it is a folder itself.
    """
    file = Path(path).absolute()
    if file.is_dir():
        raise PathError(f"{path}: is a folder; name a file")
    if not file.parent.is_dir():
        raise PathError(f"{path}: its folder does not exist; make it, or name another file")
    if not os.access(file.parent, os.W_OK | os.X_OK) or (file.exists() and not os.access(file, os.W_OK)):
        raise PathError(f"{path}: may not be written; name another file, or change permissions")
    if len(os.fsencode(file.name + _BESIDE)) > _LONGEST_NAME:
        raise PathError(f"{path}: the file's name is too long; name a shorter one")


def nearest(path: str | os.PathLike[str], wanted: Callable[[Path], bool] = Path.is_file) -> Path | None:
    """What is there and nearly called so, file or folder as is `wanted`; in a folder that is nearly called so, too."""
    path = Path(path)
    with contextlib.suppress(OSError):
        parent = path.parent if path.parent.is_dir() else nearest(path.parent, Path.is_dir)
        if parent is None or (parent != path.parent and wanted(parent / path.name)):
            return parent and parent / path.name
        names = {_SUFFIX.sub("", one.name): one for one in sorted(parent.iterdir()) if wanted(one)}
        close = difflib.get_close_matches(_SUFFIX.sub("", path.name), names, 1)
        return names[close[0]] if close else None
    return None


def cache_folder(*parts: str) -> Path | None:
    """A folder in the user's cache, made where it is missing: in XDG_CACHE_HOME if that is absolute, else in ~/.cache.

    None where no home folder is known, as in a container whose user has no name, or where it cannot be written.
    """
    cache = Path(os.environ.get("XDG_CACHE_HOME", ""))
    try:
        folder = (cache if cache.is_absolute() else Path.home() / ".cache").joinpath("rlver_jax", *parts)
        if not folder.is_absolute():
            return None  # HOME is no path
        folder.mkdir(parents=True, exist_ok=True)
    except (RuntimeError, OSError):
        return None
    return folder if os.access(folder, os.W_OK | os.X_OK) else None


def _is_utf8(path: str) -> bool:
    """Whether Python and libraries written in other languages, which take UTF-8, mean one file by it."""
    try:
        return os.fsencode(path) == path.encode("utf-8")
    except UnicodeEncodeError:
        return False


def _no_url(scheme: str, rest: str) -> str:
    told = "is a URL, but files are read and written by local paths only"
    if scheme == "file":
        return f"{told}; write the path itself, /{rest.removeprefix('localhost/')}"
    if scheme in ("gs", "gcs"):
        return (
            f"{told}. Mount the bucket (gcsfuse --implicit-dirs {rest.split('/')[0] or 'BUCKET'} FOLDER) and name its "
            f"place in FOLDER, or start the command with launch/tpu_pod.sh, which mounts it; what is only read can be "
            f"copied: gcloud storage cp -r gs://{rest} FOLDER"
        )
    if match := _HUB.match(f"{scheme}://{rest}"):
        return f"{told}. A model goes by its name alone, {match[1]}; other files: hf download, and name their folder"
    return f"{told}. Mount what holds it, or download it, and name its local path"


SAGE_SIMULATOR = "simulator_response.py"


def sage_folder(folder: str | Path) -> Path | None:
    """The folder of SAGE's files in a clone of its repository, which may be given itself; None: it is no clone."""
    folder = Path(folder)
    return next((one for one in (folder / "SAGE", folder) if (one / SAGE_SIMULATOR).is_file()), None)
