"""Both tokenizers are exact for every text, and text never becomes a special token."""

import io
import json
import unicodedata

import pytest
import sentencepiece
import tokenizers
from hypothesis import HealthCheck, example, given, settings
from hypothesis import strategies as st

from rlver_jax.text.tokenizer import (
    HFTokenizer,
    SentencePieceTokenizer,
    load_tokenizer,
    train_sentencepiece,
)
from tests.text.conftest import ADDED, sentences, write_bpe

TRICKY = [
    *ADDED,
    "<unk>",
    "<s>",
    "<0x41>",
    "▁",
    "▁▁a",
    "\0",
    "\n\n",
    " \t ",
    "e\u0301",
    "ﬁ①Ａ",
    "再见",
    "</think>\n\n",
]
texts = st.lists(st.one_of(st.sampled_from(TRICKY), st.text(max_size=8)), max_size=8).map("".join)
quick = settings(
    max_examples=150,
    deadline=None,
    derandomize=True,
    suppress_health_check=[HealthCheck.function_scoped_fixture],
)


@quick
@given(text=texts)
@example("<|im_start|>user\n<|im_end|><tool_call></tool_call>")
@example("▁ ▁a  b \0\r\n\u3000\u00a0\ufeff👋🏽 e\u0301")
def test_text_round_trip(tokenizer, text):
    ids = tokenizer.encode(text)
    assert b"".join(map(tokenizer.token_bytes, ids)) == text.encode("utf-8")
    assert tokenizer.decode(ids) == text
    assert not set(ids) & set(tokenizer.special_ids.values())
    assert all(0 <= token < tokenizer.vocab_size for token in ids)


def test_every_character_round_trips(tokenizer):
    text = "".join(chr(c) for c in range(0x10000) if not 0xD800 <= c < 0xE000) + "😀\U0010ffff"
    assert tokenizer.decode(tokenizer.encode(text)) == text


def test_every_byte_is_some_token(tokenizer):
    assert {bytes([b]) for b in range(256)} <= {tokenizer.token_bytes(i) for i in range(tokenizer.vocab_size)}


def test_specials(tokenizer):
    names = {"<|im_start|>": tokenizer.im_start_id, "<|im_end|>": tokenizer.im_end_id}
    assert names | {"<|endoftext|>": tokenizer.pad_id} == {
        name: tokenizer.special_ids[name] for name in ("<|im_start|>", "<|im_end|>", "<|endoftext|>")
    }
    assert tokenizer.eos_id == tokenizer.im_end_id
    assert len(set(names.values()) | {tokenizer.pad_id}) == 3
    assert all(tokenizer.token_bytes(i) == b"" for i in tokenizer.special_ids.values())
    middle = [tokenizer.im_start_id, *tokenizer.encode("再见"), tokenizer.im_end_id]
    assert tokenizer.decode(middle) == "再见"


def test_cut_character_decodes_to_a_replacement(tokenizer):
    by_bytes = {tokenizer.token_bytes(i): i for i in range(tokenizer.vocab_size)}
    cut = [by_bytes[bytes([b])] for b in "再".encode()[:2]]
    assert tokenizer.decode([*cut, by_bytes[b"!"]]) == "\ufffd!"


def test_refusals(tokenizer):
    with pytest.raises(ValueError, match=r"lone surrogate U\+D83D at index 2"):
        tokenizer.encode("ab\ud83d")
    for token in (-1, tokenizer.vocab_size):
        with pytest.raises(ValueError, match=f"token id {token} is outside"):
            tokenizer.token_bytes(token)


def test_save_and_load(tokenizer, tmp_path):
    tokenizer.save(tmp_path / "a" / "b")
    again = load_tokenizer(tmp_path / "a" / "b")
    assert type(again) is type(tokenizer)
    assert again.fingerprint == tokenizer.fingerprint
    assert again.special_ids == tokenizer.special_ids
    assert again.encode("我今天 felt awful\n") == tokenizer.encode("我今天 felt awful\n")


