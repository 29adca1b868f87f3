"""Text told piece by piece against Python's own decoding and searching of the whole."""

from hypothesis import example, given
from hypothesis import strategies as st

from rlver_jax.serving.detokenizer import StreamingDetokenizer

TEXTS = st.text(st.sampled_from("ab知👋\n "), max_size=20)


def told(tokenizer, tokens, stop) -> tuple[list[str], bool]:
    detokenizer, pieces = StreamingDetokenizer(tokenizer, stop), []
    for token in tokens:
        pieces.append(detokenizer.add(token))
        if detokenizer.stopped:
            return pieces, True
    pieces.append(detokenizer.finish())
    return pieces, detokenizer.stopped


@given(text=TEXTS, stop=st.lists(st.text(st.sampled_from("ab知👋\n"), min_size=1, max_size=3), max_size=3))
@example(text="aab", stop=["ab", "b"])
@example(text="知", stop=[])
def test_pieces_are_the_text_before_the_first_stop_string(bpe, text, stop):
    """The earliest one in the text wins; byte-level tokens cut characters in pieces."""
    pieces, stopped = told(bpe, bpe.encode(text), stop)
    # A longer stop that begins earlier may be complete only after a shorter one has been seen: the first complete wins.
    ends = {s: text.find(s) + len(s) for s in stop if s in text}
    first = min(ends.values(), default=None)
    starts = [end - len(s) for s, end in ends.items() if end == first]
    assert "".join(pieces) == (text[: min(starts)] if starts else text)
    assert stopped == bool(starts)


def test_half_a_character_is_not_told(bpe):
    tokens = [t for byte in "é👋".encode() for t in range(bpe.vocab_size) if bpe.token_bytes(t) == bytes([byte])]
    assert len(tokens) == 6
    assert told(bpe, tokens, [])[0] == ["", "é", "", "", "", "👋", ""]
    assert told(bpe, tokens[:-1], [])[0][-1] == "\ufffd", "a character that stays incomplete becomes one mark"


def test_what_may_become_a_stop_string_waits(bpe):
    tokens = [bpe.encode(c)[0] for c in "abaab"]
    assert told(bpe, tokens, ["aac"])[0] == ["", "ab", "", "", "aab", ""]
