"""What XLA makes of the programs of a training step on a mesh: which weights travel, what exists, what is copied."""

import dataclasses
import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from ml_collections import ConfigDict

from rlver_jax.models.attention import AttentionMask, visible
from rlver_jax.models.qwen import Qwen2
from rlver_jax.models.splash import blocks_of, splash_attention
from rlver_jax.models.tpu_layout import stored_transposed
from rlver_jax.parallel.mesh import batch_parts, make_mesh, sampling_mesh
from rlver_jax.parallel.rules import sharding
from rlver_jax.perf.chips import topology_devices
from rlver_jax.perf.hlo import Module
from rlver_jax.perf.plan_programs import params_of
from rlver_jax.rollout.ready import rollout_model, sampling_params, sampling_program
from tests.parallel.programs import (
    CONFIG,
    MODEL,
    VOCAB_CHUNK,
    collectives,
    lower_copy,
    lower_decode,
    lower_turns,
    lower_update,
    operations,
)
from tests.quick import ALL_PASSES

BATCH, LENGTH, CAPACITY = 16, 288, 1024
SHARED = {"replica": 2, "fsdp": 1, "tensor": 0, "attention_data": 2}
LARGEST_MATRIX = CONFIG.hidden_size * CONFIG.intermediate_size


def gathers(ops):
    """Gathers of floats: weights and activations, not token ids."""
    return [op for op in collectives(ops) if op.kind.startswith("all-gather") and "f" in op.shapes[0][0]]


