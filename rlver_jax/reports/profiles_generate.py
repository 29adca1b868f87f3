"""`rlver profiles generate`: new profiles in RLVER's schema, which a model writes from seeds.

The model fills in a form of free lines, as judges do: on the device a field can't be anything but a line, at an
endpoint answers are stored, so that nothing is paid for twice. What is unusable is refused, and the next seed takes its
place.
"""

import dataclasses
import json
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from ml_collections import ConfigDict

from rlver_jax.config.flags import import_remote
from rlver_jax.endpoints.usage import summed, usage_text
from rlver_jax.evaluation.forms import Form, Questionnaire, Step
from rlver_jax.evaluation.rater import DeviceRater, Rater
from rlver_jax.profiles.schema import Profile, read_profiles
from rlver_jax.profiles.seeds import SIMILAR, Seed, SeedError, describe_profiles, similarity, text_of
from rlver_jax.runs.files import write_json
from rlver_jax.text.command import Command
from rlver_jax.user.prompts import Prompts

PROGRESS, TRAIN, TEST = "progress.json", "train.jsonl", "test.jsonl"
SHORTEST = {"en": 12, "zh": 6}  # characters of a field, about two words
_SYSTEM = {
    "en": "You write profiles of people for conversations that somebody plays. Concrete, plausible, in plain English.",
    "zh": "你为可扮演的对话编写人物档案：具体、可信、语言平实。",
}
# The hidden intention is not told: a small model copies it into what the person says first.
_TEXT = {
    "en": "A person: {persona}\nWhat it is about: {topic}\nWrite this person's profile.",
    "zh": "人物：{persona}\n话题：{topic}\n写出此人的档案。",
}
_HEADINGS = {
    "en": {
        "player": "Who the person is and how it talks, beginning with a name and an age:",
        "temper": "Its temper, in a word or two:",
        "scene": "What happened, with details that may come up:",
        "first_talk": "The first thing that the person says:",
    },
    "zh": {
        "player": "此人是谁、怎样说话，以姓名和年龄开头：",
        "temper": "性格，一两个词：",
        "scene": "发生了什么，带上可能谈到的细节：",
        "first_talk": "此人开口说的第一句话：",
    },
}


@dataclasses.dataclass
class Generation:
    """Profiles of one folder while they are made; `tried` are numbers of seeds, with why one was refused."""

    folder: Path
    profiles: dict[str, list[Profile]]  # by file
    tried: dict[int, str]
    usage: list[dict[str, Any]]
    against: list[str]  # texts that new profiles must not resemble
    shortest: int  # characters of a field

    @classmethod
    def open(cls, folder: Path, settings: dict[str, Any], against: Sequence[Profile], shortest: int) -> "Generation":
        """A new folder, or one that is continued.

        Raises:
            SeedError: the folder was made with other settings, or holds something else.
        """
        noted: dict[str, Any] = {"settings": settings, "tried": {}, "usage": [], "profiles": {TRAIN: [], TEST: []}}
        if (folder / PROGRESS).exists():
            noted = json.loads((folder / PROGRESS).read_text(encoding="utf-8"))
        elif folder.exists() and any(folder.iterdir()):
            raise SeedError(f"{folder}: is not empty and holds no {PROGRESS}; name another --out")
        if noted["settings"] != settings:
            differ = ", ".join(name for name in settings if noted["settings"].get(name) != settings[name])
            raise SeedError(f"{folder}: was made with other {differ}; name another --out")
        folder.mkdir(parents=True, exist_ok=True)
        profiles = {file: [Profile.from_json(one) for one in noted["profiles"][file]] for file in (TRAIN, TEST)}
        texts = [text_of(profile) for profile in (*against, *profiles[TRAIN], *profiles[TEST])]
        tried = {int(number): why for number, why in noted["tried"].items()}
        return cls(folder, profiles, tried, noted["usage"], texts, shortest)

    @property
    def count(self) -> int:
        """Profiles so far."""
        return sum(map(len, self.profiles.values()))

    def take(self, seed: Seed, wish: str, lines: dict[str, Any], remote: dict[str, Any] | None) -> None:
        """Takes an answer: a profile, or why it is refused. `wish`: the sentence of the seed's intention."""
        made, why = profile_of(seed, wish, lines, self.shortest)
        if made is not None and (near := similarity(text_of(made), self.against)) >= SIMILAR:
            made, why = None, f"resembles another profile ({near:.0f} of 100)"
        self.tried[seed.number] = why
        self.usage += [remote] if remote else []
        if made is not None:
            self.against.append(text_of(made))
            self.profiles[TEST if seed.held_out else TRAIN].append(made)

    def save(self, settings: dict[str, Any]) -> None:
        """Writes what there is: the progress, and the two files."""
        made = {file: [profile.to_json() for profile in profiles] for file, profiles in self.profiles.items()}
        for file, records in made.items():
            text = "".join(json.dumps(one, ensure_ascii=False) + "\n" for one in records)
            (self.folder / file).write_text(text, encoding="utf-8")
        noted = {"settings": settings, "tried": self.tried, "usage": self.usage, "profiles": made}
        write_json(self.folder / PROGRESS, noted)


