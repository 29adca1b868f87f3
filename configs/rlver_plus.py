"""What we would run in place of RLVER's published settings: Qwen2.5-7B on a TPU pod, each change with its reason.

Use: python -m rlver_jax.train --config=configs/rlver_plus.py:ppo,think --config.policy.path=QWEN_7B
     --config.user.path=QWEN_72B --config.data.train=TRAIN.jsonl --config.data.eval=TEST.jsonl --workdir=DIR
     (:grpo,think, :ppo,direct and :grpo,direct; with ,challenging the user never hints at what it hopes for)

RLVER's values are in ppo_think_7b.py and its siblings. This code has not been run at this size yet.
"""

from ml_collections import ConfigDict

from configs import base
from configs.ppo_think_7b import LORA, USER_72B, on_a_pod, with_adapters


def get_config(arg: str = "") -> ConfigDict:
    """`arg` joins ppo or grpo, think or direct (default ppo,think), challenging, user72b, lora with commas."""
    words = base.words(arg, "ppo", "grpo", "think", "direct", base.CHALLENGING, USER_72B, LORA)
    c = base.get_config(base.CHALLENGING if base.CHALLENGING in words else "")
    c.policy.mode = "direct" if "direct" in words else "think"
    c.policy.prompt = "coach"  # an untrained policy earns more with it, so that rewards spread from the first step
    # Dialogues end as SAGE's do, which scores them: a failure is over below 10, a success at 100.
    c.emotion.floor, c.emotion.ceiling = 9, 100
    c.rollout.max_turns = 8
    # Replies of a few sentences: 512 tokens bound the cache, and so the chips, at a sixth of RLVER's 5,000.
    c.rollout.context, c.rollout.think_tokens, c.rollout.say_tokens = 8192, 512, 512
    c.loss.normalization = "token_mean"  # every token counts alike, long replies are not favoured (DAPO, 2503.14476)
    c.train.steps, c.train.warmup_steps = 500, 50
    if "grpo" in words:
        c.algorithm.estimator = "grpo"
        c.rollout.group = 4
    c.train.microbatches = 2
    c = on_a_pod(c, "72b" if USER_72B in words else "7b")
    return with_adapters(c) if LORA in words else c
