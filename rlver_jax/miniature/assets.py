"""Where the miniature's shipped files lie, and its profiles as files."""

import json
from collections.abc import Sequence
from pathlib import Path

from rlver_jax.miniature.world import Person

PROMPTS = Path(__file__).parent / "prompts"
ASSETS = Path(__file__).parent / "assets"  # policy/, user/ (Hugging Face folders), profiles, manifest
POLICY, USER, TRAIN, EVAL, MANIFEST = "policy", "user", "train.jsonl", "eval.jsonl", "manifest.json"
TURNS, INITIAL = 6, 40  # of a dialogue; the emotion at its start
TRAIN_COUNT, EVAL_COUNT = 512, 128
SEED = 0  # of the shipped profiles


def write_profiles(path: Path, people: Sequence[Person]) -> None:
    """Profiles in RLVER's schema, one a line."""
    lines = (json.dumps(person.to_json(), ensure_ascii=False) + "\n" for person in people)
    path.write_text("".join(lines), encoding="utf-8")
