"""Prepares JSONL files of profiles as a TFDS data set, for data.train and data.eval (docs/data.md).

    rlver prepare --profiles=FILE,… [--eval=FILE,…] [--data_dir=DIR]

The data set has the split `train`, of --profiles, and `eval`, of --eval; the last line says how a config names it.
Profiles are read by index from array_record files, so that a million of them take no memory. A set that is prepared
already is found by the contents of its files. DIR is TFDS's data_dir; default: TFDS_DATA_DIR or ~/tensorflow_datasets.
Exit status: 0 done, 2 bad usage or files that cannot be used, 130 interrupted.
"""

# A data set's identity is the content of the files it was made from: unchanged files are prepared once and reused,
# changed ones make another beside the old. Processes may prepare one set at once, on one host or on several that share
# the folder: each works in a folder of its own, and one rename decides whose result stays. TensorFlow is not needed.

import array
import dataclasses
import hashlib
import os
import re
import shutil
import sys
import tempfile
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import tensorflow_datasets as tfds
from absl import flags, logging

from rlver_jax.config.datasets import NAME, SCHEME, default_data_dir, profile_files
from rlver_jax.config.flags import define_path, define_paths, parse_flags
from rlver_jax.config.validate import ConfigError
from rlver_jax.profiles.fingerprint import ListDigest, json_of
from rlver_jax.profiles.prepared import (
    INDEXED,
    DatasetError,
    PreparedProfiles,
    check_whole,
    hash_of,
    index_path,
    quiet,
    write_index,
)
from rlver_jax.profiles.schema import (
    BYTE_ORDER_MARK,
    PathLike,
    Paths,
    Profile,
    ProfileError,
    as_paths,
    empty_file,
    iter_profiles,
    open_file,
    read_profiles,
)
from rlver_jax.text.command import Command, Ending, run_command

_BLOCK = 1 << 20  # bytes of a file that are hashed at a time
_EVERY = 1000  # profiles between two reports
Progress = Callable[[str, int, int], None]  # what is done, of how many profiles (0: not known yet)


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
            _raise_faults(paths)  # a file can't be read: raises that, with the faults in all the other files
            raise


# Not registered by name: `python -m` defines it twice.
class Profiles(tfds.core.GeneratorBasedBuilder, skip_registration=True):  # type: ignore[call-arg]
    """TFDS builder of profiles; `prepare` is the simple way to it. Needs a `ProfilesConfig`."""

    name = NAME
    VERSION = tfds.core.Version("1.0.0")  # of the stored form: raise it with any change of the features below

    def __init__(self, *, progress: Progress = lambda what, done, total: None, **kwargs: Any):
        self._progress = progress
        super().__init__(**kwargs)

    def _info(self) -> tfds.core.DatasetInfo:
        text = tfds.features.Text()
        features = {field.name: text for field in dataclasses.fields(Profile) if field.name != "traits"}
        return self.dataset_info_from_configs(
            description="Profiles of simulated users (RLVER, arXiv 2507.03112; SAGE, arXiv 2505.02847).",
            features=tfds.features.FeaturesDict(features | {"traits": tfds.features.Sequence(text)}),
            disable_shuffling=True,  # index i is the i-th profile of the files; the reader shuffles
            metadata=tfds.core.MetadataDict(),  # {split: `profiles_fingerprint`}
        )

    def _split_generators(self, dl_manager: Any) -> dict[str, Iterator[tuple[int, dict[str, Any]]]]:
        files = self.builder_config.files
        sizes = {split: self._check(files, split) for split in files}
        return {split: self._generate_examples(split, sizes[split]) for split in files}

    def _check(self, files: Mapping[str, Sequence[Path]], split: str) -> array.array:
        """Reads a split once; returns the size of each profile's JSON. Raises ProfileError with the faults of all."""
        sizes, ids = array.array("I"), array.array("Q")
        try:
            for profile in iter_profiles(files[split]):
                sizes.append(len(json_of(profile)))
                ids.append(hash_of(profile.id))
                if len(sizes) % _EVERY == 0:
                    self._progress(f"checking {split}", len(sizes), 0)
        except ProfileError:
            _raise_faults(files)
            raise
        if len(np.unique(np.frombuffer(ids, np.uint64))) < len(ids):
            _raise_faults(files)  # unless two ids have one hash by chance
        return sizes

    def _generate_examples(self, split: str, sizes: Sequence[int]) -> Iterator[tuple[int, dict[str, Any]]]:
        digest = ListDigest(sizes)
        hashes = {index: array.array("Q") for index in INDEXED}
        for number, profile in enumerate(iter_profiles(self.builder_config.files[split])):
            digest.add(json_of(profile))
            for index, field in INDEXED.items():
                hashes[index].append(hash_of(getattr(profile, field)))
            values = {field.name: getattr(profile, field.name) for field in dataclasses.fields(profile)}
            # The files hold no empty text (schema.py sees to it), so an empty one can stand for "not known".
            yield number, {name: "" if value is None else value for name, value in values.items()}
            if (number + 1) % _EVERY == 0:
                self._progress(f"writing {split}", number + 1, len(sizes))
        for index in INDEXED:
            write_index(index_path(Path(self.data_path), split, index), hashes[index])
        self.info.metadata[split] = digest.finish()


