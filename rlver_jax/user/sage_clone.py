"""SAGE's prompts, read from a clone of its repository (arXiv 2505.02847; github.com/Tencent/digitalhuman, MIT).

They are string literals in Python files there. The files are parsed, never imported or run. What is read: of
`simulator_response.py` the goal and the bands of emotion, of its `planning_reply` the appraisal's template, of its
`player_reply` the reply's template and the texts that are put into it; of `npc_response.py` the policy's system prompt.
"""

import ast
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

from rlver_jax.config.paths import SAGE_SIMULATOR, sage_folder

POLICY = "npc_response.py"
_APPRAISAL_SLOTS = ("target", "simulator_role", "simulator_scene", "emotion", "dialog_history")
_REPLY_SLOTS = ("target", "emotion", "player_type", "player_topic", "dialog_history", "new_history", "planning")


class PromptPart(NamedTuple):
    """A piece of what the reply's prompt says of an appraisal: a text, or one of the appraisal's fields."""

    text: str
    field: str = ""


@dataclass(frozen=True)
class SagePrompts:
    """What a clone says.

    Attributes:
        goal: of the dialogue, for both templates.
        bands: {name: lowest emotion}, the highest first.
        lowest: name of what lies below the last band.
        appraisal, reply: templates with {{slots}}.
        speakers: names of `user` and `assistant` in the history.
        planning: what the reply's prompt says of the appraisal.
        opening: stands for it where there is none yet: asks for the first words.
        no_history: stands for the dialogue before the first words.
        policy: the policy's system prompt.
    """

    goal: str
    bands: Mapping[str, int]
    lowest: str
    appraisal: str
    reply: str
    speakers: Mapping[str, str]
    planning: tuple[PromptPart, ...]
    opening: str
    no_history: str
    policy: str


def read(clone: Path) -> SagePrompts:
    """The prompts of a clone.

    Raises:
        ValueError: it is none, or a text is not where SAGE's repository has it; names the file and what was expected.
    """
    folder = sage_folder(clone)
    if folder is None:
        raise ValueError(
            f"{clone}: holds no SAGE/{SAGE_SIMULATOR}; expected a clone of github.com/Tencent/digitalhuman, or the "
            f"folder SAGE in it"
        )
    simulator, policy = _Source(folder / SAGE_SIMULATOR), _Source(folder / POLICY)
    bands = simulator.mapping("", "emo_count", int)
    reply = simulator.function("player_reply")
    pieces = [values for values in simulator.put_in(reply, "planning") if len(values) > 1]
    history = [values[0].text for values in simulator.put_in(reply, "dialog_history") if len(values) == 1]
    return SagePrompts(
        goal=simulator.text("", "target_prompt"),
        bands=bands,
        lowest=f"{next(reversed(bands))[:-1]}F",
        appraisal=simulator.template("planning_reply", _APPRAISAL_SLOTS),
        reply=simulator.template("player_reply", _REPLY_SLOTS),
        speakers=simulator.mapping("player_reply", "mapping", str, ("user", "assistant")),
        planning=tuple(simulator.one(pieces, "player_reply", "text around the appraisal in {{planning}}")),
        opening=simulator.opening(reply),
        no_history=simulator.one([text for text in history if text], "player_reply", "text for no {{dialog_history}}"),
        policy=policy.text("call_npc", "role_system"),
    )


