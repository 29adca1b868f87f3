"""Low-rank adapters (LoRA, arXiv 2106.09685): what is trained beside a frozen model, and how the two become one.

    y = x W + s x A B        s = alpha / r, or rank-stabilized alpha / sqrt(r) (arXiv 2312.03732)

An adapter is a tree of its own, shaped like the parameters: beside each targeted `kernel` [in, out] of a layer it has
`lora_a` [in, r] and `lora_b` [r, out]. `applied` puts both into one tree, of which `Linear` computes y; B holds s by
then, so that a model needs no word of how it was trained. B starts at zero: an untrained adapter changes nothing.
"""

import dataclasses
import functools
import zlib
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
from jax.sharding import PartitionSpec
from jaxtyping import Array, Float, Key

from rlver_jax.config.lora_fields import TARGETS
from rlver_jax.models.precision import accum_dtype, matmul_options
from rlver_jax.models.product import LORA_A, LORA_B, LORA_ROWS
from rlver_jax.models.qwen import Params, Qwen2, abstract_params, unstack_layers


@dataclasses.dataclass(frozen=True)
class LoRA:
    """What an adapter is made of (static and hashable); fields as in `config.lora`."""

    rank: int  # r
    alpha: float
    targets: tuple[str, ...] = TARGETS
    rank_stabilized: bool = False

    @property
    def scaling(self) -> float:
        """s."""
        return self.alpha / (self.rank**0.5 if self.rank_stabilized else self.rank)


def abstract_adapter(model: Qwen2, lora: LoRA) -> tuple[Params, Params]:
    """(shapes, logical axes) of a model's adapter as trees, like `qwen.abstract_params`; float32 or wider."""
    return jax.tree.map(lambda x: x, _abstract_adapter(model, lora))  # trees of the caller's own


@functools.cache
def _abstract_adapter(model: Qwen2, lora: LoRA) -> tuple[Params, Params]:
    dtype = accum_dtype(model.dtype)

    def pair(kernel: Any, axes: Any) -> tuple[Params, Params]:
        *stack, inputs, outputs = kernel.shape
        *over, from_axis, to_axis = axes
        shape = lambda *sizes: jax.ShapeDtypeStruct((*stack, *sizes), dtype)  # noqa: E731
        return (
            {LORA_A: shape(inputs, lora.rank), LORA_B: shape(lora.rank, outputs)},
            {LORA_A: PartitionSpec(*over, from_axis, "rank"), LORA_B: PartitionSpec(*over, "rank", to_axis)},
        )

    def walk(shapes: Params, axes: Params) -> tuple[Params, Params]:
        halves: tuple[Params, Params] = {}, {}
        for name, tree in shapes.items():
            if not isinstance(tree, dict):
                continue
            target = name in lora.targets and "kernel" in tree
            both = pair(tree["kernel"], axes[name]["kernel"]) if target else walk(tree, axes[name])
            for whole, part in zip(halves, both, strict=True):
                whole.update({name: part} if part else {})
        return halves

    return walk(*abstract_params(model))


def trained_axes(model: Qwen2, lora: LoRA | None) -> Params:
    """Logical axes of what is trained of a model: its adapter, or without one all parameters."""
    return (abstract_params(model) if lora is None else abstract_adapter(model, lora))[1]


def init_adapter(model: Qwen2, lora: LoRA, key: Key[Array, ""]) -> Params:
    """A fresh adapter: B zero, A uniform within 1 / sqrt(in), as `peft` has it; the same with layers scanned or not."""
    shapes, _ = abstract_adapter(model.clone(scan_layers=True), lora)

    def leaf(path: Any, x: jax.ShapeDtypeStruct) -> Array:
        if path[-1].key == LORA_B:
            return jnp.zeros(x.shape, x.dtype)
        name = jax.tree_util.keystr(path, simple=True, separator="/")
        bound = x.shape[-2] ** -0.5
        return jax.random.uniform(jax.random.fold_in(key, zlib.crc32(name.encode())), x.shape, x.dtype, -bound, bound)

    adapter = jax.tree_util.tree_map_with_path(leaf, shapes)
    return adapter if model.scan_layers else unstack_layers(adapter)


