"""RLVER's main run as published: Qwen2.5-7B, PPO with a critic of its own, a thought before each reply; for a TPU pod.

Use: python -m rlver_jax.train --config=configs/ppo_think_7b.py --config.policy.path=QWEN_7B
     --config.user.path=QWEN_72B --config.data.train=TRAIN.jsonl --config.data.eval=TEST.jsonl --workdir=DIR
     (--config=configs/ppo_think_7b.py:challenging for the user who never hints at what it hopes for; :ppo and :grpo
     choose the algorithm in all four of these configs)

The same command on every host. The paper (arXiv 2507.03112) reports 13.3 before and 79.2 after on the Sentient
benchmark, with DeepSeek-V3 as the user. This code has not been run at this size yet. `rlver config --diff=rlver` prints
every value beside the published one with its source, docs/reproducing.md says what differs; rlver_plus.py is what we
would run instead.
"""

from ml_collections import ConfigDict

from configs import base

USER_72B, LORA = "user72b", "lora"


def get_config(arg: str = "") -> ConfigDict:
    """RLVER's values with their sources, then what only memory and speed depend on.

    `arg` joins any of ppo (as it is), grpo (`grpo`), challenging (as in base.py), user72b (a plan's size of the user)
    and lora (`with_adapters`) with commas. Sources: files of RLVER's code (github.com/Tencent/digitalhuman, RLVER/code,
    commit 057e269), sections of the paper.
    """
    words = base.words(arg, "ppo", "grpo", USER_72B, LORA, base.CHALLENGING)
    c = base.get_config(base.CHALLENGING if base.CHALLENGING in words else "")
    c.policy.prompt = "friend"  # system_prompt.py, in our words
    c.rollout.batch, c.rollout.group = 32, 1  # train_rlver.sh: train_batch_size 32, rollout.n 1; paper B.3
    c.rollout.max_turns = 9  # vllm_rollout_spmd_think.py: 8 in the script, compared after counting
    c.rollout.context = 15000  # train_rlver.sh: prompt 5,000 and response 10,000
    c.rollout.think_tokens, c.rollout.say_tokens = 4000, 1000  # train_rlver.sh: per_turn_length 5000, both together
    c.emotion.floor, c.emotion.ceiling = 0, 101  # vllm_rollout_spmd_think.py: ends at 0 or a goodbye, not at 100
    c.algorithm.credit = "turn"  # url_environment.py: the final reward at the end of every turn's row
    c.loss.normalization = "turn_mean"  # dp_actor.py: the mean of each row, then over 32 GPUs with a row each
    c.loss.entropy = 0.001  # ppo_trainer.yaml: entropy_coeff
    c.loss.recompute = True  # ray_trainer_think.py: old log-probs are the trainer's
    c.critic.head_init = "random"  # fsdp_workers.py: a new token classification head
    c.train.steps = 1000  # train_rlver.sh; the paper's curves end at 350 (PPO) and 210 (GRPO)
    c.train.turns_per_update = 32  # train_rlver.sh: ppo_mini_batch_size 32, of turns
    c.train.warmup_steps = 160  # train_rlver.sh: 0.02 x 1,000 training steps, of about 8 updates
    c.critic.rate_warmup_steps = 400  # train_rlver.sh: 0.05 x 1,000 training steps, of about 8 updates
    c = on_a_pod(c, "72b" if USER_72B in words else "7b")
    c = grpo(c) if "grpo" in words else c
    return with_adapters(c) if LORA in words else c


def with_grpo(arg: str) -> str:
    """The argument of a GRPO config for `get_config`: with grpo, unless ppo is asked for."""
    return arg if "ppo" in arg.split(",") else f"{arg},grpo"


def on_a_pod(c: ConfigDict, user: str) -> ConfigDict:
    """What saves memory and time at 7B and changes nothing that is learned; `user` is its size for plans."""
    c.policy.size, c.user.size = "7b", user  # for plans without a path
    for model in (c.policy, c.critic):
        model.remat = "full"
    for model in (c.policy, c.user, c.critic):
        model.attention = "chunked"
    c.loss.vocab_chunk = 2048  # of the 38,016 of a chip, at up to 13,824 positions a row: 0.1 GiB in float32
    c.mesh.tensor = 4  # Qwen2.5-7B has 4 key and value heads
    c.mesh_sampling.replica, c.mesh_sampling.fsdp = -1, 1  # no weights travel while dialogues are played
    c.eval.every, c.eval.max_turns = 25, 9
    return c


def with_adapters(c: ConfigDict) -> ConfigDict:
    """Adapters on one frozen base, which the user reads too where its path is the policy's (docs/lora.md).

    Not RLVER's: it trained all parameters. Learning rates are ten times its own; nothing here has been tuned.
    """
    c.lora.rank, c.lora.alpha = 16, 32.0
    c.policy.param_dtype = c.critic.param_dtype = "bfloat16"
    c.train.learning_rate *= 10
    c.critic.learning_rate *= 10
    return c


def direct(c: ConfigDict) -> ConfigDict:
    """RLVER's values where replies have no thoughts: a dialogue is one row, and a batch one update."""
    c.policy.mode = "direct"
    c.rollout.say_tokens = 1000  # RLVER: 5,000 a reply, but a dialogue is cut at 10,000, which nine replies share
    c.algorithm.credit = "dialogue"  # url_environment.py: once, at the end
    c.loss.normalization = "dialogue_mean"
    c.train.turns_per_update = 0
    c.train.warmup_steps, c.critic.rate_warmup_steps = 20, 50  # training steps are updates here
    return c


def grpo(c: ConfigDict) -> ConfigDict:
    """RLVER's values for GRPO: groups of four, and updates of four times as many rows."""
    c.algorithm.estimator = "grpo"
    c.algorithm.credit = "dialogue"  # one advantage for all of a dialogue
    c.rollout.batch, c.rollout.group = 128, 4  # train_rlver.sh and README: 32 profiles, rollout.n 4; paper B.3
    c.train.turns_per_update *= 4  # fsdp_workers.py multiplies ppo_mini_batch_size by n
    return c
