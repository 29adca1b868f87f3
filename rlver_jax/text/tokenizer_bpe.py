"""Byte-level BPE tokenizers in the format of the `tokenizers` library: Qwen2.5's."""

import hashlib
import json
from collections.abc import Iterable
from functools import cached_property
from pathlib import Path
from typing import Any

import tokenizers

from rlver_jax.text.template import CONFIG, FolderTemplate, named_specials, read_config
from rlver_jax.text.tokenizer_base import CHATML, Tokenizer, check_text

# Everything `transformers` may want beside tokenizer.json; `save` passes these through unchanged.
ADDED = "added_tokens.json"
LONG = 4096  # characters; a longer text is encoded as a batch of one, in which the library lets other threads run
SIDE_FILES = ("tokenizer_config.json", "special_tokens_map.json", ADDED, "chat_template.jinja")


class HFTokenizer(Tokenizer):
    """A byte-level BPE `tokenizer.json`, as of Qwen2.5.

    Added tokens that are not special (`<think>` of QwQ and Qwen3, `<tool_call>`) are text: `encode` finds them, and
    they stand for their own bytes. Special ones (`<|im_end|>`) are never found in text. So `encode` gives the ids of
    `transformers.AutoTokenizer` for all text in NFC that holds the name of no special token, provided that the file's
    pre-tokenizer is Qwen2's: AutoTokenizer 5.24 puts the one of its class in place of a Qwen2 folder's own, and its
    normalizer too. Here the file's own splits the text, and no normalizer changes it, so that decoding returns the very
    text that was encoded: what is not NFC keeps its own ids. For the same reason the white space beside an added token
    stays text, even where the file says `lstrip` or `rstrip`.
    """

    def __init__(self, folder: str | Path):
        """Reads `folder/tokenizer.json`. Raises FileNotFoundError; ValueError if it is of another kind."""
        path = Path(folder) / "tokenizer.json"
        if not path.is_file():
            raise FileNotFoundError(f"no tokenizer.json in {folder}: give the folder of a Qwen2.5 checkpoint")
        self._files = {path.name: path.read_bytes()}
        for name in SIDE_FILES:
            if (side := path.with_name(name)).is_file():
                self._files[name] = side.read_bytes()
        raw = _read_json(path, self._files[path.name])
        self.template = FolderTemplate.read(path.parent)
        added = _added_tokens(raw, path)
        words = {token["content"]: token["id"] for token in added if not token["special"]}
        special = {token["content"]: token["id"] for token in added if token["special"]}
        try:
            spec = _plain_bpe(raw, added, path)
            pieces = _byte_level_pieces(spec["model"]["vocab"], words, special, path)
        except (AttributeError, IndexError, KeyError, OverflowError, TypeError) as error:
            raise ValueError(
                f"{path} is not laid out as the tokenizers library writes it ({type(error).__name__}: {error}); "
                f"download or copy it again"
            ) from error
        super().__init__(pieces, special, str(path))
        self._spec, self._words = spec, words
        unspecial = [token | {"lstrip": False, "rstrip": False} for token in added if not token["special"]]
        model = spec["model"] | {"vocab": spec["model"]["vocab"] | words}  # so each keeps its id
        try:
            self._bpe = tokenizers.Tokenizer.from_str(json.dumps(spec | {"added_tokens": unspecial, "model": model}))
        except Exception as error:  # the library raises nothing narrower
            raise ValueError(f"{path}: the tokenizers library can't read it ({error}); copy it again") from None
        probe = f"  It's 3\r\n\n½ of «再见»\t👋🏽 e\u0301 <|im_end|>\x00 {' '.join(words)}{''.join(words)} "
        if (back := self.decode(self.encode(probe))) != probe:
            raise ValueError(f"{path}: not a lossless byte-level BPE: {probe!r} comes back as {back!r}. Use Qwen2.5's.")

    def encode(self, text: str) -> list[int]:
        """Ids of plain text; never a special id. Raises ValueError for text with lone surrogates."""
        check_text(text)
        if len(text) > LONG:
            return self._bpe.encode_batch_fast([text], add_special_tokens=False)[0].ids
        return self._bpe.encode(text, add_special_tokens=False).ids

    def save(self, folder: str | Path) -> None:
        """Writes the original files unchanged, so that `transformers` reads them too."""
        Path(folder).mkdir(parents=True, exist_ok=True)
        for name, content in self._files.items():
            (Path(folder) / name).write_bytes(content)

    @cached_property
    def fingerprint(self) -> str:
        """SHA-256 of vocabulary, merges, pre-tokenizer and added tokens, however the JSON was laid out."""
        model = self._spec["model"]
        return _digest(
            sorted(model["vocab"].items(), key=lambda item: item[1]),
            self._merges,
            bool(model.get("ignore_merges")),
            _without(self._spec["pre_tokenizer"], "trim_offsets"),  # offsets only; writers differ in it
            sorted((self.special_ids | self._words).items()),
            *([sorted(self._words)] if self._words else []),
        )

    @cached_property
    def rules(self) -> dict[str, str]:
        """See `Tokenizer`."""
        single = [t["content"] for t in self._spec["added_tokens"] if t.get("single_word")]
        return {
            "merges": _digest(self._merges, bool(self._spec["model"].get("ignore_merges"))),
            "pre-tokenizers": _digest(_without(self._spec["pre_tokenizer"], "trim_offsets")),
            "added tokens that are whole words": _digest(sorted(set(single) & set(self._words))),
        }

    @property
    def _merges(self) -> list[tuple[str, ...]]:
        return [_pair(merge) for merge in self._spec["model"]["merges"]]


