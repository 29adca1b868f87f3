"""Every field of a config: its default, meaning, unit and bounds, and where the default comes from.

Use: python -m rlver_jax.evaluate --config=configs/base.py --config.policy.path=DIR --config.user.path=DIR …

RLVER: arXiv 2507.03112 and its published code; SAGE: arXiv 2505.02847. Configs call `get_config` and change a few
fields. A field that is not in the table does not exist: an unknown name is an error. `--helpfull` of a command lists
the table; `config.validate` checks values against it.
"""

from typing import Any

from ml_collections import ConfigDict

from rlver_jax.config.alarm_fields import ALARMS
from rlver_jax.config.languages import LANGUAGES
from rlver_jax.config.lora_fields import LORA
from rlver_jax.config.model_fields import CHALLENGING, CRITIC, FLOATS, NO_CRITIC, NO_THOUGHTS, POLICY, USER
from rlver_jax.config.remote_fields import REMOTE
from rlver_jax.config.schema import COUNT, POSITIVE, SEED, SHARE, AllBut, Field, defaults, flat_fields, free_names
from rlver_jax.config.sft_fields import SFT

MOST_BETA = 0.999999  # Adam divides by 1 - beta
NOT_GRPO = {"algorithm.estimator": AllBut("grpo")}


DATA = {
    "language": Field(
        "zh", f"of the prompts: {' | '.join(f'{name} ({what})' for name, what in LANGUAGES.items())}", tuple(LANGUAGES)
    ),
    "train": Field(
        "", "JSONL file(s) of profiles, comma-separated, or tfds:rlver_profiles[:VERSION][?split=NAME]", path=True
    ),
    "eval": Field("", "the same, held out; empty: data.train", path=True),
    "dir": Field("", "TFDS's data_dir, of prepared data sets (docs/data.md); empty: TFDS's default", path=True),
    "seed": Field(0, "of the order of profiles", range=SEED),
    "shuffle": Field(True, "False: profiles come in the order of the files"),
}

ROLLOUT = {
    "batch": Field(
        32, "dialogues of a step = profiles x group (RLVER: 32, GRPO 128)", range=POSITIVE, unit="dialogues"
    ),
    "rows": Field(
        0,
        "of them played at a time: where one ends, the next begins (docs/performance.md); 0: all",
        range=COUNT,
        unit="dialogues",
        free=True,
    ),
    "group": Field(1, "dialogues of one profile (RLVER: 1 with PPO, 4 with GRPO)", range=POSITIVE, unit="dialogues"),
    "max_turns": Field(8, "policy replies in a dialogue (RLVER: 9)", range=POSITIVE, unit="turns"),
    "context": Field(8192, "slots of each row's cache, policy and user alike", range=POSITIVE, unit="tokens"),
    "think_tokens": Field(
        512, "at most, of a thought with its closing tag", range=(16, None), unit="tokens", unused=NO_THOUGHTS
    ),
    "say_tokens": Field(512, "at most, of a reply", range=POSITIVE, unit="tokens"),
    "param_dtype": Field(
        "",
        "of the policy's weights while dialogues of training are played: int8 rounds them once a step "
        "(docs/performance.md), needs loss.recompute and loss.importance_cap; empty: policy.dtype",
        ("", "int8"),
    ),
    "temperature": Field(1.0, "of the policy (RLVER: 1); 0: greedy", range=COUNT),
    "top_k": Field(0, "keep the k most likely tokens; 0: all", range=COUNT, unit="tokens"),
    "top_p": Field(1.0, "keep the smallest set with this probability", range=SHARE),
    "overlap": Field(
        0,
        "1: with remote.user.url the next batch is played while the update runs, one step off-policy; needs "
        "loss.recompute and loss.importance_cap; 0: every batch by the newest policy",
        range=(0, 1),
        unit="batches",
    ),
}

EMOTION = {
    "initial": Field(
        30, "at the start of a dialogue (RLVER's training; SAGE's evaluation: 40)", range=(0, 100), unit="points"
    ),
    "floor": Field(
        9, "a dialogue ends at or below it, as a failure (SAGE: below 10; RLVER: 0)", range=(-1, 100), unit="points"
    ),
    "ceiling": Field(
        100,
        "a dialogue ends at or above it, as a success (SAGE: 100); 101: never (RLVER)",
        range=(0, 101),
        unit="points",
    ),
    "max_change": Field(10, "by which one reply can move the emotion (SAGE: 10)", range=(1, 10), unit="points"),
    "thresholds": Field((100, 70, 40, 10), "lower bounds of bands S, A, B, C; F lies below (SAGE)", unit="points"),
}

