"""Writes tests/models/golden/: small random Qwen2 models and the logits that transformers computes for them.

Run once, in an environment with torch (`pip install -e '.[parity]'`):
    python tests/models/make_golden.py
The default tests then compare our model with transformers without needing torch.
"""

from pathlib import Path

import numpy as np
import torch
from transformers import Qwen2Config, Qwen2ForCausalLM

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
DEFAULT = {"rope_type": "default", "rope_theta": 10_000.0}


def main() -> None:
    for seed, (name, fields) in enumerate(CONFIGS.items()):
        torch.manual_seed(seed)
        config = Qwen2Config(
            vocab_size=131,
            hidden_size=48,
            intermediate_size=80,
            num_hidden_layers=3,
            **{"max_position_embeddings": 512, "rope_parameters": DEFAULT, **fields},
        )
        model = Qwen2ForCausalLM(config).eval()
        with torch.no_grad():
            for parameter in model.parameters():  # biases and norms are constants at initialization: disturb them all
                parameter.add_(torch.randn_like(parameter) * 0.1)
            tokens = torch.randint(0, 131, (3, 40))
            logits = model(tokens).logits
        folder = Path(__file__).parent / "golden" / name
        model.save_pretrained(folder)
        (folder / "generation_config.json").unlink(missing_ok=True)
        np.savez_compressed(folder / "golden.npz", tokens=tokens.numpy().astype(np.int32), logits=logits.numpy())


if __name__ == "__main__":
    main()