def _digest(*parts: Any) -> str:
    """SHA-256 over the JSON of `parts`."""
    return hashlib.sha256(json.dumps(parts, sort_keys=True).encode("ascii")).hexdigest()


def _without(node: Any, key: str) -> Any:
    """A copy of a JSON value without one key, at any depth."""
    if isinstance(node, dict):
        return {k: _without(v, key) for k, v in node.items() if k != key}
    return [_without(v, key) for v in node] if isinstance(node, list) else node


def _read_json(path: Path, content: bytes) -> dict[str, Any]:
    """The file's object. Raises ValueError if it is none, or has no `model`."""
    try:
        spec = json.loads(content)
    except (ValueError, RecursionError) as error:
        raise ValueError(f"{path} is not JSON ({error}); download or copy it again") from None
    if not isinstance(spec, dict) or not isinstance(spec.get("model"), dict):
        raise ValueError(f"{path} is not a file of the tokenizers library: it has no `model` section")
    return spec


def _pair(merge: str | Iterable[str]) -> tuple[str, ...]:
    """A merge of either layout."""
    return tuple(merge.split(" ") if isinstance(merge, str) else merge)


def _steps(section: dict[str, Any] | None, inner: str) -> list[dict[str, Any]]:
    """A pipeline section as a flat list: itself, or the members of a Sequence."""
    if section is None:
        return []
    return section[inner] if section["type"] == "Sequence" else [section]


def _plain_bpe(spec: dict[str, Any], added: list[dict[str, Any]], path: Path) -> dict[str, Any]:
    """The spec without all that changes plain text. Raises ValueError if that is not enough."""
    model = spec["model"]
    pre = _steps(spec.get("pre_tokenizer"), "pretokenizers")
    wrong = []
    if model.get("type") != "BPE" or not any(step["type"] == "ByteLevel" for step in pre):
        wrong.append(f"model {model.get('type')} with pre-tokenizers {[step['type'] for step in pre]}")
    if others := [s["type"] for s in _steps(spec.get("normalizer"), "normalizers") if s["type"] != "NFC"]:
        wrong.append(f"normalizers {others}")
    if any(step.get("add_prefix_space") for step in pre):
        wrong.append("add_prefix_space")
    wrong += [name for name in ("dropout", "continuing_subword_prefix", "end_of_word_suffix") if model.get(name)]
    if wrong:
        raise ValueError(f"{path} is not a byte-level BPE of Qwen2.5's kind: it has {'; '.join(wrong)}")
    # Some files list their added tokens in the vocabulary as well, where text could reach special ones, and other text
    # those that GPT-2's stand-ins spell otherwise.
    hidden = {t["content"] for t in added if t["special"] or not all("!" <= c <= "~" for c in t["content"])}
    vocab = {piece: i for piece, i in model["vocab"].items() if piece not in hidden}
    merges = model["merges"]
    if len(vocab) < len(model["vocab"]):
        merges = [m for m in merges if {"".join(_pair(m)), *_pair(m)} <= vocab.keys()]
    plain = {"normalizer": None, "post_processor": None, "truncation": None, "padding": None}
    return spec | plain | {"added_tokens": added, "model": model | {"vocab": vocab, "merges": merges}}