OWN = "FILE.py:FUNCTION or PACKAGE.MODULE:FUNCTION (docs/extending.md)"
REWARD = {
    "function": Field("", f"a function of your own in place of all below, {OWN}; empty: none"),
    "kind": Field("final", "final (emotion/100) | per_turn (change/10) | mixed", ("final", "per_turn", "mixed")),
    "discount": Field(1.0, "of later turns in `mixed`", range=SHARE, unused={"reward.kind": ("final", "per_turn")}),
    "final_weight": Field(
        0.5,
        "of the final emotion in `mixed`; the per-turn changes get the rest",
        range=SHARE,
        unused={"reward.kind": ("final", "per_turn")},
    ),
}

ALGORITHM = {
    "estimator": Field(
        "gae",
        "of advantages: gae or ppo (the same; with a critic), or one without a critic, as grpo, rloo and reinforce_pp",
        registry="rlver_jax/learning/advantages.py:ESTIMATORS",
    ),
    "credit": Field(
        "dialogue",
        "dialogue | turn (gae ends each turn with the final reward, RLVER's form; grpo gives each turn its own reward "
        "and what follows, arXiv 2402.03300, 4.1.3)",
        ("dialogue", "turn"),
        unused={"algorithm.estimator": AllBut("gae", "ppo", "grpo")},
    ),
    "turn_discount": Field(
        1.0,
        "grpo with credit=turn: of the rewards of later turns",
        range=SHARE,
        unused=NOT_GRPO | {"algorithm.credit": ("dialogue",)},
    ),
    "gamma": Field(1.0, "discount a token (RLVER: 1)", range=SHARE, unused=NO_CRITIC),
    "lam": Field(1.0, "GAE's lambda (RLVER: 1)", range=SHARE, unused=NO_CRITIC),
    "whiten": Field(True, "gae: advantages to mean 0 and deviation 1 over the batch's tokens", unused=NO_CRITIC),
    "scale": Field(
        True, "grpo: divide by the group's standard deviation; False: Dr. GRPO (arXiv 2503.20783)", unused=NOT_GRPO
    ),
}

LOSS = {
    "ratio": Field(
        "token",
        "token (PPO) | sequence (GSPO, arXiv 2507.18071: one ratio a dialogue)",
        registry="rlver_jax/learning/loss_terms.py:RATIOS",
    ),
    "clip_low": Field(0.2, "ratios below 1 - clip_low earn no more (RLVER: 0.2)", range=SHARE),
    "clip_high": Field(
        0.2, "ratios above 1 + clip_high earn no more (RLVER: 0.2; DAPO, arXiv 2503.14476: 0.28)", range=COUNT
    ),
    "dual_clip": Field(0.0, "most that a bad token's ratio can cost, e.g. 3 (arXiv 1912.09729); 0: off", range=COUNT),
    "normalization": Field(
        "token_mean",
        "token_mean | turn_mean (RLVER with thoughts) | dialogue_mean (GRPO) | dr_grpo (sum over a constant length)",
        registry="rlver_jax/learning/loss_terms.py:NORMALIZATIONS",
    ),
    "entropy": Field(0.0, "weight of the entropy bonus", range=COUNT),
    "kl": Field(
        0.0, "weight of the KL penalty to the reference model; 0: no such model is loaded (RLVER: 0)", range=COUNT
    ),
    "kl_estimator": Field(
        "k3",
        "of the KL penalty: k1 | k2 | k3",
        registry="rlver_jax/learning/loss_terms.py:KL_ESTIMATORS",
        unused={"loss.kl": (0.0,)},
    ),
    "value_clip": Field(
        0.5,
        "how far a value may move in one update (RLVER: 0.5); 0: off",
        range=COUNT,
        unit="units of reward",
        unused=NO_CRITIC,
    ),
    "value_weight": Field(
        1.0, "of the critic's loss; matters only where critic and policy share a trunk", range=COUNT, unused=NO_CRITIC
    ),
    "recompute": Field(
        False, "ratios start from the trainer's own log-probs (one more forward pass), not the sampler's"
    ),
    "importance_cap": Field(
        0.0, "with recompute: truncated importance weights sampler -> trainer, e.g. 2; 0: off", range=COUNT
    ),
    "vocab_chunk": Field(
        8192, "logits of each position that exist at a time", range=POSITIVE, unit="tokens", free=True
    ),
}

