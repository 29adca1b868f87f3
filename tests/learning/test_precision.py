"""Learning with bfloat16 parameters and inputs, against float64 in NumPy: sums, moments and steps are in float32."""

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import optax
import pytest

from rlver_jax.learning import advantages, loss_terms, masked
from rlver_jax.learning.optimizer import Optimizers, make_optimizer
from rlver_jax.learning.train_step import init_state
from rlver_jax.models.layers import Embedding

RATE, BETA1, BETA2, DECAY, EPS = 1e-3, 0.9, 0.999, 0.01, 1e-8


def made(moment="float32", clip=1e9, rate=RATE, warmup=0, decay=DECAY):
    return make_optimizer(
        learning_rate=rate, warmup_steps=warmup, grad_clip=clip, beta1=BETA1, beta2=BETA2, weight_decay=decay,
        moment_dtype=moment, adam_eps=EPS,
    )  # fmt: skip


def adamw(params, gradients, round_params, round_moment, clip):
    """AdamW (arXiv 1711.05101) behind a clip, all of it in float64; parameters and first moments rounded as stored."""
    params = {name: np.asarray(x, np.float64) for name, x in params.items()}
    first, second = ({name: np.zeros_like(x) for name, x in params.items()} for _ in range(2))
    for count, gradient in enumerate(gradients, 1):
        norm = np.sqrt(sum((np.asarray(g, np.float64) ** 2).sum() for g in gradient.values()))
        for name, g in gradient.items():
            g = np.asarray(g, np.float64) / max(norm / clip, 1)
            mean = BETA1 * first[name] + (1 - BETA1) * g
            second[name] = BETA2 * second[name] + (1 - BETA2) * g * g
            step = mean / (1 - BETA1**count) / (np.sqrt(second[name] / (1 - BETA2**count)) + EPS)
            params[name] = round_params(params[name] - RATE * (step + DECAY * params[name]))
            first[name] = round_moment(mean)
    return params, first, second


def rounding(dtype):
    return lambda x: x.astype(ml_dtypes.bfloat16).astype(np.float64) if dtype == "bfloat16" else x


@pytest.mark.parametrize("moment", ["float32", "bfloat16"])
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_adamw_over_many_steps(dtype, moment):
    """300 updates of several arrays, gradients of very different sizes, clipped from time to time."""
    draw, clip = np.random.default_rng(0), 2.0
    shapes = {"a": (7, 5), "b": (11,), "c": ()}
    params = {name: jnp.asarray(draw.normal(size=shape), dtype) for name, shape in shapes.items()}
    sizes = 10.0 ** draw.uniform(-4, 0.5, 300)
    gradients = [
        {k: jnp.asarray(size * draw.normal(size=shape), dtype) for k, shape in shapes.items()} for size in sizes
    ]
    optimizer = made(moment, clip)
    state, step = optimizer.init(params), jax.jit(optimizer.update)
    wanted = adamw(params, gradients, rounding(dtype), rounding(moment), clip)
    for gradient in gradients:
        updates, state = step(gradient, state, params)
        params = optax.apply_updates(params, updates)
    adam = state[1][0]
    assert {x.dtype.name for x in jax.tree.leaves(adam.nu)} == {"float32"}
    assert {x.dtype.name for x in jax.tree.leaves(adam.mu)} == {moment}
    assert {x.dtype.name for x in jax.tree.leaves(params)} == {dtype}
    assert {x.dtype.name for x in jax.tree.leaves(updates)} == {"float32"}
    for name in shapes:
        np.testing.assert_allclose(adam.nu[name], wanted[2][name], rtol=2e-5, err_msg=name)
        # A sum at the border of two bfloat16 numbers may be rounded to the other one, and what follows is apart, too.
        largest = np.abs(wanted[1][name]).max()
        difference = np.abs(np.asarray(adam.mu[name], np.float64) - wanted[1][name])
        assert difference.max() <= (2**-7 if moment == "bfloat16" else 2e-5) * largest, name
        difference = np.abs(np.asarray(params[name], np.float64) - wanted[0][name])
        assert difference.max() <= (2**-7 * np.abs(wanted[0][name]).max() if dtype == "bfloat16" else 2e-5), name


