"""What a judge model fills in about a finished dialogue: the forms of MEASURES, as scripts, in each language."""

import json
from collections.abc import Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass
from importlib import resources
from typing import Any, NamedTuple

import jinja2
from jinja2.sandbox import ImmutableSandboxedEnvironment

from rlver_jax.config.languages import LANGUAGES
from rlver_jax.decoding.script import Part, parse_script
from rlver_jax.dialogues.log import Record
from rlver_jax.dialogues.trajectory import reactions
from rlver_jax.evaluation.measures import FORMS, LETTERS, STRATEGIES
from rlver_jax.evaluation.transcripts import Transcript

INNER = ("activity", "feeling")  # fields of an appraisal: SAGE's Activity and Analyse
_ENV = ImmutableSandboxedEnvironment(
    undefined=jinja2.StrictUndefined, autoescape=False, trim_blocks=True, lstrip_blocks=True
)


class Step(NamedTuple):
    """A piece of a form: what is read, then a field. Without `options` the judge writes a line there."""

    literal: str
    name: str
    options: tuple[str, ...]


class Form(NamedTuple):
    """A form to fill in; all of one name have the same fields."""

    name: str
    steps: tuple[Step, ...]


class Questionnaire(NamedTuple):
    """What a judge model reads before its answer, and the forms, each of which it fills in without the others.

    Attributes:
        temperature: of the free lines; 0: greedy. Equal for all that are filled in together.
        seed: of what a model on the device draws: the same again, whatever is filled in beside it.
    """

    system: str
    text: str
    forms: tuple[Form, ...]
    temperature: float = 0.0
    seed: int = 0


@dataclass(frozen=True)
class Forms:
    """Prompts and forms of one language."""

    language: str
    texts: Mapping[str, str]  # by file name
    scripts: Mapping[str, tuple[Part, ...]]
    strategies: Mapping[str, str]

    def ask(self, dialogue: Transcript, excluded: Collection[str] = ()) -> Questionnaire:
        """All questions about what was said in a dialogue: forms of the whole, then those of each reply.

        Args:
            excluded: forms that are not asked for.
        """
        strategies = zip(LETTERS, STRATEGIES, strict=True)
        slots = {"strategies": "\n".join(f"{letter}: {self.strategies[name]}" for letter, name in strategies)}
        once = [name for name in self.scripts if not FORMS[name][1].each_reply and name not in excluded]
        whole = [self._form(name, slots) for name in once]
        replies = [
            self._form(name, slots | {"turn": str(turn + 1)})
            for turn in range(dialogue.record["turns"])
            for name in self.scripts
            if FORMS[name][1].each_reply
        ]
        text = _ENV.from_string(self.texts["conversation.j2"]).render(
            hidden_intention=dialogue.record["hidden_intention"].strip(), messages=list(_messages(dialogue.record))
        )
        return Questionnaire(self.texts["system.j2"].strip(), text.strip(), (*whole, *replies))

    def ask_of_thoughts(self, dialogue: Transcript) -> Questionnaire:
        """The relationship inventory, to be filled in from the user's inner thoughts alone; no form without any."""
        thoughts = list(_thoughts(dialogue.record))
        text = _ENV.from_string(self.texts["thoughts.j2"]).render(thoughts=thoughts)
        forms = (self._form("relationship", {}),) if thoughts and "relationship" in self.scripts else ()
        return Questionnaire(self.texts["thoughts_system.j2"].strip(), text.strip(), forms)

    def _form(self, name: str, slots: Mapping[str, str]) -> Form:
        return Form(name, tuple(_steps(self.scripts[name], FORMS[name][1].choices, slots)))

    def request(self, form: str, *, text: str | None = None) -> str:
        """A request to a model in text: to fill in a form about a conversation, or without `text` what it omitted."""
        return _ENV.from_string(self.texts["form.j2"]).render(form=form, text=text).strip()


def load_forms(language: str) -> Forms:
    """Our forms in one of LANGUAGES: of every measure whose form is written in it.

    Raises:
        ValueError: another language.
    """
    prompts = resources.files("rlver_jax.evaluation") / "prompts"
    folder = prompts / language
    if language not in LANGUAGES or not folder.is_dir():
        known = ", ".join(name for name in LANGUAGES if (prompts / name).is_dir())
        raise ValueError(f"language {language!r} has no forms: use one of {known}")
    texts = {file.name: file.read_text(encoding="utf-8") for file in folder.iterdir()}
    unknown = {name for name in texts if name.endswith(".script")} - {f"{form}.script" for form in FORMS}
    assert not unknown, f"{language}: no entry of MEASURES has the form {', '.join(sorted(unknown))}"
    scripts = {}
    for form, (_, measure) in FORMS.items():
        file = f"{form}.script"
        if file not in texts:
            continue
        parts = parse_script(texts[file], f"{language}/{file}", measure.slots)
        choices = [part.value for part in parts if part.kind == "choose"]
        expected = list(measure.choices)
        assert choices == expected, f"{language}/{file} asks for {choices}, expected {expected}"
        scripts[form] = parts
    return Forms(language, texts, scripts, json.loads(texts["strategies.json"]))


def _steps(parts: Sequence[Part], choices: Mapping[str, tuple[str, ...]], slots: Mapping[str, str]) -> Iterator[Step]:
    literal = ""
    for part in parts:
        if part.kind in ("text", "slot"):
            literal += part.value if part.kind == "text" else slots[part.value]
            continue
        yield Step(literal, part.value, choices[part.value] if part.kind == "choose" else ())
        literal = "" if part.kind == "choose" else "\n"  # an option brings its line end


def _thoughts(record: Record) -> Iterator[dict[str, Any]]:
    """What went through the user after each reply that it appraised: as SAGE does, its activity and what it felt.

    Of scripts that ask for neither, whatever else they ask for.
    """
    appraised = [(turn + 1, user["appraisal"]) for turn, _, user in reactions(record)]
    inner = [name for name in INNER if any(appraisal.get(name) for _, appraisal in appraised)]
    for turn, appraisal in appraised:
        text = " ".join(" ".join(appraisal.get(name, "") for name in inner or appraisal).split())
        if text:
            yield {"turn": turn, "text": text}


def _messages(record: Record) -> Iterator[dict[str, Any]]:
    """The messages, each on one line: a reply can't write another speaker's lines."""
    turn = 0
    for message in record["messages"]:
        turn += message["role"] == "assistant"
        text = " ".join((message["content"] or "").split())
        if text or message["role"] == "assistant":
            yield {"turn": turn if message["role"] == "assistant" else 0, "text": text or "…"}
