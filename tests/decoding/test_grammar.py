"""What grammars allow, against the bytes of whole token sequences."""

import itertools

import numpy as np
import pytest

from rlver_jax.decoding.grammar import free_text, matcher, one_line, thought_then_say, whitespace_tokens

SPARE = 5  # embedding rows without a token


def rows_of(tokenizer):
    return tokenizer.vocab_size + SPARE


def walk(grammar, tokens):
    """(states after each token, whether every token was allowed)."""
    table, forbidden = np.asarray(grammar.table), np.asarray(grammar.forbidden)
    state, allowed, states = grammar.begin, True, []
    for token in tokens:
        allowed &= not forbidden[state, token]
        state = int(table[state, token])
        states.append(state)
    return states, allowed


def allowed_first(grammar):
    return ~np.asarray(grammar.forbidden)[grammar.begin]


def random_walk(grammar, seed, ends, length=600):
    """Tokens that a model without any taste might say; one of `ends`, where it is allowed, now and then."""
    draw, table, forbidden = np.random.default_rng(seed), np.asarray(grammar.table), np.asarray(grammar.forbidden)
    state, tokens = grammar.begin, []
    while len(tokens) < length and state != grammar.stop:
        token = draw.choice(ends)
        if draw.random() < 0.95 or forbidden[state, token]:
            token = draw.choice(np.nonzero(~forbidden[state])[0])
        tokens.append(int(token))
        state = int(table[state, token])
        if grammar.first_found <= state < grammar.begin and grammar.first_found < 2:
            break  # a line ends where its pattern is found
    return tokens, state


@pytest.mark.parametrize("build", [free_text, thought_then_say, one_line])
def test_specials_and_spare_rows_are_never_said(build, tokenizer):
    grammar = build(tokenizer, rows_of(tokenizer))
    forbidden = np.asarray(grammar.forbidden)
    assert forbidden.shape == (grammar.stop + 1, rows_of(tokenizer))
    specials = set(tokenizer.special_ids.values()) - {tokenizer.im_end_id, tokenizer.pad_id}
    assert specials
    assert forbidden[:, [*specials, *range(tokenizer.vocab_size, rows_of(tokenizer))]].all()
    assert not forbidden[: grammar.stop].all(axis=1).any(), "no state without a way on"
    table = np.asarray(grammar.table)
    assert (table[:, [tokenizer.im_end_id, tokenizer.pad_id]] == grammar.stop).all()


def test_free_text_forbids_nothing_else(tokenizer):
    grammar = free_text(tokenizer, rows_of(tokenizer))
    text = [t for t in range(tokenizer.vocab_size) if t not in tokenizer.special_ids.values()]
    assert allowed_first(grammar)[text].all()
    states, allowed = walk(grammar, [*tokenizer.encode("a\n</think>\n"), tokenizer.im_end_id])
    assert allowed
    assert grammar.stop not in states[:-1]
    assert states[-1] == grammar.stop


def test_a_line_is_one_visible_line(tokenizer):
    """Every token of the vocabulary as the first and as a later one, by what its bytes say."""
    grammar = one_line(tokenizer, rows_of(tokenizer))
    start = tokenizer.encode("ab")
    states, allowed = walk(grammar, start)
    assert allowed
    later = ~np.asarray(grammar.forbidden)[states[-1]]
    for token in range(tokenizer.vocab_size):
        piece = tokenizer.token_bytes(token)
        stop = token in (tokenizer.im_end_id, tokenizer.pad_id)
        special = token in tokenizer.special_ids.values()
        whole = b"\n" not in piece[1:] or piece[:1] == b"\n"  # no line end merged with words before it
        assert allowed_first(grammar)[token] == (whole and not special and bool(piece.strip())), piece
        assert later[token] == (stop or (whole and not special)), piece


@pytest.mark.parametrize("seed", range(8))
def test_any_walk_through_a_line_ends_alike(seed, tokenizer):
    """What is left without the last token has no line end and is not blank."""
    grammar = one_line(tokenizer, rows_of(tokenizer))
    tokens, state = random_walk(grammar, seed, [tokenizer.im_end_id, *tokenizer.encode("\n")])
    assert state == grammar.stop or state >= grammar.first_found
    body = b"".join(map(tokenizer.token_bytes, tokens[:-1]))
    assert b"\n" not in body
    assert body.strip()


