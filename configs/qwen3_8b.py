"""Qwen3-8B as the policy and as its user, on a TPU pod: rlver_plus.py for a model that thinks by itself.

Use: python -m rlver_jax.train --config=configs/qwen3_8b.py:ppo,think --config.policy.path=Qwen/Qwen3-8B
     --config.user.path=Qwen/Qwen3-8B --config.data.train=TRAIN.jsonl --config.data.eval=TEST.jsonl --workdir=DIR
     (:grpo,think, :ppo,direct and :grpo,direct; with ,challenging the user never hints at what it hopes for)

The other dense sizes differ in paths, and in policy.size and user.size, which plans without a path read (qwen3-0.6b,
qwen3-1.7b, qwen3-4b, qwen3-14b, qwen3-32b). A user of Qwen2.5 works too: its tokenizer lacks four tokens of Qwen3's, so
the two exchange text. This code has not been run at this size yet.
"""

from ml_collections import ConfigDict

from configs import base, rlver_plus
from configs.ppo_think_7b import LORA


def get_config(arg: str = "") -> ConfigDict:
    """`arg` joins ppo or grpo, think or direct (ppo,think where none is named), challenging, lora with commas."""
    base.words(arg, "ppo", "grpo", "think", "direct", base.CHALLENGING, LORA)
    c = rlver_plus.get_config(arg)
    c.policy.size = c.user.size = "qwen3-8b"  # for plans without a path
    c.mesh.tensor = 4  # Qwen3 has 8 key and value heads, from 0.6B to 32B
    # Untrained, it thinks longer than Qwen2.5, which has to be asked to. A thought at its limit is closed, not lost.
    c.rollout.think_tokens = 1024
    c.policy.enforce_format = c.policy.mode == "think"
    return c
