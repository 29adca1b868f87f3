"""Adapters on a frozen model against W + s A B in NumPy's float64, against their parts, and at their beginning."""

import functools
import json
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

from rlver_jax.models.families import Qwen2Config
from rlver_jax.models.lora import (
    LoRA,
    abstract_adapter,
    applied,
    init_adapter,
    join,
    merged,
    scaled,
    split,
)
from rlver_jax.models.peft_files import AdapterError, read_adapter, save_adapter, with_adapter
from rlver_jax.models.product import low_rank
from rlver_jax.models.quantization import quantize, unrounded
from rlver_jax.models.qwen import Qwen2, abstract_params, logits, stack_layers
from rlver_jax.parallel import rules
from rlver_jax.parallel.mesh import make_mesh
from tests.conftest import appended, plain, random_params

CONFIG = Qwen2Config(58, 32, 48, num_layers=2, num_heads=4, num_kv_heads=2, head_dim=8, rope_theta=1e4)
TOKENS = np.random.default_rng(0).integers(0, 57, (2, 12)).astype(np.int32)
SOME = LoRA(3, 12.0, ("q", "v", "down"), rank_stabilized=True)


def drawn(model, lora, seed=5):
    """An adapter that has learned something: no factor is zero."""
    draw, (shapes, _) = np.random.default_rng(seed), abstract_adapter(model, lora)
    return jax.tree.map(lambda x: jnp.asarray(0.1 * draw.standard_normal(x.shape), x.dtype), shapes)


@functools.partial(jax.jit, static_argnums=0)
def forward(model, params, tokens=TOKENS):
    hidden, _ = model.apply({"params": params}, tokens, jnp.broadcast_to(jnp.arange(tokens.shape[1]), tokens.shape))
    return logits(params, hidden)


def test_scaling():
    assert LoRA(8, 16.0).scaling == 2
    assert LoRA(16, 8.0, rank_stabilized=True).scaling == 2


@pytest.mark.parametrize(
    ("scan", "dtype", "param_dtype"),
    [(True, "float32", "float32"), (False, "bfloat16", "bfloat16"), (False, "float32", "int8")],
)
def test_an_untrained_adapter_adds_zero(scan, dtype, param_dtype):
    """To the bit, operation by operation; compiled, sums may be fused and so rounded otherwise (docs/lora.md)."""
    model = Qwen2(CONFIG, dtype=jnp.dtype(dtype), param_dtype=jnp.dtype(param_dtype), scan_layers=scan)
    params = random_params(unrounded(model) if param_dtype == "int8" else model, 1)
    params = quantize(params, model) if param_dtype == "int8" else params
    lora = LoRA(4, 16.0)
    adapter = init_adapter(model, lora, jax.random.key(0))
    x = jnp.asarray(np.random.default_rng(2).standard_normal((2, 3, 32)), model.dtype)
    for factors in jax.tree.leaves(adapter, is_leaf=lambda tree: "lora_a" in tree):
        a, b = (np.asarray(factors[name]).reshape(-1, *factors[name].shape[-2:])[0] for name in ("lora_a", "lora_b"))
        assert a.any()
        if len(a) == x.shape[-1]:
            added = np.asarray(low_rank(x, a, b))
            assert added.dtype == np.float32
            assert not added.any()
    actual, wanted = (np.asarray(forward(model, tree)) for tree in (applied(params, adapter, lora), params))
    np.testing.assert_allclose(actual, wanted, atol=4 * jnp.finfo(dtype).eps * np.abs(wanted).max(), rtol=0)
    adapter = drawn(model, lora)
    assert np.abs(forward(model, applied(params, adapter, lora)) - forward(model, params)).max() > 0.01


