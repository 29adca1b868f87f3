"""Added tokens that are not special are text, as in `transformers`: read, decoded, sampled; they close thoughts."""

import json
import unicodedata

import numpy as np
import pytest
import transformers
from hypothesis import given
from hypothesis import strategies as st

from rlver_jax.decoding.grammar import free_text, one_line, thought_then_say
from rlver_jax.profiles.schema import read_profiles
from rlver_jax.text.automaton import THINK_CLOSE, build_automaton
from rlver_jax.text.tokenizer import HFTokenizer, load_tokenizer
from tests.text.conftest import ADDED, THINK, as_published, sentences, write_bpe
from tests.text.test_tokenizer import quick

WORDS = [*THINK, "<tool_call>"]


def changed(folder, **flags):
    """A folder as the thinker's, whose `<think>` has other flags."""
    as_published(write_bpe(folder, [*ADDED, *THINK]))
    spec = json.loads((folder / "tokenizer.json").read_text(encoding="utf-8"))
    for token in spec["added_tokens"]:
        if token["content"] == "<think>":
            token.update(flags)
    (folder / "tokenizer.json").write_text(json.dumps(spec), encoding="utf-8")
    return folder


def ids_of(folder, text):
    return transformers.AutoTokenizer.from_pretrained(folder).encode(text, add_special_tokens=False)


@pytest.fixture(scope="session")
def reference(thinker_folder):
    return transformers.AutoTokenizer.from_pretrained(thinker_folder)


@quick
@given(
    text=st.lists(
        st.one_of(st.sampled_from([*WORDS, " ", "\n", "</th", "ink>", "<", "再见"]), st.text(max_size=6)), max_size=9
    ).map(lambda parts: unicodedata.normalize("NFC", "".join(parts)))
)
def test_ids_are_those_of_transformers(reference, thinker, text):
    ids = thinker.encode(text)
    assert ids == reference.encode(text)
    assert b"".join(map(thinker.token_bytes, ids)) == text.encode()
    assert not set(ids) & set(thinker.special_ids.values())


def test_they_are_one_token_with_their_own_bytes(reference, thinker):
    for word in WORDS:
        number = reference.convert_tokens_to_ids(word)
        assert thinker.encode(f"a{word}\n")[1] == number
        assert thinker.token_bytes(number) == word.encode()
        assert word not in thinker.special_ids
    assert thinker.decode(reference.encode("<think>\nhm</think>\n\nok")) == "<think>\nhm</think>\n\nok"


def test_they_close_a_thought(thinker):
    """`</think>` as one token, from every state, whatever of the tag was begun before it."""
    (close,) = thinker.encode("</think>")
    automaton = build_automaton([THINK_CLOSE], thinker)
    assert (automaton.table[:, close] == automaton.first_found).all()
    assert [automaton.remainder(state, close) for state in range(automaton.first_found)] == [0] * 8


@pytest.mark.parametrize("enforce", [False, True])
def test_a_grammar_lets_them_be_said(thinker, enforce):
    rows = thinker.vocab_size + 3
    words = [thinker.encode(word)[0] for word in WORDS]
    for grammar in (free_text(thinker, rows), one_line(thinker, rows)):
        assert not np.asarray(grammar.forbidden)[grammar.begin, words].any()
    grammar = thought_then_say(thinker, rows, enforce=enforce)
    forbidden, table, state = np.asarray(grammar.forbidden), np.asarray(grammar.table), grammar.begin
    for token in thinker.encode("hm\n</think>\n\nok"):
        assert not forbidden[state, token]
        state = int(table[state, token])
    assert grammar.first_found <= state < grammar.begin
    assert not forbidden[state, thinker.im_end_id]
    if enforce:
        assert np.asarray(grammar.closing).tolist() == thinker.encode("\n</think>\n\n")
        assert len(grammar.closing) == 3, "a line end, the tag, and two line ends"


