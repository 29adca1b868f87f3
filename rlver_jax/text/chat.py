"""Qwen2.5's chat template (ChatML) as token segments, so that a dialogue is assembled by joining id lists.

    <|im_start|>ROLE \\n CONTENT <|im_end|> \\n

The pieces around the content are the same for every message. Each message ends in special tokens, which no
merge crosses, so `conversation` of a list equals the joined `message`s of its members.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from rlver_jax.text.tokenizer import Tokenizer

ROLES = ("system", "user", "assistant")


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

        Sampled tokens that follow are kept as they are. They may differ from `message` of the same text: a
        content that starts with a newline has it merged into the one after the role there.
        """
        _check_role(role)
        return [self.tokenizer.im_start_id, *self.tokenizer.encode(role + "\n")]

    def message(self, role: str, content: str) -> list[int]:
        """Ids of one whole message. Raises ValueError for a role other than those in `ROLES`."""
        _check_role(role)
        return [self.tokenizer.im_start_id, *self.tokenizer.encode(f"{role}\n{content}"), *self.close]

    def conversation(self, messages: Sequence[Mapping[str, str]], generation_prompt: bool = False) -> list[int]:
        """Ids of a list of `{"role": ..., "content": ...}`, as `apply_chat_template` gives them.

        Args:
            messages: the first must be a system message. Qwen's template inserts one of its own where none is
                given, which no caller here wants, so that is refused rather than imitated.
            generation_prompt: whether to add the start of an assistant message.

        Raises:
            ValueError: no messages, no system message first, another role, or other or missing fields.
        """
        for index, message in enumerate(messages):
            if set(message) != {"role", "content"} or not isinstance(message["content"], str):
                fields = {key: type(value).__name__ for key, value in message.items()}
                raise ValueError(
                    f"message {index} has the fields {fields}; expected `role` and `content`, both strings. "
                    "Tool calls and images are not supported."
                )
        first = messages[0]["role"] if messages else "no message at all"
        if first != "system":
            raise ValueError(
                f"a conversation must start with a system message, got {first!r}. Qwen's template would "
                "insert 'You are Qwen, created by Alibaba Cloud. ...' in its place: write the one you mean, "
                "even if it is empty."
            )
        tokens = [token for m in messages for token in self.message(m["role"], m["content"])]
        return tokens + (self.open("assistant") if generation_prompt else [])


def _check_role(role: str) -> None:
    if role not in ROLES:
        raise ValueError(f"unknown role {role!r}; expected one of {', '.join(ROLES)}")
