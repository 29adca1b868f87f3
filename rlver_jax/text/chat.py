"""Qwen2.5's chat template (ChatML) as token segments, so that a dialogue is assembled by joining id lists.

    <|im_start|>ROLE \\n CONTENT <|im_end|> \\n

The pieces around the content are the same for every message. Each message ends in special tokens, which no
merge crosses, so `conversation` of a list equals the joined `message`s of its members.

A reply that is sampled may begin with what no later turn sees (`ChatTemplate.opening`): a thought's tag, or the empty
thought of models that think unless they are told not to. Which it is the folder's template says.

Anything else in a template (a system message where none is given, thoughts left out of earlier replies) is rendered:
`as_rendered`, for conversations that come from outside.
"""

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import NamedTuple

from rlver_jax.text.tokenizer import Tokenizer

ROLES = ("system", "user", "assistant")
# What Qwen2.5's own template says where a conversation has no system message; here, where a folder has no template.
DEFAULT_SYSTEM = "You are Qwen, created by Alibaba Cloud. You are a helpful assistant."
THINK_OPEN, THINK_CLOSE = "<think>\n", "</think>"  # text, whether or not a vocabulary has tokens of their own for it


class TurnTokens(NamedTuple):
    """The pieces of the template around a dialogue's turns, as ids."""

    open_user: Sequence[int]
    open_assistant: Sequence[int]
    close: Sequence[int]

    def exchange(self, heard: Sequence[int]) -> list[int]:
        """A user's message with this content, and the opening of the assistant's that answers it."""
        return [*self.open_user, *heard, *self.close, *self.open_assistant]


