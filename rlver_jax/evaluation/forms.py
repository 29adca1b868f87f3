"""What a judge model fills in about a finished dialogue: our forms, as scripts, and what the answers amount to.

Beyond the emotion: five capabilities (1–5); a relationship inventory of twelve items in four facets after
Barrett-Lennard's (worded by us; -3..+3); three qualities and a strategy label of each reply; the place of the policy's
manner in the social-cognition coordinate of SAGE (arXiv 2505.02847), empathy–solution by structured–creative; and of
the user, how plainly it said what it needs (1–5).
A choice becomes a number as the mean of its scale under the judge's probabilities: a rating of 3.4 is a judge in doubt.
"""

import json
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from importlib import resources
from typing import Any, NamedTuple

import jinja2
from jinja2.sandbox import ImmutableSandboxedEnvironment

from rlver_jax.decoding.script import Part, parse_script
from rlver_jax.dialogues.log import Record
from rlver_jax.evaluation.transcripts import Transcript
from rlver_jax.user.prompts import LANGUAGES

RATING = ("1", "2", "3", "4", "5")
TRUTH = ("-3", "-2", "-1", "+1", "+2", "+3")
CAPABILITIES = ("empathic_depth", "core_insight", "solution_crafting", "dialogue_guidance", "style_adaptability")
QUALITIES = ("natural", "attentive", "connecting")
# The relationship inventory: facet, its items. Those of the last item of each facet are worded against it.
FACETS = {
    "regard": ("regard_mattered", "regard_welcome", "regard_case"),
    "empathy": ("empathy_unsaid", "empathy_viewpoint", "empathy_surface"),
    "acceptance": ("acceptance_steady", "acceptance_moods", "acceptance_terms"),
    "genuineness": ("genuineness_honest", "genuineness_present", "genuineness_role"),
}
REVERSED = tuple(items[-1] for items in FACETS.values())
AXES = ("solution", "creative")
PERSON = ("need_expression",)
STRATEGIES = (
    *("question", "restatement", "reflection", "validation", "praise", "companionship", "self_disclosure", "analysis"),
    *("reframing", "confrontation", "suggestion", "information", "encouragement", "other"),
)
LETTERS = "abcdefghijklmnopqrstuvwxyz"[: len(STRATEGIES)]
# Form: what its choices are among.
_CHOICES: dict[str, dict[str, tuple[str, ...]]] = {
    "capabilities": dict.fromkeys(CAPABILITIES, RATING),
    "relationship": dict.fromkeys([item for items in FACETS.values() for item in items], TRUTH),
    "coordinate": dict.fromkeys(AXES, RATING),
    "person": dict.fromkeys(PERSON, RATING),
    "reply": dict.fromkeys(QUALITIES, RATING) | {"strategy": tuple(LETTERS)},
}
_SLOTS = {"reply": ("turn", "strategies")}
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


class Asked(NamedTuple):
    """What a judge model reads before its answer, and the forms, each of which it fills in without the others."""

    system: str
    text: str
    forms: tuple[Form, ...]


# A line, or the probability of each option, which sum to 1; none where a model in text gave no answer.
Answer = str | dict[str, float]
Answers = dict[str, Answer]  # by field


@dataclass(frozen=True)
class Forms:
    """Prompts and forms of one language."""

    language: str
    texts: Mapping[str, str]  # by file name
    scripts: Mapping[str, tuple[Part, ...]]
    strategies: Mapping[str, str]

    def ask(self, dialogue: Transcript) -> Asked:
        """Everything that is asked about a dialogue: four forms of the whole, then one of each reply."""
        turns = dialogue.record["turns"]
        values = {
            "strategies": "\n".join(f"{a}: {self.strategies[s]}" for a, s in zip(LETTERS, STRATEGIES, strict=True))
        }
        whole = [Form(name, tuple(_steps(self.scripts[name], name, {}))) for name in _CHOICES if name != "reply"]
        replies = [
            Form("reply", tuple(_steps(self.scripts["reply"], "reply", values | {"turn": str(turn + 1)})))
            for turn in range(turns)
        ]
        text = _ENV.from_string(self.texts["conversation.j2"]).render(
            hidden_intention=dialogue.record["hidden_intention"].strip(), messages=list(_spoken(dialogue.record))
        )
        return Asked(self.texts["system.j2"].strip(), text.strip(), (*whole, *replies))

    def request(self, form: str, *, text: str | None = None) -> str:
        """What a model in text is asked: to fill in a form about a conversation, or without `text` what it left out."""
        return _ENV.from_string(self.texts["form.j2"]).render(form=form, text=text).strip()


