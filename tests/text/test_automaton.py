"""The automaton finds what `bytes.find` finds, wherever the token borders fall."""

import time

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import HealthCheck, assume, given, settings
from hypothesis import strategies as st

from rlver_jax.text.automaton import GOODBYES, LINE_END, THINK_CLOSE, build_automaton
from rlver_jax.text.tokenizer import CHATML, Tokenizer

quick = settings(
    max_examples=200,
    deadline=None,
    derandomize=True,
    suppress_health_check=[HealthCheck.function_scoped_fixture],
)


class PiecesTokenizer(Tokenizer):
    """Any pieces one likes, after the three specials."""

    def __init__(self, pieces):
        super().__init__([b"", b"", b"", *pieces], {name: i for i, name in enumerate(CHATML)}, "test")

    fingerprint = "pieces"

    def encode(self, text):
        raise NotImplementedError

    def save(self, folder):
        raise NotImplementedError


def first_found(patterns, pieces):
    """By definition, with bytes.find: (token index, pattern index, bytes left in that token), or None.

    A run of tokens ends at each piece without bytes; the first run with a match decides.
    """
    begin = 0
    for end in [i for i, piece in enumerate(pieces) if not piece] + [len(pieces)]:
        run = b"".join(pieces[begin:end])
        hits = [(run.find(p) + len(p), -len(p), k) for k, p in enumerate(patterns) if p in run]
        if hits:
            position, _, pattern = min(hits)
            length = 0
            for token in range(begin, end):
                length += len(pieces[token])
                if length >= position:
                    return token, pattern, length - position
        begin = end + 1
    return None


def check(automaton, patterns, tokenizer, tokens):
    """Compares every step of a run, and the remainder, with the definition."""
    want = first_found(patterns, [tokenizer.token_bytes(t) for t in tokens])
    states = automaton.run(0, tokens)
    at, pattern, left = want or (len(tokens), None, None)
    assert (states[:at] < automaton.first_found).all()
    if want is None:
        return
    assert (states[at:] == automaton.first_found + pattern).all()
    before = int(states[at - 1]) if at else 0
    assert automaton.remainder(before, tokens[at]) == left
    assert automaton.remainder_table()[before, tokens[at]] == left


few_bytes = st.lists(st.sampled_from(b"ab\n"), min_size=1, max_size=5).map(bytes)


@quick
@given(
    patterns=st.lists(few_bytes, min_size=1, max_size=4, unique=True),
    pieces=st.lists(few_bytes, min_size=1, max_size=8),
    data=st.data(),
)
def test_equals_find_on_random_tokens(patterns, pieces, data):
    tokenizer = PiecesTokenizer(pieces)
    automaton = build_automaton(patterns, tokenizer, pad_vocab_to=tokenizer.vocab_size + 2)
    token = st.integers(3, tokenizer.vocab_size - 1)
    tokens = data.draw(st.lists(st.one_of(token, token, token, st.integers(0, 2)), min_size=1, max_size=20))
    check(automaton, patterns, tokenizer, tokens)


@quick
@given(
    data=st.data(),
    head=st.text("</thinkg>\n ab再", max_size=12),
    tail=st.text("></thinkbye \n见", max_size=12),
)
def test_equals_find_on_any_split(tokenizer, lifted, data, head, tail):
    patterns, automaton, by_bytes = lifted
    middle = data.draw(st.sampled_from(["</think>", "</think>\n\n", "再见。", "goodbye", "bye", "</thin", ""]))
    stream = (head + middle + tail).encode()
    tokens = []
    while stream:  # cut a random piece that is a token; one byte always is
        sizes = [n for n in range(1, min(len(stream), 8) + 1) if stream[:n] in by_bytes]
        size = data.draw(st.sampled_from(sizes))
        if data.draw(st.integers(0, 15)) == 15:
            tokens.append(tokenizer.im_end_id)
        tokens.append(by_bytes[stream[:size]])
        stream = stream[size:]
    assume(tokens)
    check(automaton, patterns, tokenizer, tokens)
    own = tokenizer.encode(head + middle + tail)
    check(automaton, patterns, tokenizer, own)


@pytest.fixture(scope="session")
def lifted(tokenizer):
    """Patterns, their automaton, and the id of each piece: made once, for they take long on the real one."""
    patterns = (*GOODBYES, THINK_CLOSE)
    by_bytes = {tokenizer.token_bytes(i): i for i in range(tokenizer.vocab_size)}
    return patterns, build_automaton(patterns, tokenizer), by_bytes


def test_think_close_with_text_after_it(tokenizer):
    # Qwen's tokenizer, and the small one trained like it, merge the bracket with the line ends.
    automaton = build_automaton([THINK_CLOSE], tokenizer)
    tokens = tokenizer.encode("hm</think>\n\nok")
    states = automaton.run(0, tokens)
    at = int(np.argmax(states >= automaton.first_found))
    cut = tokenizer.token_bytes(tokens[at])
    left = automaton.remainder(int(states[at - 1]), tokens[at])
    assert b"".join(map(tokenizer.token_bytes, tokens[: at + 1])) == b"hm</think>" + cut[len(cut) - left :]
    assert b"\n\nok".startswith(cut[len(cut) - left :])
    assert left == (0 if type(tokenizer).__name__ == "SentencePieceTokenizer" else 2)


def states_of(automaton, *tokens):
    return automaton.run(0, list(tokens)).tolist()


