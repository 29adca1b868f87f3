"""Judges behind an OpenAI-compatible endpoint: the same appraisals and forms, asked for in text.

Answers are cached by the exact request, as those of a user at an endpoint are, so an interruption costs at most the
requests under way. There is no distribution: changes have one readout, `text`, and a choice is all or nothing.
"""

import contextlib
import functools
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ml_collections import ConfigDict

from rlver_jax.endpoints.answer_cache import AnswerCache
from rlver_jax.endpoints.client import Client, Endpoint, Message
from rlver_jax.endpoints.concurrency import as_finished
from rlver_jax.endpoints.errors import ContextFull
from rlver_jax.endpoints.usage import Usage, priced
from rlver_jax.evaluation.endpoint_play import ANSWERS, endpoint_of, prices_of, remote_user
from rlver_jax.evaluation.forms import Form, Forms, Questionnaire, load_forms
from rlver_jax.evaluation.judge import Appraised, Progress, Work
from rlver_jax.evaluation.judge_settings import judge_settings
from rlver_jax.evaluation.measures import Answers
from rlver_jax.evaluation.rater import Rated
from rlver_jax.evaluation.score import TEXT
from rlver_jax.evaluation.text_forms import read, write
from rlver_jax.evaluation.transcripts import Transcript, turns_of, within
from rlver_jax.user.endpoint import RemoteUser, RequestIndex
from rlver_jax.user.text_forms import Unreadable

_MARK = 48  # tokens that a field's mark, its heading and a choice may take in an answer


@dataclass(frozen=True)
class _Remote:
    """What both kinds of judges have.

    Attributes:
        cache: file of the answers; None: they are kept in memory.
    """

    name: str
    config: ConfigDict
    endpoint: Endpoint
    cache: str | Path | None
    settings: dict[str, Any]

    @classmethod
    def load(cls, config: ConfigDict, name: str, folder: Path | None):
        """The model at `remote.user` of a config.

        Args:
            folder: for the answers, unless remote.cache names a file.

        Raises:
            ValueError, OSError: its API key or its prompts are missing.
        """
        cache = config.remote.cache or (folder and folder / ANSWERS)
        return cls(name, config, endpoint_of(config, "user"), cache, judge_settings(config))

    @contextlib.contextmanager
    def _client(self) -> Iterator[Client]:
        with contextlib.closing(AnswerCache(self.cache)) as answers:
            yield Client(self.endpoint, answers)

    def _bill(self, usage: Usage) -> dict[str, Any]:
        return priced(usage.to_json(), prices_of(self.config, "user"))


class RemoteJudge(_Remote):
    """A simulated user as a judge; see `judge.Judge`."""

    readouts = (TEXT,)

    def appraise(
        self, dialogues: Sequence[Transcript], *, own: bool, progress: Progress
    ) -> Iterator[list[tuple[int, Appraised]]]:
        """See `judge.Judge`.

        Raises:
            EndpointError: the endpoint refused, or was gone for longer than remote.deadline.
        """
        with self._client() as client:
            user = remote_user(self.config, client)
            work = [functools.partial(self._one, user, i, dialogues, own, progress) for i in range(len(dialogues))]
            yield from as_finished(work, self.endpoint.concurrency, client.close)

    async def _one(
        self, user: RemoteUser, index: int, dialogues: Sequence[Transcript], own: bool, progress: Progress
    ) -> tuple[int, Appraised]:
        dialogue = dialogues[index]  # which may be read now: all of them need not be in memory
        assert dialogue.profile is not None
        record, usage, unanswered = dialogue.record, Usage(), []
        aloud: list[str] = []
        result = Appraised([within(record["emotions"][0])], [], [], [])
        for position, turn in enumerate(turns_of(record)):
            aloud += [turn.heard["content"] or "", turn.reply["content"] or ""]
            moved = result.emotions[-1] if own else turn.emotion
            change, before = 0, usage.completion_tokens
            fields: dict[str, str] = {}
            if not (own and user.rules.ended(moved)):
                # The same request as that of a user who plays this turn: of one model, it has been answered.
                request = RequestIndex(record["seed"] or 0, record["dialogue"], turn.turn + 1)
                try:
                    felt = await user.appraise(dialogue.profile, aloud, moved, request, usage)
                    change, moved, fields = felt.change, felt.emotion, felt.fields
                except (Unreadable, ContextFull):
                    unanswered.append(position)
                progress(Work(1, usage.completion_tokens - before))
            result.emotions.append(moved)
            result.changes.append(change)
            result.change_logprobs.append([])
            result.appraisals.append(fields)
        return index, result._replace(unanswered=unanswered, remote=self._bill(usage))


class RemoteRater(_Remote):
    """A model that fills in forms; see `rater.Rater`."""

    def fill(self, questionnaires: Sequence[Questionnaire], progress: Progress) -> Iterator[list[tuple[int, Rated]]]:
        """See `rater.Rater`; raises EndpointError as `RemoteJudge.appraise` does."""
        forms = load_forms(self.config.data.language)
        with self._client() as client:
            work = [
                functools.partial(self._one, client, forms, i, questionnaires, progress)
                for i in range(len(questionnaires))
            ]
            yield from as_finished(work, self.endpoint.concurrency, client.close)

    async def _one(
        self, client: Client, forms: Forms, index: int, questionnaires: Sequence[Questionnaire], progress: Progress
    ) -> tuple[int, Rated]:
        usage, answers, one = Usage(), [], questionnaires[index]
        for form in one.forms:
            before = usage.completion_tokens
            answers.append(await self._form(client, forms, one, form, usage))
            progress(Work(1, usage.completion_tokens - before))
        return index, Rated(answers, self._bill(usage))

    async def _form(
        self, client: Client, forms: Forms, questionnaire: Questionnaire, form: Form, usage: Usage
    ) -> Answers:
        """One form's answers; choices that are missing or impossible are asked for again, alone."""
        messages: list[Message] = [
            {"role": "system", "content": questionnaire.system},
            {"role": "user", "content": forms.request(write(form.steps), text=questionnaire.text)},
        ]
        answers: Answers = {}
        wanted = form.steps
        for attempt in range(self.config.remote.asks):
            room = sum(_MARK + (not step.options) * self.config.user.field_tokens for step in wanted)
            try:
                temperature = questionnaire.temperature
                answer = await client.ask(messages, temperature=temperature, max_tokens=room, seed=attempt)
            except ContextFull:
                break
            usage.add(answer, again=attempt > 0)
            answers |= read(wanted, answer.text)
            wanted = tuple(step for step in form.steps if step.options and step.name not in answers)
            if not wanted:
                break
            reply = {"role": "assistant", "content": answer.text or "…"}
            messages = [*messages, reply, {"role": "user", "content": forms.request(write(wanted))}]
        return {step.name: answers.get(step.name, {} if step.options else "") for step in form.steps}
