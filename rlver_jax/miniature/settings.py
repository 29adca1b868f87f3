"""The config of a training in the miniature world; `build` writes a config file that calls it beside the models.

The user is a small Qwen2.5 that has learned to appraise replies; `eval/score` is its judgement of held-out people, and
`eval/rule_score` that of the rule behind the world, which training never sees.
"""

from pathlib import Path

from ml_collections import ConfigDict

from rlver_jax.config import fields
from rlver_jax.miniature import assets

STEPS = 10  # of a training: minutes on two cores


def miniature_config(arg: str, folder: Path) -> ConfigDict:
    """Eight people a step, one of each hidden intention, eight dialogues of six turns with each.

    Args:
        arg: any of ppo, direct, final, challenging, joined with commas.
        folder: that `build` wrote.
    """
    words = fields.words(arg, "ppo", "direct", "final", fields.CHALLENGING)
    c = fields.get_config(fields.CHALLENGING if fields.CHALLENGING in words else "")
    for model, name in ((c.policy, assets.POLICY), (c.user, assets.USER), (c.critic, assets.POLICY)):
        model.path = str(folder / name)
        model.dtype = model.param_dtype = "float32"
        model.scan_layers = False
        model.attention, model.attention_chunk = "chunked", 128  # what fits the cores' caches is fast
    c.user.prompts = str(assets.PROMPTS)
    c.policy.mode = "direct" if "direct" in words else "think"
    c.user.field_tokens, c.user.reply_tokens = 24, 32
    c.data.language = "en"
    c.data.train, c.data.eval = (str(folder / name) for name in (assets.TRAIN, assets.EVAL))
    c.data.shuffle = False  # the hidden intentions come in turn
    c.rollout.batch, c.rollout.group, c.rollout.max_turns = 64, 8, assets.TURNS
    c.rollout.context, c.rollout.think_tokens, c.rollout.say_tokens = 768, 32, 32
    c.remote.cohorts = 2  # users behind an endpoint: on a CPU half the rows decode in half the time
    c.emotion.initial = c.eval.initial_emotion = assets.INITIAL
    c.reward.kind = "final" if "final" in words else "per_turn"
    _set_learning(c)
    if "direct" in words:
        c.loss.kl = 0.2  # no thought that may change freely: replies lose their variety sooner
    if "ppo" in words:
        _set_ppo(c)
    else:
        c.algorithm.estimator = "grpo"
        if "final" not in words:  # the final emotion belongs to all turns alike, as in RLVER
            c.algorithm.credit, c.algorithm.turn_discount = "turn", 0.5
    c.checkpoint.every = 20
    c.alarms.readable_min = 0.8
    c.alarms.ratio_max = 0.0  # a rare token of thousands leaps and nothing is lost; kl_max watches their mean
    c.eval.every, c.eval.num_profiles, c.eval.batch, c.eval.max_turns = STEPS, assets.EVAL_COUNT, 64, assets.TURNS
    c.eval.gold = "miniature"
    return c


def _set_learning(c: ConfigDict) -> None:
    # Without much of a penalty, the one sentence that pleases is said again and again.
    c.loss.kl, c.loss.dual_clip = 0.1, 3.0
    c.train.minibatches, c.train.microbatches = 4, 2
    c.train.steps, c.train.warmup_steps = STEPS, 4
    c.train.learning_rate = 5e-4
    # Rare tokens' rows of the vocabulary hardly ever have a gradient: with Adam's usual epsilon it would count in full.
    c.train.beta2, c.train.adam_eps = 0.99, 1e-5


def _set_ppo(c: ConfigDict) -> None:
    """What a critic needs that has ten steps to learn in, and hence tells little more than a mean."""
    c.algorithm.lam = 0.95  # a token; a reply has about thirty, and what it changes is known at its end
    # The mean over all tokens is no baseline for those far from the next reward: once replies are good, it would
    # teach against how every one of them begins.
    c.algorithm.whiten = False
    c.critic.learning_rate, c.loss.value_clip = 1e-3, 0.0
    # k3's gradient explodes on tokens that the policy has unlearned; at 0.1 one run ended in gibberish.
    c.loss.kl_estimator, c.loss.kl = "k2", 0.2
    # Before the critic knows a mean, how replies begin is taught against as well: one run in three forgot the format.
    c.policy.enforce_format = c.policy.mode == "think"
