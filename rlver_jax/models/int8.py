"""Weights of a frozen model in int8: half the memory of bfloat16, and half of what every decode step reads.

Each column of a layer's weight matrices is rounded to 255 steps of its own size, kept as `scale` beside them:
x @ kernel * scale. Activations, embedding, output head, norms and biases stay as they are: nothing needs calibration.
"""

from typing import Any

import jax
import jax.numpy as jnp
from jax.sharding import Mesh

from rlver_jax.models.qwen2 import Params, Qwen2, abstract_params
from rlver_jax.parallel import rules

STEPS = 127  # on each side of 0


def unrounded(model: Qwen2) -> Qwen2:
    """The module whose parameters `quantize` takes: those of `model` before they are rounded."""
    return model.clone(param_dtype=model.dtype)


def quantize(params: Params, model: Qwen2, mesh: Mesh | None = None) -> Params:
    """Parameters of `unrounded(model)`, which are given up, as those of `model`, whose param_dtype is int8."""
    shapes, axes = abstract_params(model)
    places = None if mesh is None else rules.tree_shardings(axes, shapes, mesh)
    return jax.jit(_of_layers, out_shardings=places, donate_argnums=0)(params)


def _of_layers(params: Params) -> Params:
    return {name: _quantized(tree) if name.startswith("layer") else tree for name, tree in params.items()}


def _quantized(tree: Any) -> Any:
    if not isinstance(tree, dict):
        return tree
    if "kernel" not in tree:
        return {name: _quantized(inner) for name, inner in tree.items()}
    kernel = tree["kernel"].astype(jnp.float32)
    largest = jnp.abs(kernel).max(axis=-2, keepdims=True)
    scale = jnp.where(largest > 0, largest / STEPS, 1)
    return tree | {"kernel": jnp.round(kernel / scale).astype(jnp.int8), "scale": scale.squeeze(-2)}
