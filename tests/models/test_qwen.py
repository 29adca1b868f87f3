"""The model against logits that transformers computed (golden files), and its variants against each other."""

import dataclasses
import functools
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from rlver_jax.models.families import PRESETS, Qwen2Config, preset
from rlver_jax.models.hf_weights import load_params
from rlver_jax.models.kv_cache import init_kv_cache, write
from rlver_jax.models.qwen import Qwen2, abstract_params, init_params, logits, stack_layers, unstack_layers
from rlver_jax.parallel.mesh import make_mesh

GOLDEN = Path(__file__).parent / "golden"
NAMES = ("tied", "untied", "gqa", "yarn", "qwen3", "qwen3_untied", "qwen3_gqa")


@functools.cache
def golden(name):
    data = np.load(GOLDEN / name / "golden.npz")
    return Qwen2Config.from_hf(GOLDEN / name), jnp.asarray(data["tokens"]), data["logits"]


def positions(tokens):
    return jnp.broadcast_to(jnp.arange(tokens.shape[1]), tokens.shape)


@functools.partial(jax.jit, static_argnums=0)
def forward(model, params, tokens, pos, branch=None, cache=None, start=None):
    hidden, cache = model.apply({"params": params}, tokens, pos, branch, cache, start)
    return logits(params, hidden), cache


CHUNKED = {"attention": "chunked", "attention_chunk": 16}  # 40 queries: the last chunk is partly padding
REMAT = {"remat": "full", "scan_layers": False, "attention": "chunked", "attention_chunk": 8}


def combined(**ways):
    """Each kind of model with each way to compute it; of the ways but the first, one kind of each family isn't slow.

    A head of its own and longer rotary tables are the same code however layers are laid out, or computed again.
    """
    slow = {(name, way) for name in NAMES for way in ways if way != "scan" and name not in ("gqa", "qwen3")}
    return [
        pytest.param(name, options, id=f"{way}-{name}", marks=[pytest.mark.slow][: (name, way) in slow])
        for way, options in ways.items()
        for name in NAMES
    ]


@pytest.mark.parametrize(
    ("name", "options"),
    combined(**{"scan": {}, "unrolled": {"scan_layers": False}, "chunked": CHUNKED, "unrolled-chunked-remat": REMAT}),
)
def test_logits_equal_transformers(name, options):
    config, tokens, expected = golden(name)
    model = Qwen2(config, **options)
    actual, _ = forward(model, load_params(GOLDEN / name, model), tokens, positions(tokens))
    np.testing.assert_allclose(actual, expected, atol=2e-5)


@pytest.mark.parametrize(
    ("name", "options"),  # chunks read 1 to 5 eighths of the cache
    combined(scan={}, unrolled={"scan_layers": False}, chunked={"attention": "chunked", "attention_chunk": 8}),
)
def test_ragged_cache_equals_transformers(name, options):
    """Prefill rows of different lengths in one call, then the rest in pieces, each row at its own length."""
    config, tokens, expected = golden(name)
    model = Qwen2(config, **options)
    params = load_params(GOLDEN / name, model)
    cache = init_kv_cache(config, 3, 64, jnp.float32, scan_layers=model.scan_layers)
    start, counts = np.zeros(3, np.int32), np.array([12, 5, 20], np.int32)
    for _ in range(2):  # the second piece continues ragged
        piece = jnp.stack([jax.lax.dynamic_slice(t, (s,), (20,)) for t, s in zip(tokens, start, strict=True)])
        actual, cache = forward(model, params, piece, start[:, None] + jnp.arange(20), None, cache, jnp.asarray(start))
        for row in range(3):
            want = expected[row, start[row] : start[row] + counts[row]]
            np.testing.assert_allclose(actual[row, : counts[row]], want, atol=2e-5)
        start = start + counts
        counts = np.array([8, 15, 0], np.int32)
    for _ in range(5):  # then one by one; what padding wrote past each length must not be seen
        now = np.minimum(start, 39)
        actual, cache = forward(
            model, params, tokens[np.arange(3), now][:, None], now[:, None], None, cache, jnp.asarray(now)
        )
        np.testing.assert_allclose(actual[:, 0], expected[np.arange(3), now], atol=2e-5)
        start = start + 1


