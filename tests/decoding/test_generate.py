"""Generating and choosing against Python loops over plain forward passes."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import scipy.stats
from scipy.special import log_softmax, softmax

from rlver_jax.decoding.choice import build_options, choose
from rlver_jax.decoding.generate import (
    KEEP_ALL,
    Limits,
    Truncation,
    borders,
    draw,
    generate,
    gumbel,
    likeliest,
    truncate,
)
from rlver_jax.decoding.grammar import Grammar
from tests.conftest import appended, plain

STOP, PERIODS, NEVER = 56, range(48, 56), [3, 4]  # ends a message; complete the pattern; forbidden everywhere
MAX = 12


@pytest.fixture(scope="module")
def grammar():
    """States 0 (start), 1 (one of PERIODS was said), 2 (begin: 7 is forbidden), 3 (stopped)."""
    table = np.zeros((4, 57), np.int16)
    table[1] = 1
    table[:3, PERIODS], table[:, STOP], table[3] = 1, 3, 3
    forbidden = np.zeros((4, 57), bool)
    forbidden[:, NEVER] = True
    forbidden[2, 7] = True
    return Grammar(jnp.asarray(table), jnp.asarray(forbidden), 1, 2, 3)


@functools.partial(jax.jit, static_argnames=("truncation", "max_tokens"))
def run(lm, cache, keys, grammar, limits, temperature, active, truncation=KEEP_ALL, max_tokens=MAX):
    return generate(
        lm,
        cache,
        keys,
        grammar,
        max_tokens=max_tokens,
        limits=Limits(*map(jnp.int32, limits)),
        temperature=temperature,
        active=active,
        truncation=truncation,
    )


def contexts(lengths, seed=0):
    random = np.random.default_rng(seed)
    return [random.integers(0, 50, n).tolist() for n in lengths]


ROWS = contexts([5, 14, 9, 1, 11, 3, 20, 8])


def ids(*numbers):
    return jax.vmap(jax.random.fold_in, (None, 0))(jax.random.key(3), jnp.asarray(numbers, jnp.uint32))


def play(toy, grammar, rows, numbers, limits=(MAX, 3), temperature=1.0, active=None):
    active = np.ones(len(rows), bool) if active is None else np.asarray(active)
    return run(toy, appended(toy, rows), ids(*numbers), grammar, limits, jnp.float32(temperature), active)


def loop(toy, rows, keys, before, after, temperature):
    """The same by full forward passes: (tokens, logprob, raw_logprob, found_at, stopped) of each row."""
    rows = [list(row) for row in rows]
    states = [[[], [], [], -1, False] for _ in rows]
    for step in range(MAX):
        alive = [
            b for b, s in enumerate(states) if not s[4] and len(s[0]) < (s[3] + 1 + after if s[3] >= 0 else before)
        ]
        if not alive:
            break
        all_raw = [logp[-1] for logp in plain(toy, rows)[1]]
        for b in alive:
            raw = all_raw[b].astype(np.float64)
            allowed = raw.copy()
            allowed[NEVER if step else [*NEVER, 7]] = -np.inf
            if temperature:
                allowed = log_softmax(allowed / temperature)
                token = int(np.argmax(allowed + np.asarray(gumbel(keys[b], step, 57))))
            else:
                token = int(np.argmax(allowed))
            tokens, logprob, raw_logprob, found_at, _ = states[b]
            tokens.append(token)
            logprob.append(allowed[token] if temperature else 0.0)
            raw_logprob.append(raw[token])
            newly = token in PERIODS and found_at < 0
            states[b][3] = step if newly else found_at
            states[b][4] = token == STOP or (newly and after == 0)
            rows[b].append(token)
    return states, rows


def test_the_likeliest_is_the_first_of_equal_ones():
    """NumPy's argmax, with many ties, ruled out scores, and rows of which nothing is left."""
    scores = np.random.default_rng(0).integers(-3, 3, (64, 2, 57)).astype(np.float32)
    scores[scores == -3] = -np.inf
    scores[::7] = -np.inf
    np.testing.assert_array_equal(jax.jit(likeliest)(scores), scores.argmax(-1))


