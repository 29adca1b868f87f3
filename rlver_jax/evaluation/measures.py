"""Measures beyond the emotion, by a judge model: MEASURES says what each asks, and what its answers amount to.

Beyond the emotion: five capabilities (1-5); a relationship inventory of twelve items in four facets after
Barrett-Lennard's (worded by us; -3..+3), filled in from the user's inner thoughts, as SAGE does (arXiv 2505.02847,
section 3 and appendix H), or from what was said; three qualities and a strategy label of each reply; where the
policy's manner lies in SAGE's social-cognition coordinate (appendix F), structured-creative by solution-empathy; and of
the user, how plainly it said what it needs (1-5).
A choice becomes a number as the mean of its scale under the judge's probabilities: a rating of 3.4 is a judge in doubt.

A new measure is an entry of MEASURES, and its form as `prompts/LANGUAGE/FORM.script` for each of LANGUAGES.
"""

import collections
import dataclasses
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

from rlver_jax.dialogues.log import Record
from rlver_jax.dialogues.trajectory import reactions
from rlver_jax.evaluation.statistics import mean_with_interval

# A line, or the probability of each option, which sum to 1; none where a model in text gave no answer.
Answer = str | dict[str, float]
Answers = dict[str, Answer]  # by field
Numbers = Mapping[str, float | None]  # by flat name; None where an answer is missing

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
AXES = ("creative", "empathy")  # of the social-cognition coordinate, x and y
THOUGHTS, SPEECH = "thoughts", "speech"  # what a form may be filled in from
STRATEGIES = (
    *("question", "restatement", "reflection", "validation", "praise", "companionship", "self_disclosure", "analysis"),
    *("reframing", "confrontation", "suggestion", "information", "encouragement", "other"),
)
LETTERS = "abcdefghijklmnopqrstuvwxyz"[: len(STRATEGIES)]


def _mean(answer: Answer, centre: float = 0, scale: float = 1) -> float | None:
    assert isinstance(answer, dict)
    return (float(sum(float(option) * p for option, p in answer.items())) - centre) / scale if answer else None


def _average(values: Sequence[float | None]) -> float | None:
    """None where one is missing: a mean of the others would be of another scale."""
    known = [value for value in values if value is not None]
    return sum(known) / len(known) if len(known) == len(values) else None


def _means(answers: Answers) -> dict[str, float | None]:
    return {name: _mean(answer) for name, answer in answers.items() if not isinstance(answer, str)}


def _coordinates(answers: Answers) -> dict[str, float | None]:
    """Ratings 1..5 as -1..1."""
    return {name: _mean(answers[name], centre=3, scale=2) for name in AXES}


def _inventory(answers: Answers) -> dict[str, Any]:
    """`items` as worded; `facets` and their `total` with reversed items turned round."""
    items = {name: _mean(answers[name]) for names in FACETS.values() for name in names}
    turned = {name: value and value * (-1 if name in REVERSED else 1) for name, value in items.items()}
    facets = {facet: _average([turned[name] for name in names]) for facet, names in FACETS.items()}
    return {"total": _average(list(facets.values())), "facets": facets, "items": items}


def _inventory_numbers(relationship: Mapping[str, Any]) -> Numbers:
    return {"total": relationship["total"], **relationship["facets"]}


def _reply(answers: Answers) -> dict[str, Any]:
    label = answers["strategy"]
    assert isinstance(label, dict)
    strategy = STRATEGIES[LETTERS.index(max(label, key=lambda option: label[option]))] if label else None
    return {name: _mean(answers[name]) for name in QUALITIES} | {"strategy": strategy}


def _reply_numbers(replies: Sequence[Mapping[str, Any]]) -> Numbers:
    """Means of the qualities over the replies of a dialogue."""
    known = {name: [reply[name] for reply in replies if reply[name] is not None] for name in QUALITIES}
    return {name: sum(values) / len(values) if values else None for name, values in known.items()}


@dataclasses.dataclass(frozen=True)
class Measure:
    """What a judge model is asked, and what becomes of its answers.

    Attributes:
        choices: the fields of the form that are choices, in its order, with their options.
        read: what a dialogue's record holds, by the answers to the form: by default the mean of each choice.
        numbers: what of that has a mean over dialogues, by name: by default all of it.
        each_reply: whether the form is about one reply; a record then holds a list, and `numbers` gets it.
        form: name of the form's script, if it is not the measure's.
        slots: of the script.
    """

    choices: Mapping[str, tuple[str, ...]]
    read: Callable[[Answers], Any] = _means
    numbers: Callable[[Any], Numbers] = dict
    each_reply: bool = False
    form: str = ""
    slots: tuple[str, ...] = ()