@pytest.mark.parametrize("attention", ["dense", "chunked"])
def test_branches_equal_separate_rows(attention):
    """canonical a, branch 1, canonical b, branch 2, canonical c: each part as a plain row that transformers knows."""
    config, tokens, _ = golden("gqa")
    model = Qwen2(config, attention=attention, attention_chunk=8)
    params = load_params(GOLDEN / "gqa", model)
    a, one, b, two, c = (tokens[0, i : i + 6] for i in range(0, 30, 6))
    packed = jnp.concatenate([a, one, b, two, c])[None]
    branch = jnp.repeat(jnp.array([0, 1, 0, 2, 0]), 6)[None]
    pos = jnp.concatenate([jnp.arange(s, s + 6) for s in (0, 6, 6, 12, 12)])[None]
    actual, _ = forward(model, params, packed, pos, branch)
    rows = {(6, 12): [a, one], (12, 18): [a, b], (18, 24): [a, b, two], (24, 30): [a, b, c]}
    for (start, end), parts in rows.items():
        row = jnp.concatenate(parts)[None]
        want, _ = forward(model, params, row, positions(row))
        np.testing.assert_allclose(actual[0, start:end], want[0, -6:], atol=2e-5)


@pytest.mark.parametrize("attention", ["dense", "chunked"])
def test_branches_over_a_cache_equal_separate_rows(attention):
    config, tokens, _ = golden("tied")
    model = Qwen2(config, attention=attention, attention_chunk=4)
    params = load_params(GOLDEN / "tied", model)
    lengths = jnp.array([10, 7, 3])
    cache = init_kv_cache(config, 3, 40, jnp.float32, scan_layers=True)
    _, cache = forward(model, params, tokens[:, :10], positions(tokens[:, :10]), None, cache, jnp.zeros(3, jnp.int32))
    options = tokens[:, 20:29]
    branch = jnp.broadcast_to(jnp.repeat(jnp.array([1, 2, 3]), 3), (3, 9))
    pos = lengths[:, None] + jnp.tile(jnp.arange(3), 3)
    actual, _ = forward(model, params, options, pos, branch, cache, lengths)
    for row in range(3):
        for option in range(3):
            plain = jnp.concatenate([tokens[row, : lengths[row]], options[row, 3 * option : 3 * option + 3]])[None]
            want, _ = forward(model, params, plain, positions(plain))
            np.testing.assert_allclose(actual[row, 3 * option : 3 * option + 3], want[0, -3:], atol=2e-5)


@functools.partial(jax.jit, static_argnums=0)
def loss_and_gradient(model, params, tokens):
    def loss(params):
        hidden, _ = model.apply({"params": params}, tokens, positions(tokens))
        return jnp.mean(jax.nn.logsumexp(logits(params, hidden), -1))

    return jax.value_and_grad(loss)(params)


@pytest.mark.slow
@pytest.mark.parametrize("remat", ["dots", "full"])
def test_remat_changes_memory_not_gradients(remat):
    config, tokens, _ = golden("tied")
    params = load_params(GOLDEN / "tied", Qwen2(config))
    plain, other = Qwen2(config), Qwen2(config, remat=remat, attention="chunked", attention_chunk=16)
    jax.tree.map(
        lambda a, b: np.testing.assert_allclose(a, b, atol=2e-6),
        loss_and_gradient(plain, params, tokens),
        loss_and_gradient(other, params, tokens),
    )
    long = jnp.zeros((2, 128), jnp.int32)
    temp = [
        loss_and_gradient.lower(m, params, long).compile().memory_analysis().temp_size_in_bytes for m in (plain, other)
    ]
    assert temp[1] < temp[0]


