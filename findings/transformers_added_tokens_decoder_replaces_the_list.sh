#!/usr/bin/env bash
# transformers 5.24.0, Qwen2Tokenizer: one entry of added_tokens_decoder in tokenizer_config.json removes all other added tokens.
#
# tokenizer.json lists <|im_start|>, <|im_end|> and <think> as added tokens. A tokenizer_config.json whose added_tokens_decoder names
# <think> alone (to change one of its flags) leaves <think> alone: <|im_end|> is split into pieces like any text, and its id is never
# produced. An absent added_tokens_decoder leaves all three; so does PreTrainedTokenizerFast with the entry. Nothing warns.
#
# Hurt: who edits or writes tokenizer_config.json by hand or by a script, e.g. to make <think> special: dialogues lose their ends.
set -euo pipefail
work="$(mktemp -d)"
trap 'rm -rf "$work"' EXIT
"${PYTHON:-python3}" -m venv "$work/venv"
"$work/venv/bin/pip" install -q 'transformers==5.24.0'
cd "$work" && TRANSFORMERS_NO_ADVISORY_WARNINGS=1 venv/bin/python - <<'PY'
import json
import warnings
from pathlib import Path

from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers
from transformers import AutoTokenizer

warnings.simplefilter("error")
tokenizer = Tokenizer(models.BPE({piece: i for i, piece in enumerate(sorted(pre_tokenizers.ByteLevel.alphabet()))}, []))
tokenizer.pre_tokenizer, tokenizer.decoder = pre_tokenizers.ByteLevel(add_prefix_space=False), decoders.ByteLevel()
tokenizer.add_tokens([AddedToken(name, special=True) for name in ("<|im_start|>", "<|im_end|>", "<think>")])
think = tokenizer.token_to_id("<think>")
decoder = {str(think): {"content": "<think>", "special": False, "normalized": False}}
lengths = {}
for name, config in (("absent", {}), ("one entry", {"added_tokens_decoder": decoder})):
    folder = Path(name)
    folder.mkdir()
    tokenizer.save(str(folder / "tokenizer.json"))
    (folder / "tokenizer_config.json").write_text(json.dumps({"tokenizer_class": "Qwen2Tokenizer"} | config))
    (folder / "config.json").write_text(json.dumps({"model_type": "qwen2"}))
    lengths[name] = [len(AutoTokenizer.from_pretrained(folder)(text).input_ids) for text in ("<|im_end|>", "<think>")]
    print(f"added_tokens_decoder {name}: <|im_end|> is {lengths[name][0]} token(s), <think> {lengths[name][1]}")
raise SystemExit(lengths != {"absent": [1, 1], "one entry": [10, 1]})
PY