def prepare(
    files: Mapping[str, Paths],
    data_dir: PathLike | None = None,
    progress: Progress = lambda what, done, total: None,
) -> dict[str, PreparedProfiles]:
    """Prepares JSONL files of profiles as a data set, or finds them prepared, and opens each split.

    `files` names one path or several for each split, in RLVER's or SAGE's schema; ids must be unique within a
    split. `data_dir` is a local folder (default: TFDS's own); data sets of earlier contents stay in it and may be
    deleted at will.

    Raises ProfileError with every fault of every file (nothing is left behind then), ValueError for a bad
    split name, and DatasetError if the folder can't be written or a prepared data set in it has lost files.
    """
    folder = prepared_folder(files, data_dir, progress)
    sources = {split: PreparedProfiles.open(folder, split) for split in files}
    counts = ", ".join(f"{len(source)} {split}" for split, source in sources.items())
    logging.info("profiles: %s, in %s", counts, folder)
    return sources


def prepared_folder(files: Mapping[str, Paths], data_dir: PathLike | None, progress: Progress) -> Path:
    """`prepare` without opening: the folder that holds dataset_info.json."""
    config = ProfilesConfig.of(files)
    root = default_data_dir() if data_dir is None else Path(data_dir).expanduser()
    with quiet():
        builder = _builder(config, root)
        if not builder.data_path.exists():
            _build(config, root, Path(builder.data_path), progress)
            builder = _builder(config, root)  # reads what is on disk now, whoever wrote it
        for split in config.files:
            check_whole(builder, split)
        return Path(builder.data_path)


def fingerprint(files: Mapping[str, Sequence[Path]]) -> str:
    """A name for the contents of the files of each split, whatever the files are called.

    Raises ProfileError that names every file that can't be read or is empty.
    """
    digest = hashlib.sha256()
    faults: list[str] = []
    for split in sorted(files):
        for path in files[split]:
            try:
                _add_file(digest, split, path)
            except ProfileError as error:
                faults += error.faults
    if faults:
        raise ProfileError(faults)
    return f"sha256_{digest.hexdigest()[:32]}"


def _add_file(digest: Any, split: str, path: Path) -> None:
    """Adds a file's length and contents to a digest, both without a byte order mark."""
    with open_file(path) as stream:
        mark = len(BYTE_ORDER_MARK) * (stream.read(len(BYTE_ORDER_MARK)) == BYTE_ORDER_MARK)
        digest.update(f"{split} {stream.seek(0, os.SEEK_END) - mark}\n".encode())
        stream.seek(mark)
        blank = True
        while block := stream.read(_BLOCK):
            blank = blank and not block.strip()
            digest.update(block)
    if blank:
        raise empty_file(path)


