"""A ragged KV cache: each row of a batch has its own length and grows by its own count."""

import dataclasses
import functools
from typing import Any

import flax.struct
import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int

from rlver_jax.models.attention import BLOCK
from rlver_jax.models.kv_cache import KVCache, Prefix, init_kv_cache, laid_out
from rlver_jax.models.qwen import Params, Qwen2, head, logits
from rlver_jax.parallel import rules
from rlver_jax.parallel.batch import gather_rows

PIECES, SMALLEST_PIECE = 8, 24  # of tokens that are prefilled: how many at most, and how many tokens each at least


@functools.partial(jax.jit, static_argnums=0)
def _forward(model: Qwen2, params: Params, *arguments: Any) -> Any:
    """Traced once for all calls in a program with as many tokens, and compiled with the rest of it."""
    return model.apply({"params": params}, *arguments)


@flax.struct.dataclass
class LM:
    """A model with its parameters; the module is static, so a jitted function compiles once per architecture."""

    params: Params
    model: Qwen2 = flax.struct.field(pytree_node=False)

    def logits(self, hidden: Float[Array, "*b D"]) -> Float[Array, "*b V"]:
        """float32 logits of a few positions."""
        return logits(self.params, hidden)

    def forward(
        self, tokens: Array, positions: Array, branch: Array | None, cache: "Cache", held: Array | None = None
    ) -> tuple[Array, KVCache]:
        """Hidden states [B, S, D] of new tokens after each row's length, and keys and values with them.

        held: branches [B, C] of what the cache holds; None: all of it is canonical.
        """
        of_cache = cache.kv, cache.filled, None, held, cache.prefix
        return _forward(self.model, self.params, tokens, positions, branch, *of_cache)

    @property
    def head(self) -> Float[Array, "V D"]:
        """Output projection."""
        return head(self.params)


