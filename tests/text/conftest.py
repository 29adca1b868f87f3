"""What the tokenizers of the tests are made of; the fixtures themselves are in tests/conftest.py."""

import json
import random
from pathlib import Path

import pytest
import tokenizers

from rlver_jax.text.tokenizer import HFTokenizer

QWEN_REGEX = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+"
    r"|\s+(?!\S)|\s+"
)
THINK = ["<think>", "</think>"]  # text, as in QwQ and Qwen3
ADDED = ["<|endoftext|>", "<|im_start|>", "<|im_end|>", "<tool_call>", "</tool_call>"]
# The part of Qwen2.5's chat template that dialogues without tools use.
TEMPLATE = (
    "{% if messages[0]['role'] != 'system' %}{{ '<|im_start|>system\nYou are Qwen, created by Alibaba Cloud. "
    "You are a helpful assistant.<|im_end|>\n' }}{% endif %}"
    "{% for message in messages %}{{ '<|im_start|>' + message.role + '\n' + message.content + '<|im_end|>' + "
    "'\n' }}{% endfor %}{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)

# What Qwen3's does in dialogues without tools, in our words: thoughts of earlier replies are left out, those after the
# last question are kept, and a last reply without one has an empty thought, as has the next one where none is wanted.
QWEN3 = """{%- set last = namespace(user=-1) %}
{%- for m in messages %}{%- if m.role == 'user' %}{%- set last.user = loop.index0 %}{%- endif %}{%- endfor %}
{%- for m in messages %}
    {%- set thought, text = '', m.content %}
    {%- if m.role == 'assistant' and m.reasoning_content is string %}
        {%- set thought = m.reasoning_content.strip('\\n') %}
    {%- elif m.role == 'assistant' and '</think>' in text %}
        {%- set thought = text.split('</think>')[0].split('<think>')[-1].strip('\\n') %}
        {%- set text = text.split('</think>')[-1].lstrip('\\n') %}
    {%- endif %}
    {%- if m.role == 'assistant' and loop.index0 > last.user and (loop.last or thought) %}
        {%- set text = '<think>\\n' + thought + '\\n</think>\\n\\n' + text.lstrip('\\n') %}
    {%- endif %}
    {{- '<|im_start|>' + m.role + '\\n' + text + '<|im_end|>\\n' }}
{%- endfor %}
{%- if add_generation_prompt %}
    {{- '<|im_start|>assistant\\n' }}
    {%- if enable_thinking is defined and enable_thinking is false %}{{- '<think>\\n\\n</think>\\n\\n' }}{%- endif %}
{%- endif %}"""


def sentences() -> list[str]:
    """A few hundred sentences of the kind the project sees."""
    draw = random.Random(0)
    who = ["我", "妈妈", "我的朋友", "I", "my boss", "She's my sister, and she"]
    what = ["今天很难过", "不知道怎么办", "又吵架了", "felt awful", "did not listen", "said goodbye"]
    end = ["。", "！\n", ", 2024.\n\n", "</think>\n\n", " <think>\n", "再见。"]
    return [draw.choice(who) + " " + draw.choice(what) + draw.choice(end) for _ in range(400)]


def write_bpe(folder, special=ADDED):
    """Writes a small tokenizer.json as Qwen2.5's: NFC, its regular expression, byte level, added tokens."""
    bpe = tokenizers.Tokenizer(tokenizers.models.BPE())
    bpe.normalizer = tokenizers.normalizers.NFC()
    bpe.pre_tokenizer = tokenizers.pre_tokenizers.Sequence(
        [
            tokenizers.pre_tokenizers.Split(tokenizers.Regex(QWEN_REGEX), "isolated"),
            tokenizers.pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
        ]
    )
    bpe.decoder = tokenizers.decoders.ByteLevel()
    alphabet = tokenizers.pre_tokenizers.ByteLevel.alphabet()
    trainer = tokenizers.trainers.BpeTrainer(vocab_size=500, initial_alphabet=alphabet, show_progress=False)
    bpe.train_from_iterator(sentences(), trainer)
    for token in special:  # as in Qwen2.5 and Qwen3, the tokens of tools and of thoughts are added but not special
        flagged = "tool" not in token and token not in THINK
        bpe.add_tokens([tokenizers.AddedToken(token, normalized=False, special=flagged)])
    folder.mkdir(parents=True, exist_ok=True)
    bpe.save(str(folder / "tokenizer.json"))
    config = {"tokenizer_class": "PreTrainedTokenizerFast", "chat_template": TEMPLATE}
    (folder / "tokenizer_config.json").write_text(json.dumps(config), encoding="utf-8")
    return folder


def as_published(folder: Path, **config) -> Path:
    """Makes a folder of `write_bpe` one that AutoTokenizer opens as Qwen2's: with its class, and fields of your own."""
    path = folder / "tokenizer_config.json"
    config_json = json.loads(path.read_text(encoding="utf-8")) | {"tokenizer_class": "Qwen2Tokenizer"} | config
    path.write_text(json.dumps(config_json), encoding="utf-8")
    (folder / "config.json").write_text('{"model_type": "qwen2"}', encoding="utf-8")
    return folder


@pytest.fixture(scope="session")
def thinker_folder(tmp_path_factory) -> Path:
    """A tokenizer in whose vocabulary a thought's tags are tokens."""
    return as_published(write_bpe(tmp_path_factory.mktemp("thinker"), [*ADDED, *THINK]))


@pytest.fixture(scope="session")
def thinker(thinker_folder) -> HFTokenizer:
    return HFTokenizer(thinker_folder)


def write_qwen3(folder: Path) -> Path:
    """A tokenizer and a chat template as Qwen3's."""
    return as_published(write_bpe(folder, [*ADDED, *THINK]), eos_token="<|im_end|>", chat_template=QWEN3)
