"""Prompts whose scripts lack some of their free fields, each left out with the rest of its line."""

import dataclasses
import re
import shutil
from collections.abc import Callable
from pathlib import Path

from rlver_jax.decoding.script import Part, parse_script
from rlver_jax.user.prompts.load import FILES, Prompts

APPRAISAL, REPLY = "appraisal.script", "reply.script"
Wanted = Callable[[str], bool]  # whether a field of that name stays


def free_fields(script: tuple[Part, ...]) -> list[str]:
    """Names of a script's free fields."""
    return [part.value for part in script if part.kind == "free"]


def with_fields(prompts: Prompts, appraisal: Wanted, reply: Wanted) -> Prompts:
    """The prompts with those free fields alone; the reply itself stays in any case."""
    last = free_fields(prompts.reply)[-1]
    return dataclasses.replace(
        prompts,
        appraisal=parse_script(_without(prompts.appraisal, appraisal), APPRAISAL),
        reply=parse_script(_without(prompts.reply, lambda name: name == last or reply(name)), REPLY),
    )


def write_prompts(prompts: Prompts, own: str, folder: Path) -> None:
    """Writes what `load_prompts` reads as these prompts.

    Args:
        own: the folder of own prompt files that they came from; empty: none.
    """
    folder.mkdir(parents=True, exist_ok=True)
    for name in FILES if own else ():
        if (Path(own) / name).exists():
            shutil.copyfile(Path(own) / name, folder / name)
    for name, script in ((APPRAISAL, prompts.appraisal), (REPLY, prompts.reply)):
        (folder / name).write_text(script_text(script), encoding="utf-8")


def _without(script: tuple[Part, ...], wanted: Wanted) -> str:
    text = script_text(script)
    for name in free_fields(script):
        if not wanted(name):
            text = re.sub(rf"^.*<<free:{name}>>\n", "", text, flags=re.MULTILINE)
    return text


def script_text(script: tuple[Part, ...]) -> str:
    """The script as its file has it."""
    marks = {"text": "{}", "slot": "{{{}}}", "free": "<<free:{}>>\n", "choose": "<<choose:{}>>\n"}
    return "".join(marks[part.kind].format(part.value) for part in script)
