"""What every tokenizer gives: exact bytes both ways, and no way for plain text to become a special token.

A reply that holds the characters `<|im_end|>` must not end a turn, so `encode` never yields a special id. A
dialogue is sampled, split and rejoined in token space, so each id stands for exact bytes whatever its
neighbours: `b"".join(map(token_bytes, encode(t))) == t.encode()` for every text `t`.
"""

from abc import ABC, abstractmethod
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path

from rlver_jax.text.template import FolderTemplate

IM_START = "<|im_start|>"
IM_END = "<|im_end|>"
END_OF_TEXT = "<|endoftext|>"
CHATML = (END_OF_TEXT, IM_START, IM_END)


class Tokenizer(ABC):
    """Text to token ids and back, exactly.

    Attributes:
        vocab_size: number of real token ids, `0 .. vocab_size-1`. A model's embedding may have more rows.
        special_ids: name to id of every token that is not text; at least the three of ChatML.
        stop_ids: ids that end a reply: `<|im_end|>`, `<|endoftext|>`, and what else the folder of a model names.
        template: the chat template of the tokenizer's folder; None where it has none.
    """

    vocab_size: int
    special_ids: dict[str, int]
    stop_ids: tuple[int, ...]
    template: FolderTemplate | None = None

    def __init__(self, pieces: Sequence[bytes], special_ids: Mapping[str, int], source: str):
        """Keeps the bytes of each id (`b""` for specials); `source` names the files in error messages."""
        missing = [name for name in CHATML if name not in special_ids]
        if missing:
            raise ValueError(
                f"{source} has no special token {', '.join(missing)}; dialogues are written in ChatML, "
                f"which needs {', '.join(CHATML)}. Use a Qwen2.5 tokenizer or train_sentencepiece."
            )
        self._pieces = tuple(pieces)
        self.vocab_size = len(self._pieces)
        self.special_ids = dict(special_ids)
        self.stop_ids = (self.im_end_id, self.pad_id)

    @abstractmethod
    def encode(self, text: str) -> list[int]:
        """Ids of plain text; never a special id. Raises ValueError for text with lone surrogates."""

    @abstractmethod
    def save(self, folder: str | Path) -> None:
        """Writes the files that `load_tokenizer(folder)` reads; makes the folder if needed."""

    @property
    @abstractmethod
    def fingerprint(self) -> str:
        """Hexadecimal SHA-256 of all that decides ids: equal ones encode and decode alike."""

    @property
    def rules(self) -> dict[str, str]:
        """What decides beside the tokens themselves how text is split: the name of each rule, and its SHA-256."""
        return {"rules": self.fingerprint}

    @property
    def im_start_id(self) -> int:
        """Id of `<|im_start|>`."""
        return self.special_ids[IM_START]

    @property
    def im_end_id(self) -> int:
        """Id of `<|im_end|>`."""
        return self.special_ids[IM_END]

    @property
    def eos_id(self) -> int:
        """Id that ends a message: `<|im_end|>`."""
        return self.im_end_id

    @property
    def pad_id(self) -> int:
        """Id that fills unused positions: `<|endoftext|>`."""
        return self.special_ids[END_OF_TEXT]

    def token_bytes(self, token: int) -> bytes:
        """Exact bytes of one id, `b""` for a special. Raises ValueError outside the vocabulary."""
        if not 0 <= token < self.vocab_size:
            raise ValueError(
                f"token id {token} is outside the tokenizer's 0..{self.vocab_size - 1}. Embedding rows "
                "beyond the vocabulary are padding: ban them when sampling."
            )
        return self._pieces[token]

    def decode(self, tokens: Iterable[int]) -> str:
        """Text of ids. Specials add nothing; bytes that are not UTF-8 (a cut character) become U+FFFD."""
        return b"".join(self.token_bytes(int(token)) for token in tokens).decode("utf-8", errors="replace")


def check_text(text: str) -> None:
    """Refuses what has no bytes in UTF-8; the libraries' own errors don't say what is wrong."""
    try:
        text.encode("utf-8")
    except UnicodeEncodeError as error:
        raise ValueError(
            f"text holds the lone surrogate U+{ord(text[error.start]):04X} at index {error.start}, "
            "so it has no UTF-8 bytes. Read files as UTF-8, or clean it: "
            "text.encode('utf-8', 'replace').decode()."
        ) from None
