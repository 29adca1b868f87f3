"""Products of float32 keep all of their operands' bits, also where a chip would round them first.

On a CPU nothing rounds, so what the compiler is asked for is read from the program.
"""

import re

import jax
import jax.numpy as jnp
import pytest

from rlver_jax.models.logprobs import token_logprobs
from rlver_jax.models.qwen import Qwen2, head, init_params, logits
from rlver_jax.models.value_head import ValueHead
from tests.models.test_qwen import golden, positions

PRODUCT = re.compile(r"stablehlo\.dot_general.*?precision = \[(\w+), (\w+)\]")


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("attention", ["dense", "chunked"])
def test_training_and_reading(dtype, attention):
    config, tokens, _ = golden("gqa")
    model = Qwen2(config, dtype=jnp.dtype(dtype), attention=attention, attention_chunk=16)
    values = ValueHead(param_dtype=jnp.float32)
    params = init_params(model, jax.random.key(0))
    extra = values.init(jax.random.key(1), jnp.zeros((1, config.hidden_size)))

    def loss(params, extra):
        hidden, _ = model.apply({"params": params}, tokens, positions(tokens))
        logprob, entropy = token_logprobs(hidden, head(params), tokens)
        return (logprob + entropy).sum() + values.apply(extra, hidden).sum() + logits(params, hidden[:, 0]).sum()

    program = jax.jit(jax.grad(loss, (0, 1))).lower(params, extra).as_text()
    precisions = PRODUCT.findall(program)
    assert len(precisions) == program.count("stablehlo.dot_general") > 20
    asked = "HIGHEST" if dtype == "float32" else "DEFAULT"
    assert {precision for both in precisions for precision in both} == {asked}