def test_the_second_moment_falls():
    """One gradient of 0.4, then 5,000 of 0.004; optax alone stays at 1.6e-4 in bfloat16."""
    optimizer, params = made(decay=0.0), {"w": jnp.zeros(1, jnp.bfloat16)}
    large, small = ({"w": jnp.full(1, x, jnp.bfloat16)} for x in (0.4, 0.004))
    _, state = jax.jit(optimizer.update)(large, optimizer.init(params), params)

    def step(_, both):
        return optimizer.update(small, both[1], params)

    updates, state = jax.jit(lambda s: jax.lax.fori_loop(0, 5000, step, ({"w": jnp.zeros(1)}, s)))(state)
    g0, g = (float(x["w"][0]) for x in (large, small))
    second = 0.001 * g0**2 * 0.999**5000 + g**2 * (1 - 0.999**5000)
    assert second == pytest.approx(1.7e-5, rel=0.02)
    np.testing.assert_allclose(state[1][0].nu["w"], second, rtol=1e-4)
    first = 0.1 * g0 * 0.9**5000 + g * (1 - 0.9**5000)
    np.testing.assert_allclose(updates["w"], -RATE * first / (np.sqrt(second / (1 - 0.999**5001)) + EPS), rtol=1e-4)


@pytest.mark.slow
def test_the_norm_of_many_arrays():
    """324 ones: 18; a sum of squares in bfloat16 ends at 256, a norm at 16."""
    ones = {str(i): jnp.ones((), jnp.bfloat16) for i in range(324)}
    optimizer = made(clip=1.0)
    _, state = jax.jit(optimizer.update)(ones, optimizer.init(ones), ones)
    np.testing.assert_allclose(state[1][0].mu["7"], 0.1 / 18, rtol=1e-5)


def test_float32_is_the_same_program():
    """As optax's own chain, letter by letter."""
    params = {"w": jnp.ones((3, 4)), "b": jnp.ones(4)}
    adam = optax.adamw(RATE, b1=BETA1, b2=BETA2, eps=EPS, weight_decay=DECAY, mu_dtype=jnp.float32)
    plain = optax.chain(optax.clip_by_global_norm(1.0), adam)
    texts = []
    for one in (plain, made(clip=1.0)):
        update = lambda *arguments, one=one: one.update(*arguments)  # noqa: E731
        texts.append(jax.jit(update).lower(params, one.init(params), params).as_text())
    assert texts[0] == texts[1]


def test_a_state_in_bfloat16():
    params = {"policy": {"w": jnp.ones((3, 4), jnp.bfloat16)}}
    state = init_state(params, Optimizers(made("bfloat16")))
    adam = state.opt_state["policy"][1][0]
    assert (adam.mu["w"].dtype, adam.nu["w"].dtype, state.params["policy"]["w"].dtype) == (
        "bfloat16",
        "float32",
        "bfloat16",
    )


