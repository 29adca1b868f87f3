"""What a folder of the miniature holds: two Hugging Face folders, profiles, a config; and the world's constants."""

import json
from collections.abc import Sequence
from pathlib import Path

from rlver_jax.miniature.world import Person

PROMPTS = Path(__file__).parent / "prompts"
SHIPPED = Path(__file__).parent / "shipped"
POLICY, USER, TRAIN, EVAL, CONFIG = "policy", "user", "train.jsonl", "eval.jsonl", "config.py"
TRAINED, MANIFEST = "trained.jsonl", "manifest.json"
TURNS, INITIAL = 6, 40  # of a dialogue; the emotion at its start
TRAIN_COUNT, EVAL_COUNT = 512, 128
SEED = 0  # of the profiles


_CONFIG = '''"""The miniature in this folder.

Use: python -m rlver_jax.train --config=THIS_FILE --workdir=DIR    (THIS_FILE:ppo, :direct, :challenging, or joined)
"""

from pathlib import Path

from rlver_jax.miniature.settings import miniature_config


def get_config(arg=""):
    return miniature_config(arg, Path(__file__).parent)
'''


def write_config(folder: Path) -> None:
    """A config file for the models and profiles beside it."""
    (folder / CONFIG).write_text(_CONFIG, encoding="utf-8")


def write_profiles(path: Path, people: Sequence[Person]) -> None:
    """Profiles in RLVER's schema, one a line."""
    lines = (json.dumps(person.to_json(), ensure_ascii=False) + "\n" for person in people)
    path.write_text("".join(lines), encoding="utf-8")
