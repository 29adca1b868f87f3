"""Choosing among options: the model's probability of each one, in one forward pass."""

import dataclasses
import itertools
from collections.abc import Sequence

import flax.struct
import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int

from rlver_jax.decoding.cache import LM, Cache
from rlver_jax.models.attention import CHILD_RADIX
from rlver_jax.models.logprobs import log_normalizer
from rlver_jax.models.precision import matmul_options
from rlver_jax.parallel import rules


@flax.struct.dataclass
class Options:
    """Options of a choice, flattened to a tree of branches so that one forward pass scores them all.

    The model reads N tokens to predict those of O options. Each of the C distinct contexts of a predicted token is
    evaluated once.
    """

    tokens: Int[Array, "N"]
    branch: Int[Array, "N"]  # as children of the canonical history (see `models.attention`)
    offset: Int[Array, "N"]  # position in its option
    contexts: Int[Array, "C"]  # 0: the cache's last token; j + 1: after token j
    pair_context: Int[Array, "P"]  # index into contexts
    pair_token: Int[Array, "P"]
    pair_option: Int[Array, "P"]
    padded: Int[Array, "O W"]  # the options again, one a line
    counts: Int[Array, "O"]


def build_options(options: Sequence[Sequence[int]]) -> Options:
    """Options from their token ids.

    Raises:
        ValueError: one is empty or the beginning of another, so that it could never be told apart; or there are over
            63 first tokens, or over 63 ways to go on after one.
    """
    tuples = [tuple(o) for o in options]
    for i, a in enumerate(tuples):
        for j, b in enumerate(tuples):
            if i != j and b[: len(a)] == a:
                raise ValueError(f"option {a} is the beginning of option {b}; end each option with a terminator token")
    flat, ends = _tree(tuples)
    contexts: dict[tuple[int, ...], int] = {}
    context_ends: list[int] = []
    pairs: list[tuple[int, int, int]] = []
    for i, option in enumerate(tuples):
        for j, token in enumerate(option):
            if option[:j] not in contexts:
                contexts[option[:j]] = len(context_ends)
                context_ends.append(ends[option[:j]])
            pairs.append((contexts[option[:j]], token, i))
    width = max(map(len, tuples))
    arrays = [
        *np.array(flat, np.int32).reshape(-1, 3).T,
        context_ends,
        *zip(*pairs, strict=True),
        [o + (0,) * (width - len(o)) for o in tuples],
        [len(o) for o in tuples],
    ]
    return Options(*jax.device_put([np.array(a, np.int32) for a in arrays]))


def _tree(options: Sequence[tuple[int, ...]]) -> tuple[list[tuple[int, int, int]], dict[tuple[int, ...], int]]:
    """The tokens that predict all others, as a tree of two levels.

    The last token of an option is only predicted, never read. Options with the same first token share a child branch
    for the tokens that they all begin with. Each continues on a grandchild of its own, or on that of a longer one that
    begins with it.

    Returns:
        (token, branch, offset) of each token that is read; and for each beginning of an option, how many of these
        tokens have been read at its end (0: none).
    """
    prefixes = dict.fromkeys(option[:-1] for option in options if len(option) > 1)
    inner = {prefix[:end] for prefix in prefixes for end in range(len(prefix))}
    flat: list[tuple[int, int, int]] = []
    ends: dict[tuple[int, ...], int] = {(): 0}

    def grow(path: tuple[int, ...], start: int, branch: int) -> None:
        for offset in range(start, len(path)):
            flat.append((path[offset], branch, offset))
            ends.setdefault(path[: offset + 1], len(flat))

    for child, first in enumerate(dict.fromkeys(prefix[0] for prefix in prefixes), 1):
        siblings = [prefix for prefix in prefixes if prefix[0] == first]
        columns = itertools.takewhile(lambda column: len(set(column)) == 1, zip(*siblings, strict=False))
        common = tuple(column[0] for column in columns)
        grandchildren = [prefix for prefix in siblings if prefix != common and prefix not in inner]
        if max(child, len(grandchildren)) >= CHILD_RADIX:
            raise ValueError(f"more than {CHILD_RADIX - 1} beginnings of options, or of what follows one: give fewer")
        grow(common, 0, child * CHILD_RADIX)
        for grandchild, prefix in enumerate(grandchildren, 1):
            grow(prefix, len(common), child * CHILD_RADIX + grandchild)
    return flat, ends


def choose(lm: LM, cache: Cache, options: Options) -> tuple[Cache, Float[Array, "B O"]]:
    """log p(option | context) of every option, exactly, in one forward pass; the context is left as it was.

    Raw model probabilities at temperature 1; normalize over the options with `log_softmax`. The options' tokens are
    written beyond each row's length as scratch: N free slots are needed.
    """
    batch = cache.length.shape[0]
    if not options.tokens.size:  # options of one token each
        return cache, score_options(lm, options, cache.hidden[:, None])
    tokens, branch = (jnp.broadcast_to(x, (batch, x.shape[0])) for x in (options.tokens, options.branch))
    positions = cache.length[:, None] + options.offset
    hidden, kv = lm.forward(tokens, positions, branch, cache)
    contexts = jnp.concatenate([cache.hidden[:, None], hidden], axis=1)[:, options.contexts]
    return dataclasses.replace(cache, kv=kv), score_options(lm, options, contexts)


def score_options(lm: LM, options: Options, contexts: Float[Array, "B C D"]) -> Float[Array, "B O"]:
    """log p of every option from the hidden states of its contexts."""
    vocab_shards = rules.parts("vocab")
    kernel = lm.head[options.pair_token].astype(contexts.dtype)
    pair_hidden = contexts[:, options.pair_context]
    logits = jnp.einsum("bpd,pd->bp", pair_hidden, kernel, **matmul_options(kernel.dtype))
    logprob = logits - log_normalizer(contexts, lm.head, vocab_shards=vocab_shards)[:, options.pair_context]
    total = jnp.zeros((contexts.shape[0], options.counts.shape[0]), jnp.float32)
    return total.at[:, options.pair_option].add(logprob)
