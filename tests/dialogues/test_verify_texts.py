"""How a log's reader splits replies, against what the sampler's grammar and arrays make of the same tokens."""

import random

import jax.numpy as jnp
import numpy as np
import pytest

from rlver_jax.decoding.generate import Generated
from rlver_jax.decoding.grammar import thought_then_say, whitespace_tokens
from rlver_jax.dialogues.verify_texts import split_reply
from rlver_jax.rollout.policy_turn import _split_say
from rlver_jax.rollout.spec import RolloutConfig

ROWS, MOST = 400, 24


def random_tokens(tokenizer, draw):
    """Words, white space and `</think>`, whole, in pieces, cut, merged with what follows; often a stop token last."""
    close = tokenizer.encode("</think>")
    texts = ("I felt", " ", "\n", "\n\n", "</think>\n\n", "</think> ", "<", ">", "</")
    parts = [
        *map(tokenizer.encode, texts),
        *([byte] for text in "</think>" for byte in tokenizer.encode(text)),
        close,
        close[:-1],
        close[1:],
        [token for text in "</think>" for token in tokenizer.encode(text)],
        [draw.randrange(tokenizer.vocab_size)],
        [tokenizer.im_start_id],
    ]
    tokens = [token for _ in range(draw.randint(0, 9)) for token in draw.choice(parts)][: MOST - 1]
    tokens = [token for token in tokens if token not in tokenizer.stop_ids]
    return ([*tokens, tokenizer.stop_ids[0]], True) if draw.random() < 0.7 or not tokens else (tokens, False)


def on_the_device(tokenizer, rows):
    """(found_at, say, violation) of each row: `generate`'s automaton, then `policy_turn`'s arrays."""
    size = tokenizer.vocab_size + 5
    grammar, whitespace = thought_then_say(tokenizer, size), jnp.asarray(whitespace_tokens(tokenizer, size))
    tokens, found_at = np.zeros((len(rows), MOST), np.int32), np.full(len(rows), -1, np.int32)
    for row, (completion, _) in enumerate(rows):
        tokens[row, : len(completion)], state = completion, grammar.begin
        for position, token in enumerate(completion):
            state = int(grammar.table[state, token])
            if found_at[row] < 0 and grammar.first_found <= state < grammar.begin:
                found_at[row] = position
    count = np.array([len(completion) for completion, _ in rows], np.int32)
    stopped, none = np.array([stopped for _, stopped in rows]), jnp.zeros((len(rows), MOST))
    completion = Generated(
        jnp.asarray(tokens), jnp.asarray(count), none, none, jnp.asarray(found_at), jnp.asarray(stopped)
    )
    spec = RolloutConfig("think", False, 1, 1, 100, think_tokens=MOST, say_tokens=MOST, user_tokens=1)
    say, say_count = _split_say(completion, whitespace, spec)
    violation = (completion.found_at < 0) | (say_count == 0)
    return found_at, [row[:n].tolist() for row, n in zip(np.asarray(say), say_count, strict=True)], violation


@pytest.mark.parametrize("seed", range(3))
def test_random_tokens_are_split_as_the_sampler_splits_them(tokenizer, seed):
    draw = random.Random(seed)
    rows = [random_tokens(tokenizer, draw) for _ in range(ROWS)]
    expected = on_the_device(tokenizer, rows)
    kinds = set()
    for (tokens, stopped), found_at, say, violation in zip(rows, *expected, strict=True):
        split = split_reply(tokenizer, tokens, stopped=stopped, think=True)
        assert (split.found_at, list(split.say), split.violation) == (found_at, say, bool(violation)), tokens
        kinds.add((found_at >= 0, bool(say), stopped))
    assert len(kinds) == 6, "found or not, something said or not, stopped or not; without the mark nothing is said"


@pytest.mark.parametrize(
    ("text", "say"),
    [
        ("I felt</think>\n\nmy boss", "my boss"),
        ("</think>", ""),
        ("I felt </think>  \n ", ""),
        ("I felt my boss", ""),
        ("a</think>b</think>c", "b</think>c"),
        ("</think </think>\nx", "x"),
    ],
)
def test_texts_by_hand(bpe, text, say):
    split = split_reply(bpe, [*bpe.encode(text), bpe.im_end_id], stopped=True, think=True)
    assert bpe.decode(split.say) == say
    assert split.violation == (not say)
    direct = split_reply(bpe, [*bpe.encode(text), bpe.im_end_id], stopped=True, think=False)
    assert (bpe.decode(direct.say), direct.violation) == (text, False)
