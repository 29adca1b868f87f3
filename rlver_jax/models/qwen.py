"""Qwen2.5 and Qwen3 as a functional Flax model (arXiv 2412.15115, 2505.09388): tokens in, hidden states and cache out.

The module never makes [B, L, V] logits; see `logits` for a few positions and `logprobs.token_logprobs` for training.
"""

import functools
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
from jax.sharding import Mesh
from jaxtyping import Array, Float, Int

from rlver_jax.models.attention import AttentionMask, PrefixKeys, dense_attention, rotate, visible
from rlver_jax.models.backward import late
from rlver_jax.models.chunked import chunked_attention
from rlver_jax.models.families import Qwen2Config
from rlver_jax.models.kv_cache import KVCache, Prefix, write
from rlver_jax.models.layers import WEIGHT_PRODUCT, Embedding, Linear, RMSNorm, partitioned, unquantized_dtype
from rlver_jax.models.precision import matmul_options
from rlver_jax.models.splash import blocks_of, splash_attention
from rlver_jax.models.tpu_layout import apart
from rlver_jax.parallel import rules

Params = dict[str, Any]

# What is saved for the backward pass of a layer; everything else is recomputed.
REMAT_POLICIES = {
    "none": None,  # save all activations
    # Save the results of weight products, by name: a policy of operations doesn't see into `product`'s own derivative.
    "dots": jax.checkpoint_policies.save_only_these_names(WEIGHT_PRODUCT),
    "full": jax.checkpoint_policies.nothing_saveable,  # save only the layer's input
}
ATTENTION = ("dense", "chunked", "splash")


class Attention(nn.Module):
    """Grouped-query self-attention with biases or norms of queries and keys; these come from the row or the cache."""

    config: Qwen2Config
    dtype: Any
    param_dtype: Any
    attention: str
    attention_chunk: int

    @nn.compact
    def __call__(self, x, positions, mask: AttentionMask, start, keys, values, layer, prefix: Prefix | None):
        """x [B, S, D]; keys/values None, or caches to write at `start` [B]. Returns (out, keys, values)."""
        c = self.config
        b, s, _ = x.shape
        decoding = keys is not None
        options = (self.dtype, self.param_dtype, c.init_std, decoding)

        def project(name: str, heads: int, axis: str) -> Array:
            y = Linear(heads * c.head_dim, ("embed", axis), c.qkv_bias, *options, name=name)(x)
            y = (apart(y) if decoding else y).reshape(b, s, heads, c.head_dim)
            return rules.constrain(y, "batch", "length", axis, "head_dim")

        # Qwen2.5's key biases reach hundreds: product, bias, norm and rotation stay in float32 and are rounded once.
        def rotated(name: str, heads: int, axis: str) -> Array:
            x = project(name, heads, axis)
            if c.qk_norm:
                x = RMSNorm(c.rms_norm_eps, self.dtype, self.param_dtype, rounded=False, name=f"{name}_norm")(x)
            return rotate(x, positions, c.rope).astype(self.dtype)

        q, k = rotated("q", c.num_heads, "heads"), rotated("k", c.num_kv_heads, "kv_heads")
        v = project("v", c.num_kv_heads, "kv_heads").astype(self.dtype)
        k, v = k.swapaxes(1, 2), v.swapaxes(1, 2)  # [B, K, S, hd]: each head's slots lie together
        if keys is not None:
            keys, values = write(keys, k, start, layer), write(values, v, start, layer)
            k, v = (keys, values) if layer is None else (keys[layer], values[layer])
        before = prefix_keys(prefix, layer)
        if mask.blocks is not None:
            out = splash_attention(q, k, v, mask.blocks)
        elif self.attention == "chunked":
            out = chunked_attention(q, k.astype(q.dtype), v.astype(q.dtype), mask, self.attention_chunk, before)
        else:
            out = dense_attention(q, k.astype(q.dtype), v.astype(q.dtype), mask, before)
        o = Linear(c.hidden_size, ("heads", "embed"), False, *options, name="o")
        return o(out.reshape(b, s, -1)).astype(self.dtype), keys, values