@pytest.mark.parametrize("far", [2, 10**9])
def test_ids_with_a_gap_are_refused(tmp_path, far):
    """The tokenizers library gives such a token the next free id, and so does transformers."""
    folder = write_bpe(tmp_path)
    spec = json.loads((folder / "tokenizer.json").read_text())
    last = spec["added_tokens"][-1]
    free = last["id"]
    last["id"] += far
    (folder / "tokenizer.json").write_text(json.dumps(spec))
    theirs = transformers.PreTrainedTokenizerFast(tokenizer_file=str(folder / "tokenizer.json"))
    assert theirs.convert_tokens_to_ids(last["content"]) == free, "not the file's"
    with pytest.raises(ValueError, match=rf"no token has the id {free}, but '{last['content']}' has {free + far}"):
        HFTokenizer(folder)


def test_ids_beyond_the_tokenizer_are_never_said(thinker):
    """Rows of the embedding that no token has."""
    rows = thinker.vocab_size + 3
    forbidden = np.asarray(free_text(thinker, rows).forbidden)
    assert forbidden[:, thinker.vocab_size :].all()
    assert not forbidden[0, thinker.vocab_size - 1]


def test_an_older_file_of_added_tokens_counts_too(tmp_path):
    """Where tokenizer_config.json has no list of its own."""
    folder = as_published(write_bpe(tmp_path, [*ADDED, *THINK]))
    number = len(transformers.AutoTokenizer.from_pretrained(folder))
    (folder / "added_tokens.json").write_text(json.dumps({"<note>": number, "[PAD]": number + 1}))
    (folder / "special_tokens_map.json").write_text('{"pad_token": "[PAD]"}')
    theirs, ours = transformers.AutoTokenizer.from_pretrained(folder), HFTokenizer(folder)
    text = "a<note> b <note></think>"
    assert number in ours.encode(text)
    assert ours.encode(text) == theirs.encode(text)
    assert ours.special_ids["[PAD]"] == theirs.convert_tokens_to_ids("[PAD]") == number + 1


@pytest.mark.parametrize(
    "change",
    [
        {"model": {"vocab": None}},
        {"model": {"vocab": [["a", 0.1]]}},
        {"model": {"merges": None}},
        {"pre_tokenizer": "ByteLevel"},
        {"pre_tokenizer": {"type": "Sequence"}},
        {"normalizer": {}},
        {"added_tokens": [{"id": float("inf"), "content": "<x>"}]},
        {"added_tokens": [{"id": 0, "content": None}]},
    ],
    ids=str,
)
def test_malformed_sections_are_refused_by_the_file(tmp_path, change):
    file = write_bpe(tmp_path) / "tokenizer.json"
    spec = json.loads(file.read_text())
    for name, value in change.items():
        spec[name] = spec[name] | value if name == "model" else value
    file.write_text(json.dumps(spec))
    with pytest.raises(ValueError, match=r"tokenizer\.json.*copy (it|both) again"):
        HFTokenizer(file.parent)


@pytest.mark.parametrize(
    ("generation", "config", "further"),
    [
        ({"eos_token_id": [0, 1, 2, 3]}, {}, [0, 3]),
        ({"eos_token_id": 3}, {"eos_token_id": 0}, [3]),
        ({}, {"eos_token_id": 0}, [0]),
        ({"eos_token_id": None}, {"eos_token_id": [1]}, []),
        ({}, {}, []),
    ],
)
def test_ids_that_the_folder_ends_a_text_with(tmp_path, generation, config, further):
    """As transformers' `generate`: generation_config.json, else config.json. Text ends nothing."""
    names = ["<|eot|>", "<|im_end|>", "<|endoftext|>", "<|eom|>"]  # by their places in the lists above
    folder = as_published(write_bpe(tmp_path, [*names, "<|im_start|>"]))
    number = load_tokenizer(folder).special_ids
    ids = lambda tokens: [number[names[i]] for i in (tokens if isinstance(tokens, list) else [tokens])]  # noqa: E731
    listed = lambda fields: {k: v if v is None else ids(v) for k, v in fields.items()}  # noqa: E731
    (folder / "generation_config.json").write_text(json.dumps(listed(generation)))
    (folder / "config.json").write_text(json.dumps({"model_type": "qwen2"} | listed(config)))
    tokenizer = load_tokenizer(folder)
    want = {number["<|im_end|>"], number["<|endoftext|>"], *ids(further)}
    assert set(tokenizer.stop_ids) == want
    for grammar in (free_text(tokenizer, tokenizer.vocab_size), thought_then_say(tokenizer, tokenizer.vocab_size)):
        ends = np.asarray(grammar.table)[grammar.begin] == grammar.stop
        assert set(np.flatnonzero(ends)) == want
        assert not np.asarray(grammar.forbidden)[grammar.begin, sorted(want)].any()