@pytest.mark.parametrize(("remat", "again"), [("none", 0), ("dots", 2), ("full", 8)])
def test_remat_computes_again_what_it_says(remat, again):
    """Products of a scanned layer: 7 with weights and 2 of attention, each with two derivatives. `dots` repeats
    attention's; `full` all but the last one, whose result no derivative needs."""
    config, tokens, _ = golden("tied")
    model = Qwen2(config, remat=remat, scan_layers=True)
    shapes, _ = abstract_params(model)

    def loss(params):
        return model.apply({"params": params}, tokens, positions(tokens))[0].sum()

    text = jax.jit(jax.grad(loss)).lower(shapes).as_text()
    assert text.count("stablehlo.dot_general") == 3 * (7 + 2) + again


def test_decoding_updates_a_scanned_cache_in_place():
    """A donated cache is returned in its own buffers, and no second cache is ever made."""
    config, _, _ = golden("gqa")
    model = Qwen2(config)
    cache = init_kv_cache(config, 4, 4096, jnp.float32, scan_layers=True)
    token = jnp.zeros((4, 1), jnp.int32)
    step = jax.jit(lambda p, c, s: model.apply({"params": p}, token, s[:, None], None, c, s), donate_argnums=1)
    memory = (
        step.lower(init_params(model, jax.random.key(0)), cache, jnp.zeros(4, jnp.int32)).compile().memory_analysis()
    )
    size = cache.k.nbytes + cache.v.nbytes
    assert memory.alias_size_in_bytes >= size
    assert memory.temp_size_in_bytes < size  # a layer's slice, never the stacked cache


def test_stacking_round_trip():
    config, _, _ = golden("untied")
    params = load_params(GOLDEN / "untied", Qwen2(config))
    again = stack_layers(unstack_layers(params))
    jax.tree.map(np.testing.assert_array_equal, params, again)
    unrolled = load_params(GOLDEN / "untied", Qwen2(config, scan_layers=False))
    jax.tree.map(np.testing.assert_array_equal, unstack_layers(params), unrolled)


def test_parameters_are_created_sharded():
    config = dataclasses.replace(golden("gqa")[0], vocab_size=128)
    model, mesh = Qwen2(config), make_mesh(fsdp=4, tensor=2)
    params = init_params(model, jax.random.key(3), mesh)
    kernel = params["layers"]["gate"]["kernel"]  # [3, 48, 80]: embed over fsdp, mlp over tensor
    assert {s.data.shape for s in kernel.addressable_shards} == {(3, 12, 40)}
    assert {s.data.shape for s in params["embed"]["kernel"].addressable_shards} == {(64, 12)}
    jax.tree.map(
        lambda a, b: np.testing.assert_allclose(a, b, atol=1e-6),
        params,
        init_params(model, jax.random.key(3)),
    )


@pytest.mark.parametrize(
    ("name", "fsdp", "tensor"), [("tied", 4, 2), ("tied", 2, 4), ("tied", 8, 1), ("qwen3", 2, 4), ("qwen3", 4, 2)]
)
def test_sharded_model_equals_transformers(name, fsdp, tensor):
    """Also where heads do not divide: both have 4 query and 2 key heads, for tensor 4 the columns still divide."""
    config, tokens, expected = golden(name)
    config = dataclasses.replace(config, vocab_size=136)  # 131 rows cannot be divided: pad the table below
    model, mesh = Qwen2(config), make_mesh(fsdp=fsdp, tensor=tensor)
    params = load_params(GOLDEN / name, Qwen2(golden(name)[0]))
    params["embed"]["kernel"] = jnp.pad(params["embed"]["kernel"], ((0, 5), (0, 0)))
    shapes, axes = abstract_params(model)
    from rlver_jax.parallel.rules import tree_shardings

    params = jax.device_put(params, tree_shardings(axes, shapes, mesh))
    batch = jnp.tile(tokens, (3, 1))[:8]
    with jax.set_mesh(mesh):
        actual, _ = forward(model, params, batch, positions(batch))
    np.testing.assert_allclose(np.asarray(actual)[:3, :, :131], expected, atol=5e-5)


