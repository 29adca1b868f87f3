"""Random models with scaled RoPE, and variants of config.json, against transformers on torch (extra `parity`)."""

import dataclasses
import functools
import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from rlver_jax.models.families import Qwen2Config
from rlver_jax.models.hf_weights import load_params, save_params
from rlver_jax.models.kv_cache import init_kv_cache
from rlver_jax.models.qwen import Qwen2, logits
from rlver_jax.models.rope import RopeScaling, frequencies

pytestmark = pytest.mark.parity

SIZES = {
    **{"vocab_size": 131, "hidden_size": 64, "intermediate_size": 96, "num_hidden_layers": 3},
    **{"num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 32, "max_position_embeddings": 48},
}
YARN = {"factor": 4.0, "original_max_position_embeddings": 48}
SCALINGS = {
    "yarn, type": {"rope_theta": 1e4, "rope_scaling": YARN | {"type": "yarn"}},
    "yarn, rope_type": {"rope_theta": 1e4, "rope_scaling": YARN | {"rope_type": "yarn"}},
    "yarn of 5": {"rope_parameters": YARN | {"rope_type": "yarn", "rope_theta": 1e4}},
    "yarn, all fields": {
        "rope_theta": 1e6,
        "rope_scaling": YARN | {"type": "yarn", "beta_fast": 4, "beta_slow": 0.5, "mscale": 0.7, "mscale_all_dim": 1.1}
        | {"truncate": False},
    },
    "yarn, attention_factor": {"rope_theta": 1e4, "rope_scaling": YARN | {"type": "yarn", "attention_factor": 1.4}},
    "linear": {"rope_theta": 1e4, "rope_scaling": {"type": "linear", "factor": 4.0}},
    "llama3": {
        "rope_theta": 1e4,
        "rope_scaling": YARN | {"rope_type": "llama3", "low_freq_factor": 0.5, "high_freq_factor": 4.0},
    },
}  # fmt: skip
LENGTH = 150  # three times the original context


@pytest.fixture(scope="module")
def torch():
    return pytest.importorskip("torch", reason="extra `parity` is not installed")


@pytest.fixture(scope="module")
def random_model(torch, tmp_path_factory):
    """(folder, transformers' model, ids [LENGTH]) of a random model with fields of config.json."""
    from transformers import AutoConfig, AutoModelForCausalLM

    @functools.cache
    def one(name):
        folder = tmp_path_factory.mktemp("model")
        raw = SIZES | {"model_type": "qwen2", "architectures": ["Qwen2ForCausalLM"], "tie_word_embeddings": False}
        (folder / "config.json").write_text(json.dumps(raw | SCALINGS[name]))
        torch.manual_seed(3)
        model = AutoModelForCausalLM.from_config(AutoConfig.from_pretrained(folder), dtype=torch.float32).eval()
        with torch.no_grad():
            for parameter in model.parameters():  # far from the initial ones, so that attention is sharp
                parameter.add_(torch.randn_like(parameter) * 0.18)
        (folder / "config.json").unlink()
        model.save_pretrained(folder)
        (folder / "config.json").write_text(json.dumps(raw | SCALINGS[name]))  # not as transformers 5 writes it
        return folder, model, np.random.default_rng(5).integers(0, 131, LENGTH)

    return one


@functools.partial(jax.jit, static_argnums=0)
def forward(model, params, tokens, pos, cache=None, start=None):
    hidden, cache = model.apply({"params": params}, tokens, pos, None, cache, start)
    return logits(params, hidden), cache


def theirs(torch, model, ids, first=0):
    with torch.no_grad():
        at = torch.arange(first, first + len(ids))[None]
        return model(torch.tensor(ids)[None], position_ids=at).logits[0].numpy()


@pytest.mark.parametrize("scan", [True, False], ids=["scanned", "unrolled"])
@pytest.mark.parametrize("name", SCALINGS)
def test_logits_beyond_the_original_context(torch, random_model, name, scan):
    folder, reference, ids = random_model(name)
    model = Qwen2(Qwen2Config.from_hf(folder), scan_layers=scan)
    params, want = load_params(folder, model), theirs(torch, reference, ids)
    row = jnp.asarray(ids)[None], jnp.arange(LENGTH)[None]
    actual, _ = forward(model, params, *row)
    worst = float(np.abs(actual[0] - want).max())
    print(f"max |difference of logits|, {name}:", worst)
    assert worst <= 1e-4
    plain, _ = forward(model.clone(config=dataclasses.replace(model.config, rope_scaling=None)), params, *row)
    assert np.abs(plain[0] - want).max() > 0.1, "scaling must make a difference"


@pytest.mark.parametrize("name", ["yarn, type", "yarn of 5"])
def test_far_positions(torch, random_model, name):
    """A row that starts at position 100,000: angles have an ulp of 8e-3, but both round them in the same way."""
    folder, reference, ids = random_model(name)
    model = Qwen2(Qwen2Config.from_hf(folder))
    actual, _ = forward(model, load_params(folder, model), jnp.asarray(ids)[None], 100_000 + jnp.arange(LENGTH)[None])
    worst = float(np.abs(actual[0] - theirs(torch, reference, ids, 100_000)).max())
    print(f"max |difference of logits| from position 100,000 on, {name}:", worst)
    assert worst <= 1e-4


@pytest.mark.parametrize("scan", [True, False], ids=["scanned", "unrolled"])
@pytest.mark.parametrize("name", ["yarn, type", "yarn of 5", "yarn, all fields"])
def test_greedy_tokens_through_the_cache(torch, random_model, name, scan):
    """A prompt within the original context, and 64 tokens that pass its end."""
    folder, reference, ids = random_model(name)
    prompt = ids[:40]
    with torch.no_grad():
        want = reference.generate(torch.tensor(prompt)[None], max_new_tokens=64, min_new_tokens=64, do_sample=False)
    model = Qwen2(Qwen2Config.from_hf(folder), scan_layers=scan)
    params = load_params(folder, model)
    cache = init_kv_cache(model.config, 1, 128, jnp.float32, scan_layers=scan)
    part, cache = forward(model, params, jnp.asarray(prompt)[None], jnp.arange(40)[None], cache, jnp.array([0]))
    generated = []
    for at in range(40, 104):
        generated.append(int(part[0, -1].argmax()))
        part, cache = forward(model, params, jnp.array([[generated[-1]]]), jnp.array([[at]]), cache, jnp.array([at]))
    assert generated == want[0, 40:].tolist()
    assert len(set(generated)) > 8, "a model that repeats itself proves little"


@pytest.mark.parametrize("name", SCALINGS)
def test_an_export_means_the_same(torch, random_model, name, tmp_path):
    from transformers import AutoModelForCausalLM

    folder, reference, ids = random_model(name)
    model = Qwen2(Qwen2Config.from_hf(folder))
    save_params(tmp_path / "out", load_params(folder, model), model.config)
    again = AutoModelForCausalLM.from_pretrained(tmp_path / "out", dtype=torch.float32).eval()
    np.testing.assert_array_equal(theirs(torch, again, ids), theirs(torch, reference, ids))


@pytest.mark.parametrize("dim", [8, 64, 128])
@pytest.mark.parametrize("theta", [1e4, 5e5, 1e6])
@pytest.mark.parametrize(
    "fields",
    [
        {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 32_768},
        {"rope_type": "yarn", "factor": 2.5, "original_max_position_embeddings": 4096, "beta_fast": 20.0,
         "beta_slow": 2.0, "truncate": False},
        {"rope_type": "yarn", "factor": 40.0, "original_max_position_embeddings": 4096, "mscale": 0.707,
         "mscale_all_dim": 1.0},
        {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 16, "attention_factor": 1.3},
        {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 3},  # bounds that coincide
        {"rope_type": "linear", "factor": 3.0},
        {"rope_type": "llama3", "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0,
         "original_max_position_embeddings": 8192},
    ],
)  # fmt: skip
def test_frequencies_are_those_of_transformers(torch, fields, theta, dim):
    """Within 4 ulp; torch's own powers are rounded wrongly now and then."""
    from transformers import Qwen2Config as Theirs
    from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS

    config = Theirs(**SIZES | {"head_dim": dim}, rope_parameters={"rope_theta": theta} | fields)
    inverse, scale = ROPE_INIT_FUNCTIONS[fields["rope_type"]](config)
    actual = frequencies(theta, dim, RopeScaling(**fields))
    np.testing.assert_array_max_ulp(actual.inverse, inverse.numpy(), 4)
    assert (actual.inverse == inverse.numpy()).mean() >= 0.75
    assert actual.scale == pytest.approx(scale, abs=1e-15)


VARIANTS = {
    "no architectures": {"architectures": None},
    "key heads null": {"num_key_value_heads": None},
    "swish": {"hidden_act": "swish"},
    "windows from a layer that it hasn't": {"use_sliding_window": True, "sliding_window": 4, "max_window_layers": 3},
    "layer_types": {"layer_types": ["full_attention"] * 3, "use_sliding_window": True, "sliding_window": 4},
    "theta absent": {},
    "eps": {"rms_norm_eps": 1e-2},
    "tied": {"tie_word_embeddings": True},
    "head_dim": {"head_dim": 24},
}


@pytest.mark.parametrize("name", VARIANTS)
def test_variants_compute_what_transformers_computes(torch, name, tmp_path):
    from transformers import AutoConfig, AutoModelForCausalLM

    raw = {k: v for k, v in SIZES.items() if k != "head_dim"} | {"model_type": "qwen2"} | VARIANTS[name]
    (tmp_path / "config.json").write_text(json.dumps(raw))
    torch.manual_seed(4)
    reference = AutoModelForCausalLM.from_config(AutoConfig.from_pretrained(tmp_path), dtype=torch.float32).eval()
    with torch.no_grad():
        for parameter in reference.parameters():
            parameter.add_(torch.randn_like(parameter) * 0.1)
    reference.save_pretrained(tmp_path)
    (tmp_path / "config.json").write_text(json.dumps(raw))
    model = Qwen2(Qwen2Config.from_hf(tmp_path))
    ids = np.random.default_rng(6).integers(0, 131, 40)
    actual, _ = forward(model, load_params(tmp_path, model), jnp.asarray(ids)[None], jnp.arange(40)[None])
    np.testing.assert_allclose(actual[0], theirs(torch, reference, ids), atol=1e-4)
