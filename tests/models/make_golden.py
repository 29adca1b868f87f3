"""Writes tests/models/golden/: small random Qwen2 and Qwen3 models and the logits that transformers computes for them.

Run once, in an environment with torch (`pip install -e '.[parity]'`):
    python tests/models/make_golden.py [NAME …]
The default tests then compare our model with transformers without needing torch.
"""

import sys
from pathlib import Path

import numpy as np
import torch
from transformers import Qwen2Config, Qwen2ForCausalLM, Qwen3Config, Qwen3ForCausalLM

CONFIGS = {
    "tied": {"num_attention_heads": 4, "num_key_value_heads": 2, "tie_word_embeddings": True},
    "untied": {"num_attention_heads": 4, "num_key_value_heads": 4, "tie_word_embeddings": False},
    "gqa": {"num_attention_heads": 6, "num_key_value_heads": 1, "tie_word_embeddings": False},
    "yarn": {  # 40 tokens: 2.5 times the original context
        **{"num_attention_heads": 4, "num_key_value_heads": 2, "tie_word_embeddings": True},
        "max_position_embeddings": 64,
        "rope_parameters": {
            **{"rope_type": "yarn", "rope_theta": 10_000.0, "factor": 4.0, "original_max_position_embeddings": 16},
            **{"beta_fast": 2.0, "beta_slow": 0.25},  # of 6 frequencies 1 stays, 1 lies between, 4 are divided
        },
    },
}
QWEN3 = {  # heads are wider than hidden_size / num_attention_heads, as in 0.6B and 4B, or narrower, as in none
    "qwen3": {"num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 16, "tie_word_embeddings": True},
    "qwen3_untied": {"num_attention_heads": 4, "num_key_value_heads": 4, "head_dim": 8, "tie_word_embeddings": False},
    "qwen3_gqa": {"num_attention_heads": 6, "num_key_value_heads": 1, "head_dim": 8, "tie_word_embeddings": False},
}
DEFAULT = {"rope_type": "default", "rope_theta": 10_000.0}


def main(names: list[str]) -> None:
    for seed, (name, fields) in enumerate((CONFIGS | QWEN3).items()):
        if names and name not in names:
            continue
        torch.manual_seed(seed)
        config_class, model_class = (
            (Qwen3Config, Qwen3ForCausalLM) if name in QWEN3 else (Qwen2Config, Qwen2ForCausalLM)
        )
        config = config_class(
            vocab_size=131,
            hidden_size=48,
            intermediate_size=80,
            num_hidden_layers=3,
            **{"max_position_embeddings": 512, "rope_parameters": DEFAULT, **fields},
        )
        model = model_class(config).eval()
        with torch.no_grad():
            for parameter in model.parameters():  # biases and norms are constants at first: disturb them all
                parameter.add_(torch.randn_like(parameter) * 0.1)
            tokens = torch.randint(0, 131, (3, 40))
            logits = model(tokens).logits
        folder = Path(__file__).parent / "golden" / name
        model.save_pretrained(folder)
        (folder / "generation_config.json").unlink(missing_ok=True)
        np.savez_compressed(folder / "golden.npz", tokens=tokens.numpy().astype(np.int32), logits=logits.numpy())


if __name__ == "__main__":
    main(sys.argv[1:])
