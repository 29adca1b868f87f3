"""Which tokens a generation may contain and where it ends: one state per row and two tables over tokens."""

import dataclasses
from collections.abc import Sequence

import flax.struct
import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Int

from rlver_jax.text.automaton import LINE_END, THINK_CLOSE, TokenAutomaton, build_automaton
from rlver_jax.text.tokenizer import Tokenizer

CLOSING = "\n</think>\n\n"


@flax.struct.dataclass
class Grammar:
    """A byte automaton with two more states: `begin`, before the first token, and `stop`, after a stop token.

    States from `first_found` to `begin` - 1 mean that a pattern has been found.
    """

    table: Int[Array, "N V"]  # next state
    forbidden: Bool[Array, "N V"]  # tokens that may not come next
    first_found: int = flax.struct.field(pytree_node=False)
    begin: int = flax.struct.field(pytree_node=False)
    stop: int = flax.struct.field(pytree_node=False)
    # Forced before the limit where the pattern has not been found by then; empty: nothing is forced.
    closing: Int[Array, "K"] = flax.struct.field(default_factory=lambda: jnp.zeros(0, jnp.int32))

    def matched(self, state: Int[Array, "B"]) -> Bool[Array, "B"]:
        """Whether a pattern has been found (and no stop token has come since)."""
        return (state >= self.first_found) & (state < self.begin)


def _pieces(tokenizer: Tokenizer, vocab_size: int) -> list[bytes]:
    if vocab_size < tokenizer.vocab_size:
        raise ValueError(
            f"the model has {vocab_size} embedding rows but its tokenizer {tokenizer.vocab_size} tokens; the two do "
            f"not belong together: give the folder that holds both"
        )
    return [tokenizer.token_bytes(i) for i in range(tokenizer.vocab_size)] + [b""] * (vocab_size - tokenizer.vocab_size)


def whitespace_tokens(tokenizer: Tokenizer, vocab_size: int) -> np.ndarray:
    """Bool [vocab_size]: tokens of nothing but white space."""
    return np.array([bool(p) and not p.strip() for p in _pieces(tokenizer, vocab_size)])


def _grammar(
    tokenizer: Tokenizer,
    vocab_size: int,
    automaton: TokenAutomaton | None,
    forbidden: np.ndarray,
    begin: np.ndarray,
    closing: str = "",
) -> Grammar:
    """Adds `begin` and `stop`. `forbidden` [n, vocab_size] and `begin` [vocab_size]: what the pattern rules out."""
    table = np.zeros((1, vocab_size), np.int16) if automaton is None else automaton.table
    states = len(table)
    stops = list(tokenizer.stop_ids)
    table = np.concatenate([table, table[:1], np.full((1, vocab_size), states + 1, np.int16)])
    table[:, stops] = states + 1
    never = np.array([not piece for piece in _pieces(tokenizer, vocab_size)])  # special, or no token at all
    never[stops] = False
    # Some base models stop with the end of text; where a message can end, <|im_end|> ends it.
    forbidden = np.concatenate([forbidden, (forbidden[0] | begin)[None], np.zeros((1, vocab_size), bool)]) | never
    first_found = states if automaton is None else automaton.first_found
    end = np.array(tokenizer.encode(closing), np.int32)
    arrays: tuple[Array, Array, Array] = jax.device_put((table, forbidden, end))
    return Grammar(*arrays[:2], first_found, states, states + 1, arrays[2])


def free_text(tokenizer: Tokenizer, vocab_size: int) -> Grammar:
    """Anything up to a stop token: a reply in direct mode."""
    _pieces(tokenizer, vocab_size)
    return _grammar(tokenizer, vocab_size, None, np.zeros((1, vocab_size), bool), np.zeros(vocab_size, bool))


def thought_then_say(tokenizer: Tokenizer, vocab_size: int, *, enforce: bool = False) -> Grammar:
    """A thought, `</think>`, and a reply up to a stop token.

    Qwen merges the tag's end with what follows (`>\n\n`). Tokens that would merge it with more than white space are
    forbidden there, so that thought and reply are separate tokens.

    Args:
        enforce: holds a model that hasn't learned the format to it: no stop token before the reply has visible text,
            and a thought that reaches its limit is closed.
    """
    pieces = _pieces(tokenizer, vocab_size)
    automaton = build_automaton([THINK_CLOSE], tokenizer, pad_vocab_to=vocab_size)
    forbidden = np.zeros(automaton.table.shape, bool)
    for key, left in zip(automaton.completing, automaton.left_over, strict=True):
        state, token = divmod(int(key), vocab_size)
        forbidden[state, token] = left > 0 and bool(pieces[token][-int(left) :].strip())
    if enforce:
        stops, first_found = list(tokenizer.stop_ids), automaton.first_found
        # One more found state, `found + 1`: the reply has visible text. Until then no stop.
        visible = np.full((1, vocab_size), first_found + 1, automaton.table.dtype)
        silent = np.where(whitespace_tokens(tokenizer, vocab_size), first_found, first_found + 1).astype(
            automaton.table.dtype
        )
        table = np.concatenate([automaton.table[:first_found], silent[None], visible])
        forbidden = np.concatenate([forbidden, np.zeros((1, vocab_size), bool)])
        forbidden[: first_found + 1, stops] = True
        automaton = dataclasses.replace(automaton, table=table)
    return _grammar(tokenizer, vocab_size, automaton, forbidden, np.zeros(vocab_size, bool), CLOSING if enforce else "")


def one_line(tokenizer: Tokenizer, vocab_size: int) -> Grammar:
    """One line that is not empty, ended by a line end or a stop token: a field of a script.

    A line end always starts its token (never `.\\n`), so that dropping the last token drops the line end alone.
    """
    pieces = _pieces(tokenizer, vocab_size)
    automaton = build_automaton([LINE_END], tokenizer, pad_vocab_to=vocab_size)
    merged = np.array([piece.find(LINE_END) > 0 for piece in pieces])
    blank = np.array([not piece.strip() for piece in pieces])  # white space, specials and stop tokens
    return _grammar(tokenizer, vocab_size, automaton, np.tile(merged, (len(automaton.table), 1)), blank)


def matcher(patterns: Sequence[bytes], tokenizer: Tokenizer, vocab_size: int) -> tuple[Array, int]:
    """(table, first found state) of an automaton that watches finished text, e.g. for goodbyes."""
    automaton = build_automaton(patterns, tokenizer, pad_vocab_to=vocab_size)
    return jax.device_put(automaton.table), automaton.first_found