def prefix_keys(prefix: Prefix | None, layer: Any) -> PrefixKeys | None:
    """What one layer sees of a prefix, in which layers are stacked if they have an index."""
    if prefix is None:
        return None
    kv: Any = prefix.kv if layer is None else jax.tree.map(lambda x: x[layer], prefix.kv)
    return PrefixKeys(kv.k, kv.v, prefix.length)


def gathered(x: Float[Array, "B S D"], rows: str = "batch") -> Float[Array, "B S D"]:
    """Hidden states as products with weights read them: whole rows on each device.

    Args:
        rows: mlp_batch for products with columns that the devices of `attention_data` split: each has all their rows.
    """
    return rules.constrain(x, rows, "length", "activation")


def residual(x: Float[Array, "B S D"], spread: bool) -> Float[Array, "B S D"]:
    """The layout of hidden states between layers.

    `spread` over the devices that split heads and MLP columns, where each would keep the same ones for the backward
    pass otherwise (sequence parallelism, arXiv 2205.05198): products gather rows, and their sums are spread again.
    """
    return rules.constrain(x, "batch", "residual_length" if spread else "length", "activation")


class Block(nn.Module):
    """Pre-norm decoder layer. As the body of a scan its carry is (x, keys, values): the cache is updated in place."""

    config: Qwen2Config
    dtype: Any
    param_dtype: Any
    attention: str
    attention_chunk: int

    @nn.compact
    def __call__(self, carry, layer, positions, mask: AttentionMask, start, prefix: Prefix | None):
        """Returns (carry, None) as `nn.scan` wants it."""
        c = self.config
        x, keys, values = carry
        spread = keys is None
        norm = lambda name: RMSNorm(c.rms_norm_eps, self.dtype, self.param_dtype, name=name)  # noqa: E731
        attention = Attention(c, self.dtype, self.param_dtype, self.attention, self.attention_chunk, name="attn")
        y = gathered(norm("attn_norm")(x))
        out, keys, values = attention(y, positions, mask, start, keys, values, layer, prefix)
        # Gathered for the backward pass, which would gather weights instead of cotangents.
        x = x + residual(gathered(out), spread)
        x = x + residual(gathered(self.mlp(gathered(norm("mlp_norm")(x), "mlp_batch"), not spread)), spread)
        return (residual(x, spread), keys, values), None

    def mlp(self, x: Array, decoding: bool) -> Array:
        """Gated MLP: down(silu(gate(x)) * up(x)), the elementwise part in float32."""
        f, d = self.config.intermediate_size, self.config.hidden_size
        options = (False, self.dtype, self.param_dtype, self.config.init_std, decoding)
        gate = Linear(f, ("embed", "mlp"), *options, name="gate")(x)
        up = Linear(f, ("embed", "mlp"), *options, name="up")(x)
        inner = rules.constrain((nn.silu(gate) * up).astype(self.dtype), "mlp_batch", "length", "mlp")
        return Linear(d, ("mlp", "embed"), *options, name="down")(inner).astype(self.dtype)


@functools.cache
def _block(remat: str, scanned: bool) -> type[nn.Module]:
    """The class of a layer, the same one for the same arguments."""
    if remat == "none":
        return Block
    return nn.remat(Block, policy=REMAT_POLICIES[remat], prevent_cse=not scanned)


@functools.partial(jax.jit, static_argnums=(0, 1))
def _layer(block: type[nn.Module], fields: tuple, params: Params, *arguments: Any) -> Any:
    """One of the unrolled layers: traced once for all of them, as their shapes are the same; compiled with the rest."""
    apply = lambda params, *arguments: block(*fields, parent=None).apply({"params": params}, *arguments)  # noqa: E731
    return apply(params, *arguments) if block is Block else late(apply)(params, *arguments)


