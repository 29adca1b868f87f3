"""One profile of a simulated user, as RLVER's and SAGE's files write it, and a strict reader of such files.

RLVER (arXiv 2507.03112) publishes one JSON object a line: `id`, `player` (the persona), `scene`, `main_cha`,
`cha_group` (character traits), `task` (the hidden intention) and, in its test set, `first_talk`. SAGE (arXiv
2505.02847) writes results that carry the profile too: `character` stands for `main_cha`, `topic` is new, and
the first talk opens `history`. RLVER's simulator logs dialogues like SAGE's results, without `task`: there the hidden
intention is what the scene ends with. All are read into `Profile`; other keys of a line (SAGE's `emo_point`, …) are
not ours and are left alone.
"""

import dataclasses
import json
import os
import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import IO, Any

from rlver_jax.config.paths import nearest
from rlver_jax.profiles.intentions import HiddenIntention, Kind, known_intention
from rlver_jax.text.strict_json import half_character, repeats

PathLike = str | os.PathLike[str]
Paths = PathLike | Iterable[PathLike]

MAX_FAULTS_SHOWN = 20
# Fields that may be absent: spelt otherwise they would be passed over without a word.
_OPTIONAL = {"firsttalk": "first_talk", "topic": "topic"}
BYTE_ORDER_MARK = b"\xef\xbb\xbf"

# How published scenes end: a heading, then `***` and the hidden intention.
_SCENE_ENDING = re.compile(
    r"\n?####[ \t]*(?:隐藏主题|hidden (?:theme|intention))[ \t]*[:：]?[ \t]*\n\*\*\*(?P<intention>[^\n]*)\s*\Z",
    re.IGNORECASE,
)


class ProfileError(ValueError):
    """Profiles that cannot be used. `faults` holds every fault found; the message shows the first twenty."""

    def __init__(self, faults: Sequence[str]):
        self.faults = tuple(faults)
        super().__init__(self.faults)  # as the only argument, so that the error survives pickling between processes

    def __str__(self) -> str:
        count = len(self.faults)
        shown = "\n".join(f"  {fault}" for fault in self.faults[:MAX_FAULTS_SHOWN])
        rest = f"\n  … and {count - MAX_FAULTS_SHOWN} more" if count > MAX_FAULTS_SHOWN else ""
        return f"{count} fault{'s' * (count != 1)} in the profiles, none was loaded; correct:\n{shown}{rest}"


@dataclasses.dataclass(frozen=True)
class Profile:
    """One simulated user, as written; texts are kept to the letter, white space included.

    `persona` is who the user is, `scene` what happened to them (a published scene ends with the hidden
    intention; see `background`), `hidden_intention` the wish it must not reveal, `main_character` and
    `traits` labels of its temper, `topic` (SAGE only) a label of the scene, `first_talk` the words that open
    the dialogue, where known.
    """

    id: str
    persona: str
    scene: str
    hidden_intention: str
    main_character: str
    traits: tuple[str, ...] = ()
    topic: str | None = None
    first_talk: str | None = None

    @classmethod
    def from_json(cls, obj: object) -> "Profile":
        """The profile in one parsed JSON value of RLVER's or SAGE's schema (told apart by their keys).

        Without `task` the hidden intention is the sentence that the scene ends with.

        Raises `ProfileError` with every fault of the object; keys that are far from a profile's are not looked at.
        """
        if not isinstance(obj, dict):
            raise ProfileError([f"found {_describe(obj)}, expected a JSON object with the fields of a profile"])
        taker = _Taker(obj)
        taker.spelling()
        sage = "history" in obj or ("character" in obj and "main_cha" not in obj)
        profile = cls(
            id=taker.text("id"),
            persona=taker.text("player"),
            scene=taker.text("scene"),
            hidden_intention=taker.intention("task", "scene"),
            main_character=taker.text("character" if sage else "main_cha"),
            traits=() if sage else taker.texts("cha_group"),
            topic=taker.optional_text("topic") if not sage or obj.get("topic") else None,
            first_talk=taker.opening("history") if sage else taker.optional_text("first_talk"),
        )
        ending = _SCENE_ENDING.search(profile.scene)
        if ending and profile.hidden_intention and ending["intention"].strip() != profile.hidden_intention.strip():
            taker.faults.append(
                f"field 'scene' ends with the hidden intention {_short(ending['intention'])} but field 'task' says "
                f"{_short(profile.hidden_intention)}, expected the same sentence in both"
            )
        if taker.faults:
            raise ProfileError(taker.faults)
        return profile

    def to_json(self) -> dict[str, Any]:
        """The profile in RLVER's schema; `topic` and `first_talk` are left out where unknown."""
        obj: dict[str, Any] = {
            "id": self.id,
            "player": self.persona,
            "scene": self.scene,
            "main_cha": self.main_character,
            "cha_group": list(self.traits),
            "task": self.hidden_intention,
        }
        known = {"topic": self.topic, "first_talk": self.first_talk}
        return obj | {name: text for name, text in known.items() if text is not None}

    @property
    def background(self) -> str:
        """The scene without its closing section, which states the hidden intention (the scene if it has none)."""
        return _SCENE_ENDING.sub("", self.scene)

    @property
    def kind(self) -> Kind | None:
        """Kind of the hidden intention; None if it isn't one of the eight published ones."""
        intention = intention_of(self)
        return intention.kind if intention else None