REFERENCE = {
    "path": Field(
        "",
        "Hugging Face folder, or name on the hub, for the KL penalty; empty: policy.path",
        path=True,
        unused={"loss.kl": (0.0,)},
    )
}

TRAIN = {
    "steps": Field(500, "batches played and learned from", range=POSITIVE, unit="steps", free=True),
    "seed": Field(0, "of all that is drawn in training", range=SEED),
    "learning_rate": Field(1e-6, "of the policy (RLVER)", range=COUNT),
    "warmup_steps": Field(
        50, "updates over which learning rates rise (RLVER: 20 steps, its critic's 50)", range=COUNT, unit="updates"
    ),
    "decay_steps": Field(
        0,
        "updates after these over which learning rates fall, like a cosine, to a twentieth; 0: they stay",
        range=COUNT,
        unit="updates",
    ),
    "grad_clip": Field(1.0, "largest norm of a gradient (RLVER); 0: any", range=COUNT),
    "beta1": Field(0.9, "AdamW's", range=(0, MOST_BETA)),
    "beta2": Field(0.999, "AdamW's", range=(0, MOST_BETA)),
    # Above 0: a gradient of 0, as that of a token which no text holds, would be divided by 0.
    "adam_eps": Field(
        1e-8,
        "AdamW's; 1e-5 keeps weights with next to no gradient (rare tokens' rows) where they are",
        range=(1e-30, None),
    ),
    "weight_decay": Field(0.01, "AdamW's, times the learning rate", range=COUNT),
    "moment_dtype": Field("float32", "of Adam's first moment; the second is float32", FLOATS),
    "epochs": Field(1, "passes over each batch (RLVER: 1)", range=POSITIVE, unit="passes"),
    "minibatches": Field(1, "optimizer steps a pass", range=POSITIVE, unit="updates"),
    "turns_per_update": Field(
        0,
        "with share_rows: an optimizer step for so many turns of dialogues (RLVER with thoughts: 32, GRPO 128), so a "
        "batch of longer dialogues makes more of them; 0: minibatches",
        range=COUNT,
        unit="turns",
    ),
    "microbatches": Field(
        1,
        "parts of a minibatch whose gradients are summed: less memory, same result; by share_rows as many as it takes",
        range=POSITIVE,
        unit="parts",
        free=True,
    ),
    "share_rows": Field(
        True,
        "dialogues share packed rows, each read by one device at a time: less padding, same result "
        "(docs/performance.md); False: one dialogue a row, microbatches as given",
    ),
    "padding": Field(
        0.1,
        "share of padding in packed rows that is little: the shortest rows with less are taken",
        range=SHARE,
        unused={"train.share_rows": (False,)},
    ),
    "length_buckets": Field(
        8,
        "lengths of packed rows that may be compiled, between a length and its double",
        range=POSITIVE,
        unit="lengths",
    ),
}

CHECKPOINT = {
    "every": Field(
        20, "the last step and an interrupted one are always saved", range=POSITIVE, unit="steps", free=True
    ),
    "keep_last": Field(2, "newest checkpoints that stay", range=POSITIVE, unit="checkpoints", free=True),
    "keep_best": Field(1, "best checkpoints that stay, by eval/score", range=COUNT, unit="checkpoints", free=True),
}

LOG = {
    "tensorboard": Field(True, "write WORKDIR/tensorboard", free=True),
    "wandb": Field("", "project of Weights & Biases (extra `wandb`); empty: off", free=True),
    "dialogues_every": Field(
        10, "between files of all dialogues of a step; 0: never", range=COUNT, unit="steps", free=True
    ),
}

METRICS = {
    "functions": Field(
        "", f"functions of your own that measure finished dialogues, {OWN}, comma-separated; empty: none"
    )
}

