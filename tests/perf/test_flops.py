"""The formulas against what XLA counts in the same programs, on a model whose layers are unrolled."""

import dataclasses

import jax
import jax.numpy as jnp
import pytest

from rlver_jax.models.families import Qwen2Config
from rlver_jax.models.logprobs import token_logprobs
from rlver_jax.models.qwen import Qwen2, abstract_params, head
from rlver_jax.perf import flops
from tests.quick import ALL_PASSES

# Wide enough that products outweigh elementwise work, as they do in real models.
CONFIG = Qwen2Config(2048, 512, 1408, 2, 8, 4, 64)
ROWS, LENGTH = 2, 256


def counted(function, *args) -> float:
    return jax.jit(function).lower(*args).compile(compiler_options=ALL_PASSES).cost_analysis()["flops"]


def tokens():
    return jax.ShapeDtypeStruct((ROWS, LENGTH), jnp.int32)


def hidden(model, params, x):
    return model.apply({"params": params}, x, x)[0]


def square() -> float:
    """Pairs that dense attention computes: masked ones too, unlike the formulas' triangle."""
    return ROWS * LENGTH**2 - ROWS * LENGTH * (LENGTH + 1) / 2


def test_forward_pass():
    model = Qwen2(CONFIG, scan_layers=False)
    counted_flops = counted(lambda p, x: hidden(model, p, x), abstract_params(model)[0], tokens())
    work = flops.packed_forward(CONFIG, ROWS, LENGTH, logits=False, itemsize=4, parts=1)
    assert counted_flops == pytest.approx(work.flops + flops.attention_flops(CONFIG, square()), rel=0.02)


@pytest.mark.parametrize("remat", ["none", "full"])
def test_update(remat):
    """Gradients of log-probs: with the vocabulary in one chunk, so that no loop hides its turns from the compiler."""
    model = Qwen2(CONFIG, scan_layers=False, remat=remat)

    def loss(params, x):
        return token_logprobs(hidden(model, params, x), head(params), x, chunk=CONFIG.vocab_size).logprob.sum()

    counted_flops = counted(jax.grad(loss), abstract_params(model)[0], tokens())
    work = flops.packed_update(
        CONFIG, ROWS, LENGTH, logits=True, itemsize=4, parts=1, remat=remat, chunked=False
    )  # fmt: skip
    passes = 4 if remat == "full" else 3
    wanted = work.flops + passes * flops.attention_flops(CONFIG, square())
    wanted -= flops.head_flops(CONFIG, ROWS * LENGTH)  # logits of one chunk are not computed again: XLA sees them twice
    assert counted_flops == pytest.approx(wanted, rel=0.02)


def test_a_token_of_seven_billion():
    """By hand: 2 x (parameters without the input embedding) a token, and 4 x 28 layers x 3,584 for each key seen."""
    config = Qwen2Config(152_064, 3584, 18_944, 28, 28, 4, 128)
    weights = 28 * (2 * 3584 * 3584 + 2 * 3584 * 512 + 3 * 3584 * 18_944) + 152_064 * 3584
    work = flops.forward_passes(flops.Reader(config), 1, 1, 999, logits=1, passes=1)
    assert work.flops == 2 * weights + 4 * 28 * 3584 * 1000
    # The published number of parameters; of the input embedding a row is looked up.
    assert work.weight_bytes + work.column_bytes == 2 * (7_615_616_512 - 152_064 * 3584)
    assert work.column_bytes == 2 * (28 * 3 * 3584 * 18_944 + 152_064 * 3584)


def test_a_token_of_seven_billion_in_int8():
    """By the arrays themselves: a byte for each weight of a layer's matrices, four for each of their columns."""
    model = Qwen2(dataclasses.replace(CONFIG, tie_embeddings=False), param_dtype=jnp.int8, dtype=jnp.bfloat16)
    leaves = jax.tree_util.tree_leaves_with_path(abstract_params(model)[0])
    stored = sum(x.size * x.dtype.itemsize for _, x in leaves)
    embedding = next(x.size * 2 for path, x in leaves if path[0].key == "embed")
    reader = flops.Reader(model.config, rounded=True)
    assert reader.stored_bytes == stored
    assert reader.pass_bytes + reader.column_bytes == stored - embedding
    matrices = [x for path, x in leaves if {key.key for key in path} & {"gate", "up", "down", "lm_head"}]
    assert reader.column_bytes == sum(x.size * x.dtype.itemsize for x in matrices)


def test_rows_that_share_a_prefix_read_it_once():
    """Two layers, one key head of 8: 64 bytes a token. Four rows see 100 tokens and one of their own, 80 of them shared
    by two and two: 2 x 80 + 4 x 20.5 are read, and 4 written."""
    c = Qwen2Config(100, 16, 32, 2, num_heads=2, num_kv_heads=1, head_dim=8)
    whole, shared = (
        flops.forward_passes(flops.Reader(c), 4, 1, 100, logits=0, passes=1, shared=tokens)
        for tokens in (0, (4 - 2) * 80)
    )
    assert whole.spread_bytes == 64 * (4 * 100.5 + 4)
    assert shared.spread_bytes == 64 * (2 * 80 + 4 * 20.5 + 4)
    assert whole.flops == shared.flops


def test_the_optimizers_bytes():
    """Gradient, weight, first and second moment of each parameter: 4 + 2 x (4 + 4 + 4), or 4 + 2 x (2 + 2 + 4)."""
    c = Qwen2Config(100, 16, 32, 2, num_heads=2, num_kv_heads=1, head_dim=8)
    options = {"logits": False, "parts": 1, "remat": "none", "chunked": False}
    assert flops.packed_update(c, 1, 8, itemsize=4, **options).spread_bytes == 28 * c.num_params
    assert flops.packed_update(c, 1, 8, itemsize=2, moment=2, **options).spread_bytes == 20 * c.num_params
