"""The prompts of a user that names its change at once: the fields before it left out of the appraisal."""

import dataclasses
import re
import shutil
from pathlib import Path

from rlver_jax.decoding.script import Part, parse_script
from rlver_jax.user.prompts.load import FILES, Prompts

SCRIPT = "appraisal.script"
_FREE_LINE = re.compile(r"^.*<<free:[^<>\n]*>>\n", re.MULTILINE)


def change_only(prompts: Prompts) -> Prompts:
    """The prompts without the appraisal's free fields, each with the rest of its line."""
    return dataclasses.replace(prompts, appraisal=parse_script(_text(prompts.appraisal), SCRIPT))


def write_change_only(prompts: Prompts, own: str, folder: Path) -> None:
    """Writes what `load_prompts` reads as `change_only(prompts)`.

    Args:
        own: the folder of own prompt files that `prompts` were read from; empty: none.
    """
    folder.mkdir(parents=True, exist_ok=True)
    for name in FILES if own else ():
        if (Path(own) / name).exists():
            shutil.copyfile(Path(own) / name, folder / name)
    (folder / SCRIPT).write_text(_text(prompts.appraisal) + "\n", encoding="utf-8")


def _text(parts: tuple[Part, ...]) -> str:
    """The script's file, without the lines of free fields."""
    marks = {"text": "{}", "slot": "{{{}}}", "free": "<<free:{}>>\n", "choose": "<<choose:{}>>"}
    return _FREE_LINE.sub("", "".join(marks[part.kind].format(part.value) for part in parts))
