"""Weights as they are published, against transformers on torch (extra `parity`): random models, every figure measured.

Each case is a folder that transformers reads too: what it makes of it is what ours must make of it.
"""

import functools
import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

from rlver_jax.config.foreign_weights import INDEX_FILE
from rlver_jax.models.families import Qwen2Config
from rlver_jax.models.hf_weights import load_params
from rlver_jax.models.qwen import Qwen2, logits

pytestmark = pytest.mark.parity

HEAD, EMBEDDING = "lm_head.weight", "model.embed_tokens.weight"
ROWS, PROMPT, SAID = 3, 24, 64


@pytest.fixture(scope="module")
def torch():
    return pytest.importorskip("torch", reason="extra `parity` is not installed")


@pytest.fixture
def folder(torch, tmp_path):
    """(tied) -> a random model as transformers saves it."""
    from transformers import Qwen2Config as Theirs
    from transformers import Qwen2ForCausalLM

    def make(tied):
        torch.manual_seed(7)
        sizes = {"vocab_size": 307, "hidden_size": 64, "intermediate_size": 112, "num_hidden_layers": 3}
        attention_sizes = {"num_attention_heads": 4, "num_key_value_heads": 2, "max_position_embeddings": 512}
        model = Qwen2ForCausalLM(Theirs(**sizes, **attention_sizes, tie_word_embeddings=tied)).eval()
        with torch.no_grad():
            for parameter in model.parameters():
                parameter.add_(torch.randn_like(parameter) * 0.1)
        model.save_pretrained(tmp_path)
        return tmp_path

    return make


def rewrite(folder, change, file="model.safetensors"):
    tensors = load_file(folder / file)
    change(tensors)
    save_file(tensors, folder / file, metadata={"format": "pt"})


def head_stored_too(folder):
    rewrite(folder, lambda t: t.update({HEAD: t[EMBEDDING].copy()}))


def head_stored_too_by_an_index(folder):
    tensors = load_file(folder / "model.safetensors")
    (folder / "model.safetensors").unlink()
    files = {
        "model-00001-of-00002.safetensors": tensors,
        "model-00002-of-00002.safetensors": {HEAD: tensors[EMBEDDING]},
    }
    for file, held in files.items():
        save_file(held, folder / file, metadata={"format": "pt"})
    weight_map = {name: file for file, held in files.items() for name in held}
    (folder / INDEX_FILE).write_text(json.dumps({"metadata": {}, "weight_map": weight_map}))


def head_stored_instead(folder):
    rewrite(folder, lambda t: t.update({HEAD: t.pop(EMBEDDING)}))


def an_old_index(folder):
    weight_map = dict.fromkeys(load_file(folder / "model.safetensors"), "model-00001-of-00001.safetensors")
    (folder / INDEX_FILE).write_text(json.dumps({"metadata": {}, "weight_map": weight_map}))


def old_buffers(folder):
    extra = {f"model.layers.{i}.self_attn.rotary_emb.inv_freq": np.full(8, 9.0, np.float32) for i in range(3)}
    rewrite(folder, lambda t: t.update(extra))


def mixed_precisions(folder):
    kinds = (np.float32, jnp.bfloat16, np.float16)
    rewrite(folder, lambda t: t.update({n: t[n].astype(kinds[i % 3]) for i, n in enumerate(sorted(t))}))
    assert len({x.dtype for x in load_file(folder / "model.safetensors").values()}) == 3


CASES = [
    (True, head_stored_too),
    (True, head_stored_too_by_an_index),
    (True, head_stored_instead),
    (False, an_old_index),
    (True, old_buffers),
    (False, mixed_precisions),
    (True, mixed_precisions),
]


@functools.partial(jax.jit, static_argnums=0)
def all_logits(model, params, tokens):
    positions = jnp.broadcast_to(jnp.arange(tokens.shape[1]), tokens.shape)
    return logits(params, model.apply({"params": params}, tokens, positions)[0])


@pytest.mark.parametrize(("tied", "change"), CASES, ids=[f"{c.__name__}-{'tied' if t else 'untied'}" for t, c in CASES])
def test_equals_transformers(torch, folder, tied, change):
    from transformers import AutoModelForCausalLM

    path = folder(tied)
    change(path)
    theirs = AutoModelForCausalLM.from_pretrained(path, dtype=torch.float32).eval()
    ours = Qwen2(Qwen2Config.from_hf(path))
    params = load_params(path, ours)
    prompt = np.random.default_rng(0).integers(0, 307, (ROWS, PROMPT))
    with torch.no_grad():
        options = {"attention_mask": torch.ones(ROWS, PROMPT), "do_sample": False}  # else id 0 would be padding
        generated = theirs.generate(
            torch.tensor(prompt), max_new_tokens=SAID, min_new_tokens=SAID, pad_token_id=0, **options
        )
        generated = generated.numpy()
        want = theirs(torch.tensor(generated)).logits.numpy()
    assert generated.shape == (ROWS, PROMPT + SAID)
    actual = np.asarray(all_logits(ours, params, jnp.asarray(generated)))
    print(f"{change.__name__}, tied={tied}: max |difference of logits|", float(np.abs(actual - want).max()))
    assert np.abs(actual - want).max() <= 1e-4
    mine = np.zeros_like(generated)
    mine[:, :PROMPT] = prompt
    for at in range(PROMPT, PROMPT + SAID):  # what lies behind is never seen
        mine[:, at] = np.asarray(all_logits(ours, params, jnp.asarray(mine)))[:, at - 1].argmax(-1)
    np.testing.assert_array_equal(mine, generated)


@pytest.mark.parametrize("change", [mixed_precisions])
def test_rounds_mixed_precisions_as_transformers(torch, folder, change):
    """To bfloat16, bit for bit."""
    from transformers import AutoModelForCausalLM

    path = folder(False)
    change(path)
    theirs = AutoModelForCausalLM.from_pretrained(path, dtype=torch.bfloat16).state_dict()
    params = load_params(path, Qwen2(Qwen2Config.from_hf(path), param_dtype=jnp.bfloat16))
    as_bits = lambda t: t.view(torch.int16).numpy().view(jnp.bfloat16)  # noqa: E731
    np.testing.assert_array_equal(params["embed"]["kernel"], as_bits(theirs[EMBEDDING]))
    np.testing.assert_array_equal(params["lm_head"], as_bits(theirs[HEAD]))
    for i in range(3):
        layer, prefix = jax.tree.map(lambda x, i=i: x[i], params["layers"]), f"model.layers.{i}."
        for name, mine in (("mlp.up_proj", layer["up"]), ("self_attn.k_proj", layer["attn"]["k"])):
            np.testing.assert_array_equal(mine["kernel"], as_bits(theirs[f"{prefix}{name}.weight"].T.contiguous()))
        np.testing.assert_array_equal(layer["attn"]["k"]["bias"], as_bits(theirs[f"{prefix}self_attn.k_proj.bias"]))
