"""Agents behind an OpenAI-compatible endpoint. Rows are asked for at once; the client bounds how many."""

import asyncio
from collections.abc import Coroutine, Iterable, Sequence
from dataclasses import dataclass
from typing import Any

from rlver_jax.dialogues.log import SCRIPT_FIELDS, TOKEN_FIELDS, Record
from rlver_jax.dialogues.turn_by_turn import Row
from rlver_jax.endpoints.client import Client, Message
from rlver_jax.endpoints.completion import Answer
from rlver_jax.endpoints.errors import ContextFull
from rlver_jax.endpoints.usage import Usage
from rlver_jax.user.endpoint import Reaction, RemoteUser, RequestIndex
from rlver_jax.user.text_forms import Unreadable

_NO_TOKENS = dict.fromkeys(TOKEN_FIELDS)


async def all_of(work: Iterable[Coroutine[Any, Any, None]]) -> None:
    """Runs the coroutines concurrently; the first exception cancels the others and is raised."""
    try:
        async with asyncio.TaskGroup() as group:
            for one in work:
                group.create_task(one)
    except BaseExceptionGroup as errors:
        raise errors.exceptions[0] from None


@dataclass(frozen=True)
class RemotePolicy:
    """A policy behind an endpoint: any chat model, asked with our system prompt and the plain dialogue.

    Attributes:
        system: prompt of the mode; empty: none is sent.
        think: whether a reply is `<think>thought</think>` and the words for the user.
        asks: times that an empty answer is asked for again.
    """

    client: Client
    system: str
    think: bool
    temperature: float
    top_p: float
    max_tokens: int
    asks: int
    seed: int

    async def speak(self, rows: Sequence[Row]) -> None:
        """Adds a reply to each row; one that stays empty ends it as unreadable."""
        await all_of(map(self._speak, rows))

    async def _speak(self, row: Row) -> None:
        roles = ("user", "assistant")
        history = [{"role": roles[i % 2], "content": text} for i, text in enumerate(row.aloud)]
        system = [{"role": "system", "content": self.system}] if self.system else []
        messages: list[Message] = [*system, *history]
        index, usage = RequestIndex(self.seed, row.number, row.turns), row.usage.setdefault("policy", Usage())
        for attempt in range(self.asks):
            try:
                answer = await self.client.ask(
                    messages,
                    temperature=self.temperature,
                    max_tokens=self.max_tokens,
                    seed=index.seed_of("policy", attempt),
                    top_p=self.top_p,
                )
            except ContextFull as error:
                return row.fail(error)
            usage.add(answer, again=attempt > 0)
            if answer.text.strip() or answer.reasoning:
                row.messages.append(reply_message(answer, think=self.think))
                return None
        return row.fail(Unreadable("reply"))


def reply_message(answer: Answer, *, think: bool) -> Record:
    """A policy's answer as a message of a log, with the thought separate.

    In think mode a thought ends in `</think>` (the opening tag may be missing), or is what the endpoint returns as the
    model's reasoning. Without a thought, or with nothing after it, the format is broken.
    """
    text, thought = answer.text, None
    closed = True
    if think:
        before, mark, after = text.partition("</think>")
        if mark:
            thought, text = before.strip().removeprefix("<think>").strip(), after
        elif answer.reasoning:
            thought = answer.reasoning.strip()
        else:
            thought, text, closed = text.strip().removeprefix("<think>").strip(), "", False
    reply = text.strip()
    return {
        "role": "assistant",
        "thought": thought,
        "content": reply,
        **_NO_TOKENS,
        "say_tokens": None,
        "stopped": not answer.cut,
        "violation": think and not (closed and reply),
    }


@dataclass(frozen=True)
class RemoteUserSide:
    """Users behind an endpoint."""

    user: RemoteUser
    seed: int

    async def begin(self, rows: Sequence[Row]) -> None:
        """The profile's first words, or the model's."""
        await all_of(map(self.begin_one, rows))

    async def react(self, rows: Sequence[Row], *, may_reply: bool) -> None:
        """Appraisal and reply of each row."""
        await all_of(self.react_one(row, may_reply=may_reply) for row in rows)

    async def begin_one(self, row: Row) -> None:
        """`begin` for one row."""
        usage = row.usage.setdefault("user", Usage())
        first_talk = (row.profile.first_talk or "").strip()
        text = first_talk
        if not first_talk:
            try:
                text = await self.user.begin(row.profile, RequestIndex(self.seed, row.number, 0), usage)
            except (Unreadable, ContextFull) as error:
                row.fail(error)
        opening = {"role": "user", "content": text, "tokens": None, "emotion": row.emotions[0]}
        row.messages.append(opening | {"generated": not first_talk})

    async def react_one(self, row: Row, *, may_reply: bool) -> None:
        """`react` for one row."""
        index = RequestIndex(self.seed, row.number, row.turns)
        try:
            reaction = await self.user.react(
                row.profile, row.aloud, row.emotions[-1], index, row.usage["user"], may_reply=may_reply
            )
        except (Unreadable, ContextFull) as error:
            return row.fail(error)
        row.messages.append(reaction_message(reaction))
        row.goodbye = reaction.goodbye
        if reaction.unreadable:
            row.fail(Unreadable("reply"))
        return None


def reaction_message(reaction: Reaction) -> Record:
    """A user's reaction as a message of a log; what only a model on the device has is null."""
    return {
        "role": "user",
        "content": reaction.reply,
        **_NO_TOKENS,
        "stopped": None,
        "all_tokens": None,
        "appraisal": reaction.appraisal,
        "change": reaction.change,
        "change_logprobs": None,
        "considerations": reaction.considerations,
        **dict.fromkeys(SCRIPT_FIELDS),
        "emotion": reaction.emotion,
    }