# By the name in a record's `measures`; its numbers are called NAME/FIELD in a summary.
MEASURES: dict[str, Measure] = {
    "capabilities": Measure(dict.fromkeys(CAPABILITIES, RATING)),
    "relationship": Measure(
        {item: TRUTH for items in FACETS.values() for item in items}, _inventory, _inventory_numbers
    ),
    "replies": Measure(
        dict.fromkeys(QUALITIES, RATING) | {"strategy": tuple(LETTERS)},
        _reply, _reply_numbers, each_reply=True, form="reply", slots=("turn", "strategies"),
    ),
    "coordinate": Measure(dict.fromkeys(AXES, RATING), _coordinates),
    "person": Measure({"need_expression": RATING}),
}  # fmt: skip
# {form: (measure's name, measure)} in the order in which they are asked: those of a whole dialogue first.
FORMS = {
    measure.form or name: (name, measure)
    for name, measure in sorted(MEASURES.items(), key=lambda item: item[1].each_reply)
}


def measures_of(forms: Sequence[str], answers: Sequence[Answers], judge: str) -> dict[str, Any]:
    """What the answers about a dialogue amount to, as its `measures`; None where an answer is missing.

    Args:
        forms: the form that each of the answers is to; all filled in from what was said.
    """
    lines = {name: text for one in answers for name, text in one.items() if isinstance(text, str)}
    values: dict[str, Any] = {}
    for name, measure in MEASURES.items():
        own = [measure.read(one) for form, one in zip(forms, answers, strict=True) if form == (measure.form or name)]
        if own or measure.each_reply:
            values[name] = own if measure.each_reply else own[0]
    if "relationship" in values:
        values["relationship"] |= {"from": SPEECH}
    return {"judge": judge, **lines, **values, "unanswered": _unanswered(answers)}


def with_thoughts(measures: Mapping[str, Any], answers: Sequence[Answers]) -> dict[str, Any]:
    """A dialogue's `measures` with the relationship inventory as it was filled in from the user's inner thoughts.

    Args:
        answers: to that form; none where the user had no thoughts, since it appraised nothing.
    """
    measure = MEASURES["relationship"]
    relationship = {"relationship": measure.read(answers[0]) | {"from": THOUGHTS}} if answers else {}
    return {**measures, **relationship, "unanswered": measures["unanswered"] + _unanswered(answers)}


def _unanswered(answers: Sequence[Answers]) -> int:
    return sum(answer == {} for one in answers for answer in one.values())


def summarize(records: Sequence[Record]) -> dict[str, Any]:
    """Means over dialogues with deviations and intervals, and what became of each strategy."""
    values: dict[str, list[float]] = collections.defaultdict(list)
    profiles: dict[str, list[str]] = collections.defaultdict(list)  # whose dialogue each value is of
    unanswered = 0
    for record in records:
        measures = record["measures"]
        unanswered += measures["unanswered"]
        for name, kind in FORMS.values():
            for field, value in kind.numbers(measures[name]).items() if name in measures else ():
                if value is not None:
                    values[f"{name}/{field}"].append(value)
                    profiles[f"{name}/{field}"].append(record["profile"])
    means = {name: mean_with_interval(known, profiles[name]) for name, known in values.items()}
    first = {"judge": records[0]["measures"]["judge"], "unanswered": unanswered}
    return first | {"strategies": strategies(records)} | means


def strategies(records: Iterable[Record]) -> dict[str, dict[str, Any]]:
    """Of each strategy: how often it leads in a reply, and how the dialogue's user took it.

    `n` replies; `acceptance`: share of those that the user appraised after which its emotion was meant to rise;
    `change`: their mean change. Both are null where there are none.
    """
    counts: collections.Counter[str] = collections.Counter()
    changes: dict[str, list[int]] = collections.defaultdict(list)
    for record in records:
        led = [reply["strategy"] for reply in record["measures"]["replies"]]
        counts.update(led)
        for turn, _, user in reactions(record) if led else ():
            changes[led[turn]].append(user["change"])
    return {
        name: {
            "n": counts[name],
            "acceptance": sum(change > 0 for change in taken) / len(taken) if taken else None,
            "change": sum(taken) / len(taken) if taken else None,
        }
        for name in STRATEGIES
        for taken in (changes[name],)
    }