@pytest.mark.parametrize(("temperature", "after"), [(0.0, 3), (1.3, 0), (1.3, 3)])
def test_generate_equals_a_loop_of_full_passes(toy, grammar, temperature, after):
    """Tokens, both log-probabilities, counts, found_at and stopped; and the cache holds what was said."""
    numbers = range(8)
    cache, generated = play(toy, grammar, ROWS, numbers, (MAX, after), temperature)
    want, grown = loop(toy, ROWS, ids(*numbers), MAX, after, temperature)
    generated = jax.device_get(generated)
    for b, (tokens, logprob, raw, found_at, stopped) in enumerate(want):
        n = len(tokens)
        assert generated.count[b] == n
        assert generated.tokens[b].tolist() == tokens + [0] * (MAX - n)
        np.testing.assert_allclose(generated.logprob[b], logprob + [0] * (MAX - n), atol=1e-4)
        np.testing.assert_allclose(generated.raw_logprob[b], raw + [0] * (MAX - n), atol=1e-4)
        assert (generated.found_at[b], generated.stopped[b]) == (found_at, stopped)
        assert generated.text_count[b] == n - stopped
    np.testing.assert_array_equal(cache.length, [len(row) for row in grown])
    np.testing.assert_allclose(cache.hidden, [h[-1] for h in plain(toy, grown)[0]], atol=5e-5)
    if temperature:
        assert {s[4] for s in want} >= ({True, False} if after else {True}), "both ends occur"
        assert any(s[3] >= 0 for s in want)


def test_limits_are_arguments(toy, grammar):
    """Shorter limits give beginnings of the longer ones' texts, and nothing is compiled again."""
    _, full = play(toy, grammar, ROWS, range(8), (MAX, MAX))
    compiled = run._cache_size()
    for before, after in ((1, 1), (4, 2), (MAX, 0), (0, 5)):
        _, generated = play(toy, grammar, ROWS, range(8), (before, after))
        for b in range(8):
            found_at = int(full.found_at[b])
            limit = found_at + 1 + after if 0 <= found_at < before else before
            n = min(int(full.count[b]), limit)
            assert generated.count[b] == n
            np.testing.assert_array_equal(generated.tokens[b, :n], full.tokens[b, :n])
    assert run._cache_size() == compiled


def test_a_rows_words_depend_on_its_key_alone(toy, grammar):
    """Other places, other neighbours, another batch size: the same tokens; another key: other tokens."""
    _, here = play(toy, grammar, ROWS, range(8))
    order = [6, 2, 7, 0, 5, 1, 3, 4]
    _, there = play(toy, grammar, [ROWS[i] for i in order], order)
    for position, i in enumerate(order):
        np.testing.assert_array_equal(there.tokens[position], here.tokens[i])
    _, few = play(toy, grammar, [ROWS[4], ROWS[1]], [4, 1])
    np.testing.assert_array_equal(few.tokens, here.tokens[np.array([4, 1])])
    _, again = play(toy, grammar, ROWS, range(8))
    jax.tree.map(np.testing.assert_array_equal, again, here)
    _, other = play(toy, grammar, ROWS, range(8, 16))
    assert sum(not np.array_equal(a, b) for a, b in zip(other.tokens, here.tokens, strict=True)) >= 6


