"""Random Qwen3 models of three shapes against transformers on torch (extra `parity`). Prints figures (-s)."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from rlver_jax.models.families import Qwen2Config, Qwen3Config
from rlver_jax.models.hf_weights import load_params, save_params
from rlver_jax.models.kv_cache import init_kv_cache
from rlver_jax.models.qwen import Qwen2, init_params, logits

pytestmark = pytest.mark.parity

COMMON = {"vocab_size": 311, "max_position_embeddings": 512}
SHAPES = {
    "0.6b in small": COMMON
    | {"hidden_size": 64, "intermediate_size": 192, "num_hidden_layers": 3, "num_attention_heads": 4}
    | {"num_key_value_heads": 2, "head_dim": 32, "tie_word_embeddings": True},
    "14b in small": COMMON
    | {"hidden_size": 80, "intermediate_size": 272, "num_hidden_layers": 4, "num_attention_heads": 10}
    | {"num_key_value_heads": 2, "head_dim": 8, "tie_word_embeddings": False},
    "32b in small": COMMON
    | {"hidden_size": 80, "intermediate_size": 400, "num_hidden_layers": 2, "num_attention_heads": 16}
    | {"num_key_value_heads": 2, "head_dim": 16, "tie_word_embeddings": False},
}
YARN = {"rope_type": "yarn", "rope_theta": 1e6, "factor": 4.0, "original_max_position_embeddings": 32}


@pytest.fixture(scope="module")
def torch():
    return pytest.importorskip("torch", reason="extra `parity` is not installed")


@pytest.fixture(scope="module")
def random_model(torch, tmp_path_factory):
    """(folder, transformers' model, ids) by shape: in shards, far from its initial weights."""
    from transformers import Qwen3Config as Config
    from transformers import Qwen3ForCausalLM

    @functools.cache
    def one(name, scaled=False):
        torch.manual_seed(8)
        rope = {"rope_parameters": YARN} if scaled else {}
        model = Qwen3ForCausalLM(Config(**SHAPES[name], **rope)).eval()
        with torch.no_grad():
            for parameter in model.parameters():
                parameter.add_(torch.randn_like(parameter) * 0.1)
        folder = tmp_path_factory.mktemp("qwen3")
        model.save_pretrained(folder, max_shard_size="200KB")
        assert len(list(folder.glob("model-*.safetensors"))) > 1
        return folder, model, np.random.default_rng(2).integers(0, 311, (2, 100))

    return one


@functools.partial(jax.jit, static_argnums=0)
def forward(model, params, tokens, first, cache=None):
    pos = jnp.broadcast_to(first + jnp.arange(tokens.shape[1]), tokens.shape)
    start = None if cache is None else jnp.broadcast_to(first, tokens.shape[0])
    hidden, cache = model.apply({"params": params}, tokens, pos, None, cache, start)
    return logits(params, hidden), cache


def theirs(torch, model, ids):
    with torch.no_grad():
        return model(torch.tensor(ids)).logits.numpy()


@pytest.mark.parametrize("scaled", [False, True], ids=["plain", "yarn"])
@pytest.mark.parametrize("name", SHAPES)
@pytest.mark.parametrize("options", [{}, {"scan_layers": False, "attention": "chunked", "attention_chunk": 32}])
def test_logits(torch, random_model, name, scaled, options):
    folder, reference, ids = random_model(name, scaled)
    model = Qwen2(Qwen2Config.from_hf(folder), **options)
    actual, _ = forward(model, load_params(folder, model), jnp.asarray(ids), 0)
    worst = float(np.abs(np.asarray(actual) - theirs(torch, reference, ids)).max())
    print(f"{name}, {'yarn' if scaled else 'plain'}: max |difference of logits| {worst:.2g}")
    assert worst <= 1e-4


@pytest.mark.parametrize("name", SHAPES)
def test_64_greedy_tokens(torch, random_model, name):
    folder, reference, ids = random_model(name)
    prompt = ids[:, :20]
    with torch.no_grad():
        want = reference.generate(
            torch.tensor(prompt), attention_mask=torch.ones(prompt.shape, dtype=torch.long), max_new_tokens=64,
            min_new_tokens=64, do_sample=False, pad_token_id=0, eos_token_id=None,
        )[:, 20:].numpy()  # fmt: skip
    model = Qwen2(Qwen2Config.from_hf(folder), scan_layers=False)
    params = load_params(folder, model)
    cache = init_kv_cache(model.config, 2, 96, jnp.float32, scan_layers=False)
    scores, cache = forward(model, params, jnp.asarray(prompt), 0, cache)
    generated = [scores[:, -1].argmax(-1)]
    for at in range(20, 83):
        scores, cache = forward(model, params, generated[-1][:, None], at, cache)
        generated.append(scores[:, -1].argmax(-1))
    np.testing.assert_array_equal(np.stack(generated, axis=1), want)


@pytest.mark.parametrize("scan", [True, False])
def test_what_is_written_loads_in_transformers(torch, tmp_path, scan):
    """A model of our own, in shards: transformers finds all tensors, and computes the same."""
    from transformers import AutoModelForCausalLM

    config = Qwen3Config(311, 64, 96, num_layers=2, num_heads=6, num_kv_heads=2, head_dim=24, rope_theta=1e4)
    model = Qwen2(config, scan_layers=scan)
    draw = np.random.default_rng(0)
    disturbed = lambda x: x + 0.1 * jnp.asarray(draw.standard_normal(x.shape), x.dtype)  # noqa: E731
    params = jax.tree.map(disturbed, init_params(model, jax.random.key(0)))
    save_params(tmp_path / "out", params, config, max_shard_bytes=150_000)
    reference, told = AutoModelForCausalLM.from_pretrained(tmp_path / "out", output_loading_info=True)
    assert not any(told.values())
    assert type(reference).__name__ == "Qwen3ForCausalLM"
    ids = draw.integers(0, 311, (1, 60))
    actual, _ = forward(model, params, jnp.asarray(ids), 0)
    np.testing.assert_allclose(actual, theirs(torch, reference.float().eval(), ids), atol=1e-4)


def test_gradients(torch, random_model):
    """Of the mean cross-entropy of the next token, those of the norms of queries and keys included."""
    folder, reference, ids = random_model("14b in small")
    model = Qwen2(Qwen2Config.from_hf(folder), remat="full")
    params = load_params(folder, model)

    def loss(params):
        scores, _ = forward(model, params, jnp.asarray(ids), 0)
        return -jnp.take_along_axis(jax.nn.log_softmax(scores[:, :-1]), jnp.asarray(ids)[:, 1:, None], -1).mean()

    gradients = jax.grad(loss)(params)["layers"]["attn"]
    reference.zero_grad()
    reference(torch.tensor(ids), labels=torch.tensor(ids)).loss.backward()
    for i, layer in enumerate(reference.model.layers):
        for name in ("q_norm", "k_norm"):
            want = getattr(layer.self_attn, name).weight.grad.numpy()
            np.testing.assert_allclose(gradients[name]["scale"][i], want, atol=1e-5 * np.abs(want).max())
        want = layer.self_attn.k_proj.weight.grad.numpy().T
        np.testing.assert_allclose(gradients["k"]["kernel"][i], want, atol=1e-5 * np.abs(want).max())
