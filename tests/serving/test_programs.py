"""The server's programs against plain forward passes over whole rows, without a cache."""

import jax
import numpy as np
import pytest
import scipy.stats
from scipy.special import softmax

from rlver_jax.decoding.grammar import free_text
from rlver_jax.serving import programs
from rlver_jax.serving.programs import SlotRequest
from rlver_jax.text.chat import ChatTemplate
from tests.conftest import plain

ROWS, CAPACITY = 3, 96


def requests(**columns) -> SlotRequest:
    """Rows that decode greedily without end, changed by column."""
    zeros = dict.fromkeys(("length", "generated"), np.zeros(ROWS, np.int32))
    values = zeros | {
        "active": np.ones(ROWS, bool),
        "limit": np.full(ROWS, 50, np.int32),
        "seed": np.arange(ROWS, dtype=np.uint32),
        "temperature": np.zeros(ROWS, np.float32),
        "top_p": np.ones(ROWS, np.float32),
        "details": np.zeros(ROWS, bool),
    }
    return SlotRequest(**values | {name: np.asarray(value, values[name].dtype) for name, value in columns.items()})


def prompt(bpe, row: int) -> list[int]:
    chat, texts = ChatTemplate(bpe), ["my boss did not listen.", "I felt awful and she said goodbye", "my sister"][row]
    return chat.message("system", "Say.") + chat.message("user", texts) + chat.open("assistant")


def read_all(lm, prompts, sizes=(8, 5)):
    """A cache whose rows have read their prompts in chunks of alternating sizes, with the scores where it was asked."""
    cache, scores = programs.empty_cache(lm, ROWS, CAPACITY), []
    for row, tokens in enumerate(prompts):
        at, told = 0, []
        while at < len(tokens):
            size = sizes[len(told) % len(sizes)]
            part = np.zeros((1, size), np.int32)
            part[0, : len(tokens[at : at + size])] = tokens[at : at + size]
            count = np.array([len(tokens[at : at + size])], np.int32)
            cache, one = programs.prefill_and_score(lm, cache, np.int32(row), np.int32(at), part, count)
            told.append(jax.tree.map(lambda x, n=count[0]: np.asarray(x)[:n], one))
            at += size
        scores.append(jax.tree.map(lambda *x: np.concatenate(x), *told))
    return cache, scores


@pytest.fixture(scope="module")
def grammar(policy_lm, bpe):
    return free_text(bpe, policy_lm.model.config.vocab_size)


@pytest.fixture(scope="module")
def prompts(bpe):
    return [prompt(bpe, row) for row in range(ROWS)]


def test_chunks_read_what_a_whole_row_would(policy_lm, prompts):
    """Log-probabilities of the prompts' tokens, and the twenty likeliest, against one pass over each prompt."""
    _, scores = read_all(policy_lm, prompts)
    for tokens, score, logp in zip(prompts, scores, plain(policy_lm, prompts)[1], strict=True):
        positions = np.arange(len(tokens) - 1)
        np.testing.assert_allclose(score.logprob[1:], logp[positions, tokens[1:]], atol=1e-4)
        np.testing.assert_allclose(score.top_logprob[1:], -np.sort(-logp[:-1], axis=1)[:, :20], atol=1e-4)
        np.testing.assert_allclose(np.take_along_axis(logp[:-1], score.top[1:], 1), score.top_logprob[1:], atol=1e-4)


def test_rows_generate_what_the_model_finds_likeliest(policy_lm, bpe, grammar, prompts):
    """Greedy tokens, their log-probabilities and the likeliest ones; a row that is not active stays as it was."""
    cache, _ = read_all(policy_lm, prompts)
    lengths, active = [len(p) for p in prompts], [True, False, True]
    cache, output = programs.decode_block(
        policy_lm, cache, grammar, requests(length=lengths, active=active, details=[True, False, False]), steps=9
    )
    assert output.count[1] == 0
    never = {t for name, t in bpe.special_ids.items() if t not in (bpe.im_end_id, bpe.pad_id)}
    for row in (0, 2):
        tokens = output.tokens[row, : output.count[row]].tolist()
        logp = plain(policy_lm, [prompts[row] + tokens])[1][0]
        for n, token in enumerate(tokens):
            expected = logp[lengths[row] + n - 1]
            allowed = [t for t in np.argsort(-expected) if t not in never and t < bpe.vocab_size]
            assert token == allowed[0]
            assert output.logprobs.logprob[row, n] == pytest.approx(expected[token], abs=1e-4)
            if row == 0:
                np.testing.assert_allclose(expected[output.logprobs.top[0, n]], -np.sort(-expected)[:20], atol=1e-4)
    again, _ = programs.decode_block(
        policy_lm, cache, grammar, requests(length=lengths, active=[False, True, False]), steps=9
    )
    fresh, alone = programs.decode_block(
        policy_lm,
        read_all(policy_lm, prompts)[0],
        grammar,
        requests(length=lengths, active=[False, True, False]),
        steps=9,
    )
    np.testing.assert_allclose(again.hidden[1], fresh.hidden[1], atol=1e-5)
    assert alone.count[1] > 0