@pytest.mark.parametrize(
    "config",
    [
        {"pad_token": "<think>"},
        {"additional_special_tokens": ["<think>"]},
        {"extra_special_tokens": {"thought_token": "<think>"}},
        {"eos_token": {"content": "<think>", "__type": "AddedToken"}},
    ],
)
def test_what_the_config_names_is_special(tmp_path, config):
    folder = as_published(write_bpe(tmp_path, [*ADDED, *THINK]), **config)
    added = transformers.AutoTokenizer.from_pretrained(folder).added_tokens_decoder
    assert {token.content for token in added.values() if token.special} >= {"<think>"}
    tokenizer = HFTokenizer(folder)
    special = {token.content: number for number, token in added.items() if token.special}
    assert tokenizer.special_ids == special
    assert tokenizer.decode(tokenizer.encode("<think>")) == "<think>"
    assert special["<think>"] not in tokenizer.encode("<think>")


def test_the_older_file_of_special_tokens_counts_too(tmp_path):
    folder = as_published(write_bpe(tmp_path, [*ADDED, *THINK]))
    (folder / "special_tokens_map.json").write_text('{"additional_special_tokens": ["<think>"]}')
    added = transformers.AutoTokenizer.from_pretrained(folder).added_tokens_decoder
    special = {token.content: number for number, token in added.items() if token.special}
    assert "<think>" in special
    assert HFTokenizer(folder).special_ids == special


def test_a_chatml_token_is_special_whatever_the_file_says(tmp_path):
    folder = write_bpe(tmp_path)
    spec = json.loads((folder / "tokenizer.json").read_text())
    for token in spec["added_tokens"]:
        token["special"] = False
    (folder / "tokenizer.json").write_text(json.dumps(spec))
    tokenizer = HFTokenizer(folder)
    assert set(tokenizer.special_ids) == set(ADDED[:3])
    assert tokenizer.im_end_id not in tokenizer.encode("a<|im_end|>")


def test_the_configs_flags_go_before_the_files(tmp_path):
    """`added_tokens_decoder`, where there is one, as AutoTokenizer has it."""
    folder = as_published(write_bpe(tmp_path, [*ADDED, *THINK]))
    spec = json.loads((folder / "tokenizer.json").read_text())["added_tokens"]
    told = {str(t["id"]): {k: v for k, v in t.items() if k != "id"} for t in spec}
    told[str(spec[-1]["id"])]["special"] = True
    as_published(folder, added_tokens_decoder=told)
    added = transformers.AutoTokenizer.from_pretrained(folder).added_tokens_decoder
    special = {token.content: number for number, token in added.items() if token.special}
    assert "</think>" in special
    assert HFTokenizer(folder).special_ids == special
    as_published(folder, added_tokens_decoder={"1": told[str(spec[-1]["id"])]})
    with pytest.raises(ValueError, match=rf"'</think>' as id {spec[-1]['id']}, but .* as id 1; download or copy both"):
        HFTokenizer(folder)


@pytest.mark.parametrize("flags", [{"lstrip": True}, {"rstrip": True}, {"lstrip": True, "rstrip": True}])
def test_white_space_beside_them_is_kept(tmp_path, flags):
    """Where `transformers` swallows it."""
    folder = changed(tmp_path, **flags)
    text = "a  <think> \nb"
    assert transformers.AutoTokenizer.from_pretrained(folder).decode(ids_of(folder, text)) != text
    tokenizer = HFTokenizer(folder)
    assert tokenizer.decode(tokenizer.encode(text)) == text
    assert tokenizer.encode("a<think>b") == ids_of(folder, "a<think>b")


