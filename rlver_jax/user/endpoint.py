"""The simulated user behind an OpenAI-compatible endpoint: the same appraisal and reply scripts, as forms.

A turn is two requests: the appraisal's form after the policy's reply, then the reply's form after the appraisal.
Neither stays in the history, which holds only the messages, as on the device.
"""

import zlib
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import NamedTuple, TypeVar

from rlver_jax.endpoints.client import Client, Message
from rlver_jax.endpoints.usage import Usage
from rlver_jax.profiles.schema import Profile
from rlver_jax.text.automaton import GOODBYES
from rlver_jax.user import sage_user
from rlver_jax.user.emotion import EmotionRules
from rlver_jax.user.prompts import Prompts
from rlver_jax.user.sage_clone import SagePrompts
from rlver_jax.user.text_forms import Filled, Form, Unreadable, make_form, read_form, read_wanted

T = TypeVar("T")
_MARKS = 24  # tokens that a field's mark and heading may take in an answer


class RequestIndex(NamedTuple):
    """Which request of an evaluation; decides its seed."""

    seed: int
    dialogue: int
    turn: int

    def seed_of(self, part: str, attempt: int) -> int:
        """A seed for one request, 0..2**31-1."""
        return zlib.crc32(f"{self.seed}/{self.dialogue}/{self.turn}/{part}/{attempt}".encode()) & 0x7FFFFFFF


class Appraisal(NamedTuple):
    """What the user makes of a reply, and how it came to that: needed to ask for the user's own reply."""

    fields: dict[str, str]
    change: int
    emotion: int  # after the change
    messages: list[Message]  # the history, and the form
    answer: str  # the form, filled in


@dataclass(frozen=True)
class Reaction:
    """One turn of the user."""

    appraisal: dict[str, str]
    change: int
    emotion: int  # after the change
    considerations: dict[str, str]
    reply: str | None  # None: the dialogue is over, or the reply could not be read
    unreadable: bool = False  # the reply's form

    @property
    def goodbye(self) -> bool:
        """Whether the reply takes leave."""
        return self.reply is not None and any(word in self.reply.encode() for word in GOODBYES)


