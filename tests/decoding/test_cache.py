"""Ragged contexts against plain forward passes over whole rows."""

import dataclasses
import functools
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from jax.sharding import NamedSharding, PartitionSpec

from rlver_jax.decoding.cache import (
    LM,
    append,
    concat_ragged,
    init_cache,
    repeat_rows,
    restart_rows,
    rollback,
    share_rows,
)
from rlver_jax.models.qwen import Qwen2, stack_layers
from rlver_jax.parallel.mesh import make_mesh
from tests.conftest import append_tokens, appended, plain


def random_rows(lengths, seed=0):
    draw = np.random.default_rng(seed)
    return [draw.integers(0, 57, n).tolist() for n in lengths]


def last_hidden(lm, rows):
    return np.stack([hidden[-1] for hidden in plain(lm, rows)[0]])


@pytest.fixture(params=[False, True], ids=["unrolled", "scanned"])
def lm(request, toy) -> LM:
    if not request.param:
        return toy
    return LM(stack_layers(toy.params), Qwen2(toy.model.config, scan_layers=True))


def test_ragged_pieces_equal_plain_rows(lm):
    """Three appends, each row growing by its own count (also none); padding is garbage on purpose."""
    pieces = [[7, 3, 1, 8], [2, 0, 8, 5], [0, 4, 6, 1]]
    rows = random_rows(np.sum(pieces, axis=0))
    cache, done = init_cache(lm, 4, 64), np.zeros(4, int)
    for counts in pieces:
        tokens = np.full((4, 24), 55, np.int32)
        for b, n in enumerate(counts):
            tokens[b, :n] = rows[b][done[b] : done[b] + n]
        cache = append_tokens(lm, cache, tokens, jnp.asarray(counts, jnp.int32))
        done += counts
        np.testing.assert_array_equal(cache.length, done)
        want = last_hidden(lm, [row[:n] for row, n in zip(rows, done, strict=True)])
        np.testing.assert_allclose(cache.hidden, want, atol=2e-5)


def padded(rows, width):
    """The rows side by side, with garbage behind them, and their lengths."""
    tokens = np.full((len(rows), width), 55, np.int32)
    for b, row in enumerate(rows):
        tokens[b, : len(row)] = row
    return tokens, jnp.asarray([len(row) for row in rows], jnp.int32)


