"""What a person of the miniature answers behind a chat protocol: the grammar's own rule, and no model.

A request holds all that an answer depends on. The system prompt names the person's trouble and hidden intention, the
messages are the dialogue so far, and the last one is a form (`user.text_forms`) or the cue for the first words. So
nothing is kept between requests, and equal requests have equal answers.
"""

import itertools
import random
import re
from collections.abc import Mapping, Sequence
from typing import NamedTuple

from rlver_jax.config.languages import LANGUAGES
from rlver_jax.miniature import assets, rule
from rlver_jax.miniature.rule import Verdict
from rlver_jax.miniature.world import MOODS, TROUBLES, WHO, WISH, Person, Topic, reply_of
from rlver_jax.user.prompts import Prompts, load_prompts

Message = Mapping[str, str]  # role and content
_FORM, _SAY = "\x00form\x00", "\x00say\x00"  # stand for them while a template is taken apart
_MARK = re.compile(r"^\[(\w+)\]", re.MULTILINE)
# The rule's three sentences by the fields of our other scripts; any further field gets the feeling.
_SENTENCES = {"content": "heard", "target": "wish"}


class NotOfThisWorld(ValueError):
    """A request that no person of the miniature can answer; says what was expected."""


class Asked(NamedTuple):
    """A request, taken apart.

    Attributes:
        fields: of the form to fill in, in its order; empty: the first words are wanted.
        missing: of an answer that could not be read: the one field that is asked for again; else "".
        replies: the policy's, the one to appraise last.
        heard: the person's words before each.
    """

    person: Person
    style: str
    fields: list[str]
    missing: str
    replies: list[str]
    heard: list[str]


class _Form(NamedTuple):
    """How a prompt language asks for a form: what stands before a reply, between reply and form, and around a form."""

    before: str
    between: str
    alone: str
    missing: dict[str, str]

    @classmethod
    def of(cls, prompts: Prompts) -> "_Form":
        before, _, rest = prompts.form(_FORM, say=_SAY).partition(_SAY)
        again = {field: prompts.form("", missing=field) for field in ("change", "reply")}
        return cls(before, rest.partition(_FORM)[0], prompts.form(_FORM).partition(_FORM)[0], again)

    def reply(self, message: str) -> str | None:
        """The policy's reply in a request to appraise it; None where it is no such request."""
        whole = message.startswith(self.before) and self.between in message
        return message[len(self.before) :].rpartition(self.between)[0] if whole else None

    def fields(self, message: str) -> list[str]:
        """Names of the fields of a request's form; none where it is no form."""
        behind = message.rpartition(self.between)[2] if self.reply(message) is not None else message
        is_form = behind is not message or message.startswith(self.alone)
        return _MARK.findall(behind.removeprefix(self.alone)) if is_form else []


class People:
    """All people of the world, as the prompts that the package ships describe them."""

    def __init__(self) -> None:
        prompts = [load_prompts(one, folder) for one in LANGUAGES for folder in (assets.PROMPTS, None)]
        self._forms = [_Form.of(one) for one in prompts]
        self._cues = {one.opening for one in prompts}
        self._challenging = [_challenging_lines(one) for one in prompts]
        topics = itertools.starmap(Topic, itertools.product(WHO, TROUBLES))
        self._topics = {Person(0, "", 0, "", "", "", topic, "").scene: topic for topic in topics}

    def answer(self, messages: Sequence[Message], draw: random.Random) -> str:
        """What the person says, or the form filled in.

        Args:
            draw: decides the words where the grammar has several; neither appraisals nor changes depend on it.

        Raises:
            NotOfThisWorld: no person of the miniature is asked, or not in a form of the package's prompts.
        """
        asked = self.read(messages)
        if not asked.fields:
            who, what = asked.person.topic.who, asked.person.topic.what
            return f"My {who} {TROUBLES[what]}. I feel {draw.choice(MOODS)}."
        verdict = rule.judge(asked.person, asked.replies[-1], asked.replies[:-1], asked.heard[-1])
        values = {name: _value(asked, name, verdict, draw) for name in asked.fields}
        if asked.missing:
            return values.get(asked.missing, "")
        return "\n".join(f"[{name}] {value}" for name, value in values.items())

    def read(self, messages: Sequence[Message]) -> Asked:
        """A request, taken apart.

        Raises:
            NotOfThisWorld: see `answer`.
        """
        roles = [message["role"] for message in messages]
        if roles != ["system", *itertools.islice(itertools.cycle(["user", "assistant"]), len(roles) - 1)]:
            raise NotOfThisWorld("the messages are not a system prompt, then user and assistant in turns")
        texts = [message["content"] for message in messages]
        person, style = self._person(texts[0]), self._style(texts[0])
        if len(texts) == 2 and texts[1].strip() in self._cues:
            return Asked(person, style, [], "", [], [])
        for form in self._forms:
            if parsed := _dialogue(form, texts):
                return Asked(person, style, *parsed)
        raise NotOfThisWorld(
            "the last message asks for none of the simulated user's forms; send what evaluate or train sends for "
            "remote.user with the package's own prompts"
        )

    def _person(self, system: str) -> Person:
        topics = [topic for scene, topic in self._topics.items() if scene in system]
        wishes = [key for key, wish in WISH.items() if wish in system]
        if not topics or not wishes:
            lacking = "trouble (such as 'Your boss read your private letter.')" if not topics else "hidden intention"
            raise NotOfThisWorld(
                f"the system prompt names no {lacking} of the miniature's world; use its profiles: "
                f"--config=configs/miniature.py"
            )
        return Person(0, "", 0, "", "", "", topics[0], wishes[0])

    def _style(self, system: str) -> str:
        lines = set(system.splitlines())
        return "challenging" if any(own <= lines for own in self._challenging) else "vanilla"


def _dialogue(form: _Form, texts: Sequence[str]) -> tuple[list[str], str, list[str], list[str]] | None:
    """(fields, missing, replies, heard) of a request in this form; None where it is in another one."""
    last, missing = len(texts) - 1, ""
    while last > 3 and (again := [field for field, text in form.missing.items() if texts[last].strip() == text]):
        missing, last = again[0], last - 2  # before an answer that could not be read
    fields = form.fields(texts[last])
    appraised = last if form.reply(texts[last]) is not None else last - 2  # a reply's form follows the appraisal
    if not fields or appraised < 3 or (reply := form.reply(texts[appraised])) is None:
        return None
    return fields, missing, [*texts[3:appraised:2], reply], list(texts[2:appraised:2])


def _value(asked: Asked, name: str, verdict: Verdict, draw: random.Random) -> str:
    """What stands in a field."""
    if name == "change":
        return f"{verdict.change:+d}"
    if name == "reply":
        return reply_of(asked.person, verdict.change, asked.style, draw)
    sentences = rule.appraisal(asked.person, verdict)
    return sentences.get(_SENTENCES.get(name, name), sentences["feeling"])


def _challenging_lines(prompts: Prompts) -> set[str]:
    """What only the challenging user's system prompt says."""
    system = {style: prompts.user_system("P", "S", "W", style=style) for style in ("vanilla", "challenging")}
    return set(system["challenging"].splitlines()) - set(system["vanilla"].splitlines())