def test_a_small_update_is_rounded_once():
    """1 - 0.6 ulp is the number below 1, in bfloat16 after one rounding; -0.4 ulp is 1 again."""
    ulp = 2.0**-8  # below 1
    for rate, wanted in ((0.6 * ulp, 1 - ulp), (0.4 * ulp, 1.0)):
        optimizer, params = made(rate=rate, decay=0.0), {"w": jnp.ones((), jnp.bfloat16)}
        updates, _ = jax.jit(optimizer.update)(params, optimizer.init(params), params)
        assert float(optax.apply_updates(params, updates)["w"]) == wanted


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_the_gradient_of_a_frequent_token(dtype):
    """5,000 places of one token with a cotangent of 0.01 each."""
    table = Embedding(4, 8, jnp.float32, jnp.dtype(dtype))
    params = {"params": {"kernel": jnp.zeros((4, 8), dtype)}}
    tokens = jnp.zeros((2, 2500), jnp.int32).at[1, 0].set(3)
    actual = jax.jit(jax.grad(lambda p: 0.01 * table.apply(p, tokens).sum()))(params)["params"]["kernel"]
    cotangent = float(jnp.asarray(0.01, dtype))
    assert actual.dtype == dtype
    np.testing.assert_allclose(np.asarray(actual[0], np.float64), 4999 * cotangent, rtol=2**-8)
    np.testing.assert_allclose(np.asarray(actual[3], np.float64), cotangent, rtol=2**-8)
    assert not np.asarray(actual[1:3], np.float64).any()


@pytest.fixture(scope="module")
def rows():
    """bfloat16 arrays [4, 3000] and their float64 values; a sum of their ones would end at 256."""
    draw = np.random.default_rng(3)
    narrow = lambda scale: jnp.asarray(draw.normal(1, scale, (4, 3000)), jnp.bfloat16)  # noqa: E731
    x, y, z = narrow(0.5), narrow(0.3), narrow(0.2)
    mask = jnp.asarray(draw.random((4, 3000)) < 0.7)
    return (x, y, z, mask), (*(np.asarray(a, np.float64) for a in (x, y, z)), np.asarray(mask))


def test_masked_statistics(rows):
    (x, *_, mask), (x64, *_, m) = rows
    inside = x64[m]
    np.testing.assert_allclose(masked.masked_sum(x, mask), inside.sum(), rtol=1e-6)
    np.testing.assert_allclose(masked.masked_mean(x, mask), inside.mean(), rtol=1e-6)
    np.testing.assert_allclose(masked.masked_var(x, mask), inside.var(), rtol=1e-5)
    whitened = np.where(m, (x64 - inside.mean()) / np.sqrt(inside.var() + 1e-8), 0)
    np.testing.assert_allclose(masked.whiten(x, mask), whitened, atol=1e-5)


def test_generalized_advantages(rows):
    (reward, value, _, mask), (r, v, _, m) = rows
    actual = advantages.gae(reward, value, mask, gamma=0.999, lam=0.99)
    wanted = np.zeros_like(r)
    for b in range(4):
        after, following = 0.0, 0.0
        for i in reversed(np.flatnonzero(m[b])):
            after = r[b, i] + 0.999 * following - v[b, i] + 0.999 * 0.99 * after
            wanted[b, i], following = after, v[b, i]
    np.testing.assert_allclose(actual.advantage, wanted, rtol=1e-4, atol=1e-3)
    np.testing.assert_allclose(actual.returns, np.where(m, wanted + v, 0), rtol=1e-4, atol=1e-3)


