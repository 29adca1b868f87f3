"""Weights in int8, of a frozen model or of a copy that only plays: half of what they take, and of what a step reads.

Each column of a layer's weight matrices is rounded to 255 steps of its own size, kept as `scale` beside them:
x @ kernel * scale. Activations, embedding, output head, norms and biases stay as they are: nothing needs calibration.
"""

import functools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jax.sharding import Mesh
from jaxtyping import Array, Float, Int8

from rlver_jax.models.qwen import Params, Qwen2, abstract_params
from rlver_jax.parallel import rules

STEPS = 127  # on each side of 0


def unrounded(model: Qwen2) -> Qwen2:
    """The module whose parameters `quantize` takes: those of `model` before they are rounded."""
    return model.clone(param_dtype=model.dtype)


def quantize(params: Params, model: Qwen2, mesh: Mesh | None = None) -> Params:
    """Parameters of `unrounded(model)` as those of `model`, whose param_dtype is int8.

    Wide matrices are freed one after another, each as soon as it is rounded (those of all layers are one where they are
    scanned), so that beside the model there is room needed for one rounded matrix only. Everything else is passed on.
    """
    shapes, axes = abstract_params(model)
    shardings = None if mesh is None else rules.tree_shardings(axes, shapes, mesh)
    return {
        name: _with_rounded(tree, _rounded_and_freed, shardings and shardings[name])
        if name.startswith("layer")
        else tree
        for name, tree in params.items()
    }


def rounded(params: Params) -> Params:
    """As `quantize`, inside a jitted program; the parameters given stay as they are, in any dtype of floats."""
    one = lambda kernel, _: _rounded(kernel)  # noqa: E731
    return {name: _with_rounded(tree, one) if name.startswith("layer") else tree for name, tree in params.items()}


def _with_rounded(tree: Any, one: Callable[[Array, Any], tuple[Array, Array]], shardings: Any = None) -> Any:
    """A layer's parameters with each matrix as `one` makes it of the matrix and of the shardings that it gets."""
    if not isinstance(tree, dict):
        return tree
    if "kernel" not in tree:
        return {name: _with_rounded(inner, one, shardings and shardings[name]) for name, inner in tree.items()}
    kernel, scale = one(tree["kernel"], shardings)
    return tree | {"kernel": kernel, "scale": scale}


def _rounded_and_freed(unrounded: Array, shardings: Any) -> tuple[Array, Array]:
    out_shardings = None if shardings is None else (shardings["kernel"], shardings["scale"])
    # A donation would do nothing: no result has the size of what is given. Deleted before it has been read, it would
    # live on until then, and the next matrices' results be allocated meanwhile.
    kernel, scale = jax.block_until_ready(_program(out_shardings)(unrounded))
    unrounded.delete()
    return kernel, scale


@functools.cache
def _program(out_shardings: Any) -> Any:
    return jax.jit(_rounded, out_shardings=out_shardings)


def _rounded(kernel: Float[Array, "*L I O"]) -> tuple[Int8[Array, "*L I O"], Float[Array, "*L O"]]:
    """A matrix, or one for each layer, in steps of its columns, and their size."""
    upcast = kernel.astype(jnp.float32)
    largest = jnp.abs(upcast).max(axis=-2, keepdims=True)
    scale = jnp.where(largest > 0, largest / STEPS, 1)
    return jnp.round(upcast / scale).astype(jnp.int8), scale.squeeze(-2)
