"""Profiles of a prepared TFDS data set: read by index, never all at once, and found by id or persona.

Beside TFDS's own files a split has two indexes, `ids` and `personas`, and the fingerprint of its contents
(`metadata.json`). They are written by `builder` and save the reader from going through all profiles.
"""

import array
import contextlib
import hashlib
import io
import operator
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, overload

import numpy as np
import tensorflow_datasets as tfds
from absl import logging

from rlver_jax.config.datasets import NAME
from rlver_jax.profiles.indexed import IndexedProfiles
from rlver_jax.profiles.schema import Profile

INDEXED = {"ids": "id", "personas": "persona"}  # index: field of a profile


class DatasetError(RuntimeError, ValueError):
    """The folder of prepared profiles cannot be written, or has lost files."""


class TextIndex:
    """Positions of texts by their 64-bit hashes, in a sorted file that is mapped into memory."""

    def __init__(self, path: Path):
        self._hashes, self._positions = np.load(path, mmap_mode="r")  # uint64 [2, N]

    def candidates(self, text: str) -> list[int]:
        """Positions at which the text may stand, rising; other texts with its hash are among them."""
        wanted = np.uint64(hash_of(text))
        start, stop = (int(np.searchsorted(self._hashes, wanted, side)) for side in ("left", "right"))
        return [int(position) for position in self._positions[start:stop]]


def hash_of(text: str) -> int:
    """64 bits of BLAKE2b."""
    return int.from_bytes(hashlib.blake2b(text.encode(), digest_size=8).digest(), "little")


def write_index(path: Path, hashes: array.array) -> None:
    """Writes the `TextIndex` of texts by their hashes, in the order of their positions."""
    values = np.frombuffer(hashes, np.uint64)
    order = np.argsort(values, kind="stable")
    np.save(path, np.stack([values[order], order.astype(np.uint64)]))


def index_path(folder: Path, split: str, index: str) -> Path:
    """The file of a split's index."""
    return folder / f"{NAME}-{split}.{index}.npy"


class PreparedProfiles(IndexedProfiles):
    """The profiles of one split, in the order of the files that it was prepared from. See the module."""

    def __init__(self, records: Sequence[Mapping[str, Any]], folder: Path, split: str, fingerprint: str):
        """`records` are TFDS's; use `open`."""
        self._records = records
        self.fingerprint = fingerprint  # `profiles_fingerprint` of them all
        self._indexes = {name: TextIndex(index_path(folder, split, name)) for name in INDEXED}

    @classmethod
    def open(cls, folder: Path, split: str) -> "PreparedProfiles":
        """Opens a split of the data set in `folder`, which holds dataset_info.json.

        Raises:
            DatasetError: it lacks the split or a file, or is of an older version.
        """
        with quiet():
            builder = tfds.builder_from_directory(folder)
            check_whole(builder, split)
            return cls(builder.as_data_source(split=split), folder, split, builder.info.metadata[split])

    def __len__(self) -> int:
        return len(self._records)

    @overload
    def __getitem__(self, index: int) -> Profile: ...
    @overload
    def __getitem__(self, index: slice) -> list[Profile]: ...
    def __getitem__(self, index: int | slice) -> Profile | list[Profile]:
        if isinstance(index, slice):
            return [self[i] for i in range(*index.indices(len(self)))]
        position = operator.index(index)
        if not -len(self) <= position < len(self):
            raise IndexError(f"profile {position} was asked for, expected an index below {len(self)}")
        record = self._records[position % len(self)]
        texts = {name: value.decode() for name, value in record.items() if name != "traits"}
        texts |= {name: texts[name] or None for name in ("topic", "first_talk")}
        return Profile(**texts, traits=tuple(trait.decode() for trait in record["traits"]))

    def with_id(self, wanted: str) -> Profile | None:
        """The profile with an id; None: there is none."""
        return next(self._with("ids", wanted), None)

    def has_persona(self, persona: str) -> bool:
        """Whether a profile has this persona, to the letter."""
        return any(self._with("personas", persona))

    def _with(self, index: str, text: str) -> Iterator[Profile]:
        for position in self._indexes[index].candidates(text):
            profile = self[position]
            if getattr(profile, INDEXED[index]) == text:
                yield profile


def check_whole(builder: tfds.core.DatasetBuilder, split: str) -> None:
    """Raises DatasetError if a prepared data set lacks a split, one of its files, or what `builder` writes beside."""
    info, folder = builder.info.splits.get(split), Path(builder.data_path)
    files = [] if info is None else [*map(Path, info.filepaths), *(index_path(folder, split, name) for name in INDEXED)]
    if not files or not all(file.exists() for file in files) or split not in (builder.info.metadata or {}):
        raise DatasetError(
            f"the prepared profiles in {folder} lack files of split {split!r}; delete that folder, and prepare it again"
        )


@contextlib.contextmanager
def quiet() -> Iterator[None]:
    """TFDS without its progress bars, notices on stdout, and warning that our config is a custom one."""
    verbosity = logging.get_verbosity()
    tfds.disable_progress_bar()
    logging.set_verbosity(logging.ERROR)
    try:
        with contextlib.redirect_stdout(io.StringIO()):  # stdout belongs to the command's own summary
            yield
    finally:
        logging.set_verbosity(verbosity)
