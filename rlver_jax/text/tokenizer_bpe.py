"""Byte-level BPE tokenizers in the format of the `tokenizers` library: Qwen2.5's."""

import hashlib
import json
from collections.abc import Mapping
from functools import cached_property
from pathlib import Path
from typing import Any

import tokenizers

from rlver_jax.text.tokenizer_base import Tokenizer, check_text

# Everything `transformers` may want beside tokenizer.json; `save` passes these through unchanged.
SIDE_FILES = ("tokenizer_config.json", "special_tokens_map.json", "added_tokens.json", "chat_template.jinja")


class HFTokenizer(Tokenizer):
    """A byte-level BPE `tokenizer.json`, as of Qwen2.5.

    Two parts of the file are not used. Added tokens (`<|im_end|>`, also `<tool_call>`) are never found in
    text. And NFC normalization is left out, so that decoding returns the very text that was encoded. So ids
    differ from those of `transformers` for text that holds such tokens or is not NFC, and for no other.
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
        spec = _plain_bpe(_read_json(path, self._files[path.name]), path)
        added = {token["content"]: int(token["id"]) for token in spec["added_tokens"]}
        super().__init__(_byte_level_pieces(spec["model"]["vocab"], added, path), added, str(path))
        self._spec = spec
        self._bpe = tokenizers.Tokenizer.from_str(json.dumps(spec | {"added_tokens": []}))
        probe = "  It's 3\r\n\n½ of «再见»\t👋🏽 e\u0301 <|im_end|>\x00 "
        if (back := self.decode(self.encode(probe))) != probe:
            raise ValueError(f"{path}: not a lossless byte-level BPE: {probe!r} comes back as {back!r}. Use Qwen2.5's.")

    def encode(self, text: str) -> list[int]:
        """Ids of plain text; never a special id. Raises ValueError for text with lone surrogates."""
        check_text(text)
        return self._bpe.encode(text, add_special_tokens=False).ids

    def save(self, folder: str | Path) -> None:
        """Writes the original files unchanged, so that `transformers` reads them too."""
        Path(folder).mkdir(parents=True, exist_ok=True)
        for name, content in self._files.items():
            (Path(folder) / name).write_bytes(content)

    @cached_property
    def fingerprint(self) -> str:
        """SHA-256 of vocabulary, merges, pre-tokenizer and specials, however the JSON was laid out."""
        model = self._spec["model"]
        merges = [tuple(merge.split(" ")) if isinstance(merge, str) else tuple(merge) for merge in model["merges"]]
        return _digest(
            sorted(model["vocab"].items(), key=lambda item: item[1]),
            merges,
            bool(model.get("ignore_merges")),
            _without(self._spec["pre_tokenizer"], "trim_offsets"),  # offsets only; writers differ in it
            sorted(self.special_ids.items()),
        )


def _digest(*parts: Any) -> str:
    """SHA-256 over the JSON of `parts`."""
    return hashlib.sha256(json.dumps(parts, sort_keys=True).encode("ascii")).hexdigest()


def _without(node: Any, key: str) -> Any:
    """A copy of a JSON value without one key, at any depth."""
    if isinstance(node, dict):
        return {k: _without(v, key) for k, v in node.items() if k != key}
    return [_without(v, key) for v in node] if isinstance(node, list) else node


def _read_json(path: Path, content: bytes) -> dict[str, Any]:
    try:
        spec = json.loads(content)
    except ValueError as error:
        raise ValueError(f"{path} is not JSON ({error}); download or copy it again") from None
    if not isinstance(spec, dict) or not isinstance(spec.get("model"), dict):
        raise ValueError(f"{path} is not a file of the tokenizers library: it has no `model` section")
    return spec


def _steps(section: dict[str, Any] | None, inner: str) -> list[dict[str, Any]]:
    """A pipeline section as a flat list: itself, or the members of a Sequence."""
    if section is None:
        return []
    return section[inner] if section["type"] == "Sequence" else [section]


def _plain_bpe(spec: dict[str, Any], path: Path) -> dict[str, Any]:
    """The spec without all that changes plain text. Raises ValueError if that is not enough."""
    model, added = spec["model"], {token["content"] for token in spec.get("added_tokens", [])}
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
    # Some files list their added tokens in the vocabulary as well, where text could reach them.
    vocab = {piece: int(i) for piece, i in model["vocab"].items() if piece not in added}
    merges = [m for m in model["merges"] if (m.replace(" ", "") if isinstance(m, str) else "".join(m)) in vocab]
    plain = {"normalizer": None, "post_processor": None, "truncation": None, "padding": None}
    return {"added_tokens": []} | spec | plain | {"model": model | {"vocab": vocab, "merges": merges}}


def _byte_level_pieces(vocab: Mapping[str, int], added: Mapping[str, int], path: Path) -> list[bytes]:
    """Bytes of each id, from GPT-2's printable stand-ins. Ids that no piece has stay `b""`."""
    table = {stand_in: byte for byte, stand_in in enumerate(_stand_ins())}
    absent = [byte for stand_in, byte in table.items() if chr(stand_in) not in vocab]
    if absent:
        raise ValueError(f"{path} is not byte-level: it has no piece for {len(absent)} of 256 bytes, first {absent[0]}")
    pieces = [b""] * (1 + max(max(vocab.values()), max(added.values(), default=0)))
    for piece, token in vocab.items():
        try:
            pieces[token] = piece.translate(table).encode("latin-1")
        except UnicodeEncodeError:
            raise ValueError(f"{path} is not byte-level: piece {piece!r} (id {token}) is not made of bytes") from None
    return pieces


def _stand_ins() -> list[int]:
    """GPT-2's table: the code point that stands for each byte; printable Latin-1 stands for itself."""
    printable = {*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)}
    others = iter(range(0x100, 0x200))
    return [byte if byte in printable else next(others) for byte in range(256)]
