"""Reading a packed dialogue in chunks, with the ended turns forgotten between them, is reading it in one pass."""

import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from rlver_jax.decoding.cache import LM, init_cache, keep_slots
from rlver_jax.decoding.replay_chunks import WIDTHS, Sizes, chunks_of, cuts
from rlver_jax.decoding.replay_sequence import Choice, Query, ReplaySequence
from rlver_jax.models.attention import BRANCH_RADIX
from rlver_jax.text.padding import pad_rows

PREFIX = 30


def dialogue(seed: int, turns: int, prefix: int = PREFIX) -> ReplaySequence:
    """Messages, and in each turn a thought, four options of one to three tokens, and mostly more of the thought."""
    draw = np.random.default_rng(seed)
    random_tokens = lambda count: draw.integers(1, 40, count).tolist()  # noqa: E731
    sequence = ReplaySequence(prefix=prefix)
    position = sequence.add(np.random.default_rng(99).integers(1, 40, prefix).tolist(), 0, 0)
    for turn in range(turns):
        position = sequence.add(random_tokens(draw.integers(2, 9)), 0, position)
        branch = (turn + 1) * BRANCH_RADIX
        after = sequence.add(random_tokens(draw.integers(3, 20)), branch, position)
        first = len(sequence.tokens)
        for child in range(1, 5):
            sequence.add(random_tokens(draw.integers(1, 4)), branch + child, after)
        sequence.choices.append(Choice(turn, first, len(sequence.tokens)))
        sequence.add(random_tokens(draw.integers(0, 20)), branch, after)
    indices = sorted((prefix + draw.choice(len(sequence.tokens) - prefix, 8, replace=False)).tolist())
    sequence.queries = [Query(index, sequence.tokens[index], 0, 0, 0, 0, 0, False) for index in indices]
    return sequence


def seen(sequence: ReplaySequence, i: int) -> set[int]:
    """Indices that token i sees: before it, of the messages, of its own branch or of that branch's parent."""
    own = {0, sequence.branch[i], sequence.branch[i] // BRANCH_RADIX * BRANCH_RADIX}
    return {j for j in range(i + 1) if sequence.branch[j] in own}


@pytest.mark.parametrize("width", [16, 23, 64, 1000])
def test_every_token_finds_what_it_sees_and_the_rest_is_forgotten(width):
    for seed in range(20):
        sequence = dialogue(seed, turns=1 + seed % 5)
        offset, slots, queries, choices = 0, list[int](), list[Query](), list[Choice]()
        whole = np.array([sequence.tokens, sequence.positions, sequence.branch])
        for chunk in chunks_of(sequence, width):
            slots = [slots[slot] for slot in chunk.retained]
            assert chunk.held.tolist() == [sequence.branch[index] for index in slots]
            own = range(offset, offset + chunk.rows.shape[1])
            assert 0 < len(own) <= width
            np.testing.assert_array_equal(chunk.rows, whole[:, own.start : own.stop])
            needed = set().union(*(seen(sequence, i) for i in own))
            assert needed <= set(slots) | set(own)
            current = sequence.branch[own.start] // BRANCH_RADIX * BRANCH_RADIX
            assert {sequence.branch[index] for index in slots} <= {0, current}, "no turn that has ended"
            assert slots == sorted(slots), "in the order of reading: visibility is causal by slot"
            for query in itertools.starmap(Query, chunk.queries.tolist()):
                assert 0 <= query.previous < len(own)
                queries.append(query._replace(previous=query.previous + offset))
            for choice in itertools.starmap(Choice, chunk.choices.tolist()):
                assert 0 < choice.first < choice.end <= len(own), "with the token before it"
                choices.append(choice._replace(first=choice.first + offset, end=choice.end + offset))
            slots, offset = slots + list(own), own.stop
        assert (offset, queries, choices) == (len(sequence.tokens), sequence.queries, sequence.choices)


def test_chunks_within_the_prefix_are_those_of_every_dialogue_with_it():
    one, other = (list(chunks_of(dialogue(seed, 3), 13)) for seed in (1, 2))
    same = [
        all(itertools.starmap(np.array_equal, zip(mine, its, strict=True)))
        for mine, its in zip(one, other, strict=False)
    ]
    assert same[: PREFIX // 13 + 1] == [True] * (PREFIX // 13) + [False]


def test_a_choice_longer_than_a_chunk_is_refused():
    sequence = dialogue(0, 1)
    choice = sequence.choices[0]
    assert cuts(sequence, choice.end - choice.first + 1)[-1] == len(sequence.tokens)
    with pytest.raises(ValueError, match="a choice takes"):
        cuts(sequence, choice.end - choice.first)


def test_the_width_is_that_of_the_least_padding():
    dialogues = [dialogue(seed, turns, prefix=700) for seed, turns in enumerate((3, 3, 17, 25))]
    sizes = Sizes.of(dialogues)

    def positions(width: int) -> int:
        first = sum(chunk.rows.shape[1] == width for chunk in list(chunks_of(dialogues[0], width))[: 700 // width])
        assert first == 700 // width
        return width * (first + sum(len(list(chunks_of(one, width))) - first for one in dialogues))

    assert positions(sizes.width) == min(map(positions, WIDTHS)) < max(map(positions, WIDTHS))
    chunks = [chunk for one in dialogues for chunk in chunks_of(one, sizes.width)]
    assert sizes.capacity == max(len(chunk.retained) for chunk in chunks) + sizes.width
    assert sizes.choices == max(len(chunk.choices) for chunk in chunks)


@pytest.mark.parametrize("width", [16, 40])
def test_hidden_states_are_those_of_one_forward_pass(width, toy):
    """Against the model's own pass over the whole row without a cache, in which nothing was ever forgotten."""
    sequence = dialogue(5, turns=4)
    rows = (jnp.asarray([row]) for row in (sequence.tokens, sequence.positions, sequence.branch))
    expected, _ = jax.jit(toy.model.apply)({"params": toy.params}, *rows)
    capacity = len(sequence.tokens) + width

    @jax.jit
    def forward(lm: LM, cache, retained, held, length, tokens, positions, branch):
        cache = keep_slots(cache, retained, length)
        hidden, kv = lm.forward(tokens, positions, branch, cache, held)
        return cache.replace(kv=kv), hidden

    cache, states = init_cache(toy, 1, capacity), []
    for chunk in chunks_of(sequence, width):
        retained, length = pad_rows([chunk.retained], capacity)
        own = (pad_rows([row], width)[0] for row in chunk.rows)
        cache, hidden = forward(toy, cache, retained[0], pad_rows([chunk.held], capacity)[0], length, *own)
        states.append(np.asarray(hidden[0, : chunk.rows.shape[1]]))
    np.testing.assert_allclose(np.concatenate(states), expected[0], atol=2e-5)
    assert forward._cache_size() == 1


def test_branches_of_a_cache_are_refused_without_it_or_without_those_of_the_new_tokens(toy):
    one, held = jnp.zeros((1, 1), jnp.int32), jnp.zeros((1, 8), jnp.int32)
    with pytest.raises(ValueError, match="`held`"):
        toy.forward(one, one, None, init_cache(toy, 1, 8), held)
    with pytest.raises(ValueError, match="`held`"):
        toy.model.apply({"params": toy.params}, one, one, one, held=held)
