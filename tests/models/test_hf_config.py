"""`config.json` in every layout that transformers reads: our reading against its own, and what is refused."""

import dataclasses
import importlib.util
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from rlver_jax.models.families import PRESETS, Qwen2Config, Qwen3Config
from rlver_jax.models.rope import RopeScaling

ABSENT = object()
CARD = {"factor": 4.0, "original_max_position_embeddings": 32768, "type": "yarn"}  # as the model card gives it
# https://huggingface.co/Qwen/Qwen2.5-7B-Instruct/blob/main/config.json
PUBLISHED = {
    "architectures": ["Qwen2ForCausalLM"],
    "attention_dropout": 0.0,
    "bos_token_id": 151643,
    "eos_token_id": 151645,
    "hidden_act": "silu",
    "hidden_size": 3584,
    "initializer_range": 0.02,
    "intermediate_size": 18944,
    "max_position_embeddings": 32768,
    "max_window_layers": 28,
    "model_type": "qwen2",
    "num_attention_heads": 28,
    "num_hidden_layers": 28,
    "num_key_value_heads": 4,
    "rms_norm_eps": 1e-06,
    "rope_theta": 1000000.0,
    "sliding_window": 131072,
    "tie_word_embeddings": False,
    "torch_dtype": "bfloat16",
    "transformers_version": "4.43.1",
    "use_cache": True,
    "use_sliding_window": False,
    "vocab_size": 152064,
}

# https://huggingface.co/Qwen/Qwen3-8B/blob/main/config.json
QWEN3 = PUBLISHED | {
    **{"architectures": ["Qwen3ForCausalLM"], "model_type": "qwen3", "attention_bias": False, "head_dim": 128},
    **{"hidden_size": 4096, "intermediate_size": 12288, "max_position_embeddings": 40960, "max_window_layers": 36},
    **{"num_attention_heads": 32, "num_hidden_layers": 36, "num_key_value_heads": 8, "rope_scaling": None},
    **{"sliding_window": None, "transformers_version": "4.51.0", "vocab_size": 151936},
}


@pytest.fixture
def write(tmp_path):
    """Writes a config.json: the published one with changes; returns its folder."""

    def one(**changes):
        fields = {name: value for name, value in (PUBLISHED | changes).items() if value is not ABSENT}
        (tmp_path / "config.json").write_text(json.dumps(fields), encoding="utf-8")
        return tmp_path

    return one


def v5(**rope):
    return {"rope_theta": ABSENT, "rope_parameters": rope}


def yarn(**fields):
    return RopeScaling("yarn", **{"factor": 4.0, "original_max_position_embeddings": 32_768} | fields)


