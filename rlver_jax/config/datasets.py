"""What data.train and data.eval name: JSONL files, or a split of a prepared TFDS data set.

Files are separated by commas, a data set is `tfds:rlver_profiles[:VERSION][?split=NAME]`. Of a data set only folders
and `dataset_info.json` are looked at, so that a config is checked without importing TFDS.
"""

import difflib
import json
import os
import re
from pathlib import Path
from typing import NamedTuple

SCHEME = "tfds:"
NAME = "rlver_profiles"  # of the data set; `profiles.builder.Profiles.name`
PREPARE = "python -m rlver_jax.profiles.builder --profiles=FILE"
DEFAULT_SPLITS = {"data.train": "train", "data.eval": "eval"}  # by field
EXPECTED = f"expected {SCHEME}{NAME}[:VERSION][?split=NAME], such as {SCHEME}{NAME}:1.0.0?split=train"

_SPEC = re.compile(
    r"tfds:(?P<name>\w+)(?:/(?P<config>[\w.-]+))?(?::(?P<version>\d+\.\d+\.\d+))?(?:\?split=(?P<split>[A-Za-z]\w*))?",
    re.ASCII,
)


class DatasetSpecError(ValueError):
    """What was given names no prepared data set; the message says what to do."""


class PreparedSplit(NamedTuple):
    """A split of a prepared data set."""

    folder: Path  # that holds dataset_info.json
    split: str


def profile_files(*fields: str) -> list[str]:
    """The files that comma-separated fields such as `data.train` name, in order."""
    return [file for field in fields for file in field.split(",") if file]


def is_dataset(value: str) -> bool:
    """Whether a field such as `data.train` names a data set rather than files."""
    return any(part.strip().lower().startswith(SCHEME) for part in value.split(","))


def default_data_dir() -> Path:
    """Where TFDS keeps data sets: TFDS_DATA_DIR, or ~/tensorflow_datasets."""
    return Path(os.path.expanduser(os.environ.get("TFDS_DATA_DIR") or "~/tensorflow_datasets"))


def data_dir_of(value: str) -> Path:
    """The folder that `data.dir` names."""
    return Path(os.path.expanduser(value)) if value else default_data_dir()


def locate(spec: str, data_dir: str, default_split: str) -> PreparedSplit:
    """The split that `spec` names. Of several prepared sets the one that has the version and the split.

    Args:
        data_dir: of `data.dir`; empty: TFDS's default.
        default_split: where the spec names none.

    Raises:
        DatasetSpecError: the spec is malformed, or no such data set, version or split is prepared.
    """
    fields = _parse(spec)
    root = data_dir_of(data_dir)
    prepare = f"{PREPARE} --data_dir={root}" if data_dir else PREPARE
    prepared = {folder: _splits(folder) for folder in _prepared(root)}
    if not prepared:
        raise DatasetSpecError(
            f"no {NAME} is prepared in {root}; prepare it with {prepare}, or name the folder of --data_dir in data.dir"
        )
    for what, of in (("config", lambda f: f.parent.name), ("version", lambda f: f.name)):
        wanted, known = fields[what], sorted({of(folder) for folder in prepared})
        if wanted and wanted not in known:
            raise DatasetSpecError(
                f"{NAME} has no {what} {wanted} in {root}, which holds {', '.join(known)}; name one of these, or "
                f"prepare another with {prepare}"
            )
        prepared = {folder: splits for folder, splits in prepared.items() if not wanted or of(folder) == wanted}
    split = fields["split"] or default_split
    matches = [folder for folder, splits in prepared.items() if split in splits]
    if not matches:
        known = sorted({name for splits in prepared.values() for name in splits})
        raise DatasetSpecError(
            f"{NAME} has no split {split!r} in {root}, but {', '.join(known)}; name one with ?split={known[0]}, or "
            f"prepare it with {prepare}{' --eval=FILE' if split == 'eval' else ''}"
        )
    if len(matches) > 1:
        names = ", ".join(f"{SCHEME}{NAME}/{folder.parent.name}:{folder.name}" for folder in matches)
        raise DatasetSpecError(f"{root} holds several {NAME} with a split {split!r}; name one of {names}")
    return PreparedSplit(matches[0], split)


def _parse(spec: str) -> dict[str, str]:
    """{"config", "version", "split": text or ""} of a spec."""
    if "," in spec:
        raise DatasetSpecError(f"names more than one data set, or files beside it; {EXPECTED} alone")
    match = _SPEC.fullmatch(spec.strip())
    if not match:
        hint = "; a part of a split is none: prepare it as a split of its own" if "[" in spec else ""
        raise DatasetSpecError(f"is malformed, {EXPECTED}{hint}")
    if match["name"] != NAME:
        close = difflib.get_close_matches(match["name"], [NAME], 1)
        hint = f"did you mean {NAME}?" if close else f"profiles are prepared as {NAME}"
        raise DatasetSpecError(f"unknown data set {match['name']!r}; {hint}")
    return {name: match[name] or "" for name in ("config", "version", "split")}


def _prepared(root: Path) -> list[Path]:
    """Folders CONFIG/VERSION of the data set, in the order of their names."""
    try:
        return sorted(file.parent for file in (root / NAME).glob("*/*/dataset_info.json"))
    except (OSError, ValueError):  # a name that the system refuses
        return []


def _splits(folder: Path) -> list[str]:
    """Names of a prepared set's splits."""
    file = folder / "dataset_info.json"
    try:
        return [split["name"] for split in json.loads(file.read_text(encoding="utf-8"))["splits"]]
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise DatasetSpecError(f"{file} cannot be read ({error}); delete {folder}, and prepare it again") from error