def intention_of(profile: Profile) -> HiddenIntention | None:
    """Which of the eight hidden intentions a profile holds, by its Chinese or English sentence; else None."""
    return known_intention(profile.hidden_intention)


def intention_at_end(scene: object) -> str | None:
    """The hidden intention that a published scene ends with; None where there is none."""
    ending = _SCENE_ENDING.search(scene) if isinstance(scene, str) else None
    return ending["intention"].strip() or None if ending else None


def read_profiles(paths: Paths) -> list[Profile]:
    """Reads one JSONL file, or several in the order given, in RLVER's or SAGE's schema (or mixed).

    Lines of white space alone are passed over, but count in line numbers; any other line becomes a profile or a fault.
    Ids must be unique over all files.

    Raises `ProfileError` that lists every fault of every file as `file:line: what was found, what is expected`.
    """
    files = as_paths(paths)
    profiles: list[Profile] = []
    faults: list[str] = [] if files else ["no file was given, expected at least one JSONL file of profiles"]
    first_seen: dict[str, str] = {}
    for path in files:
        try:
            for number, line in read_lines(path):
                where = f"{path}:{number}"
                try:
                    profile = Profile.from_json(parse_line(line))
                except ProfileError as error:
                    faults += [f"{where}: {fault}" for fault in error.faults]
                    continue
                if profile.id in first_seen:
                    repeated = f"found id {_short(profile.id)} again, which {first_seen[profile.id]} has already"
                    faults.append(f"{where}: {repeated}, expected ids that differ")
                first_seen.setdefault(profile.id, where)
                profiles.append(profile)
        except ProfileError as error:  # of the file as a whole
            faults += error.faults
    if faults:
        raise ProfileError(faults)
    return profiles


def iter_profiles(paths: Paths) -> Iterator[Profile]:
    """Profiles one after another, which need not fit into memory together; ids are not compared.

    Raises `ProfileError` with the faults of the first line, or file, that can't be used.
    """
    for path in as_paths(paths):
        for number, line in read_lines(path):
            try:
                yield Profile.from_json(parse_line(line))
            except ProfileError as error:
                raise ProfileError([f"{path}:{number}: {fault}" for fault in error.faults]) from None


def as_paths(paths: Paths) -> tuple[Path, ...]:
    """One path or several, as a tuple of `Path`."""
    if isinstance(paths, str | os.PathLike):
        return (Path(paths),)
    return tuple(Path(path) for path in paths)


def read_lines(path: Path) -> Iterator[tuple[int, bytes]]:
    """(number, line) of each line of a file of profiles that is not blank, without a byte order mark.

    Raises `ProfileError` that says what to do if the file is missing, unreadable or empty.
    """
    empty = True
    with open_file(path) as stream:
        try:
            for number, line in enumerate(stream, start=1):  # ends at \n alone: U+2028 may stand inside a string
                line = line.removeprefix(BYTE_ORDER_MARK) if number == 1 else line
                if line.strip():
                    empty = False
                    yield number, line.removesuffix(b"\n")
        except OSError as error:
            raise _unreadable(path, error) from None
    if empty:
        raise empty_file(path)


def open_file(path: Path) -> IO[bytes]:
    """A file of profiles, opened.

    Raises `ProfileError` that says what to do if the file is missing or unreadable.
    """
    try:
        return path.open("rb")
    except FileNotFoundError:
        close = nearest(path)
        otherwise = "check the path, or download RLVER's train_profile.jsonl from its public repository"
        remedy = f"did you mean {close}?" if close else otherwise
        raise ProfileError([f"{path}: found no such file, expected a JSONL file of profiles; {remedy}"]) from None
    except OSError as error:
        raise _unreadable(path, error) from None


def empty_file(path: Path) -> ProfileError:
    """The error for a file without profiles."""
    return ProfileError([f"{path}:1: found an empty file, expected one JSON object a line"])


def _unreadable(path: Path, error: OSError) -> ProfileError:
    return ProfileError([f"{path}: found {error.strerror}, expected a readable JSONL file of profiles"])