VARIANTS = {
    "published": ({}, {}),
    "no architectures": ({"architectures": ABSENT}, {}),
    "architectures null": ({"architectures": None}, {}),
    "architectures empty": ({"architectures": []}, {}),
    "heads' default": ({"num_attention_heads": 32, "num_key_value_heads": ABSENT}, {"num_heads": 32, "num_kv_heads": 32,
                       "head_dim": 112}),
    "key heads null": ({"num_key_value_heads": None}, {"num_kv_heads": 28}),
    "head_dim": ({"head_dim": 64}, {"head_dim": 64}),
    "theta absent": ({"rope_theta": ABSENT}, {"rope_theta": 1e4}),
    "theta whole": ({"rope_theta": 1000000}, {}),
    "eps absent": ({"rms_norm_eps": ABSENT}, {"rms_norm_eps": 1e-6}),
    "eps": ({"rms_norm_eps": 1e-5}, {"rms_norm_eps": 1e-5}),
    "initial weights absent": ({"initializer_range": ABSENT}, {"init_std": 0.02}),
    "initial weights": ({"initializer_range": 0.2}, {"init_std": 0.2}),
    "tie absent": ({"tie_word_embeddings": ABSENT}, {"tie_embeddings": False}),
    "tied": ({"tie_word_embeddings": True}, {"tie_embeddings": True}),
    "positions absent": ({"max_position_embeddings": ABSENT}, {"max_positions": 32_768}),
    "sizes absent": (
        dict.fromkeys(("vocab_size", "hidden_size", "intermediate_size", "num_hidden_layers"), ABSENT)
        | {"num_attention_heads": ABSENT, "num_key_value_heads": ABSENT},
        {"vocab_size": 151_936, "hidden_size": 4096, "intermediate_size": 22_016, "num_layers": 32, "num_heads": 32,
         "num_kv_heads": 32, "head_dim": 128},
    ),
    "activation absent": ({"hidden_act": ABSENT}, {}),
    "swish": ({"hidden_act": "swish"}, {}),
    "dtype auto": ({"torch_dtype": "auto"}, {}),  # torch has none of that name
    "dtype of torch": ({"torch_dtype": "torch.bfloat16", "dtype": None}, {}),
    "dtype of 5": ({"torch_dtype": ABSENT, "dtype": "bfloat16"}, {}),
    "layer_types": ({"layer_types": ["full_attention"] * 28}, {}),
    "layer_types of old": ({"layer_types": ["attention"] * 28}, {}),
    "windows from a layer that it hasn't": ({"use_sliding_window": True, "max_window_layers": 28}, {}),
    "windows of no size": ({"use_sliding_window": True, "max_window_layers": 2, "sliding_window": None}, {}),
    "windows, but layer_types": ({"use_sliding_window": True, "max_window_layers": 2,
                                  "layer_types": ["full_attention"] * 28}, {}),
    "rope_scaling null": ({"rope_scaling": None}, {}),
    "rope_scaling empty": ({"rope_scaling": {}}, {}),
    "rope_scaling default": ({"rope_scaling": {"type": "default"}}, {}),
    "rope of 5": (v5(rope_type="default", rope_theta=5e5), {"rope_theta": 5e5}),
    "rope of 5 beside an old theta": ({"rope_parameters": {"rope_type": "default", "rope_theta": 5e5}},
                                      {"rope_theta": 5e5}),
    "rope of 5 with the old theta": ({"rope_parameters": {"rope_type": "default"}}, {"rope_theta": 1e6}),
    "rope of 5 without theta": (v5(rope_type="default"), {"rope_theta": 1e4}),
    "yarn, model card": ({"rope_scaling": CARD}, {"rope_scaling": yarn()}),
    "yarn, rope_type": ({"rope_scaling": {"rope_type": "yarn", "factor": 4, "original_max_position_embeddings": 32768}},
                        {"rope_scaling": yarn()}),
    "yarn of 5": (v5(rope_type="yarn", rope_theta=1e6, factor=4.0, original_max_position_embeddings=32768),
                  {"rope_scaling": yarn()}),
    "yarn of 5, type": (v5(type="yarn", rope_theta=1e6, factor=4.0, original_max_position_embeddings=32768),
                        {"rope_scaling": yarn()}),
    "yarn in both": ({"rope_scaling": CARD, "rope_parameters": {"rope_type": "default"}}, {"rope_scaling": yarn()}),
    "yarn in long": ({"rope_scaling": CARD, "max_position_embeddings": 131072},
                     {"rope_scaling": yarn(), "max_positions": 131_072}),
    "yarn without original": ({"rope_scaling": {"type": "yarn", "factor": 2.0}}, {"rope_scaling": yarn(factor=2.0)}),
    "yarn, factor null": (
        {"rope_scaling": CARD | {"factor": None, "original_max_position_embeddings": 8192}},
        {"rope_scaling": yarn(original_max_position_embeddings=8192)},
    ),
    "yarn, original beside": (
        {"rope_scaling": CARD, "original_max_position_embeddings": 16384},
        {"rope_scaling": yarn(original_max_position_embeddings=16_384)},
    ),
    "yarn, all": (
        {"rope_scaling": CARD | {"attention_factor": 1.1, "beta_fast": 16, "beta_slow": 2.0, "mscale": 0.7,
                                 "mscale_all_dim": 1.0, "truncate": False}},
        {"rope_scaling": yarn(attention_factor=1.1, beta_fast=16.0, beta_slow=2.0, mscale=0.7, mscale_all_dim=1.0,
                              truncate=False)},
    ),
    "yarn, nulls": (
        {"rope_scaling": CARD | dict.fromkeys(("attention_factor", "beta_fast", "beta_slow", "mscale", "truncate"))},
        {"rope_scaling": yarn(truncate=False)},  # None is no true value
    ),
    "linear": ({"rope_scaling": {"type": "linear", "factor": 2.0}}, {"rope_scaling": RopeScaling("linear", 2.0)}),
    "llama3": (
        {"rope_scaling": {"rope_type": "llama3", "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0,
                          "original_max_position_embeddings": 8192}},
        {"rope_scaling": RopeScaling("llama3", 8.0, 8192, low_freq_factor=1.0, high_freq_factor=4.0)},
    ),
    "fields that mean nothing here": ({"attention_bias": False, "frobnicate": [1], "partial_rotary_factor": 1.0}, {}),
}  # fmt: skip
BASE = Qwen2Config(152_064, 3584, 18_944, 28, 28, 4, 128)


