"""Attention over a cache in blocks: for any number of blocks the result is a plain softmax over the unmasked keys."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from rlver_jax.models.attention import BRANCH_RADIX, CHILD_RADIX, AttentionMask, dense_attention
from rlver_jax.models.chunked import chunked_attention

SLOTS = 300  # blocks of 128 slots, the last one begins earlier


def tree_path(branch):
    """(thought, child, grandchild), as far as there are any."""
    path = [branch // BRANCH_RADIX, branch % BRANCH_RADIX // CHILD_RADIX, branch % CHILD_RADIX]
    while path and path[-1] == 0:
        path.pop()
    return path


def by_hand(q, k, v, slots, q_branch, k_branch):
    """One query and one head at a time, in float64, over the keys that the rule lets it see."""
    out = np.zeros(q.shape)
    for b in range(q.shape[0]):
        for i in range(q.shape[1]):
            own = q_branch[b, i]
            seen = [
                j
                for j in range(min(slots[b, i] + 1, k.shape[2]))
                if (path := tree_path(k_branch[b, j])) == tree_path(own)[: len(path)]
            ]
            for head in range(q.shape[2]):
                shared = head // (q.shape[2] // k.shape[1])
                scores = k[b, shared, seen].astype(np.float64) @ q[b, i, head] / np.sqrt(q.shape[3])
                weights = np.exp(scores - scores.max())
                out[b, i, head] = weights / weights.sum() @ v[b, shared, seen]
    return out


@pytest.mark.parametrize("branched", [False, True])
@pytest.mark.parametrize("queries", [1, 20])
@pytest.mark.parametrize("longest", [1, 38, 127, 128, 129, 172, 255, 256, 257, 280])
def test_the_blocks_that_are_read_hold_all_that_may_be_seen(longest, queries, branched):
    draw = np.random.default_rng(longest)
    q = draw.normal(size=(2, queries, 4, 8)).astype(np.float32)
    k, v = (draw.normal(size=(2, 2, SLOTS, 8)).astype(np.float32) for _ in range(2))
    slots = np.array([longest - 1, longest // 3])[:, None] + np.arange(queries)
    filled = slots.max() + 1
    q_branch, k_branch = np.zeros((2, queries), np.int32), np.zeros((2, SLOTS), np.int32)
    if branched:
        children = [0, 64, 66, 67, 128]
        ids = [*children, *(3 * BRANCH_RADIX + x for x in children), 4 * BRANCH_RADIX]
        q_branch[:], k_branch[:] = draw.choice(ids, (2, queries)), draw.choice([0] * 9 + ids, (2, SLOTS))
        k_branch[:, 0] = 0  # every query sees something
    expected = by_hand(q, k, v, slots, q_branch, k_branch)
    branches = (jnp.asarray(q_branch), jnp.asarray(k_branch)) if branched else (None, None)
    mask = AttentionMask(jnp.asarray(slots), *branches, jnp.int32(filled))
    for attend in (dense_attention, lambda *args: chunked_attention(*args, chunk=8)):
        if attend is not dense_attention and queries == 1:
            continue
        np.testing.assert_allclose(jax.jit(attend)(q, k, v, mask), expected, atol=2e-6)


@pytest.mark.parametrize("length", [33, 75])  # parts of two chunks, the last one of one; of three, the last one shorter
def test_rows_of_many_chunks(length):
    """Without a cache: more chunks than parts."""
    draw = np.random.default_rng(length)
    q = draw.normal(size=(2, length, 4, 8)).astype(np.float32)
    k, v = (draw.normal(size=(2, 2, length, 8)).astype(np.float32) for _ in range(2))
    branch = draw.choice([0, 0, 64, 66, 128], (2, length)).astype(np.int32)
    branch[:, 0] = 0
    slots = np.tile(np.arange(length), (2, 1))
    mask = AttentionMask(None, jnp.asarray(branch), jnp.asarray(branch))
    actual = jax.jit(lambda *args: chunked_attention(*args, chunk=4))(q, k, v, mask)
    np.testing.assert_allclose(actual, by_hand(q, k, v, slots, branch, branch), atol=2e-6)
