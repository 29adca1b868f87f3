"""RLVER as published: Qwen2.5-7B, GRPO in groups of four dialogues, replies without thoughts; for a TPU pod.

Use: python -m rlver_jax.train --config=configs/grpo_direct_7b.py --config.policy.path=QWEN_7B
     --config.user.path=QWEN_72B --config.data.train=TRAIN.jsonl --config.data.eval=TEST.jsonl --workdir=DIR
     (--config=configs/grpo_direct_7b.py:challenging for the user who never hints at what it hopes for)

See ppo_think_7b.py; this code has not been run at this size yet.
"""

from ml_collections import ConfigDict

from configs import ppo_think_7b


def get_config(arg: str = "") -> ConfigDict:
    """`ppo_think_7b` with groups in place of a critic, and without thoughts; `arg` as in grpo_think_7b.py."""
    return ppo_think_7b.direct(ppo_think_7b.get_config(ppo_think_7b.with_grpo(arg)))
