"""Parameters as the sampler reads them: rounded, where dialogues are played, adapters beside their base."""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jax.sharding import Mesh, NamedSharding, PartitionSpec
from ml_collections import ConfigDict

from rlver_jax.models.lora import LoRA, abstract_adapter, join, scaled, split
from rlver_jax.models.peft_files import read_adapter
from rlver_jax.models.quantization import rounded
from rlver_jax.models.qwen import Params, Qwen2, abstract_params
from rlver_jax.parallel import rules


def rollout_model(config: ConfigDict, policy: Qwen2) -> Qwen2:
    """The policy as it plays dialogues of training: with `rollout.param_dtype` its weights are rounded.

    Evaluations play what is exported: the policy as it is trained.
    """
    return policy.clone(param_dtype=jnp.dtype(config.rollout.param_dtype)) if config.rollout.param_dtype else policy


def sampling_params(model: Qwen2, mesh: Mesh | None = None) -> Params:
    """What the sampler reads at every token, as ShapeDtypeStructs: weight matrices in the dtype of its products.

    Args:
        mesh: that dialogues are played on; None: the structs have no shardings.
    """
    shapes, axes = abstract_params(model)
    shardings = jax.tree.map(lambda _: None, shapes) if mesh is None else rules.tree_shardings(axes, shapes, mesh)

    def one(path: Any, x: jax.ShapeDtypeStruct, sharding: Any) -> jax.ShapeDtypeStruct:
        dtype = model.dtype if _is_matrix(path) and x.dtype != jnp.int8 else x.dtype
        return jax.ShapeDtypeStruct(x.shape, dtype, sharding=sharding)

    return jax.tree_util.tree_map_with_path(one, shapes, shardings)


def sampling_program(like: Params) -> Callable[[Params], Params]:
    """The jitted copy of parameters to what `sampling_params` describes: rounded, and resharded where a mesh is named.

    Weights that become int8 are rounded where they lie, so that int8 is what moves.

    The two meshes must hold the same devices in the same order (`parallel.mesh.sampling_mesh`).
    """

    def copied(params: Params) -> Params:
        if not _have_same_leaves(params, like):  # scales are missing
            params = rounded(params)
        return jax.tree_util.tree_map_with_path(cast_and_reshard, params, like)

    return jax.jit(copied, out_shardings=jax.tree.map(lambda x: x.sharding, like))


def cast_and_reshard(path: Any, x: jax.Array, like: jax.ShapeDtypeStruct) -> jax.Array:
    """A weight rounded and resharded; stacked ones layer by layer: a gather then needs room for one layer only."""
    if path[0].key != "layers" or not isinstance(like.sharding, NamedSharding):
        return x.astype(like.dtype)
    sharding = NamedSharding(like.sharding.mesh, PartitionSpec(*like.sharding.spec[1:]))
    return jax.lax.map(lambda one: jax.lax.with_sharding_constraint(one.astype(like.dtype), sharding), x)


def sampling_copy(model: Qwen2, mesh: Mesh | None = None) -> Callable[[Params], Params]:
    """What makes a model's parameters ready for the sampler; see `sampling_params`.

    The model would round weight matrices at every token anyway, so no output changes (but for int8, if `model` has it
    and the parameters don't). Parameters that are ready already are returned themselves: no second copy of a model. An
    adapter beside them (`models.lora`) stays.
    """
    like = sampling_params(model, mesh)
    copy = sampling_program(like)

    def ready(params: Params) -> Params:
        base, adapter = split(params)
        if is_ready(base, like):
            return params
        return join(copy(base), adapter)

    return ready


def is_ready(params: Params, like: Params) -> bool:
    """Whether parameters, or shapes with shardings, are as `sampling_params` describes: none need be copied."""

    def same(x: Any, y: jax.ShapeDtypeStruct) -> bool:
        return x.dtype == y.dtype and (y.sharding is None or y.sharding.is_equivalent_to(x.sharding, x.ndim))

    return _have_same_leaves(params, like) and all(jax.tree.leaves(jax.tree.map(same, params, like)))


def _have_same_leaves(one: Params, other: Params) -> bool:
    names = lambda tree: [path for path, _ in jax.tree_util.tree_leaves_with_path(tree)]  # noqa: E731
    return names(one) == names(other)


def _is_matrix(path: Any) -> bool:
    return path[-1].key in ("kernel", "lm_head")


def fitted_adapter(folder: str, model: Qwen2, mesh: Mesh | None) -> Params:
    """The adapter of a `peft` folder as the sampler reads it beside its base, on the mesh that dialogues are played on.

    Raises:
        AdapterError: as `read_adapter`.
    """
    lora, adapter = read_adapter(folder, model, mesh)
    return adapter_program(model, lora, mesh)(adapter)


def adapter_program(model: Qwen2, lora: LoRA, mesh: Mesh | None) -> Any:
    """The jitted copy of an adapter for the sampler: scaled, rounded, and resharded where a mesh is named."""
    shapes, axes = abstract_adapter(model, lora)
    shardings = None if mesh is None else rules.tree_shardings(axes, shapes, mesh)
    rounded = lambda adapter: jax.tree.map(lambda x: x.astype(model.dtype), scaled(adapter, lora))  # noqa: E731
    return jax.jit(rounded, out_shardings=shardings)