@pytest.mark.parametrize("flags", [{"single_word": True}, {"normalized": True}])
def test_other_flags_mean_what_they_mean_to_transformers(tmp_path, flags):
    folder = changed(tmp_path, **flags)
    tokenizer = HFTokenizer(folder)
    for text in ("a <think> b", "a<think>b", "<think>", "x</think><think>\n"):
        assert tokenizer.encode(text) == ids_of(folder, text)
        assert tokenizer.decode(tokenizer.encode(text)) == text


def test_a_word_of_the_vocabulary_may_be_added_too(tmp_path):
    """What `add_tokens` does with a word that is a piece already: it keeps its id, and is found inside of words."""
    folder = as_published(write_bpe(tmp_path))
    spec = json.loads((folder / "tokenizer.json").read_text())
    piece = max((p for p in spec["model"]["vocab"] if p.isascii() and p.isalpha()), key=len)
    flags = dict.fromkeys(("single_word", "lstrip", "rstrip", "normalized", "special"), False)
    spec["added_tokens"].insert(0, {"id": spec["model"]["vocab"][piece], "content": piece} | flags)
    (folder / "tokenizer.json").write_text(json.dumps(spec))
    tokenizer = HFTokenizer(folder)
    for text in (piece, f"x{piece}y {piece}", *sentences()[:20]):
        assert tokenizer.encode(text) == ids_of(folder, text)
        assert tokenizer.decode(tokenizer.encode(text)) == text


def test_two_texts_of_one_id_are_refused(tmp_path):
    folder = write_bpe(tmp_path)
    spec = json.loads((folder / "tokenizer.json").read_text())
    spec["added_tokens"][-1]["id"] = 70
    (folder / "tokenizer.json").write_text(json.dumps(spec))
    with pytest.raises(ValueError, match="id 70 is the added token '</tool_call>' and b"):
        HFTokenizer(folder)


@pytest.mark.parametrize("token", [{"content": "<x>"}, {"id": 900}, {"id": "x", "content": "<x>"}, 3, None])
@pytest.mark.parametrize("where", ["file", "config"])
def test_a_malformed_list_is_named(tmp_path, token, where):
    folder = write_bpe(tmp_path)
    spec = json.loads((folder / "tokenizer.json").read_text())
    if where == "file":
        spec["added_tokens"].append(token)
    else:
        told = {"x": token} if token == {"content": "<x>"} else {"900": 3 if isinstance(token, dict) else token}
        as_published(folder, added_tokens_decoder=told)
    (folder / "tokenizer.json").write_text(json.dumps(spec))
    with pytest.raises(ValueError, match="lists an added token that has no text or no id"):
        HFTokenizer(folder)


def test_merges_of_what_is_no_piece_are_named(tmp_path):
    folder = write_bpe(tmp_path)
    spec = json.loads((folder / "tokenizer.json").read_text())
    spec["model"]["merges"].append(["q", "☃"])
    (folder / "tokenizer.json").write_text(json.dumps(spec))
    with pytest.raises(ValueError, match="the tokenizers library can't read it"):
        HFTokenizer(folder)


def test_what_is_text_decides_the_fingerprint(tmp_path, thinker):
    folder = changed(tmp_path / "a", special=True)
    assert HFTokenizer(folder).fingerprint != thinker.fingerprint
    assert HFTokenizer(write_bpe(tmp_path / "b", [*ADDED, *THINK])).fingerprint == thinker.fingerprint


def test_a_tokenizer_without_such_tokens_keeps_its_fingerprint(tmp_path):
    """That of 13487f7, in which they were all special."""
    folder = write_bpe(tmp_path, ADDED[:3])
    assert HFTokenizer(folder).fingerprint == "14f4b1e0d0c562c5680f96e962a9054dbd1ba766e067805ed0c871b20dc2d88e"