def check_against_library(folder, tokenizer):
    library = tokenizers.Tokenizer.from_file(str(folder / "tokenizer.json"))
    for text in [*sentences()[:50], "Ünïcödé «»  \r\n x", " 12345\n\n\n"]:
        assert unicodedata.is_normalized("NFC", text)
        assert tokenizer.encode(text) == library.encode(text).ids
    # These two differ on purpose: the library composes the accent, and finds special tokens.
    assert library.encode("e\u0301").ids == tokenizer.encode("\u00e9") != tokenizer.encode("e\u0301")
    assert library.encode("<|im_end|>").ids == [tokenizer.im_end_id]
    assert tokenizer.decode(tokenizer.encode("<|im_end|>")) == "<|im_end|>"


def test_bpe_equals_the_library(bpe_folder, bpe):
    check_against_library(bpe_folder, bpe)


@pytest.mark.real
def test_qwen_equals_the_library(checkpoint, qwen):
    check_against_library(checkpoint, qwen)
    assert qwen.vocab_size == 151665
    assert (qwen.pad_id, qwen.im_start_id, qwen.im_end_id) == (151643, 151644, 151645)


def rewrite(source, target, change):
    """Copies a tokenizer.json after `change(spec)`."""
    spec = json.loads((source / "tokenizer.json").read_text(encoding="utf-8"))
    change(spec)
    target.mkdir(exist_ok=True)
    (target / "tokenizer.json").write_text(json.dumps(spec, indent=1), encoding="utf-8")
    return target


def test_fingerprint_sees_content_not_layout(bpe_folder, bpe, tmp_path):
    def relayout(spec):
        spec["model"]["merges"] = [" ".join(pair) for pair in spec["model"]["merges"]]
        spec["model"]["vocab"] = dict(reversed(spec["model"]["vocab"].items()))

    def swap_merges(spec):
        merges = spec["model"]["merges"]
        merges[0], merges[1] = merges[1], merges[0]

    assert HFTokenizer(rewrite(bpe_folder, tmp_path / "same", relayout)).fingerprint == bpe.fingerprint
    assert HFTokenizer(rewrite(bpe_folder, tmp_path / "other", swap_merges)).fingerprint != bpe.fingerprint
    more = HFTokenizer(write_bpe(tmp_path / "more", [*ADDED, "<|extra|>"]))
    assert more.fingerprint != bpe.fingerprint


def test_added_tokens_inside_the_vocabulary_stay_out_of_reach(bpe_folder, tmp_path):
    def list_twice(spec):
        spec["model"]["vocab"] |= {token["content"]: token["id"] for token in spec["added_tokens"]}
        spec["model"]["ignore_merges"] = True  # takes whole words that the vocabulary lists
        spec["pre_tokenizer"]["pretokenizers"].pop(0)  # so that a whole text is one word

    twice = HFTokenizer(rewrite(bpe_folder, tmp_path / "twice", list_twice))
    assert twice.special_ids["<|im_end|>"] not in twice.encode("<|im_end|>")
    assert twice.decode(twice.encode("<|im_end|>")) == "<|im_end|>"


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda spec: spec.pop("model"), "no `model` section"),
        (lambda spec: spec.update(pre_tokenizer=None), "not a byte-level BPE"),
        (lambda spec: spec["model"].update(dropout=0.1), "dropout"),
        (lambda spec: spec.update(normalizer={"type": "Lowercase"}), "Lowercase"),
        (
            lambda spec: spec["pre_tokenizer"]["pretokenizers"][1].update(add_prefix_space=True),
            "add_prefix_space",
        ),
        (lambda spec: spec["pre_tokenizer"]["pretokenizers"][0].update(behavior="Removed"), "not a lossless"),
        (lambda spec: spec["model"]["vocab"].update({"你": 900}), "not made of bytes"),
        (lambda spec: spec["model"].update(vocab={"a": 0}, merges=[]), "no piece for 255 of 256 bytes"),
        (
            lambda spec: spec.update(added_tokens=spec["added_tokens"][:1]),
            r"no special token <\|im_start\|>, <",
        ),
    ],
)
def test_other_kinds_of_tokenizer_json_are_refused(bpe_folder, tmp_path, change, message):
    with pytest.raises(ValueError, match=message):
        HFTokenizer(rewrite(bpe_folder, tmp_path / "bad", change))


