"""SentencePiece tokenizers that are exact on every text, and how to train one."""

import hashlib
import io
import re
from collections.abc import Iterable, Sequence
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import sentencepiece

from rlver_jax.text.template import FILE, FolderTemplate
from rlver_jax.text.tokenizer_base import CHATML, Tokenizer, check_text

SPACE = "\u2581"  # SentencePiece's stand-in for a space
REMEDY = "Train one with rlver_jax.text.tokenizer.train_sentencepiece."

# The trainer's options that make a model exact, and its training repeatable and silent.
EXACT: dict[str, Any] = {
    "normalization_rule_name": "identity",
    "byte_fallback": True,
    "add_dummy_prefix": False,
    "remove_extra_whitespaces": False,
    "required_chars": SPACE,
    "split_digits": True,
    "unk_id": 0,
    "bos_id": -1,
    "eos_id": -1,
    "pad_id": -1,
    "num_threads": 1,
    "minloglevel": 2,
}


class SentencePieceTokenizer(Tokenizer):
    """A SentencePiece model with byte fallback and no normalization at all.

    SentencePiece writes a space as U+2581, so the character U+2581 itself would come back as a space: it is
    encoded as its three byte tokens instead. In a model without a piece for the space, so is a space.
    """

    def __init__(self, model_file: str | Path):
        """Reads a `.model` file. Raises FileNotFoundError, or ValueError for a model that can't be exact."""
        path = Path(model_file)
        if not path.is_file():
            raise FileNotFoundError(f"no SentencePiece model at {path}: give a .model file. {REMEDY}")
        self._content = path.read_bytes()
        try:
            self._model = sentencepiece.SentencePieceProcessor(model_proto=self._content)
        except RuntimeError as error:
            raise ValueError(f"{path} is not a SentencePiece model ({error}). {REMEDY}") from None
        self._byte_ids = _byte_ids(self._model, path)
        _check_normalizer(self._model, path)
        model, ids = self._model, range(self._model.vocab_size())
        special = {model.id_to_piece(i): i for i in ids if model.is_control(i) or model.is_unknown(i)}
        pieces = [model.id_to_piece(i).replace(SPACE, " ").encode("utf-8") for i in ids]
        for token in special.values():
            pieces[token] = b""
        for byte, token in enumerate(self._byte_ids):
            pieces[token] = bytes([byte])
        super().__init__(pieces, special, str(path))
        self.template = FolderTemplate.read(path.parent)
        has_space = not model.is_unknown(model.piece_to_id(SPACE))
        self._escaped = re.compile(f"({SPACE}+)" if has_space else f"([{SPACE} ]+)")

    def encode(self, text: str) -> list[int]:
        """Ids of plain text; never a special id. Raises ValueError for text with lone surrogates."""
        check_text(text)
        tokens: list[int] = []
        for i, part in enumerate(self._escaped.split(text)):  # odd parts are the escaped ones
            tokens += [self._byte_ids[b] for b in part.encode("utf-8")] if i % 2 else self._model.encode(part)
        return tokens

    def save(self, folder: str | Path) -> None:
        """Writes `folder/tokenizer.model`, and the chat template where there is one."""
        Path(folder).mkdir(parents=True, exist_ok=True)
        (Path(folder) / "tokenizer.model").write_bytes(self._content)
        if self.template is not None:
            (Path(folder) / FILE).write_text(self.template.source, encoding="utf-8")

    @cached_property
    def fingerprint(self) -> str:
        """SHA-256 of the model file, which holds everything."""
        return hashlib.sha256(self._content).hexdigest()

    def proto(self) -> Any:
        """The model as SentencePiece's message ModelProto: its pieces with scores and kinds, and how it was trained."""
        from sentencepiece import sentencepiece_model_pb2  # needs protobuf, which few commands do

        proto = sentencepiece_model_pb2.ModelProto()  # type: ignore[attr-defined]
        proto.ParseFromString(self._content)
        return proto

    @cached_property
    def rules(self) -> dict[str, str]:
        """See `Tokenizer`."""
        proto, special = self.proto(), set(self.special_ids.values())
        pieces = [(p.piece, p.score, p.type) for i, p in enumerate(proto.pieces) if i not in special]
        text = repr((proto.trainer_spec.model_type, pieces))
        return {"scores of their pieces": hashlib.sha256(text.encode("utf-8")).hexdigest()}


