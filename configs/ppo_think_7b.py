"""RLVER's main run: Qwen2.5-7B, PPO with a critic of its own, a thought before each reply; for a TPU pod.

Use: python -m rlver_jax.train --config=configs/ppo_think_7b.py --config.policy.path=QWEN_7B
     --config.user.path=QWEN_72B --config.data.train=TRAIN.jsonl --config.data.eval=TEST.jsonl --workdir=DIR
     (--config=configs/ppo_think_7b.py:challenging for the user who never hints at what it hopes for)

The same command on every host. The paper (arXiv 2507.03112) reports 13.3 before and 79.2 after on the Sentient
benchmark, with DeepSeek-V3 as the user. This code has not been run at this size yet.
"""

from ml_collections import ConfigDict

from configs import base

USER_72B = "user72b"


def get_config(arg: str = "") -> ConfigDict:
    """RLVER's settings are base.py's; here is what saves memory at 7B.

    `arg` joins any of challenging (as in base.py) and user72b (a plan's size of the user) with commas.
    """
    words = base.words(arg, USER_72B, base.CHALLENGING)
    c = base.get_config(base.CHALLENGING if base.CHALLENGING in words else "")
    c.policy.size, c.user.size = "7b", "72b" if USER_72B in words else "7b"  # for plans without a path
    for model in (c.policy, c.critic):
        model.remat = "full"
    for model in (c.policy, c.user, c.critic):
        model.attention = "chunked"
    c.train.microbatches = 2
    c.loss.vocab_chunk = 2048  # of the 38,016 of a chip, at up to 13,824 positions a row: 0.1 GiB in float32
    c.mesh.tensor = 4  # Qwen2.5-7B has 4 key and value heads
    c.mesh_sampling.replica, c.mesh_sampling.fsdp = -1, 1  # no weights travel while dialogues are played
    c.eval.every = 25
    return c