def test_by_hand():
    # States: 0 start, 1 after "a"; found: 2 for "ab", 3 for "b". Ids from 3: a, b, ab, xabyb, x, padding.
    automaton = build_automaton([b"ab", b"b"], PiecesTokenizer([b"a", b"b", b"ab", b"xabyb", b"x"]), pad_vocab_to=9)
    assert (automaton.n_states, automaton.n_tokens, automaton.first_found) == (4, 9, 2)
    assert automaton.table.dtype == np.int16
    assert automaton.table.tolist() == [
        [0, 0, 0, 1, 3, 2, 2, 0, 0],
        [0, 0, 0, 1, 2, 2, 2, 0, 0],  # from "a", "b" completes both: the longer one counts
        [2] * 9,
        [3] * 9,
    ]
    assert automaton.remainder_table().tolist() == [
        [-1, -1, -1, -1, 0, 0, 2, -1, -1],
        [-1, -1, -1, -1, 0, 0, 2, -1, -1],
        [-1] * 9,
        [-1] * 9,
    ]
    assert automaton.remainder_table().dtype == np.int8
    assert automaton.patterns == (b"ab", b"b")


def test_first_completed_wins_and_stays():
    automaton = build_automaton([b"bye-bye", b"bye", b"no"], PiecesTokenizer([b"bye-bye", b"no", b"b", b"ye"]))
    bye, no = automaton.first_found + 1, automaton.first_found + 2
    assert states_of(automaton, 3, 4) == [bye, bye]
    assert states_of(automaton, 4, 3) == [no, no]
    assert automaton.remainder(0, 3) == 4
    assert states_of(automaton, 5, 6) == [1, bye]
    assert states_of(automaton, 5, 2, 6)[-1] == 0, "a special token lies between"
    assert states_of(automaton, 5, 6, 2) == [1, bye, bye], "found states outlive special tokens"


def test_long_remainders_need_a_wider_dtype():
    automaton = build_automaton([b"\n"], PiecesTokenizer([b"\n" * 128, b"\n" * 129]))
    assert automaton.left_over.tolist() == [127, 128]
    assert automaton.remainder_table().dtype == np.int16
    assert automaton.remainder_table()[0].tolist() == [-1, -1, -1, 127, 128]


def test_one_gather_per_step_on_device(bpe):
    automaton = build_automaton([THINK_CLOSE, LINE_END], bpe, pad_vocab_to=512)
    rows = np.array([bpe.encode("a b</think>x no")[:6], bpe.encode("I felt awful. \n and so on")[:6]])
    table = jnp.asarray(automaton.table)
    step = lambda state, token: (table[state, token],) * 2  # noqa: E731
    _, states = jax.jit(lambda t: jax.lax.scan(step, jnp.zeros(2, table.dtype), t))(jnp.asarray(rows.T))
    np.testing.assert_array_equal(states.T, automaton.run(0, rows))
    np.testing.assert_array_equal(automaton.run(np.zeros(2, int), rows)[1], automaton.run(0, rows[1]))


def test_goodbyes(bpe):
    automaton = build_automaton(GOODBYES, bpe)
    ends = {
        "那就这样吧，再见。": True, "拜拜啦": True, "OK, goodbye!": True, "Goodbye.": True,
        "Bye, and thanks": True, "Thank you, bye!": True, "好的，下次再说。": False,
        "I walked by the old byway.": False, "再 见": False,
        "I never said goodbye to her.": True,  # documented: matching knows no context
    }  # fmt: skip
    for text, want in ends.items():
        assert (automaton.run(0, bpe.encode(text))[-1] >= automaton.first_found) == want, text


@pytest.mark.parametrize(
    ("patterns", "options", "message"),
    [
        ([], {}, "non-empty sequence of bytes"),
        (b"ab", {}, "non-empty sequence of bytes"),
        ([b"a", b""], {}, "pattern 1 is b''"),
        (["a"], {}, "pattern 0 is 'a'; expected bytes"),
        ([b"a", b"b", b"a"], {}, "pattern 2, b'a', is there twice"),
        ([b"a"], {"pad_vocab_to": 3}, "less than the tokenizer's 4 ids"),
        ([b"x" * 128], {"dtype": np.int8}, "need 129 states, more than int8 can number"),
    ],
)
def test_refusals(patterns, options, message):
    with pytest.raises(ValueError, match=message):
        build_automaton(patterns, PiecesTokenizer([b"a"]), **options)


def test_as_many_states_as_the_dtype_holds():
    automaton = build_automaton([b"x" * 127], PiecesTokenizer([b"x"]), dtype=np.int8)
    assert states_of(automaton, *[3] * 130) == [*range(1, 128), 127, 127, 127]


def test_misuse_is_named():
    automaton = build_automaton([b"a"], PiecesTokenizer([b"a"]))
    with pytest.raises(ValueError, match=r"token ids reach from 3 to 4, but the automaton covers 0\.\.3"):
        automaton.run(0, [3, 4])
    with pytest.raises(ValueError, match="token 1 completes no pattern when read from state 0"):
        automaton.remainder(0, 1)
    with pytest.raises(ValueError, match="token 3 completes no pattern when read from state 1"):
        automaton.remainder(1, 3)


@pytest.mark.real
def test_hundred_states_over_qwen_are_quick(qwen):
    begin = time.perf_counter()
    automaton = build_automaton(GOODBYES, qwen, pad_vocab_to=151936)
    seconds = time.perf_counter() - begin
    assert automaton.n_states >= 90
    assert automaton.table.shape[1] == 151936
    assert (automaton.table[: automaton.first_found, qwen.vocab_size :] == 0).all()
    assert seconds < 3, f"{automaton.n_states} states took {seconds:.1f} s"
