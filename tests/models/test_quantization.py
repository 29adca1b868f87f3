"""Weights in int8 against the same weights multiplied out, and what a rounded user says against the one that played."""

import gc
import itertools
import json
import os
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from rlver_jax import evaluate
from rlver_jax.models import quantization
from rlver_jax.models.families import Qwen2Config, Qwen3Config
from rlver_jax.models.hf_weights import load_params
from rlver_jax.models.kv_cache import init_kv_cache
from rlver_jax.models.quantization import quantize, unrounded
from rlver_jax.models.qwen import Qwen2, abstract_params, init_params, logits
from rlver_jax.parallel.mesh import make_mesh
from rlver_jax.text.tokenizer import load_tokenizer

CONFIG = Qwen2Config(96, 32, 48, 2, num_heads=4, num_kv_heads=2, head_dim=8)
QWEN3 = Qwen3Config(96, 32, 48, 2, num_heads=4, num_kv_heads=2, head_dim=16)
MATRICES = [("attn", "q"), ("attn", "k"), ("attn", "v"), ("attn", "o"), ("gate",), ("up",), ("down",)]


def rounded(scan=True, mesh=None, dtype=jnp.float32, config=CONFIG):
    """The module, its parameters, and those that were rounded, with biases and norms that are not the initial ones."""
    model = Qwen2(config, dtype=dtype, param_dtype=jnp.int8, scan_layers=scan)
    draw = np.random.default_rng(0)
    plain = jax.tree.map(
        lambda x: x + jnp.asarray(0.1 * draw.normal(size=x.shape), x.dtype),
        init_params(unrounded(model), jax.random.key(0), mesh),
    )
    original = jax.tree.map(np.asarray, plain)
    return model, quantize(plain, model, mesh), original


def alive():
    """Bytes of all arrays that are held."""
    gc.collect()
    return sum(x.nbytes for x in jax.live_arrays())


def layers_of(params):
    return [params["layers"]] if "layers" in params else [params[f"layer_{i}"] for i in range(CONFIG.num_layers)]


def at(layer, path):
    for name in path:
        layer = layer[name]
    return layer


def multiplied(params):
    """NumPy: every matrix as int8 times its columns' scales, without scales."""
    multiplied_params = jax.tree.map(np.asarray, params)
    for layer in layers_of(multiplied_params):
        for path in MATRICES:
            linear = at(layer, path)
            linear["kernel"] = linear["kernel"].astype(np.float32) * linear.pop("scale")[..., None, :]
    return multiplied_params


@pytest.mark.parametrize(
    ("scan", "config"), [(False, CONFIG), (True, QWEN3), pytest.param(True, CONFIG, marks=pytest.mark.slow)]
)
def test_a_model_is_that_of_its_weights_multiplied_out(scan, config):
    model, params, original = rounded(scan, config=config)
    tokens, positions = jnp.arange(24).reshape(2, 12), jnp.broadcast_to(jnp.arange(12), (2, 12))
    actual = model.apply({"params": params}, tokens, positions)[0]
    want = unrounded(model).apply({"params": multiplied(params)}, tokens, positions)[0]
    np.testing.assert_allclose(actual, want, atol=2e-5)
    cache = init_kv_cache(config, 2, 16, jnp.float32, scan_layers=scan)
    cached, _ = model.apply({"params": params}, tokens, positions, None, cache, jnp.zeros(2, jnp.int32))
    np.testing.assert_allclose(cached, want, atol=2e-5)
    assert np.abs(want - unrounded(model).apply({"params": original}, tokens, positions)[0]).max() > 1e-4


