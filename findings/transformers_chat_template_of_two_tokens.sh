#!/usr/bin/env bash
# transformers 5.24.0: the length of apply_chat_template's result is 2, however long the conversation is.
#
# In 4.57.3 tokenizer.apply_chat_template(messages) is a list of token ids. In 5.24.0 the same call gives a BatchEncoding with input_ids
# and attention_mask. It is no error to take its length, to compare that with a limit, or to iterate over it: two names, instead of a
# hundred numbers. return_dict=False gives the list in both.
#
# Hurt: who measures prompts against a context window, drops those that are too long, or computes where a reply begins from the length
# of its prompt, as loss masks of fine-tuning do: every prompt has two tokens, nothing is dropped, and prompts are trained on.
set -euo pipefail
work="$(mktemp -d)"
trap 'rm -rf "$work"' EXIT
for version in 4.57.3 5.24.0; do
  "${PYTHON:-python3}" -m venv "$work/$version"
  "$work/$version/bin/pip" install -q "transformers==$version" 'jinja2==3.1.6' 2> /dev/null
  (cd "$work" && TRANSFORMERS_VERBOSITY=error "$version/bin/python" - "$version" <<'PY'
import sys

from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

words = "<unk> <|im_start|> <|im_end|> user assistant how was your day it good".split()
model = Tokenizer(models.WordLevel({word: i for i, word in enumerate(words)}, unk_token="<unk>"))
model.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
tokenizer = PreTrainedTokenizerFast(tokenizer_object=model, unk_token="<unk>")
tokenizer.chat_template = (
    "{% for m in messages %}<|im_start|> {{ m['role'] }} {{ m['content'] }} <|im_end|> {% endfor %}"
)
lengths = {}
for turns in (1, 2, 4):
    messages = [{"role": "user", "content": "how was your day"}, {"role": "assistant", "content": "it was good"}] * turns
    whole = tokenizer.apply_chat_template(messages)
    lengths[turns * 2] = len(whole), len(tokenizer.apply_chat_template(messages, return_dict=False))
    print(
        f"transformers {sys.argv[1]}, {turns * 2} messages: {type(whole).__name__} of length {lengths[turns * 2][0]}; "
        f"with return_dict=False {lengths[turns * 2][1]} token ids"
    )
expected = {n: (n // 2 * 13 if sys.argv[1] == "4.57.3" else 2, n // 2 * 13) for n in lengths}
raise SystemExit(lengths != expected)
PY
  )
done
