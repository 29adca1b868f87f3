#!/usr/bin/env bash
# transformers 5.24: Qwen's byte-level tokenizer does not give back the text that it was given: it composes characters first (NFC).
#
# A byte-level vocabulary has a token for every byte, so one would expect decode(encode(text)) == text, as GPT-2's tokenizer has it. Qwen2's
# class normalizes: accents written as characters of their own (macOS, some keyboards for Vietnamese and Korean) become one character,
# and Chinese compatibility characters become ordinary ones. But decode() of tokens that a model has drawn is not normalized.
#
# Hurt: who logs texts, encodes them again and takes the tokens for those that were sampled (policy gradients, log-probs, prefix
# caches): where a model writes "e" and an accent, the ids differ in number and kind. Log token ids. Offsets and equality tests between
# a prompt and its decoded tokens fail as well.
set -euo pipefail
work="$(mktemp -d)"
trap 'rm -rf "$work"' EXIT
"${PYTHON:-python3}" -m venv "$work/venv"
"$work/venv/bin/pip" install -q 'transformers==5.24.0'
cd "$work" && venv/bin/python - 2> /dev/null <<'PY'
from transformers import GPT2Tokenizer, Qwen2Tokenizer
from transformers.convert_slow_tokenizer import bytes_to_unicode

TEXTS = ("caf" + "e\u0301", "\u1112\u1161\u11ab", "\uf900", "caf\u00e9")
letters = bytes_to_unicode()
vocabulary = {letter: i for i, letter in enumerate(letters.values())} | {"<|endoftext|>": len(letters)}
back = {}
for Tokenizer in (GPT2Tokenizer, Qwen2Tokenizer):
    tokenizer = Tokenizer(vocab=vocabulary, merges=[])
    back[Tokenizer] = [tokenizer.decode(tokenizer.encode(text)) == text for text in TEXTS]
    print(Tokenizer.__name__, {ascii(text): ascii(tokenizer.decode(tokenizer.encode(text))) for text in TEXTS})
drawn = [vocabulary[letters[byte]] for byte in TEXTS[0].encode()]
again = tokenizer.encode(tokenizer.decode(drawn))
print(f"{len(drawn)} tokens drawn by a model, decoded and encoded again: {len(again)} tokens")
raise SystemExit(back != {GPT2Tokenizer: [True] * 4, Qwen2Tokenizer: [False] * 3 + [True]} or len(again) == len(drawn))
PY
