"""One update against plain computations: microbatches, AdamW in NumPy, finite differences; skipping, freezing."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from rlver_jax.learning import loss_terms
from rlver_jax.learning.advantages import (
    ESTIMATORS,
    AdvantageConfig,
    Advantages,
    Estimator,
    EstimatorInputs,
    broadcast,
    compute_advantages,
)
from rlver_jax.learning.loss import LossConfig, LossInputs, TrainedModels, loss
from rlver_jax.learning.optimizer import Optimizers, make_optimizer
from rlver_jax.learning.train_step import TrainStepConfig, UpdateConfig, compile_step, init_state
from rlver_jax.models.value_head import ValueHead
from rlver_jax.rollout.rewards import Rewards
from tests.learning.conftest import make_world, packed, small_lm

LENGTH, BATCH, OPTIONS = 192, 8, LossConfig()


@pytest.fixture(scope="module")
def problem(bpe, prompts):
    """(packed batch, rewards, grammar) of eight dialogues of up to three turns."""
    world = make_world(bpe, prompts, "think", batch=BATCH, turns=3, seed=2)
    batch = packed(world, LENGTH)
    draw = np.random.default_rng(0)
    turns = draw.integers(-10, 11, (BATCH, 3)).astype(np.float32) / 10
    return batch, Rewards(jnp.asarray(turns.sum(1)), jnp.asarray(turns)), world.tables.grammar


def one_layer(bpe, seed=3, **fields):
    return small_lm(bpe, seed, layers=1, scan_layers=False, **fields)


def optimizer(rate=1e-2, warmup=0, clip=1.0):
    return make_optimizer(
        learning_rate=rate, warmup_steps=warmup, grad_clip=clip, beta1=0.9, beta2=0.99, weight_decay=0.1,
        moment_dtype="float32",
    )  # fmt: skip


PLAIN, GAE, RETURN = UpdateConfig(), AdvantageConfig(), AdvantageConfig("reinforce_pp")


def earned(rewards, batch, value):
    return EstimatorInputs(rewards, batch.turn, batch.mask, value)


def setup_of(bpe, update=PLAIN, *, critic=True, advantage=GAE, options=OPTIONS, policy=None):
    model = one_layer(bpe).model
    head = ValueHead(bias_init=0.3) if critic else None
    models = TrainedModels(model, model if critic else None, head, options, vocab_chunk=128)
    return TrainStepConfig(
        models, advantage, update, Optimizers(policy or optimizer(), optimizer(2e-2) if critic else None)
    )


def trained(bpe, critic=True):
    params = {"policy": one_layer(bpe).params}
    if critic:
        kernel = 0.05 * jnp.ones(32)
        params["critic"] = {"trunk": one_layer(bpe, 4).params, "head": {"kernel": kernel, "bias": jnp.float32(0.3)}}
    return params


def run(bpe, problem, setup, steps=1, **more):
    batch, rewards, grammar = problem
    state = init_state(trained(bpe, setup.models.value_head is not None), setup.optimizers)
    state = jax.device_put(state, jax.devices()[0])
    step, compiled = compile_step(setup, state), set()
    for _ in range(steps):
        state, metrics = step(state, batch, more.get("rewards", rewards), grammar, jax.random.key(0))
        compiled.add(step._cache_size())
    assert len(compiled) == 1, "by the first step alone"
    return state, jax.device_get(metrics)


def assert_close(actual, expected, atol):
    for (path, a), b in zip(jax.tree_util.tree_leaves_with_path(actual), jax.tree.leaves(expected), strict=True):
        np.testing.assert_allclose(a, b, atol=atol, err_msg=jax.tree_util.keystr(path))


@pytest.fixture(scope="module")
def whole(bpe, problem):
    return run(bpe, problem, setup_of(bpe))


@pytest.mark.parametrize("parts", [2, pytest.param(4, marks=pytest.mark.slow)])
def test_the_number_of_microbatches_changes_nothing(bpe, problem, whole, parts):
    """Sums in another order: Adam turns the rounding of tiny gradients into steps, hence gradients are compared too."""
    state, metrics = run(bpe, problem, setup_of(bpe, UpdateConfig(microbatches=parts)))
    for name, value in whole[1].items():
        if name != "policy/update_kl":  # measured on one microbatch
            np.testing.assert_allclose(metrics[name], value, rtol=2e-4, atol=1e-6, err_msg=name)
    for kind in ("policy", "critic"):
        mine, theirs = (s.opt_state[kind][1][0].mu for s in (state, whole[0]))  # 0.1 x the clipped gradient
        assert_close(mine, theirs, 1e-6)


def test_first_ratios_are_one(bpe, problem):
    """Recomputed log-probs are the trainer's own."""
    _, metrics = run(bpe, problem, setup_of(bpe, UpdateConfig(recompute=True, importance_cap=2.0), critic=False,
                                            advantage=RETURN))  # fmt: skip
    assert metrics["policy/ratio_max_first"] == pytest.approx(1, abs=1e-5)
    assert metrics["policy/approx_kl"] == pytest.approx(0, abs=1e-6)
    assert metrics["policy/update_kl"] > 1e-4