def test_each_weight_is_within_half_a_step_and_the_rest_untouched():
    model, params, original = rounded(dtype=jnp.bfloat16)
    again = jax.tree.map(np.asarray, params)
    for path in MATRICES:
        mine, theirs = at(again["layers"], path), at(original["layers"], path)["kernel"].astype(np.float32)
        assert mine["kernel"].dtype == np.int8
        step = np.abs(theirs).max(axis=1) / 127
        np.testing.assert_allclose(mine["scale"], step, rtol=1e-6)
        error = np.abs(mine["kernel"] * mine["scale"][:, None, :] - theirs)
        assert (error <= step[:, None, :] * 0.5001).all()
    np.testing.assert_array_equal(again["embed"]["kernel"], original["embed"]["kernel"])
    np.testing.assert_array_equal(again["layers"]["attn"]["q"]["bias"], original["layers"]["attn"]["q"]["bias"])
    shapes, _ = abstract_params(model)
    assert jax.tree.map(lambda x: (x.shape, x.dtype), params) == jax.tree.map(lambda x: (x.shape, x.dtype), shapes)


def test_norms_of_queries_and_keys_are_not_rounded():
    model, params, original = rounded(dtype=jnp.bfloat16, config=QWEN3)
    shapes, _ = abstract_params(model)
    assert jax.tree.map(lambda x: (x.shape, x.dtype), params) == jax.tree.map(lambda x: (x.shape, x.dtype), shapes)
    for name in ("q_norm", "k_norm"):
        scale = params["layers"]["attn"][name]["scale"]
        assert (scale.shape, scale.dtype) == ((2, 16), jnp.bfloat16)
        np.testing.assert_array_equal(scale, original["layers"]["attn"][name]["scale"])


def test_a_column_of_zeros_stays_one():
    model = Qwen2(CONFIG, param_dtype=jnp.int8)
    params = jax.tree.map(jnp.zeros_like, init_params(unrounded(model), jax.random.key(0)))
    quantized = quantize(params, model)["layers"]["gate"]
    assert not np.asarray(quantized["kernel"]).any()
    assert np.isfinite(quantized["scale"]).all()