@dataclass(frozen=True)
class ChatTemplate:
    """Builds ids of messages for one tokenizer. Content is plain text: it can't end or forge a message."""

    tokenizer: Tokenizer

    @property
    def close(self) -> list[int]:
        """Ids that end a message: `<|im_end|>` and a newline."""
        return [self.tokenizer.im_end_id, *self.tokenizer.encode("\n")]

    def open(self, role: str) -> list[int]:
        """Ids that start a message whose content is sampled: `<|im_start|>`, the role, a newline.

        Sampled tokens that follow stay as they are. They may differ from `message` of the same text: a
        content that starts with a newline has it merged into the one after the role there.
        """
        _check_role(role)
        return [self.tokenizer.im_start_id, *self.tokenizer.encode(role + "\n")]

    @property
    def turns(self) -> TurnTokens:
        """What stands around the turns of a dialogue."""
        return TurnTokens(self.open("user"), self.open("assistant"), self.close)

    def opening(self, *, think: bool) -> list[int]:
        """Ids between `open("assistant")` and a reply that is sampled; no later turn sees them.

        Args:
            think: whether it begins with a thought. Then they are the folder's own tag, or `<think>` and a newline
                where its template leaves that to the model. Otherwise they are the empty thought of a template that
                knows `enable_thinking`; none where it has no such thing, or begins a thought whatever it is told.
        """
        template = self.tokenizer.template
        begun = "" if template is None else template.begun(think)
        closed = THINK_CLOSE in begun
        if think:
            return self._encode_rendered(begun if begun and not closed else THINK_OPEN)
        return self._encode_rendered(begun if closed else "")

    def message(self, role: str, content: str) -> list[int]:
        """Ids of one whole message. Raises ValueError for a role other than those in `ROLES`."""
        _check_role(role)
        return [self.tokenizer.im_start_id, *self.tokenizer.encode(f"{role}\n{content}"), *self.close]

    def conversation(self, messages: Sequence[Mapping[str, str]], generation_prompt: bool = False) -> list[int]:
        """Ids of a list of `{"role": ..., "content": ...}` in plain ChatML.

        Args:
            messages: the first must be a system message. What a template inserts where none is given is a matter of
                each folder: `as_rendered`.
            generation_prompt: whether to add the start of an assistant message.

        Raises:
            ValueError: no messages, no system message first, another role, or other or missing fields.
        """
        _check_messages(messages)
        first = messages[0]["role"] if messages else "no message at all"
        if first != "system":
            raise ValueError(
                f"a conversation must start with a system message, got {first!r}. A chat template may insert one of "
                "its own in its place: write the one you mean, even if it is empty, or take `as_rendered`."
            )
        tokens = [token for m in messages for token in self.message(m["role"], m["content"])]
        return tokens + (self.open("assistant") if generation_prompt else [])

    def default_system(self) -> list[int]:
        """Ids that the folder's chat template begins with where no system message is given; may be none.

        Raises:
            ValueError: it refuses conversations without one.
        """
        template = self.tokenizer.template
        if template is None:
            return self.message("system", DEFAULT_SYSTEM)
        return self._encode_rendered(template.default_system())

    def as_rendered(
        self, messages: Sequence[Mapping[str, str]], generation_prompt: bool = False, thinking: bool | None = None
    ) -> list[int]:
        """Ids of a conversation as the folder's own chat template writes it, as `apply_chat_template` gives them.

        Where the folder has none: `conversation`, with `DEFAULT_SYSTEM` in front where no system message is given.
        Content is plain text here too: where it spells a special token, `apply_chat_template` would take it for one.

        Args:
            thinking: see `FolderTemplate.render`.

        Raises:
            ValueError: another role, other or missing fields, or the template refuses these messages.
        """
        _check_messages(messages)
        for message in messages:
            _check_role(message["role"])
        template = self.tokenizer.template
        if template is None:
            has_system = bool(messages) and messages[0]["role"] == "system"
            first = [] if has_system else [{"role": "system", "content": DEFAULT_SYSTEM}]
            return self.conversation([*first, *messages], generation_prompt)
        mark = _unused_character([template.source, *(message["content"] for message in messages)])
        hidden = [{"role": m["role"], "content": self._specials_hidden(m["content"], mark)} for m in messages]
        return self._encode_rendered(template.render(hidden, generation_prompt, thinking=thinking), mark)

    def continued(self, messages: Sequence[Mapping[str, str]]) -> list[int]:
        """Ids of a conversation whose last message, the assistant's, is left open to be continued.

        Its beginning is split as if it had been sampled: apart from the message's start, and from the empty thought
        that some templates put before a last reply without one.

        Raises:
            ValueError: as `as_rendered`, and where the last message is not the assistant's.
        """
        if not messages or messages[-1].get("role") != "assistant":
            raise ValueError("only an assistant's message can be continued, and it must be the last one")
        _check_messages(messages)
        before = self.as_rendered(messages[:-1]) if messages[:-1] else self.default_system()
        template, begun = self.tokenizer.template, messages[-1]["content"]
        thinks = template is None or begun.startswith(THINK_OPEN.strip())
        thought = "" if thinks else template.before_last_reply()  # type: ignore[union-attr]
        return before + self.open("assistant") + self._encode_rendered(thought) + self.tokenizer.encode(begun)

    def _specials_hidden(self, content: str, mark: str) -> str:
        """Content in which no special token is spelt: `mark` is inserted into each name."""
        return re.sub(f"(?s)(?={self._names})(.)", lambda match: match[1] + mark, content)

    def _encode_rendered(self, text: str, mark: str = "") -> list[int]:
        """Ids of rendered text, in which special tokens are spelt; what `mark` is in is plain."""
        tokens: list[int] = []
        for part in re.split(f"({self._names})", text):
            special = self.tokenizer.special_ids.get(part) if len(part) > 1 else None
            tokens += self.tokenizer.encode(part.replace(mark, "")) if special is None else [special]
        return tokens

    @property
    def _names(self) -> str:
        """A regular expression of all special tokens' names, the longest first; single characters can't be hidden."""
        names = sorted((name for name in self.tokenizer.special_ids if len(name) > 1), key=len, reverse=True)
        return "|".join(map(re.escape, names))


def _check_messages(messages: Sequence[Mapping[str, str]]) -> None:
    for index, message in enumerate(messages):
        if set(message) != {"role", "content"} or not isinstance(message["content"], str):
            fields = {key: type(value).__name__ for key, value in message.items()}
            raise ValueError(
                f"message {index} has the fields {fields}; expected `role` and `content`, both strings. "
                "Tool calls and images are not supported."
            )


def _unused_character(texts: Sequence[str]) -> str:
    """A character that is in none of the texts, from those that mean nothing."""
    free = (c for c in map(chr, range(0xE000, 0xF900)) if not any(c in text for text in texts))
    if (mark := next(free, None)) is None:
        raise ValueError("the messages hold every character of Unicode's private use area; leave one out")
    return mark


def _check_role(role: str) -> None:
    if role not in ROLES:
        raise ValueError(f"unknown role {role!r}; expected one of {', '.join(ROLES)}")