class Qwen2(nn.Module):
    """Decoder trunk with its output head.

    `scan_layers=True` compiles one layer (parameters stacked on axis 0 under `layers`); False unrolls them under
    `layer_0`, `layer_1`, … (XLA's CPU backend copies scanned weights at every decode step).
    """

    config: Qwen2Config
    dtype: Any = jnp.float32  # of activations
    param_dtype: Any = jnp.float32  # int8: of weight matrices that are not trained (see `quantization`)
    scan_layers: bool = True
    remat: str = "none"
    attention: str = "dense"  # splash: kernels for TPU, for rows without a cache
    attention_chunk: int = 512  # queries at a time with attention="chunked"

    def __post_init__(self):
        if self.remat not in REMAT_POLICIES:
            raise ValueError(f"remat={self.remat!r}; expected one of {', '.join(REMAT_POLICIES)}")
        if self.attention not in ATTENTION:
            raise ValueError(f"attention={self.attention!r}; expected one of {', '.join(ATTENTION)}")
        super().__post_init__()

    @nn.compact
    def __call__(
        self,
        tokens: Int[Array, "B S"],
        positions: Int[Array, "B S"],
        branch: Int[Array, "B S"] | None = None,
        cache: KVCache | None = None,
        start: Int[Array, "B"] | None = None,
        segment: Int[Array, "B S"] | None = None,
        held: Int[Array, "B C"] | None = None,
        prefix: Prefix | None = None,
    ) -> tuple[Float[Array, "B S D"], KVCache | None]:
        """Hidden states after the final norm, and the cache with the new tokens in it.

        Args:
            tokens: int32; padding, if any, at the end of a row.
            positions: int32 rotary positions; a branch's positions continue from its canonical prefix.
            branch: int32, 0 for canonical tokens (see `attention`).
            cache: keys and values of earlier tokens; the new ones are written at slots start..start+S-1.
            start: int32 valid slots of each row; wanted exactly when there is a cache.
            segment: int32, equal for the tokens of one dialogue: only they see each other; None: a row is one. Without
                a cache only.
            held: int32 branches of what the cache already holds; None: all of it is canonical.
            prefix: what rows share, before all that their caches hold; canonical. With a cache only.
        """
        mask = self._attention_mask(tokens, branch, cache, start, segment, held)
        c = self.config
        embed = Embedding(c.vocab_size, c.hidden_size, self.dtype, self.param_dtype, c.init_std, name="embed")
        x = residual(embed(tokens), spread=cache is None)
        keys, values = (None, None) if cache is None else cache
        x, keys, values = self._layers(x, keys, values, positions, mask, start, prefix)
        x = RMSNorm(self.config.rms_norm_eps, self.dtype, self.param_dtype, name="norm")(x)
        x = gathered(x)
        if not self.config.tie_embeddings:
            init = partitioned(nn.initializers.normal(self.config.init_std), "vocab", "embed")
            shape = (self.config.vocab_size, self.config.hidden_size)
            self.param("lm_head", init, shape, unquantized_dtype(self.param_dtype, self.dtype))  # read by `head`
        return x, None if cache is None else KVCache(keys, values)

    def _attention_mask(self, tokens, branch, cache, start, segment, held) -> AttentionMask:
        if (cache is None) != (start is None):
            raise ValueError("cache and start go together: give both or neither")
        if held is not None and (cache is None or branch is None):
            raise ValueError("`held` tells the branches of what a cache holds: give it with a cache and with `branch`")
        if cache is None or start is None:
            mask = AttentionMask(None, branch, branch, q_segment=segment, k_segment=segment)
            if self.attention != "splash" or self.is_initializing():
                return mask
            seen = jnp.broadcast_to(visible(mask, tokens.shape[1]), (*tokens.shape, tokens.shape[1]))
            return AttentionMask(None, blocks=blocks_of(seen))
        if self.attention == "splash":
            raise ValueError("attention='splash' reads rows without a cache; sample with 'dense' or 'chunked'")
        if segment is not None:
            raise ValueError("a cache holds one dialogue a row: give no segment with it")
        slots = start[:, None] + jnp.arange(tokens.shape[1])
        filled = slots.max() + 1  # once, not in every layer: where a batch is spread, devices must agree on it
        if branch is None:
            return AttentionMask(slots, filled=filled)
        rows = jnp.arange(tokens.shape[0])[:, None]
        if held is None:
            held = jnp.zeros((tokens.shape[0], cache.capacity), branch.dtype)
        return AttentionMask(slots, branch, held.at[rows, slots].set(branch, mode="drop"), filled)

    def _layers(self, x, keys, values, positions, mask, start, prefix: Prefix | None):
        fields = (self.config, self.dtype, self.param_dtype, self.attention, self.attention_chunk)
        block = _block(self.remat, self.scan_layers)
        if self.scan_layers:
            scanned = nn.scan(
                block,
                variable_axes={"params": 0},
                split_rngs={"params": True},
                in_axes=(0, *[nn.broadcast] * 4),
                length=self.config.num_layers,
                metadata_params={nn.PARTITION_NAME: "layers"},
            )
            layers = jnp.arange(self.config.num_layers)
            carry, _ = scanned(*fields, name="layers")((x, keys, values), layers, positions, mask, start, prefix)
            return carry
        new = []
        for i in range(self.config.num_layers):
            cached = (None, None) if keys is None else (keys[i], values[i])
            shared = None if prefix is None else Prefix(KVCache(prefix.kv.k[i], prefix.kv.v[i]), prefix.length)
            arguments = ((x, *cached), None, positions, mask, start, shared)
            if self.is_initializing():
                (x, *kv), _ = block(*fields, name=f"layer_{i}")(*arguments)
            else:
                (x, *kv), _ = _layer(block, fields, self.variables["params"][f"layer_{i}"], *arguments)
            new.append(kv)
        if keys is None:
            return x, None, None
        return x, tuple(k for k, _ in new), tuple(v for _, v in new)