def test_inactive_rows_say_nothing_and_keep_what_they_know(toy, grammar):
    active = [True, False, True, True, False, False, True, True]
    cache, generated = play(toy, grammar, ROWS, range(8), active=active)
    _, all_generated = play(toy, grammar, ROWS, range(8))
    before = appended(toy, ROWS)
    for b, speaks in enumerate(active):
        if speaks:
            np.testing.assert_array_equal(generated.tokens[b], all_generated.tokens[b])
            continue
        assert generated.count[b] == 0
        assert not generated.tokens[b].any()
        assert not generated.stopped[b]
        assert generated.found_at[b] == -1
        assert cache.length[b] == before.length[b]
        np.testing.assert_array_equal(cache.hidden[b], before.hidden[b])
        for old, new in zip(jax.tree.leaves(before.kv), jax.tree.leaves(cache.kv), strict=True):
            np.testing.assert_array_equal(old[b, :, : len(ROWS[b])], new[b, :, : len(ROWS[b])])


def test_forbidden_tokens_are_never_said(toy, grammar):
    """Also not where they are far the likeliest, and also not by greedy decoding."""
    forbidden = jnp.ones_like(grammar.forbidden).at[:, 10:20].set(False)
    narrow = Grammar(grammar.table, forbidden, 1, 2, 3)
    for temperature in (0.0, 5.0):
        _, generated = play(toy, narrow, ROWS, range(8), (MAX, MAX), temperature)
        assert ((generated.tokens >= 10) & (generated.tokens < 20)).all()
        assert (generated.count == MAX).all()


def test_a_closing_is_said_before_the_limit_where_nothing_was_found(toy, grammar):
    """Rows that found the pattern themselves are left alone; a forced token has log-probability 0."""
    closing = [8, PERIODS[0]]
    _, own = play(toy, grammar, ROWS, range(8), (6, 3), 1.3)
    cache, generated = play(toy, grammar.replace(closing=jnp.asarray(closing)), ROWS, range(8), (6, 3), 1.3)
    generated, own, kinds = jax.device_get(generated), jax.device_get(own), set()
    whole = [row + generated.tokens[b, : generated.count[b]].tolist() for b, row in enumerate(ROWS)]
    np.testing.assert_array_equal(cache.length, [len(row) for row in whole])
    for b, logp in enumerate(plain(toy, whole)[1]):
        early = 0 <= own.found_at[b] < 4 or own.count[b] <= 4
        kinds.add(early)
        first = min(4, int(own.count[b]))
        np.testing.assert_array_equal(generated.tokens[b, :first], own.tokens[b, :first])
        if early:
            assert (generated.found_at[b], generated.count[b]) == (own.found_at[b], own.count[b])
        else:
            assert generated.tokens[b, 4:6].tolist() == closing
            assert generated.logprob[b, 4:6].tolist() == [0, 0]
            assert generated.found_at[b] == 5
        at = np.arange(len(ROWS[b]), len(whole[b]))
        want = logp[at - 1, np.array(whole[b])[at]]
        np.testing.assert_allclose(generated.raw_logprob[b, : generated.count[b]], want, atol=1e-4)
    assert kinds == {True, False}


LOGITS = np.random.default_rng(5).normal(0, 1.5, 12).astype(np.float32)
draw_many = jax.jit(jax.vmap(draw, (None, 0, None, None, None)), static_argnums=4)


def allowed_by_hand(p, top_k, top_p):
    """Tokens from the likeliest down: at most k, and no more than needed for a mass of p (after the cut to k)."""
    order = np.argsort(-p)[: top_k or len(p)]
    mass = np.cumsum(p[order]) / p[order].sum()
    return order[: int(np.searchsorted(mass, top_p)) + 1]


