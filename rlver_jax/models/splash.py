"""Attention of training rows on TPU: JAX's splash kernels, forward and backward, over the blocks that are seen at all.

The attention mask (`attention.visible`: causal, branches, dialogues of a shared row) differs from row to row, so it is
data. It is computed once for all layers, one byte for each pair of positions, and cut into blocks. The kernels skip
every block that is wholly masked, forward and backward, without reading its keys.
"""

import functools
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax.sharding import PartitionSpec
from jaxtyping import Array, Float

from rlver_jax.parallel import rules

BLOCK = 512  # queries, and keys, of a block at most
LANES = 128  # a block is a multiple of it


class Blocks(NamedTuple):
    """The masks of B rows in blocks; every array has the rows in front."""

    forward: Any  # MaskInfo, also of the queries' gradient
    backward: Any  # MaskInfo of the keys' and values' gradient

    @property
    def size(self) -> int:
        """Queries, and keys, of a block."""
        return self.forward.partial_mask_blocks.shape[-1]


def blocks_of(mask: Array, block: int = BLOCK) -> Blocks:
    """Cuts the masks of rows, bool [B, L, L], in blocks; rows are filled up to whole blocks.

    Every query must see a key; a padding query sees itself.
    """
    from jax.experimental.pallas.ops.tpu.splash_attention import splash_attention_mask_info as masks  # slow to import

    length = mask.shape[1]
    size = min(block, -(-length // LANES) * LANES)
    fill = -length % size
    mask = jnp.pad(mask, ((0, 0), (0, fill), (0, fill)))
    mask |= jnp.diag(jnp.arange(length + fill) >= length)
    mask = rules.constrain(mask, "batch", None, None)

    def row(mask: Array) -> Blocks:
        infos = (
            process(mask[None], (size, size))[0]
            for process in (masks.process_dynamic_mask, masks.process_dynamic_mask_dkv)
        )
        return Blocks(*(info._replace(is_dynamic_mask=None) for info in infos))  # a Python bool is no array

    return jax.vmap(row)(mask)


def splash_attention(
    q: Float[Array, "B L H hd"],
    k: Float[Array, "B K L hd"],
    v: Float[Array, "B K L hd"],
    blocks: Blocks,
    *,
    interpret: bool = False,
) -> Float[Array, "B L H hd"]:
    """softmax(q k^T / sqrt(hd)) v over what `blocks` lets be seen; scores and softmax in float32.

    On a mesh each device has its rows and heads. `interpret`: the kernels' steps as plain operations, on any device.

    Raises:
        ValueError: rows or heads can't be divided over the mesh.
    """
    length = q.shape[1]
    fill = ((0, 0), (0, 0), (0, -length % blocks.size), (0, 0))
    scaled = q * jnp.asarray(q.shape[-1] ** -0.5, q.dtype)
    inputs = [jnp.pad(x, fill) for x in (scaled.swapaxes(1, 2), k, v)]

    attend: Callable[..., Array] = functools.partial(_rows, interpret=interpret)
    if not jax.sharding.get_abstract_mesh().empty:
        _check_division(q, k)
        mesh = jax.sharding.get_abstract_mesh()
        batch = rules.axes_on(mesh, "batch")
        by_head = PartitionSpec(batch, rules.axes_on(mesh, "heads"))
        in_specs = (PartitionSpec(batch), by_head, by_head, by_head)
        attend = jax.shard_map(attend, in_specs=in_specs, out_specs=by_head, check_vma=False)
    return attend(blocks, *inputs)[:, :, :length].swapaxes(1, 2)


def _rows(blocks: Blocks, q: Array, k: Array, v: Array, *, interpret: bool) -> Array:
    """One row after the other: q [B, H, L, hd], k and v [B, K, L, hd]."""
    one = lambda row: _row(*row, interpret=interpret)  # noqa: E731
    rows = (blocks, q, k, v)
    if q.shape[0] == 1:
        return one(jax.tree.map(lambda x: x[0], rows))[None]
    return jax.lax.map(one, rows)


def _row(blocks: Blocks, q: Array, k: Array, v: Array, *, interpret: bool) -> Array:
    """One row: q [H, L, hd], k and v [K, L, hd]."""
    from jax.experimental.pallas.ops.tpu.splash_attention import splash_attention_kernel as kernels  # slow to import

    size = blocks.size
    names = ("q", "kv", "kv_compute", "q_dkv", "kv_dkv", "kv_dkv_compute", "q_dq", "kv_dq")
    sizes: Any = {f"block_{name}": size for name in names}
    kernel = kernels.SplashAttentionKernel(
        blocks.forward,
        blocks.forward,
        blocks.backward,
        block_sizes=kernels.BlockSizes(**sizes),
        is_mqa=False,
        save_residuals=False,
        mask_value=kernels.DEFAULT_MASK_VALUE,
        attn_logits_soft_cap=None,
        residual_checkpoint_name=None,
        mask_function=None,
        interpret=interpret,
    )
    out: Any = kernel(q, k, v)
    return out


def _check_division(q: Array, k: Array) -> None:
    rows, parts = q.shape[0], rules.parts("batch")
    if rows % parts:
        raise ValueError(
            f"attention='splash': {rows} rows can't be divided over {parts} groups of devices (mesh.replica x "
            f"mesh.fsdp); choose a multiple of {parts}, or attention='chunked'"
        )
    heads, parts = k.shape[1], rules.parts("kv_heads")
    if heads % parts:
        raise ValueError(
            f"attention='splash': {heads} key and value heads can't be divided over mesh.tensor={parts}; choose a "
            f"mesh.tensor that divides {heads}, or attention='chunked'"
        )
