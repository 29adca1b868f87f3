"""Every field of a config, with its unit, its default and where the default comes from.

Use: python -m rlver_jax.evaluate --config=configs/base.py --config.policy.path=DIR --config.user.path=DIR …

RLVER: arXiv 2507.03112 and its published code; SAGE: arXiv 2505.02847. Other configs call `get_config` and change a
few fields. A field that is not here does not exist: an unknown name is an error.
"""

from ml_collections import ConfigDict

CHALLENGING = "challenging"


def get_model() -> ConfigDict:
    """Fields that the policy and the simulated user have in common."""
    c = ConfigDict()
    c.path = ""  # Hugging Face folder of a Qwen2.5 model with its tokenizer files
    c.dtype = "bfloat16"  # of activations and caches: bfloat16 | float32
    c.param_dtype = "bfloat16"  # of weights: bfloat16 | float32
    c.scan_layers = True  # compile one layer and scan it (TPU); False unrolls: faster decoding on CPU
    c.attention = "dense"  # dense | chunked (less memory for long rows, equal result)
    c.attention_chunk = 512  # queries at a time with attention=chunked
    return c


def get_config(arg: str = "") -> ConfigDict:
    """The base config; `arg` "challenging" picks the challenging simulated user (RLVER, section 4.3)."""
    c = ConfigDict()

    c.policy = get_model()
    c.policy.remat = "none"  # what the backward pass keeps: none (all) | dots (weight products) | full (layer inputs)
    c.policy.mode = "think"  # think: <think>thought</think> before each reply (RLVER's main setting) | direct

    c.policy.enforce_format = False  # think: close a thought at its limit, no end of message before a visible reply

    c.user = get_model()
    c.user.style = arg or "vanilla"  # vanilla | challenging (never hints at the hidden intention)
    c.user.scenario = "heart_to_heart"  # heart_to_heart | chit_chat
    c.user.readout = "argmax"  # of the change's distribution: argmax (deterministic) | sample | mean
    c.user.prompts = ""  # folder of own prompt files, replacing those of rlver_jax/user/prompts with the same name
    c.user.reply_temperature = 1.0  # of the user's spoken replies; 0: greedy. Appraisals are always greedy
    c.user.field_tokens = 64  # at most, for each field of the appraisal and each consideration of the reply
    c.user.reply_tokens = 128  # at most, for the spoken reply

    c.data = ConfigDict()
    c.data.language = "zh"  # of the prompts: zh (RLVER's published profiles) | en
    c.data.train = ""  # JSONL file(s) of profiles in RLVER's or SAGE's schema, comma-separated
    c.data.eval = ""  # the same, held out; empty: data.train
    c.data.seed = 0  # of the order of profiles

    c.rollout = ConfigDict()
    c.rollout.batch = 32  # dialogues played at once = profiles x group (RLVER: 32)
    c.rollout.group = 1  # dialogues of one profile (RLVER: 1 with PPO, 4 with GRPO)
    c.rollout.max_turns = 8  # policy replies in a dialogue (RLVER: 8)
    c.rollout.context = 8192  # slots of each row's cache, in tokens, policy and user alike
    c.rollout.think_tokens = 512  # at most, of a thought with its closing tag
    c.rollout.say_tokens = 512  # at most, of a reply
    c.rollout.temperature = 1.0  # of the policy (RLVER: 1); 0: greedy
    c.rollout.top_k = 0  # keep the k most likely tokens; 0: all
    c.rollout.top_p = 1.0  # keep the smallest set with this probability

    c.emotion = ConfigDict()
    c.emotion.initial = 30  # points of 0..100 at the start of a dialogue (RLVER's training; SAGE's evaluation: 40)
    c.emotion.floor = 9  # a dialogue ends at or below it, as a failure (SAGE: below 10)
    c.emotion.ceiling = 100  # a dialogue ends at or above it, as a success (SAGE: 100)
    c.emotion.max_change = 10  # points by which one reply can move the emotion (SAGE: 10)
    c.emotion.thresholds = (100, 70, 40, 10)  # lower bounds of bands S, A, B, C; F lies below (SAGE)

    c.reward = ConfigDict()
    c.reward.kind = "final"  # final (emotion/100) | per_turn (change/10) | mixed
    c.reward.discount = 1.0  # of later turns in `mixed`
    c.reward.final_weight = 0.5  # of the final emotion in `mixed`; the per-turn changes get the rest

    c.eval = ConfigDict()
    c.eval.num_profiles = 100  # profiles played (SAGE: 100); fewer if the file has fewer
    c.eval.initial_emotion = 40  # SAGE
    c.eval.max_turns = 10  # SAGE
    c.eval.batch = 32  # dialogues played at once
    c.eval.temperature = 1.0  # of the policy; 0: greedy
    c.eval.seed = 0

    c.mesh = ConfigDict()
    c.mesh.replica = 1  # copies of the weights, e.g. one a TPU slice
    c.mesh.fsdp = -1  # devices over which weights and batch are split; -1: all that are left
    c.mesh.tensor = 1  # devices over which heads, MLP columns and vocabulary are split
    return c