@pytest.mark.parametrize(
    ("temperature", "top_k", "top_p"), [(1.0, 0, 1.0), (0.6, 0, 1.0), (1.0, 4, 1.0), (1.5, 0, 0.8), (2.0, 6, 0.7)]
)
def test_draws_have_the_right_frequencies(temperature, top_k, top_p):
    """20,000 draws, chi-square against the truncated softmax; and their log-probabilities are its."""
    p = softmax(LOGITS.astype(np.float64) / temperature)
    allowed = allowed_by_hand(p, top_k, top_p)
    expected = np.zeros(12)
    expected[allowed] = p[allowed] / p[allowed].sum()
    keys = jax.random.split(jax.random.key(11), 20_000)[:, None]
    truncation = Truncation(top_k, top_p)
    token, logprob = draw_many(LOGITS[None], keys, jnp.int32(4), jnp.float32(temperature), truncation)
    counts = np.bincount(np.asarray(token)[:, 0], minlength=12)
    assert set(np.nonzero(counts)[0]) == set(allowed.tolist())
    assert scipy.stats.chisquare(counts[allowed], 20_000 * expected[allowed]).pvalue > 1e-3
    np.testing.assert_allclose(logprob[:, 0], np.log(expected[np.asarray(token)[:, 0]]), atol=1e-5)


def test_rows_may_have_temperatures_and_masses_of_their_own():
    """One batch of four kinds of rows, 5,000 draws each: every kind has its own truncated softmax, as NumPy has it."""
    kinds = [(0.0, 1.0), (1.0, 1.0), (0.6, 0.7), (2.0, 0.5)]
    temperature, mass = (jnp.array(column, jnp.float32) for column in zip(*kinds, strict=True))
    logits = jnp.tile(jnp.asarray(LOGITS), (4, 1))

    @jax.jit
    def one(keys):
        return draw(logits, keys, jnp.int32(3), temperature, Truncation(top_p=mass))

    token, logprob = jax.vmap(one)(jax.random.split(jax.random.key(5), (5_000, 4)))
    assert set(np.asarray(token)[:, 0]) == {int(LOGITS.argmax())}, "temperature 0 is greedy"
    assert not np.asarray(logprob)[:, 0].any()
    for row, (t, top_p) in list(enumerate(kinds))[1:]:
        p = softmax(LOGITS.astype(np.float64) / t)
        allowed = allowed_by_hand(p, 0, top_p)
        counts = np.bincount(np.asarray(token)[:, row], minlength=12)
        assert set(np.nonzero(counts)[0]) <= set(allowed.tolist())
        assert scipy.stats.chisquare(counts[allowed], 5_000 * p[allowed] / p[allowed].sum()).pvalue > 1e-3
        want = np.log(p / p[allowed].sum())[np.asarray(token)[:, row]]
        np.testing.assert_allclose(logprob[:, row], want, atol=1e-5)


def test_greedy_takes_the_lowest_of_equals():
    logits = jnp.array([[0.0, 2.0, 2.0], [1.0, 1.0, 1.0]])
    token, logprob = draw(logits, ids(0, 1), jnp.int32(0), jnp.float32(0), KEEP_ALL)
    assert token.tolist() == [1, 0]
    assert logprob.tolist() == [0, 0]


def test_truncation_always_leaves_the_likeliest():
    log_p = jax.nn.log_softmax(jnp.asarray(LOGITS))[None]
    for truncation in (Truncation(1), Truncation(0, 1e-9), Truncation(5, 1e-9)):
        allowed = np.nonzero(np.isfinite(np.asarray(truncate(log_p, truncation))[0]))[0]
        assert allowed.tolist() == [int(LOGITS.argmax())]


OPTIONS = [[1, 9], [1, 2, 9], [5], [6, 2, 3, 9], [6, 2, 4]]
SIGNED = [[sign, digit, 9] for sign in (1, 2) for digit in (3, 4, 5)] + [[1, 3, 7, 9], [8, 9], [2, 3, 7, 9]]
DEEP = [[1, 2, 3, 4, 9], [1, 2, 3, 5, 9], [1, 6, 9], [1, 2, 9], [2, 2, 3, 4, 5]]
score = jax.jit(choose)


