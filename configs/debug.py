"""Two tiny models with random weights: the whole training program in seconds, for tests and for a first look.

Use: python -m rlver_jax.train --config=configs/debug.py --workdir=runs/debug

Nothing is learned that anyone would want: the user's appraisals are noise. But they spread over all changes and depend
on what was said, so rewards differ and every step moves the policy. `debug.py:ppo` has a critic, `:direct` no thoughts,
`:challenging` the challenging user. They can be joined: `debug.py:ppo,direct`.
"""

from pathlib import Path

from ml_collections import ConfigDict

from configs import base

WORLD = Path(__file__).parent / "debug_world"  # written by tests/make_debug_world.py


def get_config(arg: str = "") -> ConfigDict:
    """Eight dialogues of two turns a step; `arg` joins any of ppo, direct, challenging with commas."""
    words = base.words(arg, "ppo", "direct", base.CHALLENGING)
    c = base.get_config(base.CHALLENGING if base.CHALLENGING in words else "")
    for model in (c.policy, c.user, c.critic):
        model.path, model.init = str(WORLD), "random"
        model.dtype = model.param_dtype = "float32"
        model.scan_layers = False
    c.user.prompts = str(WORLD / "prompts")  # short ones
    c.policy.mode = "direct" if "direct" in words else "think"
    c.policy.enforce_format = True  # random weights never keep to it
    c.user.readout = "sample"  # the likeliest change of random weights is always the same one
    c.user.field_tokens, c.user.reply_tokens = 6, 8
    c.data.language = "en"
    c.data.train = c.data.eval = str(WORLD / "profiles.jsonl")
    c.rollout.batch, c.rollout.group, c.rollout.max_turns = 8, 4, 2
    c.rollout.context, c.rollout.think_tokens, c.rollout.say_tokens = 768, 24, 12
    c.emotion.floor = -1  # noise must not end dialogues early
    if "ppo" not in words:
        c.algorithm.estimator = "grpo"
    c.train.steps, c.train.warmup_steps = 6, 0
    c.train.learning_rate = c.critic.learning_rate = 1e-3
    c.train.length_buckets, c.train.padding = 1, 1.0  # few lengths of rows are compiled
    c.checkpoint.every = 2
    c.log.dialogues_every = 2
    c.alarms.readable_min = 0.0  # random tokens are no text
    c.eval.every, c.eval.num_profiles, c.eval.batch, c.eval.max_turns = 3, 8, 8, 2
    return c
