"""The programs of a training step on arrays that don't exist: shapes, dtypes and places only, on any topology.

Everything is made by the functions that the trainer calls itself; only where these would load or create arrays there
are `ShapeDtypeStruct`s.
"""

import dataclasses
import math
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jax.sharding import Mesh
from ml_collections import ConfigDict

from rlver_jax import assembly
from rlver_jax.dialogue import Profiles, sample_dialogues
from rlver_jax.learning.update import Setup, TrainState, compile_step, init_state
from rlver_jax.models.qwen2 import Params, Qwen2, abstract_params
from rlver_jax.parallel import rules
from rlver_jax.players import Players, check_tokenizers, limits_of, load_model, sampling_copy, spec_of
from rlver_jax.rewards import Rewards
from rlver_jax.sampling.cache import LM
from rlver_jax.text.tokenizer import Tokenizer
from rlver_jax.trainer import pack_batch
from rlver_jax.user.prompts import load_prompts


@dataclasses.dataclass(frozen=True)
class Widths:
    """Shapes that depend on the profiles: of the longest prefix and first utterance, in tokens."""

    prefix: int = 2688  # RLVER's published training profiles under Qwen2.5's tokenizer
    first_talk: int = 128


@dataclasses.dataclass(frozen=True)
class Abstract:
    """What a run holds, as shapes."""

    config: ConfigDict
    mesh: Mesh
    players: Players
    profiles: Profiles
    state: TrainState
    setup: Setup
    lengths: tuple[int, ...]
    reference: Params | None


@dataclasses.dataclass(frozen=True)
class Program:
    """One program of a training step.

    Attributes:
        lower: what the trainer calls, lowered for the arguments it gets.
        idle: trees that stay in memory beside it, by name.
    """

    name: str
    lower: Callable[[], jax.stages.Lowered]
    idle: dict[str, Any]


def abstract_weights(model: Qwen2, mesh: Mesh | None) -> Params:
    """Parameters of a model as shapes that lie where real ones would; a `players.Weights`."""
    shapes, axes = abstract_params(model)
    return place(shapes, rules.tree_shardings(axes, shapes, mesh))  # type: ignore[arg-type]


def place(shapes: Any, shardings: Any) -> Any:
    """Shapes with their places."""
    return jax.tree.map(lambda x, s: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=s), shapes, shardings)


def abstract(tree: Any) -> Any:
    """Shapes of arrays; where they lie is left to the compiler, as it is for arrays that belong to no device."""
    return jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype), tree)


def bytes_per_chip(tree: Any) -> int:
    """Bytes of a tree of placed shapes on each chip."""
    part = lambda x: x.shape if x.sharding is None else x.sharding.shard_shape(x.shape)  # noqa: E731
    return sum(math.prod(part(x)) * x.dtype.itemsize for x in jax.tree.leaves(tree))


def assemble(config: ConfigDict, mesh: Mesh, tokenizers: dict[str, Tokenizer], widths: Widths) -> Abstract:
    """Shapes of all that `assembly.assemble` loads.

    Raises:
        ValueError: an array can't be divided over the mesh, or a model's folder is not a Qwen2.5 model's.
    """