def init_params(model: Qwen2, key: jax.Array, mesh: Mesh | None = None) -> Params:
    """Fresh parameters: normal(init_std) kernels, zero biases, unit norms; the same ones with layers scanned or not.

    With a mesh every leaf is created where `parallel.rules` places it: no device ever holds more than its part.
    """
    return _init_program(model, mesh)(key)


@functools.cache  # jitted anew, a program would be traced anew for each model
def _init_program(model: Qwen2, mesh: Mesh | None) -> Any:
    tokens = jnp.zeros((1, 1), jnp.int32)

    def create(key: jax.Array) -> Params:
        scanned = nn.unbox(model.clone(scan_layers=True).init(key, tokens, tokens))["params"]
        return scanned if model.scan_layers else unstack_layers(scanned)

    if mesh is None:
        return jax.jit(create)
    shapes, axes = abstract_params(model)
    return jax.jit(create, out_shardings=rules.tree_shardings(axes, shapes, mesh))


def abstract_params(model: Qwen2) -> tuple[Params, Params]:
    """(shapes, logical axes) of the parameters as trees: ShapeDtypeStructs, and PartitionSpecs of logical names."""
    return jax.tree.map(lambda x: x, _abstract_params(model))  # trees of the caller's own


@functools.cache
def _abstract_params(model: Qwen2) -> tuple[Params, Params]:
    def create() -> Params:
        tokens = jnp.zeros((1, 1), jnp.int32)
        return model.init(jax.random.key(0), tokens, tokens)["params"]

    boxed = jax.eval_shape(create)
    return nn.unbox(boxed), nn.get_partition_spec(boxed)


def head(params: Params) -> Float[Array, "V D"]:
    """The output projection: the embedding itself when it is tied."""
    return params["lm_head"] if "lm_head" in params else params["embed"]["kernel"]


def logits(params: Params, hidden: Float[Array, "*b D"]) -> Float[Array, "*b V"]:
    """float32 logits for a few positions (decoding, tests); training uses `token_logprobs`."""
    kernel, middle = head(params).astype(hidden.dtype), ("length",) * (hidden.ndim - 2)
    hidden = rules.constrain(hidden, "mlp_batch", *middle, "activation")
    scores = jnp.einsum("...d,vd->...v", hidden, kernel, **matmul_options(hidden.dtype))
    return rules.constrain(scores, "mlp_batch", *middle, "vocab")


def stack_layers(params: Params) -> Params:
    """Parameters of an unrolled model -> of a scanned one."""
    count = sum(name.startswith("layer_") for name in params)
    rest = {name: value for name, value in params.items() if not name.startswith("layer_")}
    return rest | {"layers": jax.tree.map(lambda *x: jnp.stack(x), *(params[f"layer_{i}"] for i in range(count)))}


def unstack_layers(params: Params) -> Params:
    """Parameters of a scanned model -> of an unrolled one."""
    rest = {name: value for name, value in params.items() if name != "layers"}
    count = jax.tree.leaves(params["layers"])[0].shape[0]
    return rest | {f"layer_{i}": jax.tree.map(lambda x, i=i: x[i], params["layers"]) for i in range(count)}