def _raise_faults(files: Mapping[str, Sequence[Path]]) -> None:
    """Raises ProfileError with the faults of all splits together, if there are any."""
    faults: list[str] = []
    for paths in files.values():
        try:
            read_profiles(paths)
        except ProfileError as error:
            faults += error.faults
    if faults:
        raise ProfileError(faults)


def _builder(config: ProfilesConfig, root: Path, progress: Progress = lambda what, done, total: None) -> Profiles:
    return Profiles(config=config, data_dir=root, file_format="array_record", progress=progress)


def _build(config: ProfilesConfig, root: Path, target: Path, progress: Progress) -> None:
    """Writes the data set in a folder of this process's own, then renames it to `target` in one step."""
    try:
        root.mkdir(parents=True, exist_ok=True)
        own = Path(tempfile.mkdtemp(prefix=".preparing-", dir=root))
    except OSError as error:
        remedy = "name a folder that can be written, as data_dir or in TFDS_DATA_DIR"
        raise DatasetError(f"can't write the data set of profiles in {root} ({error.strerror}); {remedy}") from error
    try:
        builder = _builder(config, own, progress)
        builder.download_and_prepare()
        if fingerprint(config.files) != config.name:
            raise DatasetError("the files of profiles changed while they were being read; run the command again")
        target.parent.mkdir(parents=True, exist_ok=True)
        try:
            os.rename(builder.data_path, target)
        except OSError:
            if not target.exists():
                raise
            # Another process was first, with the same contents: its result is used.
    finally:
        shutil.rmtree(own, ignore_errors=True)


def main(argv: Sequence[str] | None = None) -> int:
    """The command line; returns the exit status."""
    interrupted = Ending(130, "interrupted; nothing is left of it")
    return run_command("profiles.builder", _prepare, argv, {KeyboardInterrupt: interrupted}, soft_wrap=True)


def _prepare(command: Command, argv: Sequence[str]) -> int:
    options = _arguments(argv)
    splits = {"train": options.profiles, "eval": options.eval}
    files = {split: profile_files(value) for split, value in splits.items() if value}
    with command.errors.status("reading") as status:
        report = lambda what, done, total: status.update(  # noqa: E731
            f"{what}: {done:,}{f' of {total:,}' if total else ''} profiles"
        )
        folder = prepared_folder(files, options.data_dir or None, report)
    counts = {split: len(PreparedProfiles.open(folder, split)) for split in files}
    command.print(_summary(folder, counts, options.data_dir))
    return 0


def _arguments(argv: Sequence[str]) -> flags.FlagValues:
    def define(values: flags.FlagValues) -> None:
        define_paths("profiles", "", "JSONL files of profiles, comma-separated: the split train", values)
        define_paths("eval", "", "the same, held out: the split eval", values)
        define_path("data_dir", "", "TFDS's data_dir; default: TFDS_DATA_DIR or ~/tensorflow_datasets", values)

    options, rest = parse_flags(argv, __doc__, define)
    if rest:
        raise ConfigError(f"found {rest[0]!r}, expected flags only, such as --profiles=FILE; --help lists them")
    if not profile_files(options.profiles):
        raise ConfigError("no --profiles was given; name a JSONL file of profiles, or several, comma-separated")
    return options


def _summary(folder: Path, counts: Mapping[str, int], data_dir: str) -> str:
    """How many profiles lie where, and the fields of a config that name them."""
    spec = f"{SCHEME}{NAME}/{folder.parent.name}:{folder.name}"
    fields = [f"--config.data.{split}={spec}" for split in counts]
    fields += [f"--config.data.dir={data_dir}"] * bool(data_dir)
    listed = ", ".join(f"{count:,} {split}" for split, count in counts.items())
    return f"{listed} profiles in {folder}\n{' '.join(fields)}"


if __name__ == "__main__":
    from rlver_jax.profiles import builder  # TFDS asks for the package of a builder's module, and __main__ has none

    sys.exit(builder.main())
