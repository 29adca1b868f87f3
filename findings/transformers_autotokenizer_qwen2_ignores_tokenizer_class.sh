#!/usr/bin/env bash
# transformers 5.24.0: beside a config.json of model_type qwen2, AutoTokenizer ignores tokenizer_class and reads another tokenizer.
#
# A folder whose tokenizer_config.json says PreTrainedTokenizerFast and whose tokenizer.json holds a BPE without Qwen's byte level is
# opened as Qwen2Tokenizer: its pre-tokenizer and normalizer take the place of the file's, and ids are others. No error, no warning.
# The same two files without the config.json, or PreTrainedTokenizerFast.from_pretrained on the same folder, give the file's own ids.
#
# Hurt: who trains a Qwen2 architecture with a tokenizer of their own (SentencePiece turned into tokenizer.json, a small vocabulary) and
# serves the export: the model reads other tokens than it was trained on.
set -euo pipefail
work="$(mktemp -d)"
trap 'rm -rf "$work"' EXIT
"${PYTHON:-python3}" -m venv "$work/venv"
"$work/venv/bin/pip" install -q 'transformers==5.24.0'
cd "$work" && TRANSFORMERS_NO_ADVISORY_WARNINGS=1 venv/bin/python - <<'PY'
import json
import warnings
from pathlib import Path

from tokenizers import Tokenizer, decoders, models, normalizers
from transformers import AutoTokenizer, PreTrainedTokenizerFast

warnings.simplefilter("error")
pieces = ["<unk>", *"▁abcdehlorw", "▁h", "▁he", "ll", "▁hell", "▁hello"]
merges = [("▁", "h"), ("▁h", "e"), ("l", "l"), ("▁he", "ll"), ("▁hell", "o")]
tokenizer = Tokenizer(models.BPE({piece: i for i, piece in enumerate(pieces)}, merges, unk_token="<unk>"))
tokenizer.normalizer = normalizers.Replace(" ", "▁")
tokenizer.decoder = decoders.Replace("▁", " ")
text = " hello world"
right = tokenizer.encode(text).ids
for folder in (Path("with"), Path("without")):
    folder.mkdir()
    tokenizer.save(str(folder / "tokenizer.json"))
    (folder / "tokenizer_config.json").write_text(json.dumps({"tokenizer_class": "PreTrainedTokenizerFast"}))
Path("with/config.json").write_text(json.dumps({"model_type": "qwen2", "architectures": ["Qwen2ForCausalLM"]}))
auto = AutoTokenizer.from_pretrained("with")
alone = AutoTokenizer.from_pretrained("without")
named = PreTrainedTokenizerFast.from_pretrained("with")
print(f"the file: {right}")
print(f"AutoTokenizer beside config.json: {type(auto).__name__} {auto(text).input_ids}")
print(f"AutoTokenizer without: {type(alone).__name__} {alone(text).input_ids}; the class named: {named(text).input_ids}")
changed = type(auto).__name__ != "Qwen2Tokenizer" or auto(text).input_ids == right
raise SystemExit(changed or not (alone(text).input_ids == named(text).input_ids == right))
PY