def test_on_a_mesh_it_lies_as_weights_do():
    mesh = make_mesh(1, 4, 2)
    _, alone, _ = rounded()
    _, params, _ = rounded(mesh=mesh)
    for a, b in zip(jax.tree.leaves(alone), jax.tree.leaves(params), strict=True):
        np.testing.assert_array_equal(a, b)
    gate = params["layers"]["gate"]
    assert gate["kernel"].sharding.shard_shape(gate["kernel"].shape) == (2, 32 // 4, 48 // 2)
    assert gate["scale"].sharding.shard_shape(gate["scale"].shape) == (2, 48 // 2)


@pytest.mark.parametrize(
    "profiles", [pytest.param(16, marks=pytest.mark.long), pytest.param(64, marks=pytest.mark.long)]
)
def test_a_rounded_user_feels_the_same(profiles, tmp_path):
    """The miniature's user in int8 reads the dialogues that it played whole, keeping its own emotion."""
    (tmp_path / "int8.py").write_text(
        "from configs import miniature\n\n\ndef get_config(arg=''):\n    config = miniature.get_config()\n"
        "    config.user.param_dtype = 'int8'\n    return config\n"
    )
    out = tmp_path / "out"
    command = [
        "--config=configs/miniature.py",
        f"--judge={tmp_path / 'int8.py'}",
        f"--out={out}",
        f"--config.eval.num_profiles={profiles}",
        f"--config.eval.batch={profiles}",
    ]
    assert evaluate.main(command) == 0
    read_lines = lambda file: [json.loads(line) for line in file.read_text().splitlines()]  # noqa: E731
    played = read_lines(out / "dialogues.jsonl")
    judgements = sorted(read_lines(out / "judges" / "int8.jsonl"), key=lambda line: line["index"])
    print(json.loads((out / "summary.json").read_text())["judges"])
    pairs = [
        (message["change"], change)
        for one, other in zip(played, judgements, strict=True)
        for message, change in zip([m for m in one["messages"] if "change" in m], other["changes"], strict=True)
    ]
    same = np.mean([a == b for a, b in pairs])
    print(f"the same change in {same:.1%} of {len(pairs)} turns")
    assert len(pairs) > 4.5 * profiles
    assert same >= 0.97


@pytest.mark.real
@pytest.mark.long
def test_the_real_model_rounded_says_nearly_the_same(checkpoint):
    """Qwen2.5-0.5B reads what SAGE's policies and people said: the likeliest next token, and the divergence."""
    folder = os.environ.get("RLVER_JAX_SAGE_RESULTS")
    if not folder:
        pytest.skip("needs RLVER_JAX_SAGE_RESULTS, a folder of SAGE's result files")
    tokenizer, length = load_tokenizer(checkpoint), 256
    texts = []
    for file in sorted(Path(folder).glob("*.jsonl"))[:3]:
        with open(file, encoding="utf-8") as lines:
            texts += [json.loads(line)["history"] for line in itertools.islice(lines, 2)]
    rows = [tokenizer.encode("\n".join(message["content"] for message in text))[:length] for text in texts]
    rows = jnp.asarray([row for row in rows if len(row) == length])
    assert len(rows) >= 5
    plain = Qwen2(Qwen2Config.from_hf(checkpoint), dtype=jnp.float32, param_dtype=jnp.float32)
    rounded = plain.clone(param_dtype=jnp.int8)
    params = load_params(checkpoint, plain)

    def distributions(model, params):
        @jax.jit
        def one(params, row):
            hidden = model.apply({"params": params}, row[None], jnp.arange(length)[None])[0]
            return jax.nn.log_softmax(logits(params, hidden)[0, :, : tokenizer.vocab_size])

        return [np.asarray(one(params, row)) for row in rows]

    want = distributions(plain, params)
    actual = distributions(rounded, quantize(params, rounded))
    same = np.mean([a.argmax(-1) == b.argmax(-1) for a, b in zip(want, actual, strict=True)])
    divergence = np.mean([(np.exp(b) * (b - a)).sum(-1) for a, b in zip(want, actual, strict=True)])
    print(f"the same likeliest token at {same:.1%} of {rows.size} positions, mean KL {divergence:.4f} nats")
    assert same >= 0.97
    assert divergence <= 0.02


@pytest.mark.parametrize("scan", [True, False])
@pytest.mark.parametrize("spread", [False, True])
def test_wide_matrices_are_freed_and_the_rest_is_passed_on(scan, spread):
    """Matrices of the given parameters are gone; norms, biases, embedding and head are the very same arrays."""
    mesh = make_mesh(1, 4, 2) if spread else None
    model = Qwen2(CONFIG, dtype=jnp.float32, param_dtype=jnp.int8, scan_layers=scan)
    params = init_params(unrounded(model), jax.random.key(0), mesh)
    quantized = quantize(params, model, mesh)
    for layer, rounded_layer in zip(layers_of(params), layers_of(quantized), strict=True):
        for path in MATRICES:
            assert at(layer, path)["kernel"].is_deleted()
        assert rounded_layer["attn_norm"]["scale"] is layer["attn_norm"]["scale"]
        assert rounded_layer["attn"]["q"]["bias"] is layer["attn"]["q"]["bias"]
    for name in ("embed", "norm", "lm_head"):
        assert quantized[name] is params[name]
    assert not any(x.is_deleted() for x in jax.tree.leaves(quantized))


@pytest.mark.slow
def test_one_rounded_matrix_at_a_time_beside_the_wide_model(monkeypatch):
    """Bytes alive while each matrix is rounded: never a second model, less and less as it goes on."""
    model = Qwen2(CONFIG, dtype=jnp.float32, param_dtype=jnp.int8)
    params = init_params(unrounded(model), jax.random.key(0))
    before = alive()
    program, seen = quantization._program, []
    monkeypatch.setattr(quantization, "_program", lambda where: lambda x: (seen.append(alive()), program(where)(x))[1])
    quantized = quantize(params, model)
    assert len(seen) == len(MATRICES)
    assert max(seen) == before
    assert seen == sorted(seen, reverse=True)
    kernels = [at(quantized["layers"], path) for path in MATRICES]
    freed = sum(4 * x["kernel"].size for x in kernels) - sum(x["kernel"].nbytes + x["scale"].nbytes for x in kernels)
    assert before - alive() == freed
