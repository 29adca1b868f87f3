"""Byte patterns found in a stream of tokens, one table look-up per token.

An Aho-Corasick automaton (Aho & Corasick 1975) reads bytes. Running each token's bytes through it from each
state gives a table over tokens, so a decode loop on a device carries one integer per row:

    state = table[state, token]
    found = state >= first_found          # which pattern: state - first_found

A pattern is found wherever it lies: within one token, or across several, however the text was split.

*What is found.* The pattern that is completed first in the byte stream; of several completed by the same
byte, the longest. A found state is absorbing, so later tokens change nothing. Hence a pattern can never be
found if another one lies inside it and ends before it ("bye" before "bye-bye"); listing both is allowed.

*Specials.* A token without bytes (a special token, or a padding row of the embedding) resets an unfound state
to the start: a pattern never spans a special token.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from rlver_jax.text import chat
from rlver_jax.text.tokenizer import Tokenizer

THINK_CLOSE = chat.THINK_CLOSE.encode()
LINE_END = b"\n"

# What ends a dialogue when the user says it. Matching knows no context: a quoted or narrated farewell ("I
# never said goodbye to her", 「等我再见到他」) counts as well. Where that matters, give a list of your own.
GOODBYES = tuple(
    text.encode("utf-8")
    for text in (
        *("再见", "再會", "拜拜", "掰掰"),
        *("goodbye", "Goodbye", "GOODBYE", "good bye", "Good bye", "good-bye", "Good-bye"),
        *("bye-bye", "Bye-bye", "Bye-Bye", "bye bye", "Bye bye", "Bye Bye"),
        *("bye for now", "Bye for now", "Bye!", "Bye.", "Bye,", " bye!", " bye."),
    )
)

START = 0
_CHUNK = 4096  # tokens lifted at once: keeps the working arrays inside the cache


@dataclass(frozen=True, eq=False)
class TokenAutomaton:
    """A byte automaton lifted to tokens; made by `build_automaton`, start state 0.

    Attributes:
        patterns: the patterns, in the order that found states have.
        table: [n_states, n_tokens], the state after reading a token; put it on the device as it is.
        first_found: states from here on are found ones; `state - first_found` indexes `patterns`.
        completing: [n_pairs] int64, sorted; `state * n_tokens + token` of all pairs that complete a pattern.
        left_over: [n_pairs], how many bytes of that token lie after the pattern's end.
    """

    patterns: tuple[bytes, ...]
    table: np.ndarray
    first_found: int
    completing: np.ndarray
    left_over: np.ndarray

    @property
    def n_states(self) -> int:
        """Unfound states and one found state per pattern."""
        return self.table.shape[0]

    @property
    def n_tokens(self) -> int:
        """Token ids the table covers, padding rows included."""
        return self.table.shape[1]

    def run(self, states: np.ndarray | int, tokens: np.ndarray | Sequence) -> np.ndarray:
        """States after each token, on the host.

        Args:
            states: [...] states to start from, or one for all.
            tokens: [..., n] token ids.

        Returns:
            [..., n] states, in the table's dtype.

        Raises:
            ValueError: a token id outside the table.
        """
        tokens = np.asarray(tokens, dtype=np.int64)
        if tokens.size and not 0 <= tokens.min() <= tokens.max() < self.n_tokens:
            raise ValueError(
                f"token ids reach from {tokens.min()} to {tokens.max()}, but the automaton covers "
                f"0..{self.n_tokens - 1}: build it with pad_vocab_to set to the number of embedding rows"
            )
        state = np.broadcast_to(np.asarray(states, dtype=self.table.dtype), tokens.shape[:-1])
        out = np.empty(tokens.shape, dtype=self.table.dtype)
        for i in range(tokens.shape[-1]):
            state = self.table[state, tokens[..., i]]
            out[..., i] = state
        return out

    def remainder(self, state: int, token: int) -> int:
        """Bytes of `token` after the end of the pattern that it completes when read from `state`.

        Raises ValueError if it completes none there.
        """
        key = state * self.n_tokens + token
        at = int(np.searchsorted(self.completing, key))
        if at == len(self.completing) or self.completing[at] != key:
            raise ValueError(
                f"token {token} completes no pattern when read from state {state}; ask only where the "
                f"state goes from below {self.first_found} to {self.first_found} or more"
            )
        return int(self.left_over[at])

    def remainder_table(self) -> np.ndarray:
        """`remainder` of all pairs: [n_states, n_tokens], smallest signed dtype, -1 where none completes."""
        dense = np.full(self.table.shape, -1, dtype=self.left_over.dtype)
        dense.ravel()[self.completing] = self.left_over
        return dense


def build_automaton(
    patterns: Sequence[bytes],
    tokenizer: Tokenizer,
    *,
    pad_vocab_to: int | None = None,
    dtype: np.typing.DTypeLike = np.int16,
) -> TokenAutomaton:
    """Lifts byte patterns to a token table.

    Args:
        patterns: distinct, none empty; the order gives the found states.
        tokenizer: gives each id's bytes.
        pad_vocab_to: number of embedding rows to cover; rows beyond the vocabulary act as specials.
        dtype: integer type of the table.

    Raises:
        ValueError: no pattern, an empty, repeated or non-bytes one, fewer rows than ids in the vocabulary,
            or more states than `dtype` can hold.
    """
    _check_patterns(patterns)
    n_tokens = tokenizer.vocab_size if pad_vocab_to is None else pad_vocab_to
    if n_tokens < tokenizer.vocab_size:
        raise ValueError(
            f"pad_vocab_to={pad_vocab_to} is less than the tokenizer's {tokenizer.vocab_size} ids: give the "
            "number of rows of the embedding"
        )
    step, first_found = _byte_automaton(patterns)
    if len(step) - 1 > np.iinfo(dtype).max:
        raise ValueError(
            f"{len(patterns)} patterns need {len(step)} states, more than {np.dtype(dtype).name} can number: "
            "pass a wider dtype or fewer patterns"
        )
    pieces = [tokenizer.token_bytes(token) for token in range(tokenizer.vocab_size)]
    lengths = np.array([len(piece) for piece in pieces] + [0] * (n_tokens - len(pieces)), dtype=np.int64)
    data = np.frombuffer(b"".join(pieces), dtype=np.uint8)
    starts = np.cumsum(lengths) - lengths
    table = _lift(step, first_found, data, starts, lengths, np.dtype(dtype))
    completing, left_over = _completions(table, step, first_found, data, starts, lengths)
    return TokenAutomaton(tuple(patterns), table, first_found, completing, left_over)


def _check_patterns(patterns: Sequence[bytes]) -> None:
    if isinstance(patterns, bytes | str) or not patterns:
        raise ValueError(f"patterns must be a non-empty sequence of bytes, got {patterns!r}")
    for index, pattern in enumerate(patterns):
        if not isinstance(pattern, bytes) or not pattern:
            raise ValueError(
                f"pattern {index} is {pattern!r}; expected bytes, at least one (encode text as UTF-8 first)"
            )
        if pattern in patterns[:index]:
            raise ValueError(f"pattern {index}, {pattern!r}, is there twice: remove one")


def _byte_automaton(patterns: Sequence[bytes]) -> tuple[np.ndarray, int]:
    """The byte transitions [n_states, 256], found states last and absorbing, and `first_found`."""
    children, pattern_of = _trie(patterns)
    step = np.zeros((len(children), 256), dtype=np.intp)
    fallback = [0] * len(children)  # the node of the longest proper suffix that is in the trie
    queue = [0]
    for node in queue:  # breadth first, so a fallback is complete before it is needed
        step[node] = step[fallback[node]]
        for byte, child in children[node].items():
            fallback[child] = int(step[node, byte])
            step[node, byte] = child
            if pattern_of[child] < 0:  # its own pattern is the longest; else a suffix may have one
                pattern_of[child] = pattern_of[fallback[child]]
        queue += children[node].values()
    # Only nodes that can be reached before anything is found need a state.
    label = {0: 0}
    for node in (live := [0]):
        for target in np.unique(step[node]).tolist():
            if pattern_of[target] < 0 and target not in label:
                label[target] = len(live)
                live.append(target)
    first_found = len(live)
    renamed = np.array([label.get(n, 0) if f < 0 else first_found + f for n, f in enumerate(pattern_of)])
    absorbing = np.arange(first_found, first_found + len(patterns))[:, None].repeat(256, axis=1)
    return np.concatenate([renamed[step[live]], absorbing]), first_found


def _trie(patterns: Sequence[bytes]) -> tuple[list[dict[int, int]], list[int]]:
    """Children of each node by byte, and the pattern that ends in each node (-1: none)."""
    children: list[dict[int, int]] = [{}]
    pattern_of = [-1]
    for index, pattern in enumerate(patterns):
        node = 0
        for byte in pattern:
            if byte not in children[node]:
                children[node][byte] = len(children)
                children.append({})
                pattern_of.append(-1)
            node = children[node][byte]
        pattern_of[node] = index
    return children, pattern_of


def _lift(
    step: np.ndarray,
    first_found: int,
    data: np.ndarray,
    starts: np.ndarray,
    lengths: np.ndarray,
    dtype: np.dtype,
) -> np.ndarray:
    """The table [n_states, n_tokens]: every token's bytes read from every unfound state."""
    n_states = len(step)
    table = np.empty((n_states, len(lengths)), dtype=dtype)
    table[:first_found] = START
    table[first_found:] = np.arange(first_found, n_states)[:, None]
    by_byte = np.ascontiguousarray(step.T).ravel()
    longest_first = np.argsort(-lengths, kind="stable")[: np.count_nonzero(lengths)]
    for begin in range(0, len(longest_first), _CHUNK):
        tokens = longest_first[begin : begin + _CHUNK]
        state = np.tile(np.arange(first_found), (len(tokens), 1))
        for offset in range(lengths[tokens[0]]):
            active = int(np.count_nonzero(lengths[tokens] > offset))
            byte = data[starts[tokens[:active]] + offset].astype(np.intp)
            state[:active] = by_byte.take(byte[:, None] * n_states + state[:active])
        table[:first_found, tokens] = state.T
    return table


def _completions(
    table: np.ndarray,
    step: np.ndarray,
    first_found: int,
    data: np.ndarray,
    starts: np.ndarray,
    lengths: np.ndarray,
) -> tuple[np.ndarray, np.ndarray]:
    """Keys of the (state, token) pairs that complete a pattern, and each token's bytes after it."""
    state, token = np.nonzero(table[:first_found] >= first_found)
    keys = state.astype(np.int64) * table.shape[1] + token
    left_over = np.empty(len(keys), dtype=np.int64)
    waiting = np.arange(len(keys))
    offset = 0
    while len(waiting):  # every pair completes within its token, so each leaves in time
        state[waiting] = step[state[waiting], data[starts[token[waiting]] + offset]]
        done = state[waiting] >= first_found
        left_over[waiting[done]] = lengths[token[waiting[done]]] - offset - 1
        waiting = waiting[~done]
        offset += 1
    smallest = np.result_type(np.min_scalar_type(-1 - int(left_over.max(initial=0))), np.int8)
    return keys, left_over.astype(smallest)