def test_how_far_the_sampler_is_from_the_trainer(bpe, problem):
    """What ratios that start from the sampler's own log-probs show before the first update."""
    update = UpdateConfig(recompute=True)
    _, metrics = run(bpe, problem, setup_of(bpe, update, critic=False, advantage=RETURN))
    _, plain = run(bpe, problem, setup_of(bpe, critic=False, advantage=RETURN))
    assert metrics["policy/rollout_kl"] > 1e-3
    assert metrics["policy/rollout_kl"] == pytest.approx(plain["policy/approx_kl"], rel=1e-5)
    assert "policy/rollout_kl" not in plain


def test_the_optimizer_is_adamw_behind_a_clip(bpe, problem, whole):
    """The policy's first update, from its gradient, in NumPy (arXiv 1711.05101)."""
    batch, rewards, grammar = problem
    setup, params = setup_of(bpe), trained(bpe)
    models, mask = setup.models, batch.mask
    weight = loss_terms.token_weights(mask, "token_mean")
    advantage, _ = compute_advantages(setup.advantage, earned(rewards, batch, whole_values(models, params, batch)))
    sample = LossInputs(batch, batch.logprob, advantage, weight, weight)
    gradient = jax.jit(jax.grad(lambda p: loss(models, {"policy": p}, sample, grammar)[0]))(params["policy"])
    norm = np.sqrt(sum((np.asarray(g, np.float64) ** 2).sum() for g in jax.tree.leaves(gradient)))
    np.testing.assert_allclose(whole[1]["policy/grad_norm"], norm, rtol=1e-4)
    for old, new, g in zip(*map(jax.tree.leaves, (params["policy"], whole[0].params["policy"], gradient)), strict=True):
        old, g = np.asarray(old, np.float64), np.asarray(g, np.float64) / max(norm, 1.0)
        moment, square = (1 - 0.9) * g, (1 - 0.99) * g * g
        step = (moment / (1 - 0.9)) / (np.sqrt(square / (1 - 0.99)) + 1e-8)
        large = np.abs(g) > 1e-5  # where Adam's sign-like first step is not decided by rounding
        np.testing.assert_allclose(np.asarray(new)[large], (old - 1e-2 * (step + 0.1 * old))[large], atol=2e-5)


def whole_values(models, params, batch):
    hidden, _ = jax.jit(models.trunk.apply)(
        {"params": params["critic"]["trunk"]}, batch.tokens, batch.positions, batch.branch
    )
    value = hidden @ params["critic"]["head"]["kernel"] + params["critic"]["head"]["bias"]
    return jnp.where(batch.mask, value, 0)


