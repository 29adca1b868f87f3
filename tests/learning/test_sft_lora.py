"""Supervised fine-tuning of an adapter: its gradient from that of whole matrices, and on a mesh."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from rlver_jax.learning import sft_loss
from rlver_jax.learning.optimizer import Optimizers
from rlver_jax.learning.sft_loss import FieldLoss
from rlver_jax.models.lora import LoRA, abstract_adapter
from rlver_jax.models.qwen import abstract_params
from rlver_jax.parallel import rules
from rlver_jax.parallel.mesh import make_mesh
from rlver_jax.training.setup import first_state, state_shardings
from tests.learning.test_sft_loss import LENGTH, agents, field_weights_of, lm, made, rows_of
from tests.models.test_lora import drawn

__all__ = ["agents", "lm"]  # fixtures
LORA_ = LoRA(4, 8.0)


@pytest.fixture(scope="module")
def after(agents, lm):
    """What one update gives on a mesh: (sums, gradient, new adapter, norm)."""
    make, examples, lines = made(agents, "user", 1)
    weights = jnp.float32(field_weights_of(make, lines))
    step, adapter = Optimizers(optax.sgd(0.1)), drawn(lm.model, LORA_)

    @functools.cache
    def computed(*shape):
        mesh = make_mesh(*shape, devices=jax.devices()[: np.prod(shape)])
        of = FieldLoss(lm.model, len(make.fields), 100, mesh.shape["tensor"], LORA_)
        put = lambda tree, of_: jax.device_put(tree, rules.tree_shardings(of_[1], of_[0], mesh))  # noqa: E731
        base = put(lm.params, abstract_params(lm.model))
        params = put(adapter, abstract_adapter(lm.model, LORA_))
        state = first_state({"policy": params}, step, mesh)
        shardings = state_shardings(state.params, step, mesh)
        rows, _ = rows_of(examples, LENGTH, shape[0] * shape[1])
        add = jax.jit(functools.partial(sft_loss.add_gradient, of), out_shardings=(shardings.params["policy"], None))
        with jax.set_mesh(mesh):
            total, sums = sft_loss.zero_gradient(of, params), 0.0
            for i in range(rows.tokens.shape[0]):
                microbatch = jax.tree.map(lambda x, i=i: x[i], rows)
                total, part = add(params, total, microbatch, weights, base)
                sums = sums + part
            new, metrics = jax.jit(functools.partial(sft_loss.update, step), out_shardings=(shardings, None))(
                state, total
            )
        return jax.device_get((sums, total, new.params["policy"], metrics["policy/grad_norm"]))

    return computed


@pytest.mark.parametrize("shape", [(1, 4, 2), (1, 8, 1), (2, 2, 2)], ids=["fsdp4_tensor2", "fsdp8", "replica2"])
@pytest.mark.slow
def test_a_mesh_computes_what_one_device_does(after, shape):
    for a, b in zip(*map(jax.tree.leaves, (after(1, 1, 1), after(*shape))), strict=True):
        np.testing.assert_allclose(a, b, rtol=2e-5, atol=2e-6)


def test_only_the_adapter_moves(after, lm):
    _, gradient, new, norm = after(1, 1, 1)
    adapter = drawn(lm.model, LORA_)
    assert norm == pytest.approx(np.sqrt(sum((x.astype(np.float64) ** 2).sum() for x in jax.tree.leaves(gradient))))
    jax.tree.map(lambda a, b, g: np.testing.assert_allclose(b, a - 0.1 * g, atol=1e-6), adapter, new, gradient)
    assert all(np.abs(g).max() > 1e-6 for g in jax.tree.leaves(gradient))
