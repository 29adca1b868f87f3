"""The chat template of a model's folder: where it is, how it is rendered, and whether it is ChatML.

Rendered by `transformers`, as `AutoTokenizer.apply_chat_template` does: Jinja in a sandbox (the template comes with the
model, from anyone), with the special tokens that tokenizer_config.json names as variables.
"""

import json
import threading
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from rlver_jax.text.advice import without_advice

CONFIG, FILE, FURTHER = "tokenizer_config.json", "chat_template.jinja", "additional_chat_templates"
NAMED = ("bos_token", "eos_token", "unk_token", "sep_token", "pad_token", "cls_token", "mask_token")
PATIENCE = 10.0  # seconds that a template may take
_OTHER_TEMPLATES = {  # by the text around their messages
    "<|start_header_id|>": "Llama 3's",
    "[INST]": "Mistral's or Llama 2's",
    "<start_of_turn>": "Gemma's",
    "<|user|>": "Phi's or Zephyr's",
    "<｜User｜>": "DeepSeek's",
}
_PROBE = (("system", "Alpha."), ("user", "Beta?"), ("assistant", "Gamma."), ("user", "Delta?"))

Messages = Sequence[Mapping[str, str]]


def read_config(folder: Path, name: str = CONFIG) -> dict[str, Any]:
    """tokenizer_config.json of a folder, or another file of the kind; empty where there is none.

    Raises:
        ValueError: it holds no JSON object.
    """
    path = folder / name
    if not path.is_file():
        return {}
    try:
        config = json.loads(path.read_text(encoding="utf-8"))
    except (ValueError, RecursionError) as error:
        raise ValueError(f"{path} is not JSON ({error}); download or copy it again") from None
    if not isinstance(config, dict):
        raise ValueError(f"{path} holds a {type(config).__name__}, expected a JSON object; download or copy it again")
    return config


def named_specials(folder: Path) -> set[str]:
    """Tokens that a folder's files name as special, whatever the tokenizer file says."""
    config = read_config(folder)
    if "added_tokens_decoder" not in config:  # an older layout
        config = config | read_config(folder, "special_tokens_map.json")
    named = [config.get(name) for name in NAMED]
    for name in ("additional_special_tokens", "extra_special_tokens"):
        more = config.get(name) or ()
        if not isinstance(more, list | tuple | dict | str):
            raise ValueError(f"{folder}: {name}={more!r} in its tokenizer files, expected a list of tokens; correct it")
        named += more.values() if isinstance(more, dict) else [more] if isinstance(more, str) else more
    return {content for content in map(_content, named) if content}


def _content(token: Any) -> str | None:
    """The text of a token, which may be written as one or with its flags."""
    token = token.get("content") if isinstance(token, dict) else token
    return token if isinstance(token, str) else None


