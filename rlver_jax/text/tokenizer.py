"""Opens tokenizers; the one module that other packages import them from."""

from pathlib import Path
from typing import Any

from rlver_jax.config.hub import local_folder
from rlver_jax.text.template import read_config
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
    path = local_folder(path)
    tokenizer = _open(path)
    if tokenizer.template is not None:
        tokenizer.template.check()
    ends = _ends(path if path.is_dir() else path.parent)
    further = ends & set(tokenizer.special_ids.values()) - set(tokenizer.stop_ids)
    tokenizer.stop_ids += tuple(sorted(further))
    return tokenizer


def _ends(folder: Path) -> set[int]:
    """Ids at which transformers' `generate` ends a text of the folder's model."""
    files = ("generation_config.json", "config.json")  # the first one that says it
    candidates = (read_config(folder, file).get("eos_token_id") for file in files)
    ids: Any = next((ids for ids in candidates if ids is not None), [])
    return {token for token in (ids if isinstance(ids, list) else [ids]) if type(token) is int}


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
    if (path / "vocab.json").is_file() and (path / "merges.txt").is_file():
        raise FileNotFoundError(
            f"no tokenizer.json at {path}, but vocab.json and merges.txt, which are not read; write it once: python -c "
            f"\"from transformers import AutoTokenizer as T; T.from_pretrained('{path}').save_pretrained('{path}')\""
        )
    if path.is_dir():
        contents = "a folder with " + (", ".join(sorted(p.name for p in path.iterdir())[:20]) or "nothing in it")
    else:
        contents = "another kind of file" if path.exists() else "nothing"
    raise FileNotFoundError(
        f"no tokenizer at {path}: found {contents}; expected a folder with tokenizer.json (Qwen2.5) or with "
        "tokenizer.model or a single *.model (SentencePiece), or one of these files."
    )
