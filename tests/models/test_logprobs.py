"""Chunked log-probabilities against jax.nn.log_softmax over the whole vocabulary."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import NamedSharding, PartitionSpec

from rlver_jax.models.logprobs import Forbidden, token_logprobs
from rlver_jax.parallel.mesh import make_mesh


def full(hidden, head, targets, temperature):
    log_p = jax.nn.log_softmax(jnp.einsum("bld,vd->blv", hidden, head) / temperature)
    return jnp.take_along_axis(log_p, targets[..., None], -1)[..., 0], -(jnp.exp(log_p) * log_p).sum(-1)


def problem(batch, length, vocab, dim, scale=0.3):
    keys = jax.random.split(jax.random.key(0), 5)
    hidden = jax.random.normal(keys[0], (batch, length, dim))
    head = jax.random.normal(keys[1], (vocab, dim)) * scale
    targets = jax.random.randint(keys[2], (batch, length), 0, vocab)
    targets = targets.at[0, :2].set(jnp.array([0, vocab - 1]))  # both ends of the vocabulary
    return hidden, head, targets, jax.random.normal(keys[3], (2, batch, length))


def weighted(function, targets, weights):
    def loss(hidden, head):
        logprob, entropy = function(hidden, head, targets)
        return (logprob * weights[0] + entropy * weights[1]).sum()

    return jax.value_and_grad(loss, (0, 1))


def assert_same(actual, expected, value, gradient):
    np.testing.assert_allclose(actual[0], expected[0], rtol=value)
    for a, b in zip(actual[1], expected[1], strict=True):
        np.testing.assert_allclose(a, b, atol=gradient * float(jnp.abs(b).max()))


@pytest.mark.parametrize("chunk", [7, 64, 96, 10_000])  # overlap in the last chunk, even split, one and a bit, whole
@pytest.mark.parametrize("temperature", [1.0, 0.6])
def test_values_and_gradients(chunk, temperature):
    hidden, head, targets, weights = problem(3, 5, 128, 16)
    actual = token_logprobs(hidden, head, targets, chunk=chunk, temperature=temperature)
    expected = full(hidden, head, targets, temperature)
    np.testing.assert_allclose(actual.logprob, expected[0], atol=1e-5)
    np.testing.assert_allclose(actual.entropy, expected[1], atol=1e-5)
    mine = weighted(lambda h, w, t: token_logprobs(h, w, t, chunk=chunk, temperature=temperature), targets, weights)
    plain = weighted(lambda h, w, t: full(h, w, t, temperature), targets, weights)
    assert_same(mine(hidden, head), plain(hidden, head), 1e-5, 1e-5)


@pytest.mark.parametrize("chunk", [7, 50, 128])
def test_forbidden_tokens_have_no_share(chunk):
    """Against log_softmax over logits of -inf; in one state the whole first chunk is forbidden."""
    hidden, head, targets, weights = problem(3, 5, 128, 16)
    table = np.random.default_rng(0).random((3, 128)) < 0.3
    table[1, :60] = True
    state = np.arange(15).reshape(3, 5) % 3
    allowed = [np.flatnonzero(~table[s]) for s in state.ravel()]
    targets = jnp.asarray([a[t % len(a)] for a, t in zip(allowed, np.asarray(targets).ravel(), strict=True)]).reshape(
        3, 5
    )

    def plain(hidden, head, targets):
        scores = jnp.where(table[state], -jnp.inf, jnp.einsum("bld,vd->blv", hidden, head) / 0.7)
        log_p = jax.nn.log_softmax(scores)
        p = jnp.exp(log_p)
        return jnp.take_along_axis(log_p, targets[..., None], -1)[..., 0], -(p * jnp.where(p > 0, log_p, 0)).sum(-1)

    def mine(hidden, head, targets):
        forbidden = Forbidden(jnp.asarray(table), jnp.asarray(state))
        return token_logprobs(hidden, head, targets, chunk=chunk, temperature=0.7, forbidden=forbidden)

    actual = weighted(mine, targets, weights)(hidden, head)
    assert_same(actual, weighted(plain, targets, weights)(hidden, head), 1e-5, 1e-5)


def test_extreme_logits_stay_finite():
    hidden, head, targets, weights = problem(2, 4, 64, 8, scale=300.0)
    actual = weighted(lambda h, w, t: token_logprobs(h, w, t, chunk=24), targets, weights)(hidden, head)
    expected = weighted(lambda h, w, t: full(h, w, t, 1.0), targets, weights)(hidden, head)
    assert all(bool(jnp.isfinite(x).all()) for x in jax.tree.leaves(actual))
    np.testing.assert_allclose(actual[0], expected[0], rtol=1e-4)


@pytest.mark.parametrize("shards", [2, 4])
def test_vocabulary_over_devices(shards):
    """Equal results on a mesh, and the compiled program never gathers the head."""
    hidden, head, targets, weights = problem(8, 4, 512, 16)
    mesh = make_mesh(fsdp=8 // shards, tensor=shards)
    rows = NamedSharding(mesh, PartitionSpec("fsdp"))
    placed = jax.device_put(hidden, rows), jax.device_put(head, NamedSharding(mesh, PartitionSpec("tensor")))
    mine = weighted(lambda h, w, t: token_logprobs(h, w, t, chunk=48, vocab_shards=shards), targets, weights)
    compiled = jax.jit(mine).lower(*placed).compile()
    assert_same(
        compiled(*placed),
        weighted(lambda h, w, t: full(h, w, t, 1.0), targets, weights)(hidden, head),
        1e-5,
        1e-5,
    )
    gathers = [line for line in compiled.as_text().splitlines() if " all-gather(" in line]
    assert not any("512" in line.split("=")[1].split("all-gather")[0] for line in gathers)


def test_bad_arguments():
    hidden, head, targets, _ = problem(1, 2, 10, 4)
    with pytest.raises(ValueError, match="10 rows, which 3"):
        token_logprobs(hidden, head, targets, vocab_shards=3)
    with pytest.raises(ValueError, match="above 0"):
        token_logprobs(hidden, head, targets, temperature=0.0)


def compiled_pair(hidden, head, targets, weights):
    mine = jax.jit(weighted(token_logprobs, targets, weights)).lower(hidden, head).compile()
    plain = jax.jit(weighted(lambda h, w, t: full(h, w, t, 1.0), targets, weights)).lower(hidden, head).compile()
    return mine, plain


def test_memory_at_qwen_size():
    """Peak extra memory at B=2, L=512, V=151,936, D=896 is at most a quarter of the full computation's."""
    hidden, _, targets, weights = problem(2, 512, 7, 896)
    head = jax.ShapeDtypeStruct((151_936, 896), jnp.float32)  # its values would take longer to draw than all else
    mine, plain = compiled_pair(hidden, head, targets, weights)
    extra = [c.memory_analysis().temp_size_in_bytes for c in (mine, plain)]
    print(f"extra MB: chunked {extra[0] / 1e6:.0f}, full {extra[1] / 1e6:.0f}")
    assert extra[0] <= extra[1] / 4


@pytest.mark.long
def test_values_at_qwen_size():
    arrays = problem(2, 512, 151_936, 896, scale=0.05)
    mine, plain = compiled_pair(*arrays)
    assert_same(mine(*arrays[:2]), plain(*arrays[:2]), 1e-5, 1e-4)