@flax.struct.dataclass
class Cache:
    """The context of each row: the prefix that it shares with others, if there is one, and then its own slots.

    Its own tokens lie in slots 0..filled[b]-1; what lies beyond is garbage and masked.
    """

    kv: KVCache
    length: Int[Array, "B"]  # of the context, in tokens
    hidden: Float[Array, "B D"]  # of each row's last token: what predicts the next one
    prefix: Prefix | None = None

    @property
    def capacity(self) -> int:
        """Slots of a row's own."""
        return self.kv.capacity

    @property
    def filled(self) -> Int[Array, "B"]:
        """How many of its own slots a row has filled."""
        if self.prefix is None:
            return self.length
        shared = self.prefix.length
        return self.length - jnp.repeat(shared, self.length.shape[0] // shared.shape[0])


def init_cache(lm: LM, batch: int, capacity: int) -> Cache:
    """Empty context for `batch` rows; append something before generating."""
    model = lm.model
    kv = init_kv_cache(model.config, batch, capacity, model.dtype, scan_layers=model.scan_layers)
    return Cache(kv, jnp.zeros(batch, jnp.int32), jnp.zeros((batch, model.config.hidden_size), model.dtype))


def pieces(width: int) -> int:
    """In how many pieces `append` reads texts of up to `width` tokens, at the most."""
    return min(PIECES, -(-width // SMALLEST_PIECE))


def append(lm: LM, cache: Cache, tokens: Int[Array, "B S"], count: Int[Array, "B"]) -> Cache:
    """Prefills the first count[b] tokens of row b (0: nothing changes for it).

    S is what a program is compiled for, and mostly far more than any row has: many tokens are read in pieces, up to the
    longest row's last one. Every row that is prefilled must have S free slots, padding included: filled + S <=
    capacity. The caller checks it once per turn, because a check per step would cost a host sync.
    """
    width = tokens.shape[1]
    if width == 1:
        return _append_piece(lm, cache, cache, tokens, count, jnp.int32(0))
    most = pieces(width)
    size = -(-width // most)

    def piece(state: tuple[Array, Cache]) -> tuple[Array, Cache]:
        i, now = state
        first = jnp.minimum(i * size, width - size)  # the last piece begins earlier, where `size` doesn't divide
        part = jax.lax.dynamic_slice_in_dim(tokens, first, size, axis=1)
        return i + 1, _append_piece(lm, cache, now, part, count, first)

    longest = count.max()
    with jax.named_scope(f"pieces_{most}"):  # by its name `plan` knows how often the loop runs at most
        _, end = jax.lax.while_loop(lambda state: state[0] * size < longest, piece, (jnp.int32(0), cache))
    return end


def _append_piece(lm: LM, before: Cache, now: Cache, tokens: Int[Array, "B S"], count: Array, first: Array) -> Cache:
    """Reads tokens first..first+S-1 of those that `append` adds to `before`; one forward pass over [B, S]."""
    positions = before.length[:, None] + first + jnp.arange(tokens.shape[1])
    hidden, kv = lm.forward(tokens, positions, None, dataclasses.replace(now, length=before.length + first))
    index = count - 1 - first
    last = jnp.take_along_axis(hidden, jnp.clip(index, 0, tokens.shape[1] - 1)[:, None, None], axis=1)[:, 0]
    here = (index >= 0) & (index < tokens.shape[1])
    length = before.length + jnp.minimum(count, first + tokens.shape[1])
    return dataclasses.replace(now, kv=kv, length=length, hidden=jnp.where(here[:, None], last, now.hidden))


def rollback(cache: Cache, length: Int[Array, "B"]) -> Cache:
    """Forgets each row's own tokens from the length[b]-th on. Append before generating: the hidden state is stale."""
    return dataclasses.replace(cache, length=length)


def repeat_rows(cache: Cache, times: int, capacity: int) -> Cache:
    """Every row `times` times over, neighbours together, in a cache of `capacity` slots: a group shares one prefill."""

    def grow(x: Array, axis: int) -> Array:
        x = jnp.repeat(x, times, axis=axis)
        pad = [(0, 0)] * x.ndim
        pad[-2] = (0, capacity - x.shape[-2])
        return jnp.pad(x, pad)

    axis = 0 if isinstance(cache.kv.k, tuple) else 1
    kv = laid_out(jax.tree.map(lambda x: grow(x, axis), cache.kv))
    return Cache(kv, jnp.repeat(cache.length, times), jnp.repeat(cache.hidden, times, axis=0))


def shares(prefixes: int, slots: int, times: int, parts: int) -> bool:
    """Whether rows share prefixes of so many slots, `times` neighbours each, on a mesh with `parts` parts of a batch.

    What is shorter than a block of a row's own cache isn't worth a loop of its own.
    """
    return times > 1 and slots >= BLOCK and prefixes % parts == 0


def share_rows(lm: LM, cache: Cache, times: int, capacity: int) -> Cache:
    """As `repeat_rows`, but nothing is copied: what `cache` holds becomes a prefix, which is read once for its rows.

    `capacity`: slots of each row's own. Copies where `shares` says so: of short prefixes, or where devices could not
    split them as they split the rows.
    """
    count = cache.length.shape[0]
    if not shares(count, cache.capacity, times, rules.parts("batch")):
        return repeat_rows(cache, times, capacity)
    own = init_cache(lm, count * times, capacity)
    length, hidden = (jnp.repeat(x, times, axis=0) for x in (cache.length, cache.hidden))
    return Cache(own.kv, length, hidden, Prefix(cache.kv, cache.length))


def read_one(lm: LM, tokens: Int[Array, "S"]) -> Cache:
    """A cache of one row with these tokens prefilled and no free slot; there may be none of them."""
    count = tokens.shape[0]
    padded = tokens[None] if count else jnp.zeros((1, 1), jnp.int32)  # no model reads an array of width 0
    return append(lm, init_cache(lm, 1, padded.shape[1]), padded, jnp.array([count]))


def keep_slots(cache: Cache, slots: Int[Array, "C"], length: Int[Array, "B"]) -> Cache:
    """Slot j becomes what slot slots[j] was, in all rows: what is not among a row's first length[b] is forgotten.

    As after a rollback the last hidden state is stale.
    """
    kv = jax.tree.map(lambda x: jnp.take(x, slots, axis=-2, mode="clip"), cache.kv)
    return dataclasses.replace(cache, kv=kv, length=length)


def restart_rows(cache: Cache, prefix_cache: Cache, source: Int[Array, "B"], fresh: Bool[Array, "B"]) -> Cache:
    """Row b begins anew as row source[b] of `prefix_cache` where fresh[b]; the others stay as they are.

    In place: only the slots that `prefix_cache` has are written in each row, one layer after the other.
    """
    width, mask = prefix_cache.capacity, fresh[:, None, None, None]

    def unstacked(x: Array, prefix: Array) -> Array:
        new = jnp.where(mask, gather_rows(prefix, source), x[:, :, :width])
        return jax.lax.dynamic_update_slice(x, new, (0, 0, 0, 0))

    def stacked(x: Array, prefix: Array) -> Array:
        def layer(i: Array, x: Array) -> Array:
            old = jax.lax.dynamic_slice(x, (i, 0, 0, 0, 0), (1, *x.shape[1:3], width, x.shape[4]))
            new = jnp.where(mask, gather_rows(prefix[i], source), old)
            return jax.lax.dynamic_update_slice(x, new, (i, 0, 0, 0, 0))

        return jax.lax.fori_loop(0, x.shape[0], layer, x)

    kv = jax.tree.map(unstacked if isinstance(cache.kv.k, tuple) else stacked, cache.kv, prefix_cache.kv)
    hidden = jnp.where(fresh[:, None], gather_rows(prefix_cache.hidden, source), cache.hidden)
    length = jnp.where(fresh, gather_rows(prefix_cache.length, source), cache.length)
    return Cache(kv, length, hidden)


Ragged = tuple[Array, Array | int | None]


def concat_ragged(batch: int, *parts: Ragged) -> tuple[Int[Array, "B S"], Int[Array, "B"]]:
    """Concatenates ragged parts row by row, without gaps.

    Each part is (tokens [n] or [B, n], count [B] or int or None for all n). Returns (tokens, count); what lies beyond
    a row's count is padding.
    """
    tokens, masks = [], []
    for part, count in parts:
        block = jnp.broadcast_to(part, (batch, part.shape[-1])).astype(jnp.int32)
        size = jnp.broadcast_to(jnp.asarray(block.shape[1] if count is None else count), (batch,))
        tokens.append(block)
        masks.append(jnp.arange(block.shape[1]) < size[:, None])
    mask = jnp.concatenate(masks, axis=1)
    order = jnp.argsort(~mask, axis=1, stable=True)
    return jnp.take_along_axis(jnp.concatenate(tokens, axis=1), order, axis=1), mask.sum(axis=1, dtype=jnp.int32)
