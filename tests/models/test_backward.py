"""What a backward pass keeps, by the compiler's own count, and that it is the same backward pass."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from rlver_jax.models.families import Qwen2Config
from rlver_jax.models.logprobs import token_logprobs
from rlver_jax.models.qwen import Qwen2, abstract_params, head, init_params

LAYERS, LENGTH, WIDTH = 6, 256, 64


def gradient_of(scan: bool, remat: str, attention: str, layers: int = LAYERS):
    config = Qwen2Config(300, WIDTH, 4 * WIDTH, layers, num_heads=4, num_kv_heads=2, head_dim=16)
    model = Qwen2(config, scan_layers=scan, remat=remat, attention=attention, attention_chunk=64)

    def loss(params, tokens):
        positions = jnp.broadcast_to(jnp.arange(tokens.shape[1]), tokens.shape)
        hidden, _ = model.apply({"params": params}, tokens, positions, positions // 100)
        return token_logprobs(hidden, head(params), tokens, chunk=100).logprob.mean()

    return model, jax.grad(loss)


def temporaries(scan: bool, remat: str, attention: str = "chunked", layers: int = LAYERS) -> int:
    model, gradient = gradient_of(scan, remat, attention, layers)
    tokens = jax.ShapeDtypeStruct((1, LENGTH), jnp.int32)
    compiled = jax.jit(gradient).lower(abstract_params(model)[0], tokens).compile()
    return compiled.memory_analysis().temp_size_in_bytes


@pytest.mark.slow
def test_unrolled_layers_computed_again_are_not_kept():
    """XLA's CPU backend drops the barriers that should delay what is computed again."""
    assert temporaries(False, "full") < 0.35 * temporaries(False, "none")


@pytest.mark.slow
def test_layers_computed_again_are_not_kept(capsys):
    """Of unrolled layers as of scanned ones; `full` keeps no more of a further layer than what comes into it."""
    memory = {(scan, remat): temporaries(scan, remat) for scan in (False, True) for remat in ("none", "dots", "full")}
    with capsys.disabled():
        for (scan, remat), size in memory.items():
            print(f"{'scanned' if scan else 'unrolled'} layers, remat={remat}: {size / 2**20:.2f} MiB")
    for scan in (False, True):
        none, dots, full = (memory[scan, remat] for remat in ("none", "dots", "full"))
        assert full < 0.35 * none
        assert full < dots < 0.7 * none
    assert memory[False, "full"] < 1.2 * memory[True, "full"]
    more = temporaries(False, "full", layers=2 * LAYERS) - memory[False, "full"]
    assert more <= LAYERS * LENGTH * WIDTH * 4  # less where it lies in what later holds gradients


@pytest.mark.parametrize(
    ("remat", "attention"),
    [
        ("dots", "chunked"),
        ("full", "dense"),
        pytest.param("dots", "dense", marks=pytest.mark.slow),
        pytest.param("full", "chunked", marks=pytest.mark.slow),
    ],
)
def test_gradients_are_those_without(remat, attention):
    tokens = jnp.asarray(np.random.default_rng(0).integers(0, 300, (2, 128)), jnp.int32)
    params = init_params(gradient_of(False, "none", attention, 2)[0], jax.random.key(1))
    plain, again = (jax.jit(gradient_of(False, kind, attention, 2)[1])(params, tokens) for kind in ("none", remat))
    for a, b in zip(*map(jax.tree.leaves, (plain, again)), strict=True):
        np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-5 * float(jnp.abs(a).max()))


def test_what_is_not_a_number_stays_one():
    """A gradient that is not finite is skipped by the update: it must be seen."""
    model, gradient = gradient_of(False, "full", "dense", 2)
    params = init_params(model, jax.random.key(1))
    params["norm"]["scale"] = params["norm"]["scale"].at[3].set(jnp.nan)
    gradients = jax.jit(gradient)(params, jnp.ones((1, 16), jnp.int32))
    assert jnp.isnan(gradients["layer_0"]["attn"]["q"]["kernel"]).any()