def load_forms(language: str) -> Forms:
    """Our forms in "zh" or "en".

    Raises:
        ValueError: another language.
    """
    if language not in LANGUAGES:
        raise ValueError(f"language {language!r} has no forms: use one of {', '.join(LANGUAGES)}")
    folder = resources.files("rlver_jax.evaluation") / "prompts" / language
    texts = {file.name: file.read_text(encoding="utf-8") for file in folder.iterdir()}
    scripts = {}
    for name, choices in _CHOICES.items():
        parts = parse_script(texts[f"{name}.script"], f"{language}/{name}.script", _SLOTS.get(name, ()))
        found = [part.value for part in parts if part.kind == "choose"]
        assert found == list(choices), f"{language}/{name}.script asks for {found}, expected {list(choices)}"
        scripts[name] = parts
    return Forms(language, texts, scripts, json.loads(texts["strategies.json"]))


def _steps(parts: Sequence[Part], form: str, values: Mapping[str, str]) -> Iterator[Step]:
    literal = ""
    for part in parts:
        if part.kind in ("text", "slot"):
            literal += part.value if part.kind == "text" else values[part.value]
            continue
        yield Step(literal, part.value, _CHOICES[form][part.value] if part.kind == "choose" else ())
        literal = "" if part.kind == "choose" else "\n"  # an option brings its line end


def _spoken(record: Record) -> Iterator[dict[str, Any]]:
    """What was said aloud, each on one line: a reply can't write another speaker's lines."""
    turn = 0
    for message in record["messages"]:
        turn += message["role"] == "assistant"
        text = " ".join((message["content"] or "").split())
        if text or message["role"] == "assistant":
            yield {"turn": turn if message["role"] == "assistant" else 0, "text": text or "…"}


def measures_of(answers: Sequence[Answers], judge: str) -> dict[str, Any]:
    """What the answers to `Forms.ask` amount to, as a dialogue's `measures`; None where an answer is missing.

    `capabilities` 1..5; `relationship`: `items` -3..3 as worded, `facets` and `total` with reversed items turned round;
    `replies`: qualities 1..5 and the strategy of each; `coordinate`: both axes -1..1, `solution` from empathy to
    solutions, `creative` from structured to creative; `person`: of the user, 1..5.
    """
    capabilities, relationship, coordinate, person, *replies = answers
    items = {name: _mean(relationship[name]) for names in FACETS.values() for name in names}
    turned = {name: value and value * (-1 if name in REVERSED else 1) for name, value in items.items()}
    facets = {facet: _average([turned[name] for name in names]) for facet, names in FACETS.items()}
    return {
        "judge": judge,
        "evidence": capabilities["evidence"],
        "capabilities": {name: _mean(capabilities[name]) for name in CAPABILITIES},
        "relationship": {"total": _average(list(facets.values())), "facets": facets, "items": items},
        "replies": [
            {name: _mean(reply[name]) for name in QUALITIES} | {"strategy": _label(reply["strategy"])}
            for reply in replies
        ],
        "coordinate": {name: _mean(coordinate[name], centre=3, scale=2) for name in AXES},
        "person": {name: _mean(person[name]) for name in PERSON},
        "unanswered": sum(answer == {} for form in answers for answer in form.values()),
    }


def _mean(answer: Answer, centre: float = 0, scale: float = 1) -> float | None:
    assert isinstance(answer, dict)
    return (float(sum(float(option) * p for option, p in answer.items())) - centre) / scale if answer else None


def _average(values: Sequence[float | None]) -> float | None:
    """None where one is missing: a mean of the others would be of another scale."""
    known = [value for value in values if value is not None]
    return sum(known) / len(known) if len(known) == len(values) else None


def _label(answer: Answer) -> str | None:
    assert isinstance(answer, dict)
    return STRATEGIES[LETTERS.index(max(answer, key=lambda option: answer[option]))] if answer else None