@pytest.mark.parametrize("width", [2, 24, 25, 50, 170, 200])
def test_a_long_text_is_read_in_pieces(lm, width):
    """Rows of any share of the width, whether pieces divide it or not; the second reading follows on the first."""
    prefixes = random_rows([3, 5, 1, 2], 9)
    cache = appended(lm, prefixes, 512)
    first, second = random_rows([0, 1, width // 2, width], 10), random_rows([width, 0, width - 1, width // 3], 11)
    rows = prefixes
    for more in (first, second):
        cache = append_tokens(lm, cache, *padded(more, width))
        rows = [row + new for row, new in zip(rows, more, strict=True)]
        np.testing.assert_array_equal(cache.length, [len(row) for row in rows])
        np.testing.assert_allclose(cache.hidden, last_hidden(lm, rows), atol=2e-5)


def test_pieces_that_no_row_has_are_not_read(toy):
    """Of 200 slots pieces of 25 are read: two, where the longest row has 30 tokens; none, where no row has any."""
    for counts, filled in (([30, 1, 0, 26], 50), ([0] * 4, 0)):
        cache = append_tokens(toy, init_cache(toy, 4, 256), *padded(random_rows(counts), 200))
        for keys in cache.kv.k:
            assert not np.asarray(keys[:, :, filled:]).any()
            assert np.asarray(keys[:, :, :filled]).any() == (filled > 0)


@pytest.mark.parametrize("attention", ["dense", "chunked"])
def test_rows_that_share_a_prefix_are_plain_rows(lm, attention):
    """Prefixes of other lengths, one of them none; tails are read, forgotten in part, and go on token by token."""
    lm = LM(lm.params, lm.model.clone(attention=attention, attention_chunk=8))
    prefixes = random_rows([150, 0, 13], 12)
    cache = share_rows(lm, appended(lm, prefixes, 192, 192), 2, 64)
    assert cache.prefix is not None
    assert cache.capacity == 64
    np.testing.assert_array_equal(cache.length, [150, 150, 0, 0, 13, 13])
    tails, more = random_rows([2, 24, 1, 7, 20, 5], 13), random_rows([1] * 6, 14)
    rows = [prefixes[b // 2] + tail for b, tail in enumerate(tails)]
    cache = append_tokens(lm, cache, *padded(tails, 24))
    np.testing.assert_allclose(cache.hidden, last_hidden(lm, rows), atol=2e-5)
    retained = [row[: len(prefixes[b // 2]) + 1] for b, row in enumerate(rows)]
    cache = rollback(cache, jnp.asarray([len(row) for row in retained], jnp.int32))
    cache = append_tokens(lm, cache, *padded(more, 1))
    rows = [row + new for row, new in zip(retained, more, strict=True)]
    np.testing.assert_array_equal(cache.length, [len(row) for row in rows])
    np.testing.assert_allclose(cache.hidden, last_hidden(lm, rows), atol=2e-5)


def test_short_prefixes_are_copied(toy):
    cache = share_rows(toy, appended(toy, random_rows([6, 13], 4), 32), 2, 64)
    assert cache.prefix is None
    np.testing.assert_array_equal(cache.length, [6, 6, 13, 13])


@pytest.mark.parametrize(("prefixes", "shared"), [(4, True), (2, False)])
def test_on_a_mesh_prefixes_are_split_as_their_rows(toy, prefixes, shared):
    """Four devices: no keys travel; what they can't divide is copied to each row."""
    prefix_rows, tails = random_rows([9, 40, 1, 17][:prefixes], 15), random_rows([3, 1, 8, 5, 2, 7, 4, 6], 16)
    mesh, group = make_mesh(1, 4, 1, devices=jax.devices()[:4]), len(tails) // prefixes

    def play(lm, prefix_rows, tails):
        cache = share_rows(lm, append(lm, init_cache(lm, prefixes, 128), *prefix_rows), group, 192)
        assert (cache.prefix is not None) == shared
        return append(lm, cache, *tails).hidden

    with jax.set_mesh(mesh):
        spread = NamedSharding(mesh, PartitionSpec("fsdp")), NamedSharding(mesh, PartitionSpec())
        arrays = jax.tree.map(
            lambda x: jax.device_put(x, spread[len(x) % 4 > 0]), (padded(prefix_rows, 48), padded(tails, 8))
        )
        program = jax.jit(play).lower(toy, *arrays).compile()
        actual = program(toy, *arrays)
    if shared:
        assert not re.findall(r"= f32.* all-gather", program.as_text()), "keys travel"
    want = last_hidden(toy, [prefix_rows[b // group] + tail for b, tail in enumerate(tails)])
    np.testing.assert_allclose(actual, want, atol=2e-5)


def test_nothing_read_changes_nothing_seen(toy):
    rows = random_rows([5, 9, 1, 7])
    cache = appended(toy, rows)
    same = append_tokens(toy, cache, np.full((4, 24), 3, np.int32), jnp.zeros(4, jnp.int32))
    np.testing.assert_array_equal(same.hidden, cache.hidden)
    np.testing.assert_array_equal(same.length, cache.length)
    for old, new in zip(jax.tree.leaves(cache.kv), jax.tree.leaves(same.kv), strict=True):
        for b, row in enumerate(rows):
            np.testing.assert_array_equal(old[b, :, : len(row)], new[b, :, : len(row)])


def test_rollback_then_append_is_a_fresh_context(lm):
    """A tail of each row's own length is forgotten; what is read next is as if it had never been."""
    retained, tail, new = random_rows([9, 4, 12, 1], 1), random_rows([6, 11, 0, 3], 2), random_rows([3, 7, 5, 8], 3)
    cache = appended(lm, [k + t for k, t in zip(retained, tail, strict=True)])
    cache = rollback(cache, jnp.asarray([len(k) for k in retained], jnp.int32))
    tokens = np.zeros((4, 24), np.int32)
    for b, row in enumerate(new):
        tokens[b, : len(row)] = row
    cache = append_tokens(lm, cache, tokens, jnp.asarray([len(n) for n in new], jnp.int32))
    fresh = [k + n for k, n in zip(retained, new, strict=True)]
    np.testing.assert_array_equal(cache.length, [len(f) for f in fresh])
    np.testing.assert_allclose(cache.hidden, last_hidden(lm, fresh), atol=2e-5)


def test_repeated_rows_go_their_own_ways(toy):
    """Neighbours share a prefill; each copy then continues alone, in a larger cache."""
    rows, tails = random_rows([6, 13], 4), random_rows([2, 5, 1, 4], 5)
    few = appended(toy, rows, 32)
    cache = repeat_rows(few, 2, 64)
    assert cache.capacity == 64
    np.testing.assert_array_equal(cache.length, [6, 6, 13, 13])
    np.testing.assert_array_equal(cache.hidden, np.repeat(few.hidden, 2, axis=0))
    tokens = np.zeros((4, 24), np.int32)
    for b, row in enumerate(tails):
        tokens[b, : len(row)] = row
    cache = append_tokens(toy, cache, tokens, jnp.asarray([len(t) for t in tails], jnp.int32))
    want = last_hidden(toy, [rows[b // 2] + tail for b, tail in enumerate(tails)])
    np.testing.assert_allclose(cache.hidden, want, atol=2e-5)


def test_restarted_rows_are_fresh_contexts_and_the_others_go_on(lm):
    """Rows 0 and 2 forget longer contexts than their new heads; what was there behind the heads is never seen."""
    old, prefixes, tails = random_rows([30, 9, 25, 1], 6), random_rows([6, 13], 7), random_rows([20, 5, 1, 24], 8)
    before = appended(lm, old, width=32)
    source, fresh = jnp.asarray([1, 0, 0, 1]), jnp.asarray([True, False, True, False])
    restart = jax.jit(restart_rows)
    cache = restart(before, appended(lm, prefixes, 40), source, fresh)
    np.testing.assert_array_equal(cache.length, [13, 9, 6, 1])
    now = [prefixes[1], old[1], prefixes[0], old[3]]
    np.testing.assert_allclose(cache.hidden, last_hidden(lm, now), atol=2e-5)
    tokens = np.zeros((4, 24), np.int32)
    for b, row in enumerate(tails):
        tokens[b, : len(row)] = row
    cache = append_tokens(lm, cache, tokens, jnp.asarray([len(t) for t in tails], jnp.int32))
    want = last_hidden(lm, [row + tail for row, tail in zip(now, tails, strict=True)])
    np.testing.assert_allclose(cache.hidden, want, atol=2e-5)


def test_a_row_does_not_depend_on_its_neighbours(toy):
    rows = random_rows([5, 11, 8, 2], 6)
    here = appended(toy, rows).hidden[1]
    for order in ([1, 1, 1, 1], [2, 1, 0, 3], [3, 1, 3, 2]):
        np.testing.assert_array_equal(appended(toy, [rows[i] for i in order]).hidden[1], here)
    np.testing.assert_allclose(appended(toy, rows[::-1]).hidden[2], here, atol=1e-5)


def test_cache_takes_the_models_dtype(toy):
    half = LM(toy.params, dataclasses.replace(toy.model, dtype=jnp.bfloat16))
    cache = init_cache(half, 2, 8)
    assert {x.dtype for x in jax.tree.leaves(cache.kv)} == {jnp.dtype(jnp.bfloat16)}
    assert cache.hidden.dtype == jnp.bfloat16


@functools.partial(jax.jit, static_argnums=0)
def joined(kinds, arrays, counts):
    own_counts = [{"rows": c, "one": c[0], "all": None}[k] for k, c in zip(kinds, counts, strict=True)]
    return concat_ragged(3, *zip(arrays, own_counts, strict=True))


@settings(max_examples=40, deadline=None)
@given(st.data())
def test_join_equals_a_loop(data):
    """Pieces shared by all rows or of each row, with counts for each row, for all, or none."""
    kinds = data.draw(st.sampled_from([("rows", "all", "rows"), ("one", "rows", "all"), ("all", "rows", "one")]))
    shared = data.draw(st.sampled_from([(False, True, True), (True, False, False)]))
    draw = np.random.default_rng(data.draw(st.integers(0, 2**32 - 1)))
    arrays = [draw.integers(1, 99, 4 if flat else (3, 4)).astype(np.int32) for flat in shared]
    counts = [draw.integers(0, 5, 3).astype(np.int32) for _ in kinds]
    tokens, count = joined(kinds, arrays, counts)
    assert tokens.shape == (3, 12)
    for b in range(3):
        want = []
        for kind, array, sizes in zip(kinds, arrays, counts, strict=True):
            size = {"rows": sizes[b], "one": sizes[0], "all": 4}[kind]
            want += (array if array.ndim == 1 else array[b])[:size].tolist()
        assert count[b] == len(want)
        assert tokens[b, : count[b]].tolist() == want
