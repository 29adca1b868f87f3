"""Opens tokenizers; the one module that other packages import them from."""

from pathlib import Path

from rlver_jax.hub import local_folder
from rlver_jax.text.tokenizer_base import CHATML, END_OF_TEXT, IM_END, IM_START, Tokenizer
from rlver_jax.text.tokenizer_bpe import HFTokenizer
from rlver_jax.text.tokenizer_spm import SentencePieceTokenizer, train_sentencepiece

__all__ = [
    "CHATML",
    "END_OF_TEXT",
    "IM_END",
    "IM_START",
    "HFTokenizer",
    "SentencePieceTokenizer",
    "Tokenizer",
    "load_tokenizer",
    "train_sentencepiece",
]


def load_tokenizer(path: str | Path) -> Tokenizer:
    """Opens a tokenizer: a folder with tokenizer.json or one *.model, either file itself, or a model on the hub.

    Raises FileNotFoundError when nothing of the kind is there, ValueError when what is there can't be used or its chat
    template is not ChatML.
    """
    tokenizer = _open(local_folder(path))
    if tokenizer.template is not None:
        tokenizer.template.check()
    return tokenizer


def _open(path: Path) -> Tokenizer:
    if path.name == "tokenizer.json" and path.is_file():
        return HFTokenizer(path.parent)
    if path.suffix == ".model" and path.is_file():
        return SentencePieceTokenizer(path)
    if (path / "tokenizer.json").is_file() and not (path / "tokenizer.model").is_file():
        return HFTokenizer(path)  # beside a model it is the same one, written for others to read (`export`)
    models = sorted(path.glob("*.model")) if path.is_dir() else []
    named = [model for model in models if model.name == "tokenizer.model"]
    if len(named or models) == 1:
        return SentencePieceTokenizer((named or models)[0])
    if path.is_dir():
        found = "a folder with " + (", ".join(sorted(p.name for p in path.iterdir())[:20]) or "nothing in it")
    else:
        found = "another kind of file" if path.exists() else "nothing"
    raise FileNotFoundError(
        f"no tokenizer at {path}: found {found}; expected a folder with tokenizer.json (Qwen2.5) or with "
        "tokenizer.model or a single *.model (SentencePiece), or one of these files."
    )