@pytest.mark.parametrize("scan", [True, False])
@pytest.mark.parametrize("lora", [LoRA(4, 6.0), SOME], ids=["all", "some"])
def test_it_computes_what_whole_matrices_would(scan, lora):
    model = Qwen2(CONFIG, scan_layers=scan)
    params, adapter = random_params(model, 1), drawn(model, lora)
    s = lora.alpha / (np.sqrt(lora.rank) if lora.rank_stabilized else lora.rank)

    def by_hand(tree, factors):
        if "lora_a" not in factors:
            return tree | {name: by_hand(tree[name], inner) for name, inner in factors.items()}
        a, b = (np.asarray(factors[name], np.float64) for name in ("lora_a", "lora_b"))
        return tree | {"kernel": jnp.asarray(np.asarray(tree["kernel"], np.float64) + s * (a @ b), jnp.float32)}

    whole = by_hand(params, adapter)
    changed = [not np.array_equal(a, b) for a, b in zip(*map(jax.tree.leaves, (whole, params)), strict=True)]
    assert sum(changed) == len(lora.targets) * (1 if scan else 2)
    adapted = applied(params, adapter, lora)
    np.testing.assert_allclose(forward(model, adapted), forward(model, whole), atol=2e-6)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, atol=1e-7), merged(adapted), whole)


def test_its_beginning_is_one_with_layers_stacked_or_not():
    scanned, unrolled = (Qwen2(CONFIG, scan_layers=scan) for scan in (True, False))
    stacked, unstacked = (init_adapter(model, SOME, jax.random.key(3)) for model in (scanned, unrolled))
    jax.tree.map(np.testing.assert_array_equal, stacked, stack_layers(unstacked))
    attention = stacked["layers"]["attn"]
    assert set(stacked["layers"]) == {"attn", "down"}
    assert set(attention) == {"q", "v"}
    assert attention["v"]["lora_a"].shape == (2, 32, 3)
    assert attention["v"]["lora_b"].shape == (2, 3, 16)
    a = np.asarray(stacked["layers"]["down"]["lora_a"])
    assert 0.9 / np.sqrt(48) < np.abs(a).max() <= 1 / np.sqrt(48)
    assert not np.asarray(attention["q"]["lora_b"]).any()
    other = init_adapter(scanned, SOME, jax.random.key(4))
    assert not np.array_equal(other["layers"]["down"]["lora_a"], a)


def test_base_and_adapter_come_apart_again():
    model = Qwen2(CONFIG)
    params, adapter = random_params(model, 1), drawn(model, SOME)
    base, factors = split(join(params, adapter))
    assert jax.tree.structure((base, factors)) == jax.tree.structure((params, adapter))
    assert all(a is b for a, b in zip(*map(jax.tree.leaves, ((base, factors), (params, adapter))), strict=True))
    assert split(params) == (params, {})


def test_a_cache_holds_what_one_pass_reads(toy):
    """As the sampler reads an adapted policy, token by token, and as the trainer does, in one row."""
    lora = LoRA(4, 16.0)
    lm = toy.replace(params=join(toy.params, scaled(drawn(toy.model, lora), lora)))
    rows = [TOKENS[0].tolist(), TOKENS[1, :7].tolist()]
    hidden, _ = plain(lm, rows)
    cache = appended(lm, rows)
    for b, row in enumerate(rows):
        np.testing.assert_allclose(cache.hidden[b], hidden[b][len(row) - 1], atol=1e-5)
    assert np.abs(hidden[0] - plain(toy, rows)[0][0]).max() > 0.1


def test_gradients_are_those_of_whole_matrices():
    """dL/dA = s G B^T and dL/dB = s A^T G, with G the gradient of W + s A B (arXiv 2106.09685, by the chain rule)."""
    lora = LoRA(3, 12.0)
    model = Qwen2(CONFIG, scan_layers=False, remat="full")
    params, adapter = random_params(model, 1), drawn(model, lora)

    def loss(params):
        return jnp.square(forward(model, params)).mean()

    gradients = jax.jit(jax.grad(lambda adapter: loss(applied(params, adapter, lora))))(adapter)
    whole = jax.jit(jax.grad(loss))(merged(applied(params, adapter, lora)))
    for layer, inner in gradients.items():
        pairs = {("attn", name): both for name, both in inner["attn"].items()}
        pairs |= {(name,): inner[name] for name in ("gate", "up", "down")}
        assert len(pairs) == 7
        for path, both in pairs.items():
            factors, full = adapter[layer], whole[layer]
            for name in path:
                factors, full = factors[name], full[name]
            g, a, b = (np.asarray(x, np.float64) for x in (full["kernel"], factors["lora_a"], factors["lora_b"]))
            scale = np.abs(g).max()
            np.testing.assert_allclose(both["lora_a"], 4 * g @ b.T, atol=1e-5 * scale, rtol=1e-4)
            np.testing.assert_allclose(both["lora_b"], 4 * a.T @ g, atol=1e-5 * scale, rtol=1e-4)