@pytest.mark.parametrize(("options", "width"), [(OPTIONS, 5), ([[1], [5], [7]], 0), (SIGNED, 11), (DEEP, 12)])
def test_choose_equals_scoring_each_option_separately(toy, options, width):
    """Of OPTIONS only 1 2 and 6 2 3 are read: all else is predicted behind a part of them. Of SIGNED each sign is read
    once, 3 7, 4 and 5 behind it, and 8; of DEEP 1, behind it 2 3 4, 2 3 5 and 6, and 2 2 3 4.
    """
    before, built = appended(toy, ROWS), build_options(options)
    cache, actual = score(toy, before, built)
    assert built.tokens.shape == (width,)
    whole = [row + option for row in ROWS for option in options]
    logp = plain(toy, whole)[1]
    for n, (row, option) in enumerate((row, option) for row in ROWS for option in options):
        want = sum(logp[n][len(row) - 1 + j, token] for j, token in enumerate(option))
        np.testing.assert_allclose(actual[n // len(options), n % len(options)], want, atol=1e-5)
    np.testing.assert_array_equal(cache.length, before.length)
    np.testing.assert_array_equal(cache.hidden, before.hidden)
    for old, new in zip(jax.tree.leaves(before.kv), jax.tree.leaves(cache.kv), strict=True):
        for b, row in enumerate(ROWS):
            np.testing.assert_array_equal(old[b, :, : len(row)], new[b, :, : len(row)])


def test_what_was_scored_is_not_seen_later(toy, grammar):
    cache, _ = score(toy, appended(toy, ROWS), build_options(OPTIONS))
    _, after = run(toy, cache, ids(*range(8)), grammar, (MAX, 3), jnp.float32(1), np.ones(8, bool))
    _, never = play(toy, grammar, ROWS, range(8))
    jax.tree.map(np.testing.assert_array_equal, after, never)


@pytest.mark.parametrize("options", [[[1, 2], [1]], [[1], [1, 2]], [[3], [3]], [[], [1]], [(1, 2), (1, 2)]])
def test_options_that_cannot_be_told_apart_are_refused(options):
    same = options[0]
    for ambiguous in (options, [same, same, [8]]):
        with pytest.raises(ValueError, match="end each option with a terminator"):
            build_options(ambiguous)


@pytest.mark.parametrize("options", [[[i, 1] for i in range(64)], [[1, i, 0] for i in range(64)]])
def test_more_twigs_or_leaves_than_ids_are_refused(options):
    build_options(options[1:])
    with pytest.raises(ValueError, match="more than 63"):
        build_options(options)


@pytest.mark.parametrize("truncation", [Truncation(6), Truncation(0, 0.7), Truncation(9, 0.8), Truncation(57, 0.999)])
@pytest.mark.parametrize("tie", [1e-4, 0.3])
def test_what_rounding_may_keep_lies_between_its_borders(truncation, tie):
    """Scores moved at random, by `tie` against each other at most: no less than `surely`, no more than `perhaps`."""
    random = np.random.default_rng(1)
    scores = random.normal(size=(64, 57)).astype(np.float32) * 2
    scores[:, 5::3] = scores[:, 4:-1:3] + random.uniform(-tie, tie, scores[:, 5::3].shape)  # many near ties
    scores[:, :3] = -np.inf
    surely, perhaps = jax.jit(borders, static_argnums=1)(scores, truncation, tie)
    assert (perhaps | ~surely).all()
    finite, unsure = np.isfinite(scores), np.zeros(scores.shape, bool)
    for _ in range(50):
        moved = scores + random.choice([-tie / 2, tie / 2], scores.shape).astype(np.float32)
        allowed = np.asarray(truncate(jnp.asarray(moved), truncation)) > -np.inf
        assert (allowed | ~surely | ~finite).all()
        assert (perhaps | ~allowed).all()
        unsure |= allowed != (np.asarray(truncate(jnp.asarray(scores), truncation)) > -np.inf)
    if truncation.top_k < 57:
        assert unsure.any(), "some were between"
        assert (surely & finite).any(axis=1).mean() > 0.5
