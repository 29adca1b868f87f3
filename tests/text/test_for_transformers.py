"""A SentencePiece tokenizer written for `transformers`: AutoTokenizer gives its ids, or an error, never others."""

import json
import random

import pytest
import transformers
from hypothesis import given
from hypothesis import strategies as st

from rlver_jax.miniature.assets import POLICY, shipped
from rlver_jax.models.families import preset
from rlver_jax.text.chat import ChatTemplate
from rlver_jax.text.for_transformers import as_tokenizers, write_for_transformers
from rlver_jax.text.tokenizer import SentencePieceTokenizer, load_tokenizer, train_sentencepiece
from tests.text.conftest import sentences
from tests.text.test_tokenizer import quick, train_raw

HARD = [
    *("▁", "▁▁a", " ", "  ", "\n", "\n\n", "\0", "<0x41>", "</think>", "<think>"),
    *("e\u0301", "ﬁ①", "再见", "👋🏽", "aaaa", "....", "th"),
]


def write_tokenizer(tokenizer, folder):
    """As `export` leaves it: beside a config of Qwen2's."""
    write_for_transformers(tokenizer, folder)
    (folder / "config.json").write_text(json.dumps(preset("0.5b").to_hf()))
    return folder


@pytest.fixture(scope="module", params=["miniature", "trained"])
def pair(request, tmp_path_factory):
    """(ours, AutoTokenizer's)."""
    ours = load_tokenizer(shipped() / POLICY) if request.param == "miniature" else request.getfixturevalue("spm")
    folder = write_tokenizer(ours, tmp_path_factory.mktemp("written"))
    return ours, transformers.AutoTokenizer.from_pretrained(folder), folder


def check(pair, text):
    ours, theirs, _ = pair
    ids = ours.encode(text)
    assert theirs.encode(text) == ids
    assert theirs.decode(ids, skip_special_tokens=True) == text


@quick
@given(text=st.lists(st.one_of(st.sampled_from(HARD), st.text(max_size=8)), max_size=10).map("".join))
def test_hard_texts(pair, text):
    check(pair, text)


def test_texts_of_its_own_pieces(pair):
    """Pieces in any order and repeated, so that many joins compete: where two libraries part, if they do."""
    draw, ours = random.Random(0), pair[0]
    pieces = [ours.token_bytes(i).decode("utf-8", "ignore") for i in range(ours.vocab_size)]
    for _ in range(1500):
        check(pair, "".join(draw.choices(pieces, k=draw.randint(1, 10))))
        check(pair, draw.choice(pieces) * draw.randint(1, 8) + draw.choice(pieces))
        check(pair, "".join(draw.choices("aabth e.n", k=draw.randint(1, 30))))


def test_texts_of_its_kind(pair):
    for text in sentences():
        check(pair, text)


@pytest.mark.parametrize("generation_prompt", [False, True])
def test_chats(pair, generation_prompt):
    ours, theirs, folder = pair
    talk = [
        {"role": "user", "content": "hi ▁\n"},
        {"role": "assistant", "content": " ok\n"},
        {"role": "user", "content": ""},
    ]
    for messages in (talk, [{"role": "system", "content": "Be kind."}, *talk]):
        want = theirs.apply_chat_template(messages, add_generation_prompt=generation_prompt, return_dict=False)
        for tokenizer in (ours, load_tokenizer(folder)):
            assert ChatTemplate(tokenizer).as_rendered(messages, generation_prompt) == want


def test_what_is_written(pair):
    ours, theirs, folder = pair
    assert len(theirs) == ours.vocab_size
    assert (theirs.eos_token_id, theirs.pad_token_id) == (ours.im_end_id, ours.pad_id)
    assert set(theirs.all_special_ids) == {ours.im_end_id, ours.pad_id}
    special = {t.content: i for i, t in theirs.added_tokens_decoder.items() if t.special}
    assert special == ours.special_ids
    again = load_tokenizer(folder)
    assert isinstance(again, SentencePieceTokenizer), "its own file goes before the one for others"
    assert again.fingerprint == ours.fingerprint


def test_other_ways_to_load_it(pair):
    """By the class that it names; and if Qwen2's is put in its place, as 5.24 does with others, by an error."""
    ours, _, folder = pair
    text = "I felt awful. \n 再见"
    assert transformers.PreTrainedTokenizerFast.from_pretrained(folder).encode(text) == ours.encode(text)
    with pytest.raises(TypeError):
        transformers.Qwen2Tokenizer.from_pretrained(folder)
    with pytest.raises(TypeError):
        transformers.AutoTokenizer.from_pretrained(folder, trust_remote_code=True)


def test_why_all_this(pair, tmp_path):
    """Without it, in 5.24: a Qwen2 class, other ids, no word."""
    ours, _, folder = pair
    for name in ("tokenizer.model", "config.json"):
        (tmp_path / name).write_bytes((folder / name).read_bytes())
    wrong = transformers.AutoTokenizer.from_pretrained(tmp_path)
    assert wrong.encode("I felt awful.") != ours.encode("I felt awful.")


def test_a_unigram_model_is_refused(tmp_path):
    tokenizer = train_sentencepiece(sentences(), tmp_path / "m.model", 320, model_type="unigram")
    with pytest.raises(ValueError, match=r"only a SentencePiece model of type bpe .*model_type='bpe'"):
        write_for_transformers(tokenizer, tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_a_model_that_no_trainer_makes_is_refused(tmp_path, spm):
    proto = spm.proto()
    first, second = [piece for piece in proto.pieces if piece.type == piece.NORMAL][:2]
    second.score = first.score
    (tmp_path / "m.model").write_bytes(proto.SerializeToString())
    with pytest.raises(ValueError, match="pieces of equal scores"):
        as_tokenizers(SentencePieceTokenizer(tmp_path / "m.model"))


def test_without_a_piece_for_the_space(tmp_path):
    path = train_raw(tmp_path / "m.model", sentence_iterator=iter(["今天很难过", "不知道怎么办"] * 20), vocab_size=285)
    ours = SentencePieceTokenizer(path)
    theirs = transformers.AutoTokenizer.from_pretrained(write_tokenizer(ours, tmp_path / "out"))
    for text in ("今天 ▁  x", " 不知道", "\n ▁"):
        check((ours, theirs, None), text)