def parse_line(line: bytes) -> Any:
    """The JSON value of one line; raises ProfileError with faults that don't yet name the line."""
    try:
        return json.loads(line.decode("utf-8"), object_pairs_hook=_object_without_repeats)
    except ProfileError:
        raise
    except UnicodeDecodeError as error:
        bad = f"byte 0x{line[error.start]:02x} at column {error.start + 1}"
        raise ProfileError([f"found {bad}, expected UTF-8 text; save the file as UTF-8"]) from None
    except json.JSONDecodeError as error:
        bad = f"text that is not JSON ({error.msg}, column {error.colno})"
        raise ProfileError([f"found {bad}, expected one whole JSON object on the line"]) from None
    except (ValueError, RecursionError) as error:  # a number or a nesting that Python refuses
        raise ProfileError([f"found JSON that can't be read ({error}), expected one plain JSON object"]) from None


def _object_without_repeats(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    """A JSON object; a repeated key is a fault, because json would silently keep the last one."""
    obj = dict(pairs)
    if len(obj) < len(pairs):
        twice = sorted(set(repeats(pairs)))
        raise ProfileError([f"found field {name!r} more than once in an object, expected it once" for name in twice])
    return obj


class _Taker:
    """Takes checked values out of a JSON object, noting faults rather than stopping at the first."""

    def __init__(self, obj: Mapping[str, Any]):
        self.obj = obj
        self.faults: list[str] = []

    def spelling(self) -> None:
        """Notes keys that are an optional field's but for case and what joins its words: firstTalk, first-talk."""
        for key in self.obj:
            meant = _OPTIONAL.get(re.sub(r"[\W_]", "", key).lower(), key)
            if meant != key:
                self.faults.append(f"found field {_cut(key)!r}, expected {meant!r}")

    def text(self, name: str) -> str:
        """A required text; the empty string stands in where there is a fault."""
        if name not in self.obj:
            has = ", ".join(sorted(self.obj)) or "no field"
            self.faults.append(f"found no field {name!r}, expected it to hold a text; the object has {_cut(has)}")
            return ""
        return self._checked(f"field {name!r}", self.obj[name])

    def intention(self, name: str, scene: str) -> str:
        """A required text, or where the field is absent or null, the hidden intention that the scene ends with."""
        if self.obj.get(name) is None and (stated := intention_at_end(self.obj.get(scene))):
            return stated
        return self.text(name)

    def optional_text(self, name: str) -> str | None:
        """A text, or None where the field is absent or null."""
        value = self.obj.get(name)
        return None if value is None else self._checked(f"field {name!r}", value)

    def texts(self, name: str) -> tuple[str, ...]:
        """A required list of texts, which may be empty."""
        value = self.obj.get(name)
        if not isinstance(value, list):
            instead = f"{_describe(value)} in field {name!r}" if name in self.obj else f"no field {name!r}"
            self.faults.append(f"found {instead}, expected a list of texts")
            return ()
        return tuple(self._checked(f"item {i} of field {name!r}", item) for i, item in enumerate(value, start=1))

    def opening(self, name: str) -> str | None:
        """The content of the first message of a list of chat messages, which must be the user's."""
        messages = self.obj.get(name)
        first = messages[0] if isinstance(messages, list) and messages else None
        if not isinstance(first, dict) or first.get("role") != "user" or "content" not in first:
            instead = f"{_describe(messages)} in field {name!r}" if name in self.obj else f"no field {name!r}"
            self.faults.append(f"found {instead}, expected a list of messages opened by one of role 'user'")
            return None
        return self._checked(f"the first message of field {name!r}", first["content"])

    def _checked(self, where: str, value: object) -> str:
        """The value if it is a text that can be used, else a fault and the empty string."""
        if not isinstance(value, str):
            self.faults.append(f"found {_describe(value)} in {where}, expected a text")
        elif not value.strip():
            self.faults.append(f"found an empty text in {where}, expected at least one visible character")
        elif half_character(value):
            self.faults.append(f"found half of a surrogate pair (\\ud800-dfff) in {where}, expected whole characters")
        else:
            return value
        return ""


def _describe(value: object) -> str:
    """A JSON value in words, cut short."""
    kinds = {dict: "an object", list: "a list", str: "the text", bool: "the value", type(None): "null"}
    kind = kinds.get(type(value), "the number")
    return kind if value is None else f"{kind} {_cut(json.dumps(value, ensure_ascii=False))}"


def _short(text: str) -> str:
    return _cut(repr(text))


def _cut(text: str, limit: int = 60) -> str:
    return text if len(text) <= limit else text[:limit] + "…"