def applied(base: Params, adapter: Params, lora: LoRA) -> Params:
    """Parameters of the adapted model, as `Qwen2` reads them: the base's arrays with the adapter's beside them."""
    return join(base, scaled(adapter, lora))


def scaled(adapter: Params, lora: LoRA) -> Params:
    """The adapter with s in its B."""
    part = lambda path, x: x * lora.scaling if path[-1].key == LORA_B else x  # noqa: E731
    return jax.tree_util.tree_map_with_path(part, adapter)


def join(base: Params, adapter: Params) -> Params:
    """One tree of both; no array is copied."""
    return base | {name: join(base[name], x) if isinstance(x, dict) else x for name, x in adapter.items()}


def split(params: Params) -> tuple[Params, Params]:
    """(base, adapter), what `join` was given; without an adapter (params, {})."""
    base: Params = {}
    adapter: Params = {}
    for name, tree in params.items():
        if isinstance(tree, dict):
            base[name], inner = split(tree)
            adapter |= {name: inner} if inner else {}
        else:
            (adapter if name in (LORA_A, LORA_B) else base)[name] = tree
    return base, adapter


def same_arrays(one: Params, other: Params) -> bool:
    """Whether two trees hold the very same arrays: one copy in memory."""
    pairs = [jax.tree.leaves_with_path(tree) for tree in (one, other)]
    return len(pairs[0]) == len(pairs[1]) and all(
        path == its and x is y for (path, x), (its, y) in zip(*pairs, strict=True)
    )


def side_by_side(model: Qwen2, adapters: Sequence[tuple[LoRA, Params]]) -> tuple[LoRA, Params]:
    """Several adapters of one model as one whose ranks are all of theirs, one after the other, in the model's dtype.

    Their scaling is in B already: s is 1. With `for_rows` each row of a batch takes the ranks of one of them.
    """
    targets = tuple(name for name in TARGETS if any(name in lora.targets for lora, _ in adapters))
    whole = LoRA(sum(lora.rank for lora, _ in adapters), sum(float(lora.rank) for lora, _ in adapters), targets)

    def filled(shapes: Params, adapter: Params) -> Params:  # without a target an adapter adds 0 there
        return {
            name: filled(x, adapter.get(name, {})) if isinstance(x, dict) else adapter.get(name, jnp.zeros(x.shape))
            for name, x in shapes.items()
        }

    def beside(path: Any, *parts: Array) -> Array:
        return jnp.concatenate([x.astype(model.dtype) for x in parts], -1 if path[-1].key == LORA_A else -2)

    shapes = [abstract_adapter(model, dataclasses.replace(lora, targets=targets))[0] for lora, _ in adapters]
    parts = [filled(like, scaled(adapter, lora)) for like, (lora, adapter) in zip(shapes, adapters, strict=True)]
    return whole, jax.tree_util.tree_map_with_path(beside, *parts)


def for_rows(params: Params, rows: Float[Array, "B R"] | None) -> Params:
    """Parameters whose adapter counts, in row b of a batch, with the ranks whose rows[b] is 1; None: with all."""
    if rows is None:
        return params
    if LORA_A in params:
        stack = params[LORA_A].shape[:-2]
        return params | {LORA_ROWS: jnp.broadcast_to(rows, (*stack, *rows.shape))}
    return {name: for_rows(tree, rows) if isinstance(tree, dict) else tree for name, tree in params.items()}


def merged(params: Params) -> Params:
    """Parameters of an unadapted model with the same outputs: W + s A B, in float32; the rest is passed on.

    Args:
        params: of `applied`, whose base is not in int8.
    """
    if LORA_A not in params:
        return {name: merged(tree) if isinstance(tree, dict) else tree for name, tree in params.items()}
    kernel, a, b = (params[name] for name in ("kernel", LORA_A, LORA_B))
    dtype = accum_dtype(a.dtype)
    update = jnp.einsum("...ir,...ro->...io", a.astype(dtype), b.astype(dtype), **matmul_options(dtype))
    rest = {name: x for name, x in params.items() if name not in (LORA_A, LORA_B)}
    return rest | {"kernel": kernel.astype(dtype) + update}
