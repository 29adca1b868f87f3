"""Two tokenizers may differ in what is never said; a real difference is named by its first token."""

import json

import pytest

from rlver_jax.text.common import difference
from rlver_jax.text.tokenizer import HFTokenizer, train_sentencepiece
from tests.text.conftest import ADDED, sentences, write_bpe
from tests.text.test_tokenizer import rewrite


@pytest.mark.parametrize("more", [["[PAD]"], ["<|extra|>", "[PAD]"]])
def test_further_special_tokens_make_no_difference(tmp_path, bpe, more):
    other = HFTokenizer(write_bpe(tmp_path, [*ADDED, *more]))
    assert other.fingerprint != bpe.fingerprint
    assert difference(bpe, other) is None
    assert difference(other, bpe) is None


def test_special_tokens_of_one_id_may_have_two_names(tmp_path, bpe):
    one = HFTokenizer(write_bpe(tmp_path / "a", [*ADDED, "[PAD]"]))
    other = HFTokenizer(write_bpe(tmp_path / "b", [*ADDED, "<|extra|>"]))
    assert difference(one, other) is None


def test_a_pad_that_is_text_is_a_difference(tmp_path, bpe):
    """Added by `add_tokens`: it could be said."""
    folder = write_bpe(tmp_path, [*ADDED, "[PAD]"])
    last = bpe.vocab_size

    def as_text(spec):
        spec["added_tokens"][-1]["special"] = False

    other = HFTokenizer(rewrite(folder, tmp_path / "text", as_text))
    assert difference(bpe, other) == f"token id {last} is no token in the one and '[PAD]' in the other"
    assert difference(other, bpe) == f"token id {last} is '[PAD]' in the one and no token in the other"


def test_the_first_token_that_differs_is_named(tmp_path, bpe_folder, bpe, thinker):
    def swapped(spec):
        vocab = spec["model"]["vocab"]
        by_id = {number: piece for piece, number in vocab.items()}
        vocab[by_id[300]], vocab[by_id[310]] = 310, 300

    other = HFTokenizer(rewrite(bpe_folder, tmp_path / "swapped", swapped))
    texts = [repr(bpe.token_bytes(n).decode()) for n in (300, 310)]
    assert difference(bpe, other) == f"token id 300 is {texts[0]} in the one and {texts[1]} in the other"
    assert difference(bpe, thinker) == f"token id {bpe.vocab_size} is no token in the one and '<think>' in the other"
    special = HFTokenizer(write_bpe(tmp_path / "special", [*ADDED[:3], "<|x|>", *ADDED[3:]]))
    number = special.special_ids["<|x|>"]
    assert difference(bpe, special).startswith(
        f"token id {number} is '<tool_call>' in the one and the special token <|x|>"
    )


def test_chatml_must_have_one_meaning(tmp_path, bpe):
    other = HFTokenizer(write_bpe(tmp_path, [ADDED[0], ADDED[2], ADDED[1], *ADDED[3:]]))
    message = (
        f"token id {bpe.im_start_id} is the special token <|im_start|> in the one and the special token <|im_end|>"
    )
    assert difference(bpe, other) == f"{message} in the other"


def test_text_must_be_split_alike(tmp_path, bpe_folder, bpe):
    def merges(spec):
        pairs = spec["model"]["merges"]
        pairs[0], pairs[1] = pairs[1], pairs[0]

    def digits(spec):
        split = spec["pre_tokenizer"]["pretokenizers"][0]
        split["pattern"] = {"Regex": split["pattern"]["Regex"].replace(r"\p{N}|", r"\p{N}{1,3}|")}

    for change, named in ((merges, "merges"), (digits, "pre-tokenizers")):
        other = HFTokenizer(rewrite(bpe_folder, tmp_path / named, change))
        assert difference(bpe, other) == f"they have the same tokens, but other {named}, so they split text in two ways"


def test_sentencepiece(tmp_path, spm, bpe):
    assert difference(spm, train_sentencepiece(sentences(), tmp_path / "same.model", 450)) is None
    other = train_sentencepiece(sentences()[:100], tmp_path / "other.model", 450)
    assert difference(spm, other).startswith("token id ")
    assert difference(spm, bpe).startswith("token id 0 is ")


def test_scores_alone_make_a_difference(tmp_path, spm):
    proto = spm.proto()
    last = [piece for piece in proto.pieces if piece.type == piece.NORMAL and len(piece.piece) > 1][:2]
    last[0].score, last[1].score = last[1].score, last[0].score
    (tmp_path / "m.model").write_bytes(proto.SerializeToString())
    other = type(spm)(tmp_path / "m.model")
    assert difference(spm, other) == (
        "they have the same tokens, but other scores of their pieces, so they split text in two ways"
    )


def test_layout_makes_none(tmp_path, bpe_folder, bpe):
    assert difference(bpe, HFTokenizer(rewrite(bpe_folder, tmp_path / "same", lambda spec: json.dumps(spec)))) is None