def test_ratios_penalties_and_losses(rows):
    (new, old, third, mask), (n, o, t, m) = rows
    masked = lambda x: np.where(m, x, 0)  # noqa: E731
    close = lambda a, b: np.testing.assert_allclose(a, b, rtol=2e-5, atol=1e-6)  # noqa: E731
    close(loss_terms.token_ratio(new, old, mask), masked(np.exp(n - o)))
    mean = ((n - o) * m).sum(1) / m.sum(1)
    close(loss_terms.sequence_ratio(new, old, mask), masked(np.broadcast_to(np.exp(mean)[:, None], n.shape)))
    segment = jnp.zeros(mask.shape, jnp.int32)
    close(loss_terms.sequence_ratio(new, old, mask, segment), masked(np.broadcast_to(np.exp(mean)[:, None], n.shape)))
    d = o - n
    for name, wanted in {"k1": -d, "k2": d**2 / 2, "k3": np.exp(d) - 1 - d}.items():
        close(loss_terms.kl_penalty(new, old, mask, estimator=name), masked(wanted))
    close(loss_terms.importance_weights(old, new, mask, cap=1.5), masked(np.minimum(np.exp(o - n), 1.5)))
    near = np.clip(n, o - 0.25, o + 0.25)
    close(
        loss_terms.value_loss(new, old, third, mask, clip=0.25), masked(0.5 * np.maximum((n - t) ** 2, (near - t) ** 2))
    )
    clipped = loss_terms.clipped_objective(new, third, mask, clip_low=0.25, clip_high=0.25)
    close(clipped.loss, masked(np.maximum(-t * n, -t * np.clip(n, 0.75, 1.25))))
    for kind in ("token_mean", "dialogue_mean"):
        weight = loss_terms.token_weights(mask, kind)
        wanted = m / m.sum() if kind == "token_mean" else m / m.sum(1, keepdims=True) / 4
        close(weight, wanted)
        close((weight * loss_terms.token_ratio(new, old, mask)).sum(), (wanted * np.exp(n - o)).sum())


def test_rewards_of_groups_in_bfloat16():
    """300 dialogues of one profile: their sum would end at 256."""
    reward = jnp.asarray(np.random.default_rng(0).normal(1, 0.3, 600), jnp.bfloat16)
    r = np.asarray(reward, np.float64).reshape(2, 300)
    centred = r - r.mean(1, keepdims=True)
    wanted = {"group": centred / (r.std(1, ddof=1, keepdims=True) + 1e-6), "rloo": centred * 300 / 299}
    np.testing.assert_allclose(advantages.group_advantages(reward, 300, scale=True), wanted["group"].ravel(), atol=1e-5)
    np.testing.assert_allclose(advantages.rloo(reward, 300), wanted["rloo"].ravel(), atol=1e-5)
    turns, played = reward.reshape(300, 2), jnp.ones((300, 2), bool)
    g = np.asarray(turns, np.float64)
    g = np.stack([g.sum(1), g[:, 1]], 1)
    actual = advantages.turn_advantages(turns, played, 300, discount=1.0, scale=False)
    np.testing.assert_allclose(actual, g - g.mean(0), atol=1e-5)


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize(("clip", "scale"), [(0.0, 1.0), (5.0, 0.05)])
def test_clips_against_float64(dtype, clip, scale):
    """A clip of 0 is none; else a gradient of norm 100 is cut to 5. One parameter's gradient is always 0."""
    options = {
        "learning_rate": 0.1,
        "warmup_steps": 0,
        "beta1": 0.5,
        "beta2": 0.75,
        "weight_decay": 0.0,
        "adam_eps": 8.0,
    }
    optimizer = make_optimizer(grad_clip=clip, moment_dtype="float32", **options)
    params = {"w": jnp.zeros(4, dtype), "unused": jnp.zeros(3, dtype)}
    state = optimizer.init(params)
    m, v = np.zeros(4), np.zeros(4)
    for step, size in enumerate((50.0, -50.0, 50.0), start=1):
        grads = {"w": jnp.full(4, size, dtype), "unused": jnp.zeros(3, dtype)}
        updates, state = optimizer.update(grads, state, params)
        g = np.full(4, size * scale)  # the norm is 2 * 50
        m, v = 0.5 * m + 0.5 * g, 0.75 * v + 0.25 * g * g
        wanted = -0.1 * (m / (1 - 0.5**step)) / (np.sqrt(v / (1 - 0.75**step)) + 8.0)
        np.testing.assert_allclose(updates["w"], wanted, rtol=1e-5)
        np.testing.assert_array_equal(updates["unused"], 0)
    nothing = jax.tree.map(jnp.zeros_like, params)
    updates, _ = optimizer.update(nothing, optimizer.init(params), params)
    assert all(np.isfinite(leaf).all() for leaf in jax.tree.leaves(updates)), "no gradient at all"