EVAL = {
    "every": Field(
        0, "between evaluations in training, step 0 and the last one included; 0: never", range=COUNT, unit="steps"
    ),
    "num_profiles": Field(100, "played (SAGE: 100); fewer if the file has fewer", range=POSITIVE, unit="profiles"),
    "initial_emotion": Field(40, "SAGE's", range=(0, 100), unit="points"),
    "max_turns": Field(
        9,
        "policy replies, each appraised (SAGE: 9, since its loop never appraises the tenth)",
        range=POSITIVE,
        unit="turns",
    ),
    "relationship": Field(
        "thoughts",
        "what the relationship inventory of --measures is filled in from: the user's inner thoughts (SAGE's BLRI) or "
        "what was said",
        ("thoughts", "speech"),
        free=True,
    ),
    "batch": Field(32, "played by one call of the sampler", range=POSITIVE, unit="dialogues"),
    "rows": Field(
        0,
        "of them played at a time, as rollout.rows, where both models are on the device; 0: all",
        range=COUNT,
        unit="dialogues",
        free=True,
    ),
    "temperature": Field(1.0, "of the policy; 0: greedy", range=COUNT),
    "seed": Field(0, "of what is drawn in an evaluation", range=SEED),
    "judge": Field("", f"a function of your own that scores finished dialogues, {OWN}; empty: none"),
    "gold": Field(
        "", "judge beside the user: miniature (its grammar's rule, eval/rule_score); empty: none", ("", "miniature")
    ),
}

_DEVICES: dict[str, Any] = {"range": (-1, None), "unit": "devices", "free": True}
MESH = {
    "replica": Field(1, "copies of the weights, e.g. one a TPU slice", **_DEVICES),
    "fsdp": Field(-1, "over which weights and batch are split; -1: all that are left", **_DEVICES),
    "tensor": Field(1, "over which heads, MLP columns and vocabulary are split", **_DEVICES),
}
MESH_SAMPLING = {  # the same devices while dialogues are played (docs/pods.md)
    "replica": Field(
        0, "copies of both models' weights; with fsdp 1 no decode step gathers weights; 0: as mesh", **_DEVICES
    ),
    "fsdp": Field(0, "as mesh.fsdp; -1 here or above: all that are left; 0: as mesh", **_DEVICES),
    "attention_data": Field(
        1,
        "chips of a copy that split rows in attention and columns in MLPs, beside tensor: more chips a copy than there "
        "are key heads (docs/pods.md)",
        range=POSITIVE,
        unit="devices",
        free=True,
    ),
    "tensor": Field(0, "as mesh.tensor; 0: as mesh", **_DEVICES),
}

TABLE = {
    "policy": POLICY,
    "user": USER,
    "data": DATA,
    "rollout": ROLLOUT,
    "emotion": EMOTION,
    "reward": REWARD,
    "algorithm": ALGORITHM,
    "loss": LOSS,
    "critic": CRITIC,
    "reference": REFERENCE,
    "lora": LORA,
    "train": TRAIN,
    "checkpoint": CHECKPOINT,
    "log": LOG,
    "metrics": METRICS,
    "alarms": ALARMS,
    "eval": EVAL,
    "sft": SFT,
    "remote": REMOTE,
    "mesh": MESH,
    "mesh_sampling": MESH_SAMPLING,
}
FIELDS = dict(flat_fields(TABLE))  # "section.name": Field
PATHS = tuple(name for name, field in FIELDS.items() if field.path)
FREE_FIELDS = free_names(TABLE)


def words(arg: str, *known: str) -> list[str]:
    """The words of a config's argument, "a,b"; raises ValueError for one that the config doesn't know."""
    parts = [word for word in arg.split(",") if word]
    for word in parts:
        if word not in known:
            raise ValueError(f"config argument {word!r}; expected any of {', '.join(known)}, joined by commas")
    return parts


def get_config(arg: str = "") -> ConfigDict:
    """The base config.

    Args:
        arg: "challenging" picks the challenging simulated user (RLVER, section 4.3); "ppo" says what it is.
    """
    config = defaults(TABLE)
    config.user.style = CHALLENGING if CHALLENGING in words(arg, "ppo", CHALLENGING) else config.user.style
    return config