def test_neither_blocks_nor_neighbours_change_what_is_drawn(policy_lm, grammar, prompts):
    """Nine tokens in one block with warm neighbours, or in blocks of three with silent ones."""
    lengths, temperature = np.array([len(p) for p in prompts]), [1.3, 0.8, 0.5]
    warm = {"temperature": temperature, "top_p": [0.9, 1.0, 0.7], "seed": [7, 8, 9]}
    _, whole = programs.decode_block(
        policy_lm, read_all(policy_lm, prompts)[0], grammar, requests(length=lengths, **warm), steps=9
    )
    cache, tokens = read_all(policy_lm, prompts)[0], []
    for _ in range(3):
        done = np.array([0, len(tokens), 0])
        now = requests(length=lengths + done, generated=done, active=[False, True, False], **warm)
        cache, output = programs.decode_block(policy_lm, cache, grammar, now, steps=3)
        tokens += output.tokens[1, : output.count[1]].tolist()
        if output.stopped[1]:
            break
    assert tokens == whole.tokens[1, : whole.count[1]].tolist()
    assert len(tokens) > 3, "more than one block"


def test_limits_are_kept(policy_lm, grammar, prompts):
    lengths = [len(p) for p in prompts]
    _, output = programs.decode_block(
        policy_lm, read_all(policy_lm, prompts)[0], grammar, requests(length=lengths, limit=[2, 0, 1]), steps=9
    )
    assert output.count.tolist() == [2, 0, 1]
    assert not output.stopped.any()


def test_first_tokens_have_the_right_frequencies(policy_lm, bpe, grammar, prompts):
    """1,000 seeds: chi-square against the model's softmax at the row's temperature and mass, computed by NumPy."""
    cache, _ = read_all(policy_lm, prompts)
    lengths, counts, rounds = [len(p) for p in prompts], np.zeros(policy_lm.model.config.vocab_size), 1_000
    for n in range(rounds):
        warm = requests(length=lengths, limit=[1, 1, 1], seed=[n, 0, 0], temperature=[1.5, 0, 0.7], top_p=[0.8, 1, 1])
        cache, output = programs.decode_block(policy_lm, cache, grammar, warm, steps=3)
        counts[output.tokens[0, 0]] += 1
        cache = _reread_last(policy_lm, cache, prompts[0])  # what was said is forgotten: the host keeps the lengths
    logp = plain(policy_lm, [prompts[0]])[1][0][-1].astype(np.float64)
    logp[[t for t in bpe.special_ids.values() if t not in (bpe.im_end_id, bpe.pad_id)]] = -np.inf
    logp[bpe.vocab_size :] = -np.inf
    p = softmax(logp / 1.5)
    order = np.argsort(-p)
    allowed = order[: int(np.searchsorted(np.cumsum(p[order]), 0.8)) + 1]
    assert set(np.nonzero(counts)[0]) <= set(allowed.tolist())
    expected = rounds * p[allowed] / p[allowed].sum()
    common = expected >= 5
    seen = np.append(counts[allowed][common], counts[allowed][~common].sum())
    wanted = np.append(expected[common], expected[~common].sum())
    assert common.sum() > 3
    assert scipy.stats.chisquare(seen[wanted > 0], wanted[wanted > 0]).pvalue > 1e-3


def _reread_last(lm, cache, tokens):
    """Row 0 reads its last token again, so that its hidden state is that of the prompt once more."""
    last = np.zeros((1, 5), np.int32)
    last[0, 0] = tokens[-1]
    return programs.prefill_and_score(lm, cache, np.int32(0), np.int32(len(tokens) - 1), last, np.ones(1, np.int32))[0]
