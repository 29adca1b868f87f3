"""Finished dialogues from files: our own logs, SAGE's results or RLVER's logs, told apart by their first line."""

import codecs
import dataclasses
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from rlver_jax.profiles.schema import Profile, ProfileError, parse_line
from rlver_jax.runs.dialogue_log import DialogueLogError, Record, read_dialogues, record_faults
from rlver_jax.runs.known_profiles import KnownProfiles
from rlver_jax.runs.sage import from_sage
from rlver_jax.runs.trajectory import emotion_faults, emotions_of, reactions
from rlver_jax.user.emotion import HIGHEST, LOWEST, SAGE, EmotionRules


@dataclasses.dataclass(frozen=True)
class Finished:
    """A dialogue that has been played, with its profile where that is known, and where it was read."""

    record: Record
    profile: Profile | None
    place: str


class Turn(NamedTuple):
    """What one appraised turn was, and what its own user made of it."""

    turn: int
    heard: Mapping[str, Any]  # the user's message before the reply
    spoken: Mapping[str, Any]  # the policy's reply
    emotion: int  # before, as a judge reads it: see `within`
    change: int


def turns_of(record: Record) -> list[Turn]:
    """The turns that the dialogue's own user appraised."""
    emotions, found, heard = emotions_of(record), [], record["messages"][0]
    for turn, spoken, user in reactions(record):
        found.append(Turn(turn, heard, spoken, within(emotions[turn]), user["change"]))
        heard = user
    return found


def within(emotion: int) -> int:
    """An emotion of a record as a judge reads it: 0 to 100, below which RLVER's logs may go."""
    return min(max(emotion, LOWEST), HIGHEST)


def read_finished(path: str | Path) -> list[Finished]:
    """The dialogues of a log of ours (`dialogues.jsonl`), a result file of SAGE or a log of RLVER's simulator.

    Raises:
        DialogueLogError: no such file, no dialogue in it, or a line that is none; with file and line.
    """
    path = Path(path)
    try:
        lines = path.read_bytes().removeprefix(codecs.BOM_UTF8).split(b"\n")
    except OSError as error:
        raise DialogueLogError(f"{path}: {error.strerror}; expected a file of dialogues, ours or SAGE's") from None
    first = next((line for line in lines if line.strip()), None)
    if first is None:
        raise DialogueLogError(f"{path}: is empty; expected one dialogue a line, ours or in SAGE's schema")
    if b'"history"' not in first:
        records = read_dialogues(path)
        return [Finished(record, None, f"{path}: dialogue {record['dialogue']}") for record in records]
    return list(_sage_lines(path, lines))


def _sage_lines(path: Path, lines: Sequence[bytes]) -> Iterator[Finished]:
    count = 0
    for number, line in enumerate(lines, start=1):
        if not line.strip():
            continue
        place = f"{path}:{number}"
        remedy = "restore the line, or remove it to go on without this dialogue"
        try:
            obj = parse_line(line)
            record, profile = from_sage(obj, count), Profile.from_json(obj)
        except ProfileError as error:
            raise DialogueLogError(f"{place}: {'; '.join(error.faults)}; {remedy}") from None
        except ValueError as error:
            raise DialogueLogError(f"{place}: {error}; {remedy}") from None
        fault = next(record_faults(record), None)
        if fault is not None:
            raise DialogueLogError(f"{place}: {fault}; {remedy}")
        yield Finished(record, profile, place)
        count += 1


def read_all(paths: Sequence[str]) -> dict[str, list[Finished]]:
    """Several files; with more than one, the dialogues are numbered anew from 0 over all of them.

    Raises:
        DialogueLogError: as `read_finished`, or a file named twice.
    """
    if len(set(paths)) < len(paths):
        raise DialogueLogError(f"found a file twice in {', '.join(paths)}; name each once")
    files, count = {path: read_finished(path) for path in paths}, 0
    if len(files) == 1:
        return files
    for path, dialogues in files.items():
        numbered = [d.record | {"dialogue": count + i} for i, d in enumerate(dialogues)]
        files[path] = [dataclasses.replace(d, record=r) for d, r in zip(dialogues, numbered, strict=True)]
        count += len(dialogues)
    return files


def finished(records: Sequence[Record], profiles: Sequence[Profile]) -> list[Finished]:
    """Dialogues that have just been played with these profiles."""
    known = {profile.id: profile for profile in profiles}
    return [Finished(record, known[record["profile"]], f"dialogue {record['dialogue']}") for record in records]


def with_profiles(dialogues: Sequence[Finished], profiles: Sequence[Profile]) -> list[Finished]:
    """The dialogues with their profiles, which a log of ours doesn't hold.

    Raises:
        ValueError: a dialogue whose profile is not among them.
    """
    known = KnownProfiles(profiles)
    found = [d if d.profile else dataclasses.replace(d, profile=known.of(d.record)) for d in dialogues]
    for one in found:
        if one.profile is None:
            raise ValueError(
                f"{one.place}: its profile {one.record['profile']!r} is not among the {len(known)} known ones; name "
                f"the file of profiles with --config=… --config.data.eval=FILE"
            )
    return found


def faults(dialogues: Sequence[Finished], rules: EmotionRules = SAGE) -> list[str]:
    """Every place where an emotion is not the previous one plus the change."""
    return [f"{d.place}: {fault}" for d in dialogues for fault in emotion_faults(d.record, rules)]
