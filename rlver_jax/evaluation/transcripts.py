"""Finished dialogues from files: our own logs, SAGE's results or RLVER's logs, recognized by their first line."""

import dataclasses
import operator
from array import array
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple, TypeVar

from rlver_jax.config.validate import shown
from rlver_jax.dialogues.known_profiles import KnownProfiles
from rlver_jax.dialogues.lines import ComputedSequence, IndexedLines
from rlver_jax.dialogues.log import REMEDY, DialogueLogError, Record, parse_dialogue, record_faults
from rlver_jax.dialogues.numbers import number_faults
from rlver_jax.dialogues.sage import from_sage
from rlver_jax.dialogues.trajectory import emotion_faults, emotions_of, reactions
from rlver_jax.profiles.schema import Profile, ProfileError, parse_line
from rlver_jax.user.emotion import HIGHEST, LOWEST, SAGE, EmotionRules

S = TypeVar("S")
T = TypeVar("T")


@dataclasses.dataclass(frozen=True)
class Transcript:
    """A dialogue that has been played, with its profile where that is known, and where it was read."""

    record: Record
    profile: Profile | None
    source: str


class Turn(NamedTuple):
    """What one appraised turn was, and what its own user made of it."""

    turn: int
    heard: Mapping[str, Any]  # the user's message before the reply
    reply: Mapping[str, Any]  # the policy's reply
    emotion: int  # before, as a judge reads it: see `within`
    change: int


def turns_of(record: Record) -> list[Turn]:
    """The turns that the dialogue's own user appraised."""
    emotions, turns, heard = emotions_of(record), [], record["messages"][0]
    for turn, reply, user in reactions(record):
        turns.append(Turn(turn, heard, reply, within(emotions[turn]), user["change"]))
        heard = user
    return turns


def within(emotion: int) -> int:
    """An emotion of a record as a judge reads it: 0 to 100, below which RLVER's logs may go."""
    return min(max(emotion, LOWEST), HIGHEST)


def read_finished(path: str | Path) -> list[Transcript]:
    """The dialogues of one file, checked; see `TranscriptFiles`."""
    return [one for _, one in TranscriptFiles([path]).scan()]


@dataclasses.dataclass
class _File:
    """One file, in either schema."""

    path: Path

    def __post_init__(self) -> None:
        try:
            self._lines = IndexedLines(self.path)
            first = next((line for line in self._lines if line.strip()), None)
        except OSError as error:
            wanted = "expected a file of dialogues, ours or SAGE's"
            raise DialogueLogError(f"{self.path}: {error.strerror}; {wanted}") from None
        if first is None:
            raise DialogueLogError(f"{self.path}: is empty; expected one dialogue a line, ours or in SAGE's schema")
        self._sage = b'"history"' in first

    def __iter__(self) -> Iterator[tuple[int, Transcript]]:
        """(index of its line, dialogue); blank lines are passed over in SAGE's schema alone."""
        for index, line in enumerate(self._lines):
            if not self._sage or line.strip():
                yield index, self._dialogue(line, index)

    def again(self, index: int) -> Transcript:
        """A dialogue that has been read, by its line."""
        return self._dialogue(self._lines.read(index), index)

    def _dialogue(self, line: bytes, index: int) -> Transcript:
        source = f"{self.path}:{index + 1}"
        if self._sage:
            return _of_sage(line, source)
        record = parse_dialogue(line, source, number_faults)
        return Transcript(record, None, f"{self.path}: dialogue {record['dialogue']}")


def _of_sage(line: bytes, source: str) -> Transcript:
    try:
        obj = parse_line(line)
        record, profile = from_sage(obj), Profile.from_json(obj)
    except ProfileError as error:
        raise DialogueLogError(f"{source}: {'; '.join(error.faults)}; {REMEDY}") from None
    except ValueError as error:
        raise DialogueLogError(f"{source}: {error}; {REMEDY}") from None
    fault = next(record_faults(record), None)
    if fault is not None:
        raise DialogueLogError(f"{source}: {fault}; {REMEDY}")
    return Transcript(record, profile, source)


class LazySequence(ComputedSequence[T]):
    """What is made of each element of a sequence, anew whenever it is asked for: only one needs to be in memory."""

    def __init__(self, of: Sequence[S], make: Callable[[int, S], T]):
        """`make` gets index and element."""
        self._of, self._make = of, make

    def __len__(self) -> int:
        return len(self._of)

    def _compute(self, index: int) -> T:
        return self._make(index, self._of[index])

    def __eq__(self, other: object) -> bool:
        return isinstance(other, Sequence) and len(self) == len(other) and all(map(operator.eq, self, other))

    __hash__ = None  # type: ignore[assignment]


class TranscriptFiles(ComputedSequence[Transcript]):
    """The dialogues of files: logs of ours, results of SAGE or logs of RLVER's simulator.

    `scan` reads and checks them all, and must have come to its end before they are asked for one by one; those are read
    again. With more than one file, they are numbered anew from 0 over all of them.
    """

    def __init__(self, paths: Sequence[str | Path]):
        """Raises DialogueLogError where a file is named twice."""
        self.paths = [str(path) for path in paths]
        if len(set(self.paths)) < len(self.paths):
            raise DialogueLogError(f"found a file twice in {', '.join(self.paths)}; name each once")
        self._files: list[_File] = []
        self._positions = array("q")  # file and line of each

    def scan(self) -> Iterator[tuple[str, Transcript]]:
        """(file, dialogue) of all.

        Raises:
            DialogueLogError: no such file, no dialogue in it, or a line that is none; with file and line.
        """
        for index, path in enumerate(self.paths):
            self._files.append(_File(Path(path)))
            for line, one in self._files[index]:
                self._positions.extend((index, line))
                yield path, self._numbered(one, len(self) - 1)

    def __len__(self) -> int:
        return len(self._positions) // 2

    def _compute(self, index: int) -> Transcript:
        file, line = self._positions[2 * index : 2 * index + 2]
        return self._numbered(self._files[file].again(line), index)

    def _numbered(self, one: Transcript, number: int) -> Transcript:
        if len(self.paths) == 1 and one.profile is None:
            return one  # a log of ours has numbers
        return dataclasses.replace(one, record=one.record | {"dialogue": number})


def finished(records: Sequence[Record], profiles: Sequence[Profile]) -> list[Transcript]:
    """Dialogues that have just been played with these profiles."""
    known = {profile.id: profile for profile in profiles}
    return [Transcript(record, known[record["profile"]], f"dialogue {record['dialogue']}") for record in records]


def with_profile(one: Transcript, known: KnownProfiles) -> Transcript:
    """The dialogue with its profile, which a log of ours doesn't hold.

    Raises:
        ValueError: it is not among the known ones.
    """
    profile = one.profile or known.of(one.record)
    if profile is None:
        raise ValueError(
            f"{one.source}: its profile {shown(one.record['profile'])} is not among the {len(known)} known ones; name "
            f"the file of profiles with --config=… --config.data.eval=FILE"
        )
    return one if one.profile else dataclasses.replace(one, profile=profile)


def with_profiles(dialogues: Sequence[Transcript], known: KnownProfiles) -> Sequence[Transcript]:
    """All dialogues with their profiles; raises as `with_profile`."""
    completed = LazySequence(dialogues, lambda _, one: with_profile(one, known))
    for _ in completed:
        pass
    return completed


def faults(dialogues: Iterable[Transcript], rules: EmotionRules = SAGE) -> list[str]:
    """Every emotion that is not the previous one plus the change."""
    return [f"{d.source}: {fault}" for d in dialogues for fault in emotion_faults(d.record, rules)]