def train_sentencepiece(
    texts: Iterable[str],
    path: str | Path,
    vocab_size: int,
    *,
    model_type: str = "bpe",
    special: Sequence[str] = CHATML,
    symbols: Sequence[str] = ("\n",),
) -> SentencePieceTokenizer:
    """Trains a model that `SentencePieceTokenizer` accepts, writes it to `path`, and opens it.

    Ids: `<unk>` 0, then `special`, `symbols`, the 256 bytes, and the learned pieces. Equal input gives an
    equal file.

    Args:
        texts: training sentences; any order of the same sentences may give another model.
        path: the `.model` file to write; its folder is made if needed.
        vocab_size: size of the vocabulary, specials and bytes included.
        model_type: "bpe" or "unigram".
        special: control tokens, never produced by text; must hold the three of ChatML.
        symbols: strings that are always one token of their own.

    Raises:
        ValueError: no text, or `vocab_size` that is too small or more than the texts can fill.
    """
    options = {
        "model_type": model_type,
        "vocab_size": vocab_size,
        "control_symbols": list(special),
        "user_defined_symbols": list(symbols),
    }
    content = _train(_sentences(texts), options)
    Path(path).parent.mkdir(parents=True, exist_ok=True)
    Path(path).write_bytes(content)
    return SentencePieceTokenizer(path)


def _sentences(texts: Iterable[str]) -> list[str]:
    """What the trainer can read: it takes U+2581 for a space, and drops whole sentences that hold NUL."""
    sentences = [part for text in texts for part in re.split(f"[{SPACE}\0]+", text) if part]
    if not sentences:
        raise ValueError("no text to train a SentencePiece model on: `texts` gave nothing but empty strings")
    for sentence in sentences:
        check_text(sentence)
    return sentences


def _train(sentences: list[str], options: dict[str, Any]) -> bytes:
    """Runs the trainer; returns the model file's content."""
    longest = max(len(sentence.encode("utf-8")) for sentence in sentences)
    buffer = io.BytesIO()
    try:
        sentencepiece.SentencePieceTrainer.train(
            sentence_iterator=iter(sentences),
            model_writer=buffer,
            max_sentence_length=max(10, longest + 1),  # longer ones would be dropped; 10 is the least allowed
            **EXACT,
            **options,
        )
    except RuntimeError as error:
        raise ValueError(
            f"SentencePiece could not train with {options} on {len(sentences)} sentences. Its own words, "
            f"which name the sizes it could train: {error}"
        ) from None
    return buffer.getvalue()


def _byte_ids(model: sentencepiece.SentencePieceProcessor, path: Path) -> list[int]:
    """Ids of the 256 byte tokens, in order. Raises ValueError if the model lacks any."""
    ids = [model.piece_to_id(f"<0x{byte:02X}>") for byte in range(256)]
    absent = sum(not model.is_byte(token) for token in ids)
    if absent:
        raise ValueError(
            f"{path} was trained without byte fallback ({absent} of 256 byte tokens are absent), so "
            f"characters that it has not seen would be lost. {REMEDY}"
        )
    return ids


def _check_normalizer(model: sentencepiece.SentencePieceProcessor, path: Path) -> None:
    """Refuses a model whose normalizer changes text, naming the option that does."""
    codes = np.arange(0x110000, dtype="<u4")
    characters = codes[(codes < 0xD800) | (codes > 0xDFFF)].tobytes().decode("utf-32-le")  # without surrogates
    probes = {  # each shows one fault if the ones before it are absent
        "add_dummy_prefix must be False": "a",
        "remove_extra_whitespaces must be False": "  a  b  ",
        "normalization_rule_name must be identity": characters.replace(" ", "").replace(SPACE, "") + "e\u0301",
    }
    for option, probe in probes.items():
        if model.normalize(probe) != probe.replace(" ", SPACE):
            raise ValueError(f"{path} changes text before it encodes it: {option}. {REMEDY}")
