"""PPO and GRPO raise the rate of what is rewarded: a phrase that the tiny policy seldom says becomes its habit."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from rlver_jax.decoding.cache import LM
from rlver_jax.learning.advantages import AdvantageConfig
from rlver_jax.learning.loss import LossConfig, TrainedModels
from rlver_jax.learning.optimizer import Optimizers, make_optimizer
from rlver_jax.learning.sequences import build_sequences, row_lengths
from rlver_jax.learning.train_step import TrainStepConfig, UpdateConfig, compile_step, init_state
from rlver_jax.models.value_head import ValueHead
from rlver_jax.rollout.agents import Agents
from rlver_jax.rollout.rewards import Rewards
from rlver_jax.rollout.spec import RolloutConfig, RolloutLimits
from rlver_jax.user.turn import UserLimits
from tests.conftest import make_profiles

PHRASE, PROFILES, GROUP, BEFORE, STEPS, LENGTH = "my sister said goodbye", 3, 24, 5, 50, 112
COUNT = PROFILES * GROUP


def make_agents(policy_lm, user_lm, bpe, prompts, mode):
    spec = RolloutConfig(
        mode=mode, enforce_format=False, group=GROUP, max_turns=1, context=512, think_tokens=20, say_tokens=24,
        user_tokens=2,
    )  # fmt: skip
    return Agents.build(policy_lm, user_lm, bpe, prompts, spec, style="vanilla", scenario="heart_to_heart")


def rewarded(dialogues, tokenizer) -> np.ndarray:
    replies = dialogues.policy
    texts = [tokenizer.decode(replies.say[0, b, : replies.say_count[0, b]].tolist()) for b in range(COUNT)]
    return np.array([PHRASE in text for text in texts], np.float32) * ~replies.violation[0]


def setup_of(policy_lm, estimator) -> TrainStepConfig:
    rate = {"warmup_steps": 0, "grad_clip": 1.0, "beta1": 0.9, "beta2": 0.99, "weight_decay": 0.0}
    made = make_optimizer(learning_rate=1e-3, moment_dtype="float32", **rate)
    critic = estimator == "gae"
    models = TrainedModels(policy_lm.model, None, ValueHead() if critic else None, LossConfig(), vocab_chunk=512)
    return TrainStepConfig(
        models, AdvantageConfig(estimator, group=GROUP), UpdateConfig(), Optimizers(made, made if critic else None)
    )


@pytest.mark.slow
@pytest.mark.parametrize(
    ("estimator", "mode"),
    [
        ("grpo", "think"),
        ("gae", "direct"),
        pytest.param("grpo", "direct", marks=pytest.mark.long),
        pytest.param("gae", "think", marks=pytest.mark.long),
    ],
)
def test_a_rewarded_phrase_becomes_the_habit(policy_lm, user_lm, bpe, prompts, mode, estimator):
    agents, setup = make_agents(policy_lm, user_lm, bpe, prompts, mode), setup_of(policy_lm, estimator)
    user = UserLimits(jnp.int32(1), jnp.int32(1), jnp.float32(1))
    limits = RolloutLimits(*map(jnp.int32, (1, 20, 24)), jnp.float32(1), jnp.int32(30), user)
    tokens, key = agents.tokens(make_profiles(PROFILES)), jax.random.key(0)
    params = {"policy": jax.tree.map(jnp.copy, policy_lm.params)}
    if estimator == "gae":
        width = policy_lm.model.config.hidden_size
        params["critic"] = {"head": {"kernel": jnp.zeros(width), "bias": jnp.float32(0)}}
    state = jax.device_put(init_state(params, setup.optimizers), jax.devices()[0])
    learn, packing = compile_step(setup, state), jax.jit(build_sequences, static_argnums=(2, 4))
    before, rates, ratios = [], [], []
    for step in range(-BEFORE, STEPS):
        now = dataclasses.replace(agents, policy=LM(state.params["policy"], policy_lm.model))
        ids = [(step + BEFORE) * COUNT + i for i in range(COUNT)]
        dialogues = now.play(tokens.batch(range(PROFILES), ids), key, limits)
        reward = rewarded(jax.device_get(dialogues), bpe)
        if step < 0:
            before.append(reward.mean())
            continue
        rates.append(reward.mean())
        assert row_lengths(dialogues, agents.tables[0], agents.spec).max() <= LENGTH
        batch = packing(dialogues, agents.tables[0], agents.spec, limits, LENGTH)
        rewards = Rewards(jnp.asarray(reward), jnp.asarray(reward[:, None]))
        state, metrics = learn(state, batch, rewards, agents.tables[0].grammar, key)
        ratios.append(float(metrics["policy/ratio_max_first"]))
    untrained, trained = np.mean(before), np.mean(rates[-3:])
    print(f"{estimator} {mode}: {untrained:.3f} -> {trained:.3f}; largest first ratio {max(ratios)}")
    assert untrained < 0.05
    assert trained > 0.8
    assert max(ratios) < 1 + 1e-4, "the trainer's log-probs are the sampler's"