@pytest.mark.parametrize(("options", "critic"), [
    (LossConfig(entropy=0.02, value_clip=0.3, clip_high=0.3, dual_clip=2.0), True),
    (LossConfig(ratio="sequence", normalization="dialogue_mean", kl=0.1, entropy=0.01), False),
])  # fmt: skip
def test_gradients_by_finite_differences(bpe, prompts, options, critic):
    """The whole loss, models included, in float64, along random directions."""
    with jax.enable_x64():
        world = make_world(bpe, prompts, "think", batch=3, turns=2, seed=3)
        batch = packed(world, 128)
        double = functools.partial(jax.tree.map, lambda x: x.astype(jnp.float64) if x.dtype == jnp.float32 else x)
        params = jax.tree.map(lambda x: jnp.asarray(np.asarray(x), jnp.float64), trained(bpe, critic))
        model = one_layer(bpe, dtype=jnp.float64, param_dtype=jnp.float64).model
        models = TrainedModels(
            model, model if critic else None, ValueHead() if critic else None, options, vocab_chunk=128
        )
        draw, shape = np.random.default_rng(1), batch.mask.shape
        noise = lambda scale: jnp.asarray(draw.normal(0, scale, shape))  # noqa: E731
        weight = loss_terms.token_weights(batch.mask, options.normalization, length=1).astype(jnp.float64)
        start = LossInputs(double(batch), noise(1), noise(1), weight, weight)
        _, metrics = jax.jit(lambda p: loss(models, p, start, world.tables.grammar))(params)
        assert metrics["sum"]["policy/loss"].dtype == jnp.float64
        near = jnp.asarray(np.asarray(own_logprobs(models, params, batch, world.tables.grammar)))
        sample = dataclasses.replace(
            start, old=near + noise(0.2), reference=near + noise(0.1) if options.kl else None,
            value=noise(0.3) if critic else None, returns=noise(0.3) if critic else None,
        )  # fmt: skip
        value = jax.jit(lambda p: loss(models, p, sample, world.tables.grammar)[0])
        gradient = jax.jit(jax.grad(lambda p: loss(models, p, sample, world.tables.grammar)[0]))(params)
        for seed in range(4):
            step = np.random.default_rng(seed)
            direction = jax.tree.map(lambda x, s=step: jnp.asarray(s.normal(size=x.shape)), params)
            moved = lambda h, d=direction: jax.tree.map(lambda x, y: x + h * y, params, d)  # noqa: E731
            estimate = (value(moved(1e-6)) - value(moved(-1e-6))) / 2e-6
            analytic = sum((g * d).sum() for g, d in zip(*map(jax.tree.leaves, (gradient, direction)), strict=True))
            np.testing.assert_allclose(estimate, analytic, rtol=1e-5, atol=1e-8)


def own_logprobs(models, params, batch, grammar):
    from rlver_jax.learning.loss import action_logprobs, forward

    return action_logprobs(models, params["policy"], forward(models.model, params["policy"], batch), batch, grammar)[0]


def test_a_gradient_that_is_not_finite_is_skipped_and_counted(bpe, problem):
    """A reward that is NaN (a broken judge, say) leaves parameters and moments as they were."""
    rewards = Rewards(problem[1].reward.at[3].set(jnp.nan), problem[1].turns)
    setup = setup_of(bpe, critic=False, advantage=RETURN)
    state, metrics = run(bpe, problem, setup, steps=2, rewards=rewards)
    assert metrics["train/skipped_updates"] == 2
    assert state.step == 2
    before = init_state(trained(bpe, False), setup.optimizers)
    assert_close(state.params, before.params, 0)
    assert_close(state.opt_state, before.opt_state, 0)


def test_in_its_warm_up_only_the_critic_learns(bpe, problem):
    setup = setup_of(bpe, UpdateConfig(critic_warmup_steps=1))
    one, _ = run(bpe, problem, setup)
    start = trained(bpe)
    assert_close(one.params["policy"], start["policy"], 0)
    assert np.abs(one.params["critic"]["head"]["kernel"] - start["critic"]["head"]["kernel"]).max() > 1e-3
    two, _ = run(bpe, problem, setup, steps=2)
    assert np.abs(two.params["policy"]["norm"]["scale"] - start["policy"]["norm"]["scale"]).max() > 1e-3