@dataclass(frozen=True)
class RemoteUser:
    """Plays profiles through an endpoint.

    Attributes:
        field_tokens, reply_tokens: allowance for each field and for the reply, as on the device.
        temperature: of the reply's form and the first words; appraisals are asked for at 0. Of every request where the
            prompts are SAGE's: its published loop asks for both kinds by one call.
        asks: times that an answer is asked for until it can be read.
    """

    client: Client
    prompts: Prompts
    rules: EmotionRules
    style: str
    scenario: str
    field_tokens: int
    reply_tokens: int
    temperature: float
    asks: int

    def opening(self, profile: Profile) -> list[Message]:
        """What the model reads before the first words: the profile and the cue."""
        return self.prompts.before_first_turn(profile, style=self.style, scenario=self.scenario, rules=self.rules)

    async def begin(self, profile: Profile, index: RequestIndex, usage: Usage) -> str:
        """First words of a profile that has none.

        Raises:
            Unreadable: none came, however often they were asked for.
            EndpointError: as `Client.ask` does.
        """
        if self.prompts.sage:
            request = sage_user.reply_request(self.prompts.sage, profile, [], self.rules.initial, None)
            return (await self._ask_sage(request, sage_user.read_reply, "first", index, usage)).reply
        for attempt in range(self.asks):
            answer = await self.client.ask(
                self.opening(profile),
                temperature=self.temperature,
                max_tokens=self.reply_tokens,
                seed=index.seed_of("first", attempt),
            )
            usage.add(answer, again=attempt > 0)
            text = " ".join(answer.text.rpartition("</think>")[2].split())
            if text:
                return text
        raise Unreadable("first words")

    async def appraise(
        self, profile: Profile, aloud: Sequence[str], emotion: int, index: RequestIndex, usage: Usage
    ) -> Appraisal:
        """Appraises the last reply, and moves the emotion.

        Args:
            aloud: the messages so far, the user first, in turns; the policy's reply to appraise comes last.

        Raises:
            Unreadable: the appraisal, however often it was asked for.
            EndpointError: as `Client.ask` does.
        """
        if self.prompts.sage:
            prompt = sage_user.appraisal_request(self.prompts.sage, profile, aloud, emotion)
            filled = await self._ask_sage(prompt, sage_user.read_appraisal, "appraisal", index, usage)
            change = self.rules.clamp(filled.change)
            return Appraisal(filled.texts, change, self.rules.update(emotion, change), [], "")
        roles = ("assistant", "user")
        history = [{"role": roles[i % 2], "content": text} for i, text in enumerate(aloud[:-1])]
        form = make_form(self.prompts.appraisal, emotion, self.rules.band_name(emotion))
        request = {"role": "user", "content": self.prompts.form(form.text, say=aloud[-1])}
        messages: list[Message] = [*self.opening(profile), *history, request]
        filled, answer = await self._fill(form, messages, 0.0, "appraisal", index, usage)
        change = self.rules.clamp(filled.change)
        return Appraisal(filled.texts, change, self.rules.update(emotion, change), messages, answer)

    async def react(
        self,
        profile: Profile,
        aloud: Sequence[str],
        emotion: int,
        index: RequestIndex,
        usage: Usage,
        *,
        may_reply: bool,
    ) -> Reaction:
        """Appraises the last reply, moves the emotion, and answers unless the dialogue is over; see `appraise`."""
        felt = await self.appraise(profile, aloud, emotion, index, usage)
        if self.rules.ended(felt.emotion) or not may_reply:
            return Reaction(felt.fields, felt.change, felt.emotion, {}, None)
        if self.prompts.sage:
            return await self._reply_of_sage(self.prompts.sage, profile, aloud, felt, index, usage)
        form = make_form(self.prompts.reply, felt.emotion, self.rules.band_name(felt.emotion))
        messages = [
            *felt.messages, {"role": "assistant", "content": felt.answer},
            {"role": "user", "content": self.prompts.form(form.text)},
        ]  # fmt: skip
        try:
            reply, _ = await self._fill(form, messages, self.temperature, "reply", index, usage)
        except Unreadable:
            return Reaction(felt.fields, felt.change, felt.emotion, {}, None, unreadable=True)
        text = reply.texts.pop(form.wanted.name)
        return Reaction(felt.fields, felt.change, felt.emotion, reply.texts, text)

    async def _reply_of_sage(
        self,
        sage: SagePrompts,
        profile: Profile,
        aloud: Sequence[str],
        felt: Appraisal,
        index: RequestIndex,
        usage: Usage,
    ) -> Reaction:
        prompt = sage_user.reply_request(sage, profile, aloud, felt.emotion, felt.fields)
        try:
            reply = await self._ask_sage(prompt, sage_user.read_reply, "reply", index, usage)
        except Unreadable:
            return Reaction(felt.fields, felt.change, felt.emotion, {}, None, unreadable=True)
        return Reaction(felt.fields, felt.change, felt.emotion, {"thinking": reply.thinking}, reply.reply)

    async def _ask_sage(
        self, prompt: str, parse: Callable[[str], T], part: str, index: RequestIndex, usage: Usage
    ) -> T:
        """The answer to one of SAGE's prompts; where it can't be read, the same is asked again, as SAGE does."""
        for attempt in range(self.asks):
            answer = await self.client.ask(
                [{"role": "user", "content": prompt}],
                temperature=self.temperature,
                max_tokens=sage_user.MAX_TOKENS,
                seed=index.seed_of(part, attempt),
            )
            usage.add(answer, again=attempt > 0)
            try:
                return parse(answer.text)
            except Unreadable as error:
                last = error
        raise last

    async def _fill(
        self, form: Form, messages: Sequence[Message], temperature: float, part: str, index: RequestIndex, usage: Usage
    ) -> tuple[Filled, str]:
        """A form's answer, read and as it is; where the field that counts is missing, it is asked for alone."""
        room = len(form.fields) * (self.field_tokens + _MARKS) + self.reply_tokens
        missing = self.prompts.form(form.text, missing=form.wanted.name)
        messages, texts = list(messages), {}  # type: ignore[var-annotated]
        for attempt in range(self.asks):
            answer = await self.client.ask(
                messages, temperature=temperature, max_tokens=room, seed=index.seed_of(part, attempt)
            )
            usage.add(answer, again=attempt > 0)
            try:
                filled = read_wanted(form, texts, answer.text) if attempt else read_form(form, answer.text)
                return filled, answer.text
            except Unreadable as error:
                last, texts = error, error.texts
                reply = {"role": "assistant", "content": answer.text or "…"}
                messages = [*messages, reply, {"role": "user", "content": missing}]
        raise last