@pytest.mark.parametrize("name", VARIANTS)
def test_every_variant_means_what_it_means_to_transformers(name, write):
    from transformers import AutoConfig

    changes, wanted = VARIANTS[name]
    folder = write(**changes)
    config = Qwen2Config.from_hf(folder)
    fields = {
        "vocab_size": 152_064,
        "hidden_size": 3584,
        "intermediate_size": 18_944,
        "num_layers": 28,
        "num_heads": 28,
    }
    assert config == Qwen2Config(**fields | {"num_kv_heads": 4, "head_dim": 128} | wanted)

    if str(changes.get("torch_dtype", "")) in ("auto", "torch.bfloat16") and importlib.util.find_spec("torch"):
        return  # with torch transformers itself looks the name up there, and fails
    theirs = AutoConfig.from_pretrained(folder, local_files_only=True)
    theirs.standardize_rope_params()
    assert config.vocab_size == theirs.vocab_size
    assert config.hidden_size == theirs.hidden_size
    assert config.intermediate_size == theirs.intermediate_size
    assert config.num_layers == theirs.num_hidden_layers
    assert (config.num_heads, config.num_kv_heads) == (theirs.num_attention_heads, theirs.num_key_value_heads)
    assert config.head_dim == getattr(theirs, "head_dim", theirs.hidden_size // theirs.num_attention_heads)
    assert config.max_positions == theirs.max_position_embeddings
    assert config.rms_norm_eps == theirs.rms_norm_eps
    assert config.init_std == theirs.initializer_range
    assert config.tie_embeddings == theirs.tie_word_embeddings
    assert config.rope_theta == theirs.rope_parameters["rope_theta"]
    assert set(theirs.layer_types) == {"full_attention"}
    kind = "default" if config.rope_scaling is None else config.rope_scaling.rope_type
    assert kind == theirs.rope_parameters["rope_type"]


@pytest.mark.parametrize("name", VARIANTS)
def test_what_is_written_is_read_with_the_same_meaning(name, write, tmp_path):
    from transformers import AutoConfig

    config = Qwen2Config.from_hf(write(**VARIANTS[name][0]))
    (tmp_path / "config.json").write_text(json.dumps(config.to_hf()), encoding="utf-8")
    assert Qwen2Config.from_hf(tmp_path) == config
    theirs = AutoConfig.from_pretrained(tmp_path, local_files_only=True)
    scaling = {} if config.rope_scaling is None else config.rope_scaling.to_hf()
    assert theirs.rope_parameters == {"rope_type": "default", "rope_theta": config.rope_theta} | scaling
    assert theirs.architectures == ["Qwen2ForCausalLM"]


def test_published_sizes_are_those_of_their_configs(write):
    assert Qwen2Config.from_hf(write()) == PRESETS["7b"] == BASE
    assert Qwen2Config.from_hf(write(**QWEN3)) == PRESETS["qwen3-8b"]


def test_families_differ_though_their_sizes_agree(write):
    """Also as static arguments: what is compiled for one must not run the other."""
    fields = {f.name: getattr(BASE, f.name) for f in dataclasses.fields(BASE)}
    assert Qwen3Config(**fields) != BASE
    assert (Qwen3Config(**fields).num_params, BASE.num_params) == (
        BASE.num_params + 28 * (2 * 128 - (28 + 4 + 4) * 128),
        7_615_616_512,  # of the model card's safetensors
    )


def test_a_head_is_128_wide_where_qwen3_does_not_say(write):
    """As transformers' own default; in Qwen2 it follows from the hidden size."""
    absent = QWEN3 | {"hidden_size": 2048, "num_attention_heads": 8, "head_dim": ABSENT}
    assert Qwen2Config.from_hf(write(**absent)).head_dim == 128
    family = {"model_type": "qwen2", "architectures": ["Qwen2ForCausalLM"]}
    assert Qwen2Config.from_hf(write(**absent | family)).head_dim == 256


QWEN3_REFUSED = [
    ({"attention_bias": True}, "attention_bias=true is not supported"),
    (
        {"use_sliding_window": True, "sliding_window": 4096, "max_window_layers": 4},
        "layer 4 of 36 has sliding_attention",
    ),
    ({"layer_types": ["sliding_attention"] * 36}, "layer 0 of 36 has sliding_attention"),
    ({"rope_scaling": {"rope_type": "dynamic", "factor": 2.0}}, "type 'dynamic' is not supported"),
    ({"model_type": "qwen3_moe", "architectures": ["Qwen3MoeForCausalLM"]}, "Qwen3MoeForCausalLM"),
    ({"model_type": "qwen3_next", "architectures": ["Qwen3NextForCausalLM"]}, "Qwen3NextForCausalLM"),
    ({"architectures": ["Qwen3ForSequenceClassification"]}, "Qwen3ForCausalLM of model_type 'qwen3'"),
    ({"quantization_config": {"quant_method": "fp8"}}, r"quantized \(fp8\)"),
    ({"head_dim": 127}, "even rotary dimension, but got `head_dim`=127"),
]


@pytest.mark.parametrize(("changes", "message"), QWEN3_REFUSED)
def test_unlike_qwen3_is_refused(write, changes, message):
    with pytest.raises(ValueError, match=message):
        Qwen2Config.from_hf(write(**QWEN3 | changes))


REFUSED = [
    ({"architectures": ["Qwen2ForRewardModel"]}, "'Qwen2ForRewardModel' .* only Qwen2ForCausalLM"),
    ({"architectures": ["Qwen2ForSequenceClassification"]}, "Qwen2ForSequenceClassification"),
    ({"architectures": ["Qwen2Model"]}, "Qwen2Model"),
    ({"architectures": ["LlamaForCausalLM"], "model_type": "llama"}, "'LlamaForCausalLM' of model_type 'llama'"),
    ({"architectures": ["Qwen3MoeForCausalLM"], "model_type": "qwen3_moe"}, "Qwen3MoeForCausalLM"),
    ({"architectures": ["Qwen2MoeForCausalLM"], "model_type": "qwen2_moe"}, "Qwen2MoeForCausalLM"),
    ({"architectures": ["Qwen2_5_VLForConditionalGeneration"], "model_type": "qwen2_5_vl"}, "Qwen2_5_VL"),
    ({"model_type": "qwen3"}, "'Qwen2ForCausalLM' of model_type 'qwen3'"),  # AutoModel goes by it
    ({"architectures": ABSENT, "model_type": ABSENT}, "architecture None of model_type None"),
    ({"architectures": ABSENT, "model_type": ["qwen2"]}, "model_type"),
    ({"quantization_config": {"quant_method": "awq", "bits": 4, "group_size": 128}}, r"quantized \(awq, 4 bits\)"),
    ({"quantization_config": {"quant_method": "gptq", "bits": 8}}, r"gptq, 8 bits.* use the unquantized model"),
    ({"quantization_config": {"quant_method": "fp8", "weight_block_size": [128, 128]}}, r"quantized \(fp8\)"),
    ({"quantization_config": {"load_in_4bit": True, "load_in_8bit": False}}, r"bitsandbytes, 4 bits"),
    ({"quantization_config": {"quant_method": "bitsandbytes", "load_in_8bit": True}}, r"bitsandbytes, 8 bits"),
    ({"quantization_config": {"quant_method": "compressed-tensors"}}, "compressed-tensors"),
    ({"compression_config": {"quant_method": "compressed-tensors"}}, "compression_config .*compressed-tensors"),
    ({"quantization": {"group_size": 64, "bits": 4}}, r"mlx, 4 bits"),
    ({"quantization_config": "awq"}, "'awq'"),
    ({"use_sliding_window": True, "max_window_layers": 21}, "layer 21 of 28 has sliding_attention"),
    ({"layer_types": ["full_attention"] * 27 + ["sliding_attention"]}, "layer 27 of 28 has sliding_attention"),
    ({"layer_types": ["full_attention"] * 3}, r"`num_hidden_layers` \(28\)"),
    ({"layer_types": ["frob"] * 28}, "frob"),
    ({"is_causal": False}, "is_causal=false"),
    ({"per_layer_config": {"0": {"intermediate_size": 16}}}, "per_layer_config"),
    ({"hidden_act": "gelu"}, "hidden_act='gelu': expected 'silu'"),
    ({"hidden_act": None}, "hidden_act=null"),
    ({"hidden_act": ["silu"]}, "hidden_act"),
    *(({name: value}, f"{name}=.*: expected a whole number") for name, value in [
        ("vocab_size", 0), ("vocab_size", -5), ("vocab_size", 10**12), ("vocab_size", "151936"), ("vocab_size", 1e5),
        ("vocab_size", None), ("vocab_size", True), ("vocab_size", [1]), ("vocab_size", 10**400),
        ("hidden_size", 0), ("hidden_size", "big"), ("intermediate_size", -1), ("num_hidden_layers", 0),
        ("num_hidden_layers", 2.5), ("num_hidden_layers", 10**9),
        ("num_attention_heads", 0), ("num_attention_heads", False),
        ("num_key_value_heads", 0), ("num_key_value_heads", "4"), ("head_dim", 0), ("head_dim", -128),
        ("head_dim", 128.0), ("max_position_embeddings", 0), ("max_position_embeddings", None),
        ("max_position_embeddings", float("nan")),
    ]),
    ({"vocab_size": 2**31 - 1}, "vocab_size=2147483647, .* parameters; expected at most 1e.12"),
    ({"num_hidden_layers": 10_000, "intermediate_size": 10**6}, "10000 layers make"),
    ({"num_key_value_heads": 5}, "num_attention_heads=28 is not a multiple of num_key_value_heads=5"),
    ({"num_key_value_heads": ABSENT}, "num_key_value_heads=32 .absent, it is 32"),  # transformers' default
    ({"num_attention_heads": 30, "num_key_value_heads": 5}, "3584 is not a multiple of num_attention_heads=30"),
    ({"num_attention_heads": 512, "num_key_value_heads": 4}, "head_dim=7: expected an even number"),
    ({"head_dim": 3}, "head_dim=3: expected an even number"),
    ({"head_dim": 127}, "head_dim.*127"),
    ({"rms_norm_eps": -1e-6}, "rms_norm_eps=-1e-06: expected"),
    ({"rms_norm_eps": float("inf")}, "rms_norm_eps=inf"),
    ({"rms_norm_eps": float("nan")}, "rms_norm_eps=nan"),
    ({"rms_norm_eps": "1e-6"}, "rms_norm_eps='1e-6'"),
    ({"rms_norm_eps": None}, "rms_norm_eps=null"),
    ({"initializer_range": -0.02}, "initializer_range=-0.02: expected a number of at least 0"),
    ({"initializer_range": float("nan")}, "initializer_range=nan"),
    ({"initializer_range": "0.02"}, "initializer_range='0.02'"),
    ({"initializer_range": None}, "initializer_range=null"),
    ({"initializer_range": 10**400}, "initializer_range=1.*0"),
    ({"tie_word_embeddings": None}, "tie_word_embeddings=null: expected true or false"),
    ({"tie_word_embeddings": "true"}, "tie_word_embeddings='true'"),
    ({"use_sliding_window": 1}, "use_sliding_window=1"),
    ({"sliding_window": 4.5}, "sliding_window"),
    ({"bos_token_id": "a"}, "bos_token_id"),
    *(({"rope_theta": value}, f"rope_theta={shown}: expected a number above 0") for value, shown in [
        (-1e6, "-1000000.0"), (0, "0"), (float("inf"), "inf"), (float("nan"), "nan"), ("1e6", "'1e6'"), (None, "null"),
        (True, "true"), (10**400, "1.*0"), ({"__float__": "Infinity"}, "inf"),
    ]),
    (v5(rope_type="default", rope_theta=None), "rope_theta=null"),
    (v5(rope_type="default", rope_theta=-1), "rope_theta=-1"),
    ({"rope_theta": 1.0, "rope_scaling": CARD}, "rope_theta=1.0: expected a number above 1"),
    ({"rope_scaling": "yarn"}, "rope_scaling='yarn': expected an object"),
    ({"rope_scaling": ["yarn"]}, "rope_scaling="),
    ({"rope_scaling": {"type": "dynamic", "factor": 2.0}}, "'dynamic' is not supported; .*yarn"),
    ({"rope_scaling": {"type": "longrope", "factor": 2.0}}, "'longrope'"),
    ({"rope_scaling": {"type": "su"}}, "'su'"),
    ({"rope_scaling": {"type": "mrope", "mrope_section": [16, 24, 24]}}, "'mrope'"),
    ({"rope_scaling": {"type": None, "factor": 4.0}}, "type None"),
    ({"rope_scaling": {"factor": 4.0}}, "has a factor but no type"),
    ({"rope_parameters": {"full_attention": {"rope_type": "default"}}}, "differs by type of layer"),
    ({"partial_rotary_factor": 0.5}, "partial_rotary_factor"),
    ({"rope_scaling": CARD | {"partial_rotary_factor": 0.5}}, "partial_rotary_factor"),
    ({"rope_scaling": {"type": "yarn", "original_max_position_embeddings": 32768}}, "factor"),
    ({"rope_scaling": {"type": "linear"}}, "factor"),
    ({"rope_scaling": {"type": "linear", "factor": None}}, "rope_scaling.factor=null"),
    ({"rope_scaling": {"type": "llama3", "factor": 8.0}}, "low_freq_factor"),
    *(({"rope_scaling": CARD | {name: value}}, f"{name}={shown}") for name, value, shown in [
        ("factor", 0.5, "0.5: expected a number of at least 1"), ("factor", "4", "'4'"), ("factor", True, "true"),
        ("factor", float("inf"), "inf"), ("factor", 10**400, "1.*0"), ("factor", float("nan"), "nan"),
        ("attention_factor", -1.0, "-1.0"),
        ("attention_factor", 0, "0: expected a number above 0"), ("beta_fast", "x", "'x'"), ("beta_slow", -1, "-1"),
        ("beta_slow", 64, "64 must lie below beta_fast"), ("mscale", [1], ""), ("truncate", "no", "'no'"),
        ("original_max_position_embeddings", 0, "0"), ("original_max_position_embeddings", "x", "'x'"),
        ("original_max_position_embeddings", 2.5, "2.5"), ("original_max_position_embeddings", None, "null"),
    ]),
    ({"rope_scaling": CARD | {"factor": None, "original_max_position_embeddings": 65536}}, "factor=null"),
]  # fmt: skip


@pytest.mark.parametrize("case", range(len(REFUSED)))
def test_refusals_name_file_field_and_value(case, write):
    changes, message = REFUSED[case]
    folder = write(**changes)
    with pytest.raises(ValueError, match=message) as refused:
        Qwen2Config.from_hf(folder)
    assert str(refused.value).startswith(f"{folder / 'config.json'}: ")
    assert "\n" not in str(refused.value)
    assert len(str(refused.value)) < 500 + len(str(folder))


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"", "is not JSON in UTF-8"),
        (b"{", "is not JSON in UTF-8"),
        (b"\xff\xfe{}", "is not JSON in UTF-8"),
        (b"\xef\xbb\xbf{}", "is not JSON in UTF-8"),
        (b'{"vocab_size": 1' + b"0" * 5000 + b"}", "is not JSON in UTF-8"),
        (b"[" * 100_000, "is not JSON in UTF-8"),
        (b"version https://git-lfs.github.com/spec/v1\n", "is not JSON in UTF-8"),
        (b"[]", "expected a JSON object"),
        (b"null", "expected a JSON object"),
        (b'"qwen2"', "expected a JSON object"),
        (b"{}", "architecture None of model_type None"),
        (b'{"configuration_files": 3, "model_type": "qwen2"}', "transformers can't read it"),
        (b'{"self": 3, "model_type": "qwen2"}', "transformers can't read it"),
    ],
)
def test_files_that_are_no_config(content, message, tmp_path):
    (tmp_path / "config.json").write_bytes(content)
    with pytest.raises(ValueError, match=message) as refused:
        Qwen2Config.from_hf(tmp_path)
    assert str(refused.value).startswith(f"{tmp_path / 'config.json'}: ")