def _added_tokens(spec: dict[str, Any], path: Path) -> list[dict[str, Any]]:
    """The added tokens as `transformers` has them: tokenizer_config.json says more of what is special.

    Without its list an older layout's added_tokens.json counts.

    Raises:
        ValueError: the two files disagree about an id.
    """
    config = read_config(path.parent)
    older = {} if "added_tokens_decoder" in config else read_config(path.parent, ADDED)
    decoder, side = config.get("added_tokens_decoder") or {}, ADDED if older else CONFIG
    try:
        listed = [{"id": int(number), **token} for number, token in decoder.items()]
        listed += [{"id": int(number), "content": content} for content, number in older.items()]
        in_spec = [token | {"id": int(token["id"])} for token in spec.get("added_tokens") or [] if token["id"] >= 0]
        tokens = {token["content"]: token for token in in_spec}
        assert all(isinstance(token["content"], str) for token in [*listed, *tokens.values()])
    except (AssertionError, AttributeError, KeyError, OverflowError, TypeError, ValueError):
        raise ValueError(
            f"{path} or {side} lists an added token that has no text or no id; download or copy both again"
        ) from None
    for token in listed:
        known = tokens.get(token["content"], token)
        if known["id"] != token["id"]:
            raise ValueError(
                f"{path} has {token['content']!r} as id {known['id']}, but {path.parent / side} as id {token['id']}; "
                "download or copy both again"
            )
        tokens[token["content"]] = known | token
    special = {*CHATML, *named_specials(path.parent)}
    return [
        {"single_word": False, "lstrip": False, "rstrip": False, "normalized": False}
        | token
        | {"special": bool(token.get("special")) or token["content"] in special}
        for token in tokens.values()
    ]


def _check_ids(ids: dict[str, int], path: Path) -> None:
    """Refuses ids with gaps: there the tokenizers library, and so transformers, gives other ids than the file."""
    for text, token in ids.items():
        if type(token) is not int or token < 0:
            raise ValueError(f"{path}: {text!r} has the id {token!r}, expected a whole number; copy it again")
    held = sorted(set(ids.values()))
    lacking = next((i for i, token in enumerate(held) if i != token), None)
    if lacking is not None:
        after = next(text for text, token in ids.items() if token == held[lacking])
        raise ValueError(
            f"{path}: no token has the id {lacking}, but {after!r} has {held[lacking]}; transformers would give it "
            f"another one. Add tokens for the ids between them (as added_tokens), or copy the file again"
        )


def _byte_level_pieces(
    vocab: dict[str, int], words: dict[str, int], special: dict[str, int], path: Path
) -> list[bytes]:
    """Bytes of each id, from GPT-2's printable stand-ins. Ids that no text has stay `b""`."""
    table = {stand_in: byte for byte, stand_in in enumerate(_stand_ins())}
    absent = [byte for stand_in, byte in table.items() if chr(stand_in) not in vocab]
    if absent:
        raise ValueError(f"{path} is not byte-level: it has no piece for {len(absent)} of 256 bytes, first {absent[0]}")
    contents: dict[str, bytes] = {}
    for piece, token in vocab.items():
        try:
            contents[piece] = piece.translate(table).encode("latin-1")
        except UnicodeEncodeError:
            raise ValueError(f"{path} is not byte-level: piece {piece!r} (id {token}) is not made of bytes") from None
    ids = vocab | words | special
    _check_ids(ids, path)
    pieces = [b""] * (1 + max(ids.values()))
    for piece, content in contents.items():
        pieces[vocab[piece]] = content
    for word, token in (words | special).items():
        if pieces[token] and vocab.get(word) != token:
            raise ValueError(f"{path}: id {token} is the added token {word!r} and {pieces[token]!r} of the vocabulary")
        pieces[token] = word.encode() if word in words else b""
    return pieces


def _stand_ins() -> list[int]:
    """GPT-2's table: the code point that stands for each byte; printable Latin-1 stands for itself."""
    printable = {*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)}
    others = iter(range(0x100, 0x200))
    return [byte if byte in printable else next(others) for byte in range(256)]