@pytest.mark.parametrize(
    ("name", "billions"),  # parameter counts of the model cards (huggingface.co/Qwen)
    [("0.5b", 0.49), ("1.5b", 1.54), ("3b", 3.09), ("7b", 7.61), ("14b", 14.7), ("32b", 32.5), ("72b", 72.7)],
)
def test_presets_have_the_published_sizes(name, billions):
    config = preset(name)
    assert config.num_params / 1e9 == pytest.approx(billions, rel=0.01)
    shapes, _ = abstract_params(Qwen2(config))
    assert sum(x.size for x in jax.tree.leaves(shapes)) == config.num_params


@pytest.mark.parametrize(
    ("name", "billions", "layers"),  # the model cards' counts of all parameters, and of those that embed nothing
    [
        *(("qwen3-0.6b", "0.6", "0.44"), ("qwen3-1.7b", "1.7", "1.4"), ("qwen3-4b", "4.0", "3.6")),
        *(("qwen3-8b", "8.2", "6.95"), ("qwen3-14b", "14.8", "13.2"), ("qwen3-32b", "32.8", "31.2")),
    ],
)
def test_presets_of_qwen3_have_the_published_sizes(name, billions, layers):
    config = preset(name)
    embedding = config.vocab_size * config.hidden_size * (1 if config.tie_embeddings else 2)
    for count, told in ((config.num_params, billions), (config.num_params - embedding, layers)):
        assert f"{count / 1e9:.{len(told.partition('.')[2])}f}" == told
    shapes, _ = abstract_params(Qwen2(config))
    assert sum(x.size for x in jax.tree.leaves(shapes)) == config.num_params


def test_unknown_names_are_refused_with_the_known_ones():
    with pytest.raises(ValueError, match="unknown size '8b'"):
        preset("8b")
    for options, message in [({"remat": "some"}, "dots"), ({"attention": "flash"}, "chunked")]:
        with pytest.raises(ValueError, match=message):
            Qwen2(PRESETS["0.5b"], **options)


@pytest.mark.parametrize("layer", [None, 1])
@pytest.mark.parametrize("rows", [4, 40])  # unrolled, looped
def test_cache_writes_equal_numpy(rows, layer):
    """Rows at their own lengths; alone, and with the batch split over devices (a scatter there)."""
    rng = np.random.default_rng(0)
    cache = rng.normal(size=(rows, 2, 12, 3) if layer is None else (3, rows, 2, 12, 3)).astype(np.float32)
    new, start = rng.normal(size=(rows, 2, 5, 3)).astype(np.float32), rng.integers(0, 8, rows)
    want = cache.copy()
    for b in range(rows):
        (want if layer is None else want[layer])[b, :, start[b] : start[b] + 5] = new[b]
    arguments = jnp.asarray(cache), jnp.asarray(new), jnp.asarray(start), None if layer is None else jnp.int32(layer)
    np.testing.assert_array_equal(jax.jit(write)(*arguments), want)
    with jax.set_mesh(make_mesh(fsdp=4, tensor=2)):
        np.testing.assert_array_equal(jax.jit(write)(*arguments), want)


@pytest.mark.slow
def test_gradients_on_a_mesh_are_those_of_one_device():
    """Of the norms of queries and keys too, which all heads share: devices that split heads add up their parts."""
    config, tokens, _ = golden("qwen3")
    config = dataclasses.replace(config, vocab_size=136)
    model, mesh = Qwen2(config, remat="full"), make_mesh(fsdp=2, tensor=4)
    params = init_params(model, jax.random.key(1))
    batch = jnp.tile(tokens, (3, 1))[:8]
    want = loss_and_gradient(model, params, batch)
    with jax.set_mesh(mesh):
        actual = loss_and_gradient(model, init_params(model, jax.random.key(1), mesh), batch)
    assert np.abs(want[1]["layers"]["attn"]["q_norm"]["scale"]).max() > 1e-6
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, atol=1e-5 * np.abs(b).max() + 1e-9), actual, want)