@pytest.mark.parametrize("scan", [True, False])
def test_a_folder_of_peft_is_read_as_it_was_written(scan, tmp_path):
    model = Qwen2(CONFIG, scan_layers=scan)
    adapter = drawn(model, SOME)
    save_adapter(tmp_path, adapter, CONFIG, SOME, base="BASE")
    lora, restored = read_adapter(tmp_path, model)
    assert lora == SOME
    jax.tree.map(np.testing.assert_array_equal, restored, adapter)
    mesh = make_mesh(1, 4, 2)
    with jax.set_mesh(mesh):
        _, spread = read_adapter(tmp_path, model, mesh)
        jax.tree.map(np.testing.assert_array_equal, spread, adapter)
        params = jax.device_put(random_params(model, 1), rules.tree_shardings(*abstract_params(model)[::-1], mesh))
        placed = jax.tree.map(lambda x: x.sharding, params)
        whole = with_adapter(params, model, tmp_path, mesh)
    assert jax.tree.map(lambda x: x.sharding, whole) == placed
    wanted = merged(applied(random_params(model, 1), adapter, SOME))
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, atol=1e-7), whole, wanted)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"use_dora": True}, "use_dora=True, expected False"),
        ({"peft_type": "IA3"}, "peft_type='IA3', expected 'LORA'"),
        ({"rank_pattern": {"q_proj": 2}}, r"rank_pattern=\{'q_proj': 2\}, expected \{\}"),
        ({"r": 0}, "r=0 and lora_alpha=12.0; expected a rank above 0"),
        ({"r": 5}, r"lora_A.weight has shape \(3, 32\), expected \(5, 32\): it is of another model"),
    ],
)
def test_what_a_plain_adapter_is_not_is_refused(change, message, tmp_path):
    model = Qwen2(CONFIG)
    save_adapter(tmp_path, drawn(model, SOME), CONFIG, SOME, base="BASE")
    file = tmp_path / "adapter_config.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | change))
    with pytest.raises(AdapterError, match=message):
        read_adapter(tmp_path, model)


def test_tensors_of_another_model_or_none_are_refused(tmp_path):
    model = Qwen2(CONFIG)
    save_adapter(tmp_path, drawn(model, SOME), CONFIG, SOME, base="BASE")
    file = tmp_path / "adapter_model.safetensors"
    tensors = load_file(file)
    name = "base_model.model.model.layers.1.mlp.down_proj.lora_B.weight"
    cases = [
        ({k: v for k, v in tensors.items() if k != name}, f"{name} is missing"),
        (tensors | {"base_model.model.lm_head.lora_A.weight": tensors[name]}, "holds base_model.model.lm_head.lora_A"),
        (tensors | {name: tensors[name] * np.nan}, "holds NaN or infinity"),
    ]
    for changed, message in cases:
        save_file(changed, file)
        with pytest.raises(AdapterError, match=message):
            read_adapter(tmp_path, model)
    file.write_bytes(b"no tensors")
    with pytest.raises(AdapterError, match="no adapter can be read"):
        read_adapter(tmp_path, model)


def test_no_gradient_of_a_frozen_matrix_is_computed():
    """The compiled update has no product as large as a gate's kernel; that of full fine-tuning has one for each."""
    config = Qwen2Config(58, 32, 96, num_layers=1, num_heads=4, num_kv_heads=2, head_dim=8)
    model, lora = Qwen2(config, scan_layers=False, remat="full"), LoRA(4, 16.0)
    params, adapter = abstract_params(model)[0], abstract_adapter(model, lora)[0]

    def kernels(gradient, *arguments):
        text = jax.jit(gradient).lower(*arguments).compile().as_text()
        return len(re.findall(r"f32\[32,96\]\S* (?:dot|custom-call)\(", text))

    loss = lambda params: jnp.square(forward(model, params)).sum()  # noqa: E731
    assert kernels(jax.grad(loss), params) == 2
    assert kernels(jax.grad(lambda adapter, params: loss(applied(params, adapter, lora))), adapter, params) == 0
