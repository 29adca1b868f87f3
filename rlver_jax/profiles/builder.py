"""Profiles as a TensorFlow Datasets dataset (array_record, random access), without TensorFlow installed.

A dataset's identity is the content of the files it was made from: unchanged files are prepared once and
reused, changed ones make another dataset beside the old. Processes may prepare the same dataset at once, on
one host or on several that share the folder: each works in a folder of its own, and one rename decides whose
result stays.
"""

import contextlib
import dataclasses
import functools
import hashlib
import io
import operator
import os
import re
import shutil
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, overload

import tensorflow_datasets as tfds
from absl import logging

from rlver_jax.config.paths import cache_folder
from rlver_jax.profiles.schema import (
    PathLike,
    Paths,
    Profile,
    ProfileError,
    as_paths,
    read_file,
    read_profiles,
)


class DatasetError(RuntimeError, ValueError):
    """The folder of prepared profiles cannot be written, or has lost files."""


@dataclasses.dataclass(eq=False)
class ProfilesConfig(tfds.core.BuilderConfig):
    """Which files make which split; `name` is the fingerprint of their contents. Made by `of`."""

    files: Mapping[str, tuple[Path, ...]] = dataclasses.field(default_factory=dict)

    @classmethod
    def of(cls, files: Mapping[str, Paths]) -> "ProfilesConfig":
        """The config of some splits. Raises ProfileError (unreadable file) or ValueError (bad split name)."""
        if not files:
            raise ValueError("no split was given, expected a dict such as {'train': 'train_profile.jsonl'}")
        for split in files:
            if not re.fullmatch(r"[A-Za-z][A-Za-z0-9_]*", split) or split == "all":
                raise ValueError(
                    f"split is named {split!r}, expected letters, digits and _ (not 'all', which TFDS "
                    "keeps for all splits together); rename it, for example 'train' or 'test'"
                )
        paths = {split: as_paths(files[split]) for split in files}
        try:
            return cls(name=fingerprint(paths), files=paths)
        except ProfileError:
            _read_all(paths)  # a file can't be read: raises that, with the faults in all the other files
            raise


class Profiles(tfds.core.GeneratorBasedBuilder):
    """TFDS builder of profiles; `prepare` is the simple way to it. Needs a `ProfilesConfig`."""

    name = "rlver_profiles"
    VERSION = tfds.core.Version("1.0.0")  # of the stored form: raise it with any change of the features below

    def _info(self) -> tfds.core.DatasetInfo:
        text = tfds.features.Text()
        features = {field.name: text for field in dataclasses.fields(Profile) if field.name != "traits"}
        return self.dataset_info_from_configs(
            description="Profiles of simulated users (RLVER, arXiv 2507.03112; SAGE, arXiv 2505.02847).",
            features=tfds.features.FeaturesDict(features | {"traits": tfds.features.Sequence(text)}),
            disable_shuffling=True,  # index i is the i-th profile of the files; the reader shuffles
        )

    def _split_generators(self, dl_manager: Any) -> dict[str, Iterator[tuple[int, dict[str, Any]]]]:
        config = self.builder_config
        profiles = _read_all(config.files)
        if fingerprint(config.files) != config.name:
            raise RuntimeError("the files of profiles changed while they were being read; run the command again")
        return {split: self._generate_examples(rows) for split, rows in profiles.items()}

    def _generate_examples(self, profiles: Sequence[Profile]) -> Iterator[tuple[int, dict[str, Any]]]:
        for index, profile in enumerate(profiles):
            values = {field.name: getattr(profile, field.name) for field in dataclasses.fields(profile)}
            # The files hold no empty text (schema.py sees to it), so an empty one can stand for "not known".
            yield index, {name: "" if value is None else value for name, value in values.items()}


class ProfileSource(Sequence[Profile]):
    """Random access to the prepared profiles of one split, in the order of the files."""

    def __init__(self, records: Sequence[Mapping[str, Any]]):
        self._records = records

    def __len__(self) -> int:
        return len(self._records)

    @overload
    def __getitem__(self, index: int) -> Profile: ...
    @overload
    def __getitem__(self, index: slice) -> list[Profile]: ...
    def __getitem__(self, index: int | slice) -> Profile | list[Profile]:
        if isinstance(index, slice):
            return [self[i] for i in range(*index.indices(len(self)))]
        at = operator.index(index)
        if not -len(self) <= at < len(self):
            raise IndexError(f"profile {at} was asked for, expected an index below {len(self)}")
        record = self._records[at % len(self)]
        texts = {name: value.decode() for name, value in record.items() if name != "traits"}
        texts |= {name: texts[name] or None for name in ("topic", "first_talk")}
        return Profile(**texts, traits=tuple(trait.decode() for trait in record["traits"]))