def check_update(ops, mesh, positions: int = 0, length: int = LENGTH, stacked: bool = True):
    """Weights are gathered one matrix of one layer at a time, the head a chunk at a time; no logits of all tokens.

    Numbers of all tokens, so many `positions`, may be gathered too. Hidden states are gathered for a layer's products;
    what the backward pass keeps of each layer is spread.
    """
    tensor, width = mesh.shape["tensor"], CONFIG.hidden_size
    large_gathers = [op for op in gathers(ops) if op.largest > positions and op.shapes[-1][1][-2:] != (length, width)]
    assert large_gathers, "weights split over fsdp must be gathered somewhere"
    for op in large_gathers:
        assert op.inside or not stacked, f"gathered outside the loop over layers or chunks: {op.line}"
        assert op.largest <= max(LARGEST_MATRIX // tensor, VOCAB_CHUNK * width), op.line
    logits = BATCH * length // (mesh.shape["replica"] * mesh.shape["fsdp"]) * CONFIG.vocab_size // tensor
    for op in ops:
        assert op.largest < logits, f"as large as logits of all tokens: {op.line}"
    stacks = [dims for op in ops for _, dims in op.shapes if dims[:1] == (CONFIG.num_layers,) and dims[-1] == width]
    lengths = {dims[-2] for dims in stacks}
    assert length not in lengths
    assert length // tensor in lengths or not stacked


def check_decode(ops, mesh):
    """No weights travel, and nothing as large as a cache is made anew at any step.

    Chips of `attention_data` gather hidden states, one of each of their rows.
    """
    local_heads, shared = CONFIG.num_kv_heads // mesh.shape["tensor"], mesh.shape.get("attention_data", 1)
    rows = BATCH // batch_parts(mesh)
    cache = CONFIG.num_layers * rows * local_heads * CAPACITY * CONFIG.head_dim
    most = rows * mesh.shape["tensor"] if shared == 1 else rows * shared * CONFIG.hidden_size
    assert most < CONFIG.hidden_size * CONFIG.head_dim, "less than the smallest part of a matrix"
    assert max((op.largest for op in gathers(ops)), default=0) <= most
    assert any(op.largest == cache for op in ops), "the caches are there"
    for op in ops:
        if op.inside and op.largest >= cache:
            assert op.kind not in ("copy", "copy-start", "convert", "transpose", "select", "broadcast"), op.line


def check_copy(ops, mesh):
    """The seven matrices of one layer at a time, embedding and head each by itself."""
    tensor = mesh.shape["tensor"]
    layers = [op for op in gathers(ops) if op.inside]
    assert len(layers) == 7
    assert max(op.largest for op in layers) == LARGEST_MATRIX // tensor
    assert [op.largest for op in gathers(ops) if not op.inside] == 2 * [
        CONFIG.vocab_size * CONFIG.hidden_size // tensor
    ]


def compiled(lowered) -> str:
    """The program's text; passes over loops move what is gathered."""
    return lowered.compile(compiler_options=ALL_PASSES).as_text()


def test_update_gathers_a_layer_at_a_time():
    mesh = make_mesh(1, 4, 2)
    check_update(operations(compiled(lower_update(mesh, batch=BATCH, length=LENGTH, ppo=False))), mesh)


def test_chips_that_share_a_copy_beyond_the_key_heads_gather_no_weights():
    sampling = sampling_mesh(make_mesh(1, 4, 2), SHARED)
    check_decode(
        operations(compiled(lower_decode(sampling, batch=BATCH, capacity=CAPACITY, dtype=jnp.float32))), sampling
    )


def test_decoding_on_a_mesh_without_fsdp_gathers_nothing():
    """The same loop on the training mesh gathers each layer's seven matrices for every token."""
    training = make_mesh(1, 4, 2)
    sampling = sampling_mesh(training, {"replica": 4, "fsdp": 1, "tensor": 0})
    lower = lambda mesh: lower_decode(mesh, batch=BATCH, capacity=CAPACITY, dtype=jnp.float32)  # noqa: E731
    check_decode(operations(compiled(lower(sampling))), sampling)
    again = gathers(operations(compiled(lower(training))))
    assert sum(op.inside and op.largest >= CONFIG.hidden_size * CONFIG.head_dim // 2 for op in again) == 7


def test_weights_pass_to_the_sampling_mesh_by_gathers_alone():
    """Once a step, one program."""
    training = make_mesh(1, 4, 2)
    sampling = sampling_mesh(training, {"replica": 4, "fsdp": 1, "tensor": 0})
    ops = collectives(operations(compiled(lower_copy(training, sampling))))
    assert {op.kind for op in ops} == {"all-gather"}
    check_copy(ops, sampling)


def test_weights_that_become_int8_travel_as_such():
    """Also where MLPs have more parts than attention: of floats, embedding and head alone leave their devices."""
    training = make_mesh(1, 4, 2)
    sampling = sampling_mesh(training, SHARED)
    model = rollout_model(ConfigDict({"rollout": {"param_dtype": "int8"}}), MODEL)
    lowered = sampling_program(sampling_params(model, sampling)).lower(params_of(MODEL, training))
    moved = [shape for op in collectives(operations(compiled(lowered))) for shape in op.shapes]
    least = CONFIG.hidden_size * CONFIG.num_kv_heads * CONFIG.head_dim // 8  # that a device has of a matrix
    large = [(dtype, dims) for dtype, dims in moved if np.prod(dims) >= least]
    assert sum(dtype == "s8" for dtype, _ in large) >= 7
    assert {dims[-2] for dtype, dims in large if dtype != "s8"} == {CONFIG.vocab_size // 4}


def tpu_mesh(topology: str, *shape: int, slices: int = 1):
    pytest.importorskip("libtpu", reason="needs the TPU compiler: pip install -e '.[tpu]' in the clone")
    return make_mesh(*shape, devices=topology_devices(topology, slices))


@pytest.mark.slow
@pytest.mark.parametrize(
    ("shape", "microbatches"), [pytest.param((1, 4, 2), 1, marks=pytest.mark.long), ((2, 2, 2), 2)]
)
def test_ppo_for_tpu(shape, microbatches):
    mesh = tpu_mesh("v5e:2x4", *shape)
    lowered = lower_update(mesh, batch=BATCH, length=LENGTH, ppo=True, microbatches=microbatches)
    check_update(operations(lowered.compile().as_text()), mesh)


@pytest.mark.slow
def test_shared_rows_move_numbers_of_tokens_only():
    mesh = make_mesh(1, 4, 2)
    lowered = lower_update(mesh, batch=BATCH, length=LENGTH, ppo=True, shared=True)
    check_update(operations(lowered.compile().as_text()), mesh, positions=BATCH * LENGTH)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("topology", "width", "dtype", "length"),
    [
        ("v5e:2x2", 128, jnp.bfloat16, 1088),  # filled up to whole blocks
        ("v5p:2x2x1", 128, jnp.bfloat16, 1088),
        ("v5e:2x2", 64, jnp.bfloat16, 1024),  # heads of Qwen2.5-0.5B
        ("v5e:2x2", 128, jnp.float32, 1024),
    ],
)
def test_splash_kernels_for_tpu(topology, width, dtype, length):
    """Forward and backward, on a mesh that divides rows and heads: three kernels."""
    mesh = tpu_mesh(topology, 1, 2, 2)

    def graded(q, k, v, branch, segment):
        mask = AttentionMask(None, branch, branch, q_segment=segment, k_segment=segment)
        blocks = blocks_of(visible(mask, length))
        total = lambda *x: (splash_attention(*x, blocks).astype(jnp.float32) ** 2).sum()  # noqa: E731
        return jax.value_and_grad(total, (0, 1, 2))(q, k, v)

    def shape(axes, *sizes, dtype=dtype):
        return jax.ShapeDtypeStruct(sizes, dtype, sharding=sharding(axes, sizes, mesh))

    keys_values = [shape(("batch", "kv_heads", None, None), 2, 2, length, width) for _ in "kv"]
    labels = [shape(("batch", None), 2, length, dtype=jnp.int32) for _ in range(2)]
    with jax.set_mesh(mesh):
        compiled = jax.jit(graded).lower(
            shape(("batch", None, "heads", None), 2, length, 4, width), *keys_values, *labels
        )
        text = compiled.compile().as_text()
    assert text.count("tpu_custom_call") == 3
    for kernel in ("fwd", "dq", "dkv"):
        assert f"splash_mha_{kernel}" in text


@pytest.mark.slow
@pytest.mark.parametrize("topology", ["v5e:2x4", pytest.param("v5p:2x2x2", marks=pytest.mark.long)])
@pytest.mark.parametrize("scan", [True, pytest.param(False, marks=pytest.mark.long)])
def test_an_update_with_splash_attention_for_tpu(topology, scan):
    """Of rows that dialogues share: weights are gathered as with any attention."""
    mesh = tpu_mesh(topology, 1, 4, 2)
    model = MODEL.clone(attention="splash", scan_layers=scan)
    text = lower_update(mesh, batch=BATCH, length=1024, ppo=False, model=model, shared=True).compile().as_text()
    for kernel in ("fwd", "dq", "dkv"):
        assert f"splash_mha_{kernel}" in text
    check_update(operations(text), mesh, positions=BATCH * 1024, length=1024, stacked=scan)


@pytest.mark.slow
def test_decoding_for_tpu():
    training = tpu_mesh("v5e:2x4", 1, 4, 2)
    sampling = sampling_mesh(training, {"replica": 4, "fsdp": 1, "tensor": 0})
    check_decode(operations(lower_decode(sampling, batch=BATCH, capacity=CAPACITY).compile().as_text()), sampling)
    shared = sampling_mesh(training, SHARED)
    check_decode(operations(lower_decode(shared, batch=BATCH, capacity=CAPACITY).compile().as_text()), shared)
    copied = collectives(operations(lower_copy(training, sampling).compile().as_text()))
    assert {shape[0] for op in copied for shape in op.shapes} == {"bf16"}, "rounded before they travel"
    check_copy(copied, sampling)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("chips", "tensor", "batch", "group"), [(8, 2, 8, 1), (8, 8, 16, 1), (1, 1, 24, 1), (8, 2, 32, 4)]
)
def test_loops_of_a_rollout_read_weights_and_caches_as_they_lie(chips, tensor, batch, group):
    """Reading texts and decoding replies want them in different orders. Columns of the MLP don't fill tiles of 128.

    What attention sums over a prefix that a group shares stays with its heads.
    """
    config = dataclasses.replace(
        CONFIG, hidden_size=1024, intermediate_size=1216 * tensor, num_layers=5, num_heads=16, num_kv_heads=2 * tensor
    )
    model = Qwen2(config, dtype=jnp.bfloat16, attention="chunked")
    mesh = make_mesh(chips // tensor, 1, tensor, devices=topology_devices("v5e:2x4")[:chips])
    text = lower_turns(mesh, model, batch=batch, capacity=2048, group=group).compile().as_text()
    assert Module.parse(text).copied("play", lambda name: None, lambda name: 1) == {}
    ops = operations(text)
    cache = config.num_layers * (batch * tensor // chips) * 2 * 2048 * config.head_dim
    assert any(op.largest == cache for op in ops), "the caches are there"
    assert max((op.largest for op in gathers(ops)), default=0) <= batch * tensor, "of each row's likeliest token"
    kernel = config.num_layers * config.hidden_size * min(1216, config.num_heads * config.head_dim // tensor)
    for op in ops:
        of_all_layers = op.shapes and op.shapes[0][1][:1] == (config.num_layers,)
        if of_all_layers and op.kind in ("copy", "transpose", "all-gather"):
            assert op.largest < min(cache, kernel), op.line


@pytest.mark.slow
def test_how_matrices_are_stored_on_tpu():
    """In the order that the compiler gives to a program's arguments."""
    sizes = [128, 224, 448, 896, 1216, 1728, 3696, 4864, 7392, 8192]
    shapes = list(itertools.product(sizes, sizes))
    place = jax.sharding.SingleDeviceSharding(topology_devices("v5e:2x4")[0])
    for dtype in (jnp.bfloat16, jnp.int8, jnp.float32):
        arguments = [jax.ShapeDtypeStruct((4, *shape), dtype, sharding=place) for shape in shapes]
        program = jax.jit(lambda *xs: sum(x[0, 0, 0] for x in xs)).lower(*arguments).compile()
        orders = [format.layout.major_to_minor for format in program.input_formats[0]]
        assert orders == [(0, 2, 1) if stored_transposed(*shape) else (0, 1, 2) for shape in shapes]
        assert len(set(orders)) == 2


@pytest.mark.slow
@pytest.mark.parametrize(
    ("topology", "shape"), [("v5e:8x8", (1, 16, 4)), ("v5p:4x4x4", (1, 8, 8)), ("v6e:8x8", (1, 64, 1))]
)
def test_meshes_on_real_tori(topology, shape):
    """Groups of `tensor` are neighbours: no two of them further apart than their number allows in a ring or square."""
    mesh = tpu_mesh(topology, *shape)
    assert mesh.devices.shape == shape
    for group in mesh.devices.reshape(-1, shape[2]):
        coords = [d.coords for d in group]
        spans = [max(c[i] for c in coords) - min(c[i] for c in coords) + 1 for i in range(3)]
        assert spans[0] * spans[1] * spans[2] == shape[2], coords


@pytest.mark.slow
def test_replica_goes_across_slices():
    mesh = tpu_mesh("v5e:2x4", 4, 2, 2, slices=2)
    assert [sorted({d.slice_index for d in half.flat}) for half in mesh.devices.reshape(2, -1)] == [[0], [1]]
    with pytest.raises(ValueError, match=r"mesh.replica=1: the devices are of 2 slices.*choose mesh.replica=2"):
        make_mesh(1, 8, 2, devices=list(mesh.devices.flat))
    with pytest.raises(ValueError, match="mesh_sampling.replica=1: the devices are of 2 slices"):
        sampling_mesh(mesh, {"replica": 1, "fsdp": -1, "tensor": 0})
