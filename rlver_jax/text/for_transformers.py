"""A SentencePiece tokenizer as files that `transformers.AutoTokenizer` reads, with the same ids.

`transformers` has no reader for a bare SentencePiece model in a Qwen2 folder: it takes Qwen2's class, which finds other
ids without a word. So the model is written as a `tokenizer.json`: the same pieces with the same ids, the space as
itself (SentencePiece's stand-in for it is then a character like others, as it is here), pieces that are always one
token as added tokens, and the order in which pieces were learned as merges.
"""

import json
from pathlib import Path

import tokenizers

from rlver_jax.text.chat import DEFAULT_SYSTEM
from rlver_jax.text.template import CONFIG, FILE
from rlver_jax.text.tokenizer_base import END_OF_TEXT, IM_END
from rlver_jax.text.tokenizer_spm import SPACE, SentencePieceTokenizer

# Plain ChatML, with what `ChatTemplate` takes for a system message where none is given.
TEMPLATE = (
    "{%- if messages and messages[0].role != 'system' %}{{ '<|im_start|>system\\n"
    + DEFAULT_SYSTEM
    + "<|im_end|>\\n' }}"
    "{%- endif %}{%- for message in messages %}{{ '<|im_start|>' + message.role + '\\n' + message.content + "
    "'<|im_end|>\\n' }}{%- endfor %}{%- if add_generation_prompt %}{{ '<|im_start|>assistant\\n' }}{%- endif %}\n"
)


def write_for_transformers(tokenizer: SentencePieceTokenizer, folder: str | Path) -> None:
    """Writes tokenizer.json, tokenizer_config.json and a chat template beside `tokenizer.model`.

    Raises:
        ValueError: the model is none that a tokenizer.json can hold with the same ids; nothing is written.
    """
    converted = as_tokenizers(tokenizer)
    folder = Path(folder)
    tokenizer.save(folder)
    converted.save(str(folder / "tokenizer.json"))
    config = {
        "tokenizer_class": "PreTrainedTokenizerFast",
        # transformers 5 puts Qwen2's class in place of any that a folder of this model type names (without a word, and
        # with other ids), unless the folder has code of its own, even if that is none; and then takes the one named.
        "auto_map": {"AutoTokenizer": [None, None]},
        # Where it is put in place all the same, this ends it: a TypeError in place of wrong ids. Others don't read it.
        "add_prefix_space": "not Qwen2's: load it with PreTrainedTokenizerFast",
        "eos_token": IM_END,
        "pad_token": END_OF_TEXT,
        "clean_up_tokenization_spaces": False,
    }
    (folder / CONFIG).write_text(json.dumps(config, indent=2) + "\n", encoding="utf-8")
    if tokenizer.template is None:
        (folder / FILE).write_text(TEMPLATE, encoding="utf-8")


def as_tokenizers(tokenizer: SentencePieceTokenizer) -> tokenizers.Tokenizer:
    """The tokenizer in the `tokenizers` library.

    Ids are the same for all text but the names of special tokens, which that library finds in text.

    Raises:
        ValueError: the model is not BPE, or was not made by SentencePiece's trainer.
    """
    proto = tokenizer.proto()
    kinds = type(proto.pieces[0])
    if proto.trainer_spec.model_type != proto.trainer_spec.BPE:
        raise ValueError(
            "only a SentencePiece model of type bpe can be written for transformers; this one splits text as no "
            "tokenizer.json does. Train one with train_sentencepiece(..., model_type='bpe')"
        )
    texts = [piece.piece.replace(SPACE, " ") for piece in proto.pieces]
    learned = [
        (piece.score, text) for piece, text in zip(proto.pieces, texts, strict=True) if piece.type == kinds.NORMAL
    ]
    model = tokenizers.models.BPE(
        vocab={text: number for number, text in enumerate(texts)},
        merges=_merges(learned),
        unk_token=texts[proto.trainer_spec.unk_id],
        byte_fallback=True,
    )
    converted = tokenizers.Tokenizer(model)
    converted.decoder = tokenizers.decoders.Sequence([tokenizers.decoders.ByteFallback(), tokenizers.decoders.Fuse()])
    added = {kinds.CONTROL: True, kinds.UNKNOWN: True, kinds.USER_DEFINED: False}
    for piece, text in zip(proto.pieces, texts, strict=True):
        if piece.type in added:
            converted.add_tokens([tokenizers.AddedToken(text, normalized=False, special=added[piece.type])])
    return converted


def _merges(learned: list[tuple[float, str]]) -> list[tuple[str, str]]:
    """All pairs that make a learned piece, in the order in which SentencePiece joins them: the best score first."""
    known = {text for _, text in learned}
    joined = sorted(((score, text) for score, text in learned if len(text) > 1), key=lambda item: -item[0])
    lacking = {character for _, text in joined for character in text if character != " "} - known
    if lacking or len({score for score, _ in joined}) < len(joined):
        raise ValueError(
            "this SentencePiece model is none that its trainer makes (pieces of equal scores, or of characters that "
            "are no pieces), so its ids can't be told to transformers"
        )
    cuts = ((text[:i], text[i:]) for _, text in joined for i in range(1, len(text)))
    return [(left, right) for left, right in cuts if left in known and right in known]
