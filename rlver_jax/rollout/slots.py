"""A queue of dialogues played on fewer rows than it holds: a row whose dialogue has ended takes the next one.

Where a batch is spread over devices, each part of its rows has a queue of its own, so that no cache travels.
"""

from typing import NamedTuple

import jax.numpy as jnp
from jaxtyping import Array, Bool, Int

from rlver_jax.parallel.batch import common_parts


class Queue(NamedTuple):
    """The dialogues of each part (G parts) in their order; of the last ones, which never play, only the first count."""

    dialogues: Int[Array, "G Q"]
    size: Int[Array, "G"]


class Slots(NamedTuple):
    """What each row plays."""

    dialogue: Int[Array, "R"]  # of a dead row: any of its part's
    turn: Int[Array, "R"]  # turns of that dialogue that are over
    alive: Bool[Array, "R"]
    taken: Int[Array, "G"]  # dialogues that have left each part's queue


def open_queue(active: Bool[Array, "N"], rows: int) -> tuple[Queue, Slots]:
    """The queue of all active dialogues, and as many empty rows."""
    parts = common_parts(active.shape[0], rows)
    waits = active.reshape(parts, -1)
    order = jnp.argsort(~waits, axis=1, stable=True) + jnp.arange(parts)[:, None] * waits.shape[1]
    queue = Queue(order.astype(jnp.int32), waits.sum(1, dtype=jnp.int32))
    any_of_part = jnp.repeat(queue.dialogues[:, 0], rows // parts)
    slots = Slots(any_of_part, jnp.zeros(rows, jnp.int32), jnp.zeros(rows, bool), jnp.zeros(parts, jnp.int32))
    return queue, slots


def take_next(queue: Queue, slots: Slots) -> tuple[Slots, Bool[Array, "R"]]:
    """Gives each dead row the next dialogue of its part's queue, while there is one; and which rows have got one."""
    parts, size = queue.dialogues.shape
    free = ~slots.alive.reshape(parts, -1)
    index = slots.taken[:, None] + jnp.cumsum(free, axis=1) - free
    fresh = free & (index < queue.size[:, None])
    following = jnp.take_along_axis(queue.dialogues, jnp.minimum(index, size - 1), axis=1)
    taken = slots.taken + fresh.sum(1, dtype=jnp.int32)
    following, fresh = following.reshape(-1), fresh.reshape(-1)
    dialogue = jnp.where(fresh, following, slots.dialogue)
    return Slots(dialogue, jnp.where(fresh, 0, slots.turn), slots.alive | fresh, taken), fresh