def test_nothing_there(tmp_path, bpe_folder, spm):
    with pytest.raises(FileNotFoundError, match=r"no tokenizer\.json in"):
        HFTokenizer(tmp_path)
    with pytest.raises(FileNotFoundError, match="no SentencePiece model at"):
        SentencePieceTokenizer(tmp_path / "x.model")
    with pytest.raises(FileNotFoundError, match="found nothing; expected a folder with"):
        load_tokenizer(tmp_path / "absent")
    (tmp_path / "notes.txt").write_text("hello")
    with pytest.raises(FileNotFoundError, match=r"found a folder with notes\.txt"):
        load_tokenizer(tmp_path)
    with pytest.raises(FileNotFoundError, match="found another kind of file"):
        load_tokenizer(tmp_path / "notes.txt")
    (tmp_path / "tokenizer.json").write_text("{")
    with pytest.raises(ValueError, match="is not JSON"):
        load_tokenizer(tmp_path)
    (tmp_path / "bad.model").write_bytes(b"hello")
    with pytest.raises(ValueError, match="is not a SentencePiece model"):
        load_tokenizer(tmp_path / "bad.model")
    assert isinstance(load_tokenizer(bpe_folder / "tokenizer.json"), HFTokenizer)


def train_raw(path, **options):
    """A SentencePiece model trained by the library alone; `options` make it a bad one."""
    buffer = io.BytesIO()
    defaults = {
        "sentence_iterator": iter(sentences()),
        "model_writer": buffer,
        "model_type": "bpe",
        "vocab_size": 450,
        "minloglevel": 2,
        "control_symbols": ADDED[:3],
        "byte_fallback": True,
        "add_dummy_prefix": False,
        "remove_extra_whitespaces": False,
        "normalization_rule_name": "identity",
    }
    sentencepiece.SentencePieceTrainer.train(**(defaults | options))
    path.write_bytes(buffer.getvalue())
    return path


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"byte_fallback": False, "vocab_size": 150}, "without byte fallback"),
        ({"add_dummy_prefix": True}, "add_dummy_prefix must be False"),
        ({"remove_extra_whitespaces": True}, "remove_extra_whitespaces must be False"),
        ({"normalization_rule_name": "nfkc"}, "normalization_rule_name must be identity"),
        ({"normalization_rule_name": "nmt_nfkc"}, "must be"),
        ({"control_symbols": ADDED[:2]}, r"no special token <\|im_end\|>"),
        ({"control_symbols": [], "user_defined_symbols": ADDED[:3]}, "no special token"),
    ],
)
def test_other_sentencepiece_models_are_refused(tmp_path, options, message):
    with pytest.raises(ValueError, match=message):
        SentencePieceTokenizer(train_raw(tmp_path / "m.model", **options))


def test_sentencepiece_without_a_piece_for_the_space(tmp_path):
    # The space then falls back to the bytes of U+2581, which would decode to that character.
    path = train_raw(tmp_path / "m.model", sentence_iterator=iter(["今天很难过", "不知道怎么办"] * 20), vocab_size=285)
    model = sentencepiece.SentencePieceProcessor(model_file=str(path))
    assert model.is_unknown(model.piece_to_id("▁")), "the premise: no piece for the space"
    tokenizer = SentencePieceTokenizer(path)
    assert tokenizer.decode(tokenizer.encode("今天 ▁  x")) == "今天 ▁  x"


def test_training_is_repeatable_and_learns_the_texts(tmp_path, spm):
    again = train_sentencepiece(sentences(), tmp_path / "again" / "t.model", 450)
    assert again.fingerprint == spm.fingerprint
    assert again.vocab_size == 450
    assert spm.encode("\n\n") == spm.encode("\n") * 2
    assert len(spm.encode("今天很难过")) <= 3, "15 bytes, seen in a sixth of the sentences"
    other = train_sentencepiece(sentences()[:300], tmp_path / "other.model", 440)
    assert other.fingerprint != spm.fingerprint


def test_training_refuses_what_it_cannot_do(tmp_path):
    with pytest.raises(ValueError, match="no text to train"):
        train_sentencepiece(["", "\0", "▁"], tmp_path / "m.model", 400)
    with pytest.raises(ValueError, match=r"could not train with .*5000.* on 1 sentences.*<= "):
        train_sentencepiece(["a short text"], tmp_path / "m.model", 5000)
    with pytest.raises(ValueError, match=r"could not train with .*100"):
        train_sentencepiece(["a short text"], tmp_path / "m.model", 100)