def test_a_folder_in_its_place(tmp_path):
    with pytest.raises(FileNotFoundError, match="expected a Hugging Face folder"):
        Qwen2Config.from_hf(tmp_path)
    (tmp_path / "config.json").mkdir()
    with pytest.raises(ValueError, match=r"config\.json: is a folder"):
        Qwen2Config.from_hf(tmp_path)


@pytest.mark.parametrize("model_type", ["qwen2", "qwen3_moe"])
def test_remote_code_is_never_run(model_type, write, tmp_path):
    ran = tmp_path / "ran"
    for name in ("configuration_mine", "modeling_mine"):
        (tmp_path / f"{name}.py").write_text(f"open({str(ran)!r}, 'w')\nclass Mine: pass\n")
    auto = {"AutoConfig": "configuration_mine.Mine", "AutoModelForCausalLM": "modeling_mine.Mine"}
    folder = write(auto_map=auto, model_type=model_type)
    if model_type == "qwen2":
        assert Qwen2Config.from_hf(folder) == BASE
    else:
        with pytest.raises(ValueError, match="qwen3_moe"):
            Qwen2Config.from_hf(folder)
    assert not ran.exists()


def test_nothing_is_printed_and_the_hub_is_not_asked(write):
    """In a process of its own, which imports transformers for the first time."""
    code = "import sys; from rlver_jax.models.families import Qwen2Config; Qwen2Config.from_hf(sys.argv[1])"
    root = Path(__file__).resolve().parents[2]
    env = os.environ | {"PYTHONPATH": str(root), "HF_ENDPOINT": "http://127.0.0.1:9", "TPU_SKIP_MDS_QUERY": "1"}
    folder = write(rope_scaling=CARD)
    done = subprocess.run([sys.executable, "-c", code, folder], env=env, capture_output=True, text=True, timeout=60)
    assert (done.returncode, done.stdout) == (0, "")
    assert "PyTorch" not in done.stderr
