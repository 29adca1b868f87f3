"""Whether two models can exchange token ids: what their tokenizers must share, and what they need not."""

import itertools

from rlver_jax.text.tokenizer_base import CHATML, Tokenizer


def difference(one: Tokenizer, other: Tokenizer) -> str | None:
    """What keeps two tokenizers from standing for each other; None: nothing does.

    Every id must stand for the same text in both, and ChatML's three for themselves. Other special tokens are never
    generated or read, so it doesn't matter which of the two has them. And both must split text alike.
    """
    if one is other:
        return None
    first, second = _meanings(one), _meanings(other)
    for token, (here, there) in enumerate(itertools.zip_longest(first, second)):
        if here != there:
            return f"token id {token} is {_shown(one, token)} in the one and {_shown(other, token)} in the other"
    ours, theirs = one.rules, other.rules
    wrong = [name for name in {**ours, **theirs} if ours.get(name) != theirs.get(name)]
    return (
        f"they have the same tokens, but other {' and '.join(wrong)}, so they split text in two ways" if wrong else None
    )


def _meanings(tokenizer: Tokenizer) -> list[bytes | str | None]:
    """Of each id the bytes of text, or the name of a token of ChatML; None for all that is never generated."""
    texts: list[bytes | str | None] = [tokenizer.token_bytes(token) or None for token in range(tokenizer.vocab_size)]
    for name in CHATML:
        texts[tokenizer.special_ids[name]] = name
    return texts


def _shown(tokenizer: Tokenizer, token: int) -> str:
    if token >= tokenizer.vocab_size:
        return "no token"
    if text := tokenizer.token_bytes(token):
        return repr(text.decode("utf-8", errors="backslashreplace"))
    special = {number: name for name, number in tokenizer.special_ids.items()}
    return f"the special token {special[token]}" if token in special else "no token"
