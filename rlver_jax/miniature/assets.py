"""What a folder of the miniature holds: two Hugging Face folders, profiles, a config; and the world's constants."""

import hashlib
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from rlver_jax.miniature.world import Person
from rlver_jax.runs.files import write_json

PROMPTS = Path(__file__).parent / "prompts"
SHIPPED = Path(__file__).parent / "shipped"
POLICY, USER, TRAIN, EVAL, CONFIG = "policy", "user", "train.jsonl", "eval.jsonl", "config.py"
TRAINED, MANIFEST = "trained.jsonl", "manifest.json"
RUNS = "runs"  # of a build; not shipped
TURNS, INITIAL = 6, 40  # of a dialogue; the emotion at its start
TRAIN_COUNT, EVAL_COUNT = 512, 128
SEED = 0  # of the profiles


_CONFIG = '''"""The miniature in this folder.

Use: python -m rlver_jax.train --config=THIS_FILE --workdir=DIR    (:ppo, :direct, :final, :challenging, or joined)
"""

from pathlib import Path

from rlver_jax.miniature.settings import miniature_config


def get_config(arg=""):
    """`arg` joins any of ppo, direct, final, challenging with commas."""
    return miniature_config(arg, Path(__file__).parent)
'''


def write_config(folder: Path) -> None:
    """A config file for the models and profiles beside it."""
    (folder / CONFIG).write_text(_CONFIG, encoding="utf-8")


def write_profiles(path: Path, people: Sequence[Person]) -> None:
    """Profiles in RLVER's schema, one a line."""
    lines = (json.dumps(person.to_json(), ensure_ascii=False) + "\n" for person in people)
    path.write_text("".join(lines), encoding="utf-8")


def shipped() -> Path:
    """The folder that comes with the package.

    Raises:
        FileNotFoundError: it was left out of the installation.
    """
    if not (SHIPPED / MANIFEST).exists():
        raise FileNotFoundError(
            f"{SHIPPED}: the miniature's files are missing; install the package again, or build them with "
            f"python -m rlver_jax.miniature.build --out={SHIPPED}"
        )
    return SHIPPED


def checksums(folder: Path) -> dict[str, str]:
    """{file: SHA-256} of everything that belongs to a miniature."""
    parts = (POLICY, USER)
    files = [file for part in parts for file in sorted((folder / part).iterdir())]
    files += [folder / name for name in (TRAIN, EVAL, TRAINED) if (folder / name).exists()]
    return {file.relative_to(folder).as_posix(): hashlib.sha256(file.read_bytes()).hexdigest() for file in files}


def write_manifest(folder: Path, built: dict[str, Any]) -> None:
    """What the folder holds and how it was made."""
    write_json(folder / MANIFEST, {"profile_seed": SEED, **built, "sha256": checksums(folder)})


def changed_files(folder: Path) -> list[str]:
    """Files that differ from the manifest's, are missing, or are not in it.

    Raises:
        OSError: there is no manifest.
    """
    named = json.loads((folder / MANIFEST).read_text(encoding="utf-8"))["sha256"]
    sums = checksums(folder)
    return sorted(name for name in {**named, **sums} if named.get(name) != sums.get(name))
