"""The profiles that a config names: JSONL files, or a split of a prepared TFDS data set."""

from collections.abc import Iterable, Sequence

from ml_collections import ConfigDict

from rlver_jax.config.datasets import DEFAULT_SPLITS, is_dataset, locate, profile_files
from rlver_jax.profiles.schema import Profile, read_profiles


def open_profiles(config: ConfigDict, field: str) -> Sequence[Profile]:
    """Profiles of data.train or data.eval: JSONL is read, a data set is read by index alone.

    Args:
        field: "data.train" | "data.eval", which is not empty.

    Raises:
        ValueError: a file of profiles, or the name of a data set, that cannot be used.
    """
    value = _value(config, field)
    if not is_dataset(value):
        return read_profiles(profile_files(value))
    from rlver_jax.profiles.prepared import PreparedProfiles  # imports TFDS

    return PreparedProfiles.open(*locate(value, config.data.dir, DEFAULT_SPLITS[field]))


def open_each(config: ConfigDict) -> Iterable[Sequence[Profile]]:
    """Every set whose ids are unique in itself: each file of data.eval and of data.train once, or a data set."""
    known: set[str] = set()
    for field in ("data.eval", "data.train"):
        value = _value(config, field)
        if is_dataset(value):
            yield open_profiles(config, field)
            continue
        for file in profile_files(value):
            if file not in known:
                known.add(file)
                yield read_profiles(file)


def _value(config: ConfigDict, field: str) -> str:
    return config.data[field.removeprefix("data.")]