def prepare(files: Mapping[str, Paths], data_dir: PathLike | None = None) -> dict[str, ProfileSource]:
    """Prepares JSONL files of profiles as a dataset, or finds them prepared, and opens each split.

    `files` names one path or several for each split, in RLVER's or SAGE's schema; ids must be unique within a
    split. `data_dir` is a local folder (default: `default_data_dir()`); datasets of earlier contents stay in
    it and may be deleted at will.

    Raises ProfileError with every fault of every file (nothing is left behind then), ValueError for a bad
    split name, and DatasetError if the folder can't be written or a prepared dataset in it has lost files.
    """
    config = ProfilesConfig.of(files)
    root = default_data_dir() if data_dir is None else Path(data_dir).expanduser()
    with _quiet():
        builder = _builder(config, root)
        if not builder.data_path.exists():
            _build(config, root, Path(builder.data_path))
            builder = _builder(config, root)  # reads what is on disk now, whoever wrote it
        _check_whole(builder)
        sources = {split: ProfileSource(builder.as_data_source(split=split)) for split in config.files}
    counts = ", ".join(f"{len(source)} {split}" for split, source in sources.items())
    logging.info("profiles: %s, in %s", counts, builder.data_path)
    return sources


def default_data_dir() -> Path:
    """`paths.cache_folder`, or where there is none a folder that goes with the process."""
    return cache_folder() or Path(_temporary().name)


@functools.cache
def _temporary() -> tempfile.TemporaryDirectory[str]:
    return tempfile.TemporaryDirectory(prefix="rlver_jax_")


def fingerprint(files: Mapping[str, Sequence[Path]]) -> str:
    """A name for the contents of the files of each split, whatever the files are called.

    Raises ProfileError that names every file that can't be read or is empty.
    """
    digest = hashlib.sha256()
    faults: list[str] = []
    for split in sorted(files):
        for path in files[split]:
            try:
                data = read_file(path)
            except ProfileError as error:
                faults += error.faults
                continue
            digest.update(f"{split} {len(data)}\n".encode())
            digest.update(data)
    if faults:
        raise ProfileError(faults)
    return f"sha256_{digest.hexdigest()[:32]}"


def _read_all(files: Mapping[str, Sequence[Path]]) -> dict[str, list[Profile]]:
    """The profiles of each split; raises ProfileError with the faults of all splits together."""
    profiles: dict[str, list[Profile]] = {}
    faults: list[str] = []
    for split, paths in files.items():
        try:
            profiles[split] = read_profiles(paths)
        except ProfileError as error:
            faults += error.faults
    if faults:
        raise ProfileError(faults)
    return profiles


def _builder(config: ProfilesConfig, root: Path) -> Profiles:
    return Profiles(config=config, data_dir=root, file_format="array_record")


def _build(config: ProfilesConfig, root: Path, target: Path) -> None:
    """Writes the dataset in a folder of this process's own, then renames it to `target` in one step."""
    try:
        root.mkdir(parents=True, exist_ok=True)
        own = Path(tempfile.mkdtemp(prefix=".preparing-", dir=root))
    except OSError as error:
        remedy = "name a folder that can be written, as data_dir or in XDG_CACHE_HOME"
        raise DatasetError(f"can't write the dataset of profiles in {root} ({error.strerror}); {remedy}") from error
    try:
        builder = _builder(config, own)
        builder.download_and_prepare()
        target.parent.mkdir(parents=True, exist_ok=True)
        try:
            os.rename(builder.data_path, target)
        except OSError:
            if not target.exists():
                raise
            # Another process was first, with the same contents: its result is used.
    finally:
        shutil.rmtree(own, ignore_errors=True)


def _check_whole(builder: Profiles) -> None:
    """Raises DatasetError if a prepared dataset lacks a split or one of its files."""
    for split in builder.builder_config.files:
        info = builder.info.splits.get(split)
        if info is None or not all(Path(path).exists() for path in info.filepaths):
            raise DatasetError(
                f"the prepared profiles in {builder.data_path} lack files of split {split!r}; delete that "
                "folder, and the next run prepares it again"
            )


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    """TFDS without its progress bars, notices on stdout, and warning that our config is a custom one."""
    verbosity = logging.get_verbosity()
    tfds.disable_progress_bar()
    logging.set_verbosity(logging.ERROR)
    try:
        with contextlib.redirect_stdout(io.StringIO()):  # stdout belongs to the command's own summary
            yield
    finally:
        logging.set_verbosity(verbosity)