def test_the_border_of_a_thought_is_a_border_of_tokens(tokenizer):
    """All tokens that can complete `</think>`: allowed iff nothing but white space follows within the token."""
    grammar = thought_then_say(tokenizer, rows_of(tokenizer))
    forbidden, table = np.asarray(grammar.forbidden), np.asarray(grammar.table)
    seen = 0
    for length in range(8):
        prefix, rest = b"</think>"[:length], b"</think>"[length:]
        state = grammar.begin
        for byte_token in map(tokenizer.encode, prefix.decode()):
            state = int(table[state, byte_token[0]])
        for token in range(tokenizer.vocab_size):
            piece = tokenizer.token_bytes(token)
            if not piece.startswith(rest):
                continue
            seen += 1
            assert grammar.first_found <= table[state, token] < grammar.begin
            assert forbidden[state, token] == bool(piece[len(rest) :].strip()), piece
    assert seen, "some token completes the tag"


def merged_spm(tmp_path):
    from rlver_jax.text.tokenizer import train_sentencepiece

    symbols = ["\n", ">The", ">\n\n", "</think>x", "</think>"]
    return train_sentencepiece(["some words"] * 5, tmp_path / "t.model", 280, symbols=symbols)


def test_merges_over_the_border_are_forbidden(tmp_path):
    tokenizer = merged_spm(tmp_path)
    ids = {tokenizer.token_bytes(i): i for i in range(tokenizer.vocab_size)}
    grammar = thought_then_say(tokenizer, tokenizer.vocab_size)
    assert not walk(grammar, [ids[b"</think>x"]])[1]
    spelt = [ids[bytes([c])] for c in b"</think"]
    assert not walk(grammar, [*spelt, ids[b">The"]])[1]
    assert walk(grammar, [ids[b">The"]])[1], "elsewhere it is an ordinary token"
    for end in (b">\n\n", b">"):
        states, allowed = walk(grammar, [*spelt, ids[end]])
        assert allowed
        assert states[-1] == grammar.first_found


def test_enforced_format_cannot_be_broken(tokenizer):
    grammar = thought_then_say(tokenizer, rows_of(tokenizer), enforce=True)
    stops = [tokenizer.im_end_id, tokenizer.pad_id]
    forbidden = np.asarray(grammar.forbidden)
    thought = tokenizer.encode("a thought\n</think>")
    for tokens, may_stop in (
        ([], False),
        (thought[:3], False),
        (thought, False),
        ([*thought, *tokenizer.encode("\n\n")], False),
        ([*thought, *tokenizer.encode("\n\nI")], True),
        ([*thought, *tokenizer.encode("I\n")], True),
    ):
        states, allowed = walk(grammar, tokens)
        assert allowed
        state = states[-1] if states else grammar.begin
        assert (~forbidden[state, stops] == may_stop).all(), tokenizer.decode(tokens)
        after_tag = len(tokens) >= len(thought)
        assert (grammar.first_found <= state < grammar.begin) == after_tag
    for cut in range(len(thought)):  # wherever a thought is cut, the closing leads to a say
        states, _ = walk(grammar, [*thought[:cut], *np.asarray(grammar.closing).tolist()])
        assert grammar.first_found <= states[-1] < grammar.begin
        assert forbidden[states[-1], stops].all()
    plain = thought_then_say(tokenizer, rows_of(tokenizer))
    assert plain.closing.size == 0
    assert allowed_first(plain)[tokenizer.im_end_id], "without it a model may break the format"


def test_whitespace_tokens(tokenizer):
    mask = whitespace_tokens(tokenizer, rows_of(tokenizer))
    for token in range(tokenizer.vocab_size):
        assert mask[token] == tokenizer.token_bytes(token).isspace()
    assert not mask[tokenizer.vocab_size :].any()


def test_matcher_follows_finished_text(tokenizer):
    table, first_found = matcher([b"bye", "再见".encode()], tokenizer, rows_of(tokenizer))
    table = np.asarray(table)
    for text, matches in (("good bye!", True), ("我说再见。", True), ("by e", False), ("再 见", False)):
        states = itertools.accumulate(tokenizer.encode(text), lambda s, t: int(table[s, t]), initial=0)
        assert (list(states)[-1] >= first_found) == matches


def test_a_model_with_too_few_rows_is_refused(tokenizer):
    with pytest.raises(ValueError, match="give the folder that holds both"):
        one_line(tokenizer, tokenizer.vocab_size - 1)