def test_minibatches_visit_every_dialogue_once_an_epoch(bpe, problem):
    """A learning rate of 0 makes each minibatch's metrics those of the start: their mean is the whole batch's."""
    still = optimizer(0.0)
    update = UpdateConfig(epochs=2, minibatches=4)
    advantage, options = RETURN, LossConfig(normalization="dr_grpo", length=50)
    many = run(bpe, problem, setup_of(bpe, update, critic=False, advantage=advantage, options=options, policy=still))
    one = run(bpe, problem, setup_of(bpe, critic=False, advantage=advantage, options=options, policy=still))
    np.testing.assert_allclose(many[1]["policy/loss"], one[1]["policy/loss"], rtol=1e-4)
    np.testing.assert_allclose(many[1]["policy/ratio_max"], one[1]["policy/ratio_max"], rtol=1e-4)


def test_the_old_state_is_reused(bpe, problem):
    batch, rewards, grammar = problem
    setup = setup_of(bpe, critic=False, advantage=RETURN)
    state = init_state(trained(bpe, False), setup.optimizers)
    new, _ = compile_step(setup, state)(state, batch, rewards, grammar, jax.random.key(0))
    assert all(leaf.is_deleted() for leaf in jax.tree.leaves(state.params))
    assert not any(leaf.is_deleted() for leaf in jax.tree.leaves(new))


def test_warm_up_of_the_learning_rate():
    """The k-th update (from 0) has rate (k + 1) / (n + 1) of the full one, which stays from update n on."""
    made = optimizer(0.6, warmup=5, clip=1e9)
    params = {"x": jnp.zeros(1)}
    state, moved = made.init(params), []
    for _ in range(8):
        updates, state = made.update({"x": jnp.ones(1)}, state, params)
        moved.append(-float(updates["x"][0]))
    np.testing.assert_allclose(moved, [0.1, 0.2, 0.3, 0.4, 0.5, 0.6, 0.6, 0.6], rtol=1e-5)


def test_both_forms_of_credit_agree_for_one_final_reward(problem):
    """With gamma = lambda = 1 a final reward reaches every token whole, over the dialogue or turn by turn."""
    batch, rewards, _ = problem
    last = np.zeros_like(rewards.turns)
    count = np.asarray(batch.turn).max(1)
    last[np.arange(BATCH), count] = rewards.reward
    final = Rewards(rewards.reward, jnp.asarray(last))
    value = jnp.asarray(np.random.default_rng(0).normal(size=batch.mask.shape), jnp.float32)
    ways = [
        compute_advantages(AdvantageConfig(credit=c, whiten=False), earned(final, batch, value)).advantage
        for c in ("dialogue", "turn")
    ]
    np.testing.assert_allclose(*ways, atol=1e-5)
    np.testing.assert_allclose(ways[0], np.where(batch.mask, rewards.reward[:, None] - value, 0), atol=1e-5)


def test_unknown_names_are_refused(problem):
    batch, rewards, _ = problem
    with pytest.raises(ValueError, match=f"estimator='vapo'; expected one of {', '.join(ESTIMATORS)}"):
        compute_advantages(AdvantageConfig("vapo"), earned(rewards, batch, None))
    with pytest.raises(ValueError, match="credit='token'; expected dialogue or turn"):
        compute_advantages(AdvantageConfig(credit="token"), earned(rewards, batch, batch.logprob))
    with pytest.raises(ValueError, match="estimator='gae' needs a critic's values"):
        compute_advantages(AdvantageConfig(), earned(rewards, batch, None))


def test_a_new_estimator_trains_by_its_name(bpe, problem, monkeypatch):
    """An entry of the table is all: a step with it equals one with the advantages that it computes by hand."""
    plain = Estimator(lambda config, inputs: Advantages(broadcast(inputs.rewards.reward, inputs.mask), None))
    monkeypatch.setitem(ESTIMATORS, "plain", plain)
    _, metrics = run(bpe, problem, setup_of(bpe, critic=False, advantage=AdvantageConfig("plain")))
    batch, rewards, _ = problem
    mask = np.asarray(batch.mask)
    by_hand = np.broadcast_to(np.asarray(rewards.reward, np.float64)[:, None], mask.shape)[mask]
    assert metrics["advantage/mean"] == pytest.approx(by_hand.mean(), rel=1e-5)
    assert metrics["advantage/std"] == pytest.approx(by_hand.std(), rel=1e-4)