class _Source:
    """A Python file, parsed."""

    def __init__(self, path: Path):
        self.path = path
        try:
            self._tree = ast.parse(path.read_text(encoding="utf-8-sig"))
        except OSError as error:
            raise ValueError(f"{path}: {error.strerror}; expected the file of a clone of SAGE's repository") from None
        except (SyntaxError, ValueError) as error:
            raise ValueError(f"{path}: is no Python file that can be parsed ({error}); restore the clone's") from None

    def _missing(self, function: str, what: str) -> ValueError:
        where = f"in the function {function}" if function else "at the top"
        return ValueError(f"{self.path}: expected, {where}, {what}, as in SAGE's repository; restore the clone's file")

    def one(self, candidates: list[Any], function: str, what: str) -> Any:
        """The first of what was found."""
        if not candidates:
            raise self._missing(function, f"a {what}")
        return candidates[0]

    def function(self, name: str) -> ast.FunctionDef:
        """A function by name."""
        for node in self._tree.body:
            if isinstance(node, ast.FunctionDef) and node.name == name:
                return node
        raise self._missing("", f"a function {name}")

    def _assigned(self, function: str, name: str) -> Iterator[ast.expr]:
        body = ast.walk(self.function(function)) if function else iter(self._tree.body)
        for node in body:
            if isinstance(node, ast.Assign) and any(isinstance(t, ast.Name) and t.id == name for t in node.targets):
                yield node.value

    def text(self, function: str, name: str) -> str:
        """A text that is assigned to a name."""
        for value in self._assigned(function, name):
            if (text := _text(value)) and text.strip():
                return text
        raise self._missing(function, f"a text assigned to {name}")

    def template(self, function: str, slots: tuple[str, ...]) -> str:
        """The text assigned to `template`, which must have the slots."""
        text = self.text(function, "template")
        if lacking := [f"{{{{{slot}}}}}" for slot in slots if f"{{{{{slot}}}}}" not in text]:
            raise self._missing(function, f"{', '.join(lacking)} within the text assigned to template")
        return text

    def mapping(self, function: str, name: str, kind: type, keys: tuple[str, ...] = ()) -> dict[str, Any]:
        """A dictionary of texts or numbers that is assigned to a name."""
        for value in self._assigned(function, name):
            try:
                literal = ast.literal_eval(value)
            except ValueError:
                continue
            whole = isinstance(literal, dict) and literal and set(keys) <= set(literal)
            if whole and all(isinstance(key, str) and isinstance(one, kind) for key, one in literal.items()):
                return literal
        raise self._missing(
            function, f"a dictionary assigned to {name} ({kind.__name__} by {', '.join(keys) or 'name'})"
        )

    def put_in(self, function: ast.FunctionDef, slot: str) -> Iterator[list[PromptPart]]:
        """What is put into a slot of a template, by calls of `replace`, as far as it is made of texts and fields."""
        for node in ast.walk(function):
            if not (isinstance(node, ast.Call) and isinstance(node.func, ast.Attribute) and len(node.args) == 2):
                continue
            if node.func.attr == "replace" and _text(node.args[0]) == f"{{{{{slot}}}}}":
                pieces = list(_pieces(node.args[1]))
                if pieces and None not in pieces:
                    yield pieces  # type: ignore[misc]

    def opening(self, function: ast.FunctionDef) -> str:
        """The text that is assigned to a field of the appraisal where there is none."""
        texts = [
            text
            for node in ast.walk(function)
            if isinstance(node, ast.Assign)
            and isinstance(node.targets[0], ast.Subscript)
            and (text := _text(node.value))
        ]
        return self.one(texts, function.name, "text assigned to planning['analyse'], for the first words")


def _text(node: ast.expr) -> str:
    """The text of a literal; empty where it is none."""
    return node.value if isinstance(node, ast.Constant) and isinstance(node.value, str) else ""


def _pieces(node: ast.expr) -> Iterator[PromptPart | None]:
    """Of a sum of texts and fields, from the left; None for anything else."""
    if isinstance(node, ast.BinOp) and isinstance(node.op, ast.Add):
        yield from _pieces(node.left)
        yield from _pieces(node.right)
    elif isinstance(node, ast.Constant) and isinstance(node.value, str):
        yield PromptPart(node.value)
    elif isinstance(node, ast.Subscript) and _text(node.slice):
        yield PromptPart("", _text(node.slice))
    else:
        yield None
