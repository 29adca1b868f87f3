"""The real Qwen2.5-0.5B as policy and as simulated user on two CPU cores: three GRPO steps, or a look at dialogues.

Use: python -m rlver_jax.train --config=configs/qwen25_0p5b_cpu.py --config.policy.path=DIR --config.user.path=DIR
     --config.data.train=PROFILES.jsonl --workdir=OUT
     python -m rlver_jax.evaluate --config=configs/qwen25_0p5b_cpu.py --config.policy.path=DIR --config.user.path=DIR
     --config.data.eval=PROFILES.jsonl --out=OUT
     (--config=configs/qwen25_0p5b_cpu.py:lora for adapters on one base, :challenging for the hard user, :ppo for a
     critic in place of groups; joined by commas)

DIR is the Hugging Face folder of Qwen2.5-0.5B or Qwen2.5-0.5B-Instruct; OUT of a training takes 5.1 GB. The three steps
took 24 minutes on two cores (Intel Xeon): about six to play four dialogues, one and a half to learn from them.
"""

from ml_collections import ConfigDict

from configs import base
from configs.ppo_think_7b import LORA, with_adapters


def get_config(arg: str = "") -> ConfigDict:
    """Short dialogues, two profiles a step and two dialogues of each; `arg` joins any of ppo, challenging, lora."""
    words = base.words(arg, "ppo", LORA, base.CHALLENGING)
    c = base.get_config(base.CHALLENGING if base.CHALLENGING in words else "")
    c = with_adapters(c) if LORA in words else c  # its base in bfloat16 is widened below
    for model in (c.policy, c.user, c.critic):
        model.dtype = "float32"  # a log's log-probabilities are then recomputed to 1e-3
        model.param_dtype = "float32"
        model.scan_layers = False  # scanned ones copy their weights at every decode step
        model.attention = "chunked"
        model.attention_chunk = 256
    c.user.attention_chunk = 32  # scores that stay in the cores' caches: a prefix is read in half the time
    c.policy.prompt = "coach"  # says how to be empathetic, which a model of this size doesn't know
    c.policy.remat = c.critic.remat = "full"  # a third of the work again, much less memory (docs/performance.md)
    if LORA in words:  # of attention alone, and nothing is computed again: two thirds of the time, half of the memory
        c.lora.targets = "q,k,v,o"
        c.policy.remat = c.critic.remat = "none"
    c.policy.enforce_format = True  # an untrained 0.5B model seldom keeps to it by itself
    c.user.field_tokens = 24
    c.user.reply_tokens = 48
    c.rollout.batch, c.rollout.group = 4, 2
    if "ppo" in words:
        c.rollout.group = 1  # four profiles a step
    else:
        c.algorithm.estimator = "grpo"
    c.rollout.max_turns = 3
    c.rollout.context = 4608  # a published profile takes 2,000 to 3,000 tokens
    c.rollout.think_tokens = 64
    c.rollout.say_tokens = 64
    c.train.steps, c.train.warmup_steps = 3, 0
    c.train.microbatches = 4  # a third of the memory: 24 GiB are enough
    c.log.dialogues_every = 1
    c.alarms.readable_min = 0.0  # its replies seldom end within 64 tokens
    c.alarms.unreadable_max = 0.0  # as a user behind an endpoint it often fills in its forms wrongly
    c.eval.num_profiles = 4
    c.eval.batch = 4
    c.eval.max_turns = 3
    c.mesh.fsdp, c.mesh.tensor = 1, -1  # a batch of 4 need not divide by the devices
    return c