@dataclass(frozen=True)
class FolderTemplate:
    """A chat template in Jinja.

    Attributes:
        source: the template itself.
        origin: the file that it was read from.
        variables: special tokens by the names that templates know them by, e.g. `eos_token`.
    """

    source: str
    origin: str
    variables: Mapping[str, str] = field(default_factory=dict)

    @classmethod
    def read(cls, folder: str | Path) -> "FolderTemplate | None":
        """The default template of a folder, of the places that `transformers` reads; None: it has none.

        Raises:
            ValueError: several templates are named and none is the default, or the files are malformed.
        """
        folder = Path(folder)
        config = read_config(folder)
        templates: dict[str, tuple[str, Path]] = dict(_listed(config.get("chat_template"), folder / CONFIG))
        if files := dict(_files(folder)):  # they replace what the config says
            templates = files
        if not templates:
            return None
        if "default" not in templates:
            raise ValueError(
                f"{folder}: has the chat templates {', '.join(sorted(templates))}, but none named `default`; "
                f"put the one that is meant into {FILE}"
            )
        source, origin = templates["default"]
        variables = {name: content for name in NAMED if (content := _content(config.get(name)))}
        return cls(source, str(origin), variables)

    def render(self, messages: Messages, generation_prompt: bool = False, *, thinking: bool | None = None) -> str:
        """The text of a conversation.

        Args:
            thinking: whether the reply begins with a thought, where the template knows `enable_thinking`; None: as it
                does by itself.

        Raises:
            ValueError: the template is malformed, refuses these messages, or takes longer than `PATIENCE`.
        """
        rendered: list[str] = []
        failed: list[Exception] = []
        render = _renderer()
        variables: dict[str, Any] = dict(self.variables)
        if thinking is not None:
            variables["enable_thinking"] = thinking

        def work() -> None:
            try:
                texts, _ = render(
                    [[dict(message) for message in messages]],
                    chat_template=self.source,
                    add_generation_prompt=generation_prompt,
                    **variables,
                )
                rendered.extend(texts)
            except Exception as error:  # a template can raise anything
                failed.append(error)

        thread = threading.Thread(target=work, daemon=True)  # what never ends can't be ended, but left behind
        thread.start()
        thread.join(PATIENCE)
        if failed:
            raise ValueError(f"{self.origin}: the chat template can't be rendered: {_message_of(failed[0])}")
        if not rendered:
            raise ValueError(
                f"{self.origin}: the chat template has not ended after {PATIENCE:g} s; correct or remove it"
            )
        return rendered[0]

    def check(self) -> None:
        """Refuses a template that is not ChatML, in which dialogues are put together from token segments.

        Raises:
            ValueError: it is another family's, or can't be rendered.
        """
        wanted = "".join(f"<|im_start|>{role}\n{content}<|im_end|>\n" for role, content in _PROBE)
        messages = [{"role": role, "content": content} for role, content in _PROBE]
        rendered = self._render_as_any(messages)
        if not rendered.startswith(wanted + "<|im_start|>assistant\n"):
            known = [name for mark, name in _OTHER_TEMPLATES.items() if mark in rendered]
            like = f", but {known[0]}" if known else ""
            raise ValueError(
                f"{self.origin}: the chat template is not ChatML{like}: it writes {_short(rendered)} where Qwen's "
                f"write {_short(wanted)}. Dialogues are put together in ChatML; use a model that was trained in it, or "
                f"correct the template"
            )

    def _render_as_any(self, messages: Messages) -> str:
        """With the family's name in the message where even a plain conversation is refused."""
        try:
            return self.render(messages, generation_prompt=True)
        except ValueError as error:
            known = [name for mark, name in _OTHER_TEMPLATES.items() if mark in self.source]
            raise ValueError(f"{error} (a template like {known[0]}; ChatML is needed)" if known else error) from None

    def begun(self, thinking: bool) -> str:
        """What the template puts at the beginning of a reply that is to be generated: a thought's tag, an empty thought
        where there shall be none (Qwen3), mostly nothing. No later turn sees any of it: `check` wants plain history.

        Raises:
            ValueError: it can't be rendered.
        """
        messages = [{"role": role, "content": content} for role, content in _PROBE]
        rendered = self.render(messages, generation_prompt=True, thinking=thinking)
        return rendered.rpartition("<|im_start|>assistant\n")[2]

    def before_last_reply(self) -> str:
        """What the template puts before a reply without a thought that ends a conversation: as `begun`, or nothing.

        Nothing too where it refuses such a conversation: then it says nothing of its last reply.
        """
        try:
            rendered = self.render([{"role": role, "content": content} for role, content in _PROBE[:3]])
        except ValueError:
            return ""
        return rendered.rpartition("<|im_start|>assistant\n")[2].rpartition(_PROBE[2][1])[0]

    def default_system(self) -> str:
        """What is written in front of a conversation that has no system message; may be empty.

        Raises:
            ValueError: the template refuses such a conversation.
        """
        message = "<|im_start|>user\nBeta?<|im_end|>\n"
        rendered = self.render([{"role": "user", "content": "Beta?"}])
        if not rendered.endswith(message):
            raise ValueError(f"{self.origin}: the chat template writes {_short(rendered)} for a user's one message")
        return rendered.removesuffix(message)


def _listed(value: Any, origin: Path) -> Iterator[tuple[str, tuple[str, Path]]]:
    """(name, (template, file)) of `chat_template` in tokenizer_config.json: one template, or several by name."""
    if value is None:
        return
    if isinstance(value, str):
        value = {"default": value}
    if isinstance(value, list) and all(isinstance(one, dict) for one in value):
        pairs = [(one.get("name"), one.get("template")) for one in value]
    else:
        pairs = list(value.items()) if isinstance(value, dict) else [(None, None)]
    if not all(isinstance(x, str) for pair in pairs for x in pair):
        raise ValueError(f"{origin}: chat_template is no text, nor a list of `name` and `template`; correct it")
    yield from ((name, (text, origin)) for name, text in pairs)


def _files(folder: Path) -> Iterator[tuple[str, tuple[str, Path]]]:
    paths = [("default", folder / FILE), *((path.stem, path) for path in (folder / FURTHER).glob("*.jinja"))]
    for name, path in paths:
        if path.is_file():
            try:
                yield name, (path.read_text(encoding="utf-8"), path)
            except UnicodeDecodeError as error:
                raise ValueError(f"{path}: is not UTF-8 text ({error.reason} at byte {error.start})") from None


def _renderer() -> Any:
    """The function of `transformers`; imported where it is needed, for that takes most of a second."""
    with without_advice():
        from transformers.utils.chat_template_utils import render_jinja_template

    return render_jinja_template


def _message_of(error: Exception) -> str:
    line = getattr(error, "lineno", None)
    return f"{type(error).__name__}{f' in line {line}' if line else ''}: {_short(str(error))}"


def _short(text: str) -> str:
    return repr(text if len(text) <= 120 else text[:120] + "…")
