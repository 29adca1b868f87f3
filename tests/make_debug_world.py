"""Writes configs/debug_world (but its prompts): a tokenizer, a tiny architecture, eight profiles; for configs/debug.py.

python tests/make_debug_world.py
"""

import json
from pathlib import Path

from rlver_jax.models.families import Qwen2Config
from rlver_jax.profiles.intentions import HIDDEN_INTENTIONS
from rlver_jax.text.tokenizer_spm import train_sentencepiece
from rlver_jax.user.emotion import CHANGES
from rlver_jax.user.turn import option_text

ROOT = Path(__file__).resolve().parents[1]
OUT = ROOT / "configs" / "debug_world"
SCENES = (
    ("a nurse of 34 who jokes when she is tired", "The night shift was understaffed again and she was blamed for it."),
    ("a student of 20 who thinks before every sentence", "He failed an exam that all his friends passed."),
)


def profiles() -> list[dict]:
    made = []
    for i, intention in enumerate(HIDDEN_INTENTIONS):
        who, what = SCENES[i % len(SCENES)]
        made.append(
            {
                "id": f"debug-{i}",
                "player": f"You are {who}.",
                "scene": what,
                "main_cha": "reserved",
                "cha_group": ["reserved"],
                "task": intention.english,
                "first_talk": "I don't know where to begin. It was a hard week.",
            }
        )
    return made


def main() -> None:
    texts = [file.read_text(encoding="utf-8") for file in sorted((OUT / "prompts").iterdir())]
    texts += [value for p in profiles() for value in p.values() if isinstance(value, str)]
    # Each change is one token, so that random weights find all about equally likely. In digits "0" is the shortest: it
    # would be chosen nearly always, and every reward would be the same.
    changes = [option_text(change).strip() for change in CHANGES]
    tokenizer = train_sentencepiece(texts, OUT / "tokenizer.model", 480, symbols=("\n", *changes))
    rows = -(-tokenizer.vocab_size // 8) * 8  # so that up to eight devices can share them
    sizes = {"num_layers": 1, "num_heads": 8, "num_kv_heads": 8, "head_dim": 8}
    # Wider than 0.02, so that a model of this size says different things after different words.
    config = Qwen2Config(rows, 32, 64, **sizes, tie_embeddings=True, init_std=0.2)
    (OUT / "config.json").write_text(json.dumps(config.to_hf("float32"), indent=2) + "\n", encoding="utf-8")
    lines = [json.dumps(profile, ensure_ascii=False) + "\n" for profile in profiles()]
    (OUT / "profiles.jsonl").write_text("".join(lines), encoding="utf-8")


if __name__ == "__main__":
    main()
