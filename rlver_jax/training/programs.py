"""The jitted programs between a rollout and an update: rewards, packing, the order of minibatches."""

from typing import Any

import jax
from jax.sharding import Mesh, NamedSharding, PartitionSpec
from jaxtyping import Array, Int

from rlver_jax.learning.sequences import build_sequences, row_lengths
from rlver_jax.learning.train_step import minibatch_order
from rlver_jax.parallel.rules import axes_on
from rlver_jax.rollout.policy_turn import PolicyTables
from rlver_jax.rollout.rewards import Rewards, reward
from rlver_jax.rollout.sampler import Dialogues
from rlver_jax.rollout.spec import RolloutConfig


def score(
    dialogues: Dialogues, tables: PolicyTables, spec: RolloutConfig, settings: tuple
) -> tuple[Rewards, Int[Array, " B"], Int[Array, " B"]]:
    """Rewards of a batch, tokens of its packed dialogues, their turns; `settings`: the items of `reward_settings`."""
    rewards = reward(
        emotions=dialogues.emotions, n_turns=dialogues.turns, violation=dialogues.violation, **dict(settings)
    )
    return rewards, row_lengths(dialogues, tables, spec), dialogues.turns


def row_sharding(mesh: Mesh) -> NamedSharding:
    """Of rows on the training mesh, onto which the outputs of the sampling mesh are resharded."""
    return NamedSharding(mesh, PartitionSpec(axes_on(mesh, "batch")))


def score_program(mesh: Mesh) -> Any:
    """`score`, jitted: rewards on the training mesh, lengths and turns whole on each of its devices."""
    whole = NamedSharding(mesh, PartitionSpec())
    shardings = (row_sharding(mesh), whole, whole)
    return jax.jit(score, static_argnames=("spec", "settings"), out_shardings=shardings)


def pack_program(mesh: Mesh) -> Any:
    """`learning.sequences.build_sequences`, jitted for rows on the training mesh."""
    return jax.jit(build_sequences, static_argnums=(2, 4), out_shardings=row_sharding(mesh))


def order_program(mesh: Mesh) -> Any:
    """`learning.train_step.minibatch_order`, jitted."""
    return jax.jit(minibatch_order, static_argnums=(0, 3), out_shardings=NamedSharding(mesh, PartitionSpec()))