def generate(
    command: Command, config: ConfigDict, prompts: Prompts, seeds: Sequence[Seed], count: int, folder: Path,
    against: Sequence[str],
) -> bool:  # fmt: skip
    """Makes profiles until there are `count`, or no seed is left; returns whether there are.

    Raises:
        ValueError, OSError: the model or the folder cannot be used.
    """
    if prompts.language not in _TEXT:
        raise SeedError(f"data.language={prompts.language!r}: profiles are written in {', '.join(_TEXT)}")
    similarity("", [""])  # says what is missing before anything is asked
    published = read_profiles(against) if against else []
    rater = _rater(config, folder)
    temperature = float(config.user.reply_temperature)
    settings = {"seeds": [list(seed) for seed in seeds], "model": rater.settings, "against": len(published)}
    settings = json.loads(json.dumps(settings | {"temperature": temperature}))
    made = Generation.open(folder, settings, published, SHORTEST[prompts.language])
    while made.count < count and (chosen := [s for s in seeds if s.number not in made.tried][: count - made.count]):
        questions = [_questionnaire(prompts.language, seed, temperature) for seed in chosen]
        for batch in rater.fill(questions, lambda work: None):
            for index, rated in sorted(batch):
                made.take(chosen[index], _wish(prompts, chosen[index]), rated.answers[0], rated.remote)
            made.save(settings)
            command.print(f"{made.count} of {count} profiles, {len(made.tried)} seeds tried")
    for text in _told(made, published):
        command.print(text)
    return made.count >= count


def profile_of(seed: Seed, wish: str, lines: dict[str, Any], shortest: int) -> tuple[Profile | None, str]:
    """The profile in a form that was filled in, or None and why it is refused.

    Args:
        wish: the sentence of the seed's intention.
        shortest: characters that a field has at least.
    """
    texts = {name: " ".join(str(lines.get(name) or "").split()) for name in _HEADINGS["en"]}
    short = [name for name in ("player", "scene", "first_talk") if len(texts[name]) < shortest]
    if short:
        return None, f"{', '.join(short)}: fewer than {shortest} characters"
    if len(set(texts.values())) < len(texts):
        return None, "says the same in two fields"
    if told := [name for name in ("player", "scene", "first_talk") if similarity(texts[name], [wish]) >= SIMILAR]:
        return None, f"{', '.join(told)}: the secret wish itself"
    if "\ufffd" in "".join(texts.values()):
        return None, "holds characters that are none"
    temper = texts["temper"][:40] or "unknown"
    return Profile(
        f"generated-{seed.number:06d}", texts["player"], texts["scene"], seed.intention, temper, (), seed.topic,
        texts["first_talk"],
    ), ""  # fmt: skip


def _wish(prompts: Prompts, seed: Seed) -> str:
    known = prompts.intention(seed.intention)
    return known.sentence if known else seed.intention


def _questionnaire(language: str, seed: Seed, temperature: float) -> Questionnaire:
    text = _TEXT[language].format(persona=seed.persona, topic=seed.topic)
    lines = [f"{heading} " for heading in _HEADINGS[language].values()]
    literals = [lines[0], *("\n" + line for line in lines[1:])]
    steps = tuple(Step(text, name, ()) for text, name in zip(literals, _HEADINGS[language], strict=True))
    return Questionnaire(_SYSTEM[language], text, (Form("profile", steps),), temperature, seed.number)


def _rater(config: ConfigDict, folder: Path) -> Rater:
    """The model at remote.user, or user.path on the device."""
    if not config.remote.user.url:
        return DeviceRater.load(config, "the user")
    folder.mkdir(parents=True, exist_ok=True)
    return import_remote("rlver_jax.evaluation.judge_at_endpoint").RemoteRater.load(config, "the user", folder)


def _told(made: Generation, published: Sequence[Profile]) -> Iterator[str]:
    """What has come of it."""
    refused: dict[str, int] = {}
    for why in made.tried.values():
        kind = why.split(" (")[0]
        refused |= {kind: refused.get(kind, 0) + 1} if why else {}
    if refused:
        yield "refused: " + "; ".join(f"{count} x {why}" for why, count in refused.items())
    for file, profiles in made.profiles.items():
        if profiles:
            yield f"{made.folder / file}: {describe_profiles(profiles)}"
    if published:
        yield f"beside those of --against: {describe_profiles(published)}"
    if made.usage:
        yield f"at the endpoint: {usage_text(summed(made.usage))}"