@pytest.mark.real
def test_ids_of_published_profiles(checkpoint, published, qwen):
    """Every text of the published profiles that is in NFC: AutoTokenizer's ids."""
    reference = transformers.AutoTokenizer.from_pretrained(checkpoint)
    profiles = read_profiles(sorted(published.glob("*.jsonl")))
    texts = {text for p in profiles for text in vars(p).values() if isinstance(text, str)}
    texts = [text for text in texts if unicodedata.is_normalized("NFC", text)]
    assert len(texts) > 1000
    assert [qwen.encode(text) for text in texts] == reference(texts)["input_ids"]


def test_ids_of_synthetic_texts_as_published(thinker_folder):
    """Half-width, wide, combining, emoji, digits, white space: in NFC, with a Qwen2 folder's own class."""
    reference, tokenizer = transformers.AutoTokenizer.from_pretrained(thinker_folder), load_tokenizer(thinker_folder)
    draw = np.random.default_rng(0)
    pieces = [
        *sentences()[:40],
        "é",
        "각",
        "ﬁ",
        "①",
        "😀👋🏽",
        "\u3000",
        "\u00a0",
        "\r\n",
        "  ",
        "\t",
        "12,345",
        "I'LL",
        "ا",
        "क्ष",
    ]
    for _ in range(300):
        text = unicodedata.normalize("NFC", "".join(draw.choice(pieces, draw.integers(1, 8))))
        assert tokenizer.encode(text) == reference.encode(text)


def test_only_the_files_of_a_slow_tokenizer(tmp_path):
    """The message says how to write the file that is read, and what it says works."""
    folder = as_published(write_bpe(tmp_path / "a b", [*ADDED, *THINK]))
    want = HFTokenizer(folder)
    spec = json.loads((folder / "tokenizer.json").read_text())
    (folder / "vocab.json").write_text(json.dumps(spec["model"]["vocab"]))
    merges = [merge if isinstance(merge, str) else " ".join(merge) for merge in spec["model"]["merges"]]
    (folder / "merges.txt").write_text("\n".join(["#version: 0.2", *merges]))
    flags = [{k: v for k, v in token.items() if k != "id"} for token in spec["added_tokens"]]
    numbers = [str(token["id"]) for token in spec["added_tokens"]]
    as_published(folder, added_tokens_decoder=dict(zip(numbers, flags, strict=True)))
    (folder / "tokenizer.json").unlink()
    with pytest.raises(FileNotFoundError, match="but vocab.json and merges.txt, which are not read") as error:
        load_tokenizer(folder)
    exec(str(error.value).split('python -c "')[1].removesuffix('"'))
    text = "<think>\nI felt awful, 2024.</think>"
    assert load_tokenizer(folder).encode(text) == want.encode(text)


@pytest.mark.parametrize(
    ("file", "content", "says"),
    [
        ("tokenizer_config.json", "[" * 100_000, "is not JSON"),
        ("tokenizer.json", "[" * 100_000, "is not JSON"),
        ("added_tokens.json", "", "is not JSON"),
        ("added_tokens.json", '{"<x>": Infinity}', "added_tokens.json lists an added token that has no text or no id"),
        ("added_tokens.json", '{"<x>": []}', "added_tokens.json lists an added token that has no text or no id"),
        ("added_tokens.json", '{"<think>": 7}', "has '<think>' as id 389, but .*added_tokens.json as id 7"),
        (
            "special_tokens_map.json",
            '{"additional_special_tokens": 5}',
            "additional_special_tokens=5.*a list of tokens",
        ),
        ("tokenizer_config.json", '{"extra_special_tokens": true}', "extra_special_tokens=True.*a list of tokens"),
        ("tokenizer_config.json", '{"chat_template": [{"name": [], "template": "x"}]}', "chat_template is no text"),
        ("generation_config.json", "", "generation_config.json is not JSON"),
    ],
)
def test_malformed_files_beside_it_are_named(tmp_path, file, content, says):
    folder = as_published(write_bpe(tmp_path, [*ADDED, *THINK]))
    (folder / file).write_text(content)
    with pytest.raises(ValueError, match=says):
        load_tokenizer(folder)
