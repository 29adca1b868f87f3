"""Rows that take dialogues from a queue, against a plain loop over lists."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from rlver_jax.parallel.mesh import make_mesh
from rlver_jax.rollout.slots import open_queue, take_next

take = jax.jit(take_next)


def by_lists(active, lengths, rows):
    """[(dialogue or None of each row) of each turn]: a free row takes the first dialogue that waits."""
    waiting, slots, turns = [i for i, plays in enumerate(active) if plays], [None] * rows, []
    left = list(lengths)
    while True:
        for row in range(rows):
            if slots[row] is None and waiting:
                slots[row] = waiting.pop(0)
        if all(slot is None for slot in slots):
            return turns
        turns.append(list(slots))
        for row, dialogue in enumerate(slots):
            if dialogue is not None:
                left[dialogue] -= 1
                slots[row] = None if left[dialogue] == 0 else dialogue


def played(active, lengths, rows):
    """The same with the device's functions; also checks the turn that every row is at."""
    queue, slots = open_queue(jnp.asarray(active), rows)
    turns, begun = [], {}
    while True:
        slots, fresh = take(queue, slots)
        if not slots.alive.any():
            return turns
        now = [int(d) if a else None for d, a in zip(slots.dialogue, slots.alive, strict=True)]
        for row, dialogue in enumerate(now):
            if dialogue is not None:
                assert bool(fresh[row]) == (dialogue not in begun)
                begun.setdefault(dialogue, len(turns))
                assert slots.turn[row] == len(turns) - begun[dialogue]
        turns.append(now)
        over = jnp.asarray(lengths)[slots.dialogue] <= slots.turn + 1
        slots = slots._replace(turn=slots.turn + 1, alive=slots.alive & ~over)


@pytest.mark.parametrize(("count", "rows"), [(7, 3), (9, 3), (2, 5), (6, 6), (5, 1)])
@pytest.mark.parametrize("seed", range(3))
def test_every_free_row_takes_the_next_dialogue(count, rows, seed):
    """Queues longer and shorter than the rows, with dialogues that never play in between."""
    draw = np.random.default_rng(seed)
    active, lengths = draw.random(count) < 0.8, draw.integers(1, 5, count)
    assert played(active, lengths, rows) == by_lists(active, lengths, rows)


def test_nobody_plays_an_empty_queue():
    assert played(np.zeros(4, bool), np.ones(4, int), 2) == []


def test_each_part_of_a_mesh_has_a_queue_of_its_own():
    mesh = make_mesh(1, 2, 1, devices=jax.devices()[:2])
    active = np.array([True] * 5 + [False] + [True] * 3 + [False] * 3)
    lengths = np.random.default_rng(0).integers(1, 5, 12)
    with jax.set_mesh(mesh):
        loops = played(active, lengths, 4)
    halves = by_lists(active[:6], lengths[:6], 2), by_lists(active[6:], lengths[6:], 2)
    nobody = [None, None]
    for turn, row in enumerate(loops):
        first, second = (half[turn] if turn < len(half) else nobody for half in halves)
        assert row == first + [None if d is None else d + 6 for d in second]
    assert len(loops) == max(map(len, halves))
