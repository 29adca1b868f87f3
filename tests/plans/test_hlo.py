"""What the parser reads from compiled programs, against figures worked out by hand."""

import jax
import jax.numpy as jnp
import pytest
from jax.sharding import NamedSharding, PartitionSpec

from rlver_jax.parallel.mesh import make_mesh
from rlver_jax.plans.hlo import Module, Use, group_size, trip_count
from rlver_jax.plans.measure import logits_among

LAYERS, WIDTH = 5, 64
LAYER_BYTES = WIDTH * WIDTH * 4


@pytest.fixture(scope="module")
def gathering():
    """A loop over layers that gathers each one's weights from 8 devices, in a loop until the data says stop."""
    mesh = make_mesh(fsdp=8)
    split, whole = (NamedSharding(mesh, spec) for spec in (PartitionSpec(None, "fsdp"), PartitionSpec()))

    def layer(x, w):
        return jnp.tanh(x @ jax.lax.with_sharding_constraint(w, whole)), None

    @jax.named_scope("until")
    def until(x, weights):
        return jax.lax.while_loop(lambda x: (x > 0.5).any(), lambda x: jax.lax.scan(layer, x, weights)[0], x)

    x = jax.ShapeDtypeStruct((8, WIDTH), jnp.float32, sharding=NamedSharding(mesh, PartitionSpec("fsdp")))
    weights = jax.ShapeDtypeStruct((LAYERS, WIDTH, WIDTH), jnp.float32, sharding=split)
    with jax.set_mesh(mesh):
        compiled = jax.jit(until, out_shardings=x.sharding).lower(x, weights).compile()
    return Module.parse(compiled.as_text())


def test_collectives_in_nested_loops(gathering):
    """3 turns of the outer loop, 5 layers each: 15 gathers; of each a device lacks 7 of 8 parts."""
    asked = []
    found = gathering.collectives(
        "", lambda name: "scope" if "until" in name else None, lambda name: asked.append(name) or 3
    )
    assert asked
    assert all("until" in name for name in asked)
    gathers = {phase: use for (phase, kind), use in found.items() if kind == "all-gather"}
    assert gathers == {"scope": Use(3 * LAYERS, 3 * LAYERS * LAYER_BYTES * 7 / 8)}


def test_counted_loops(gathering):
    loops = [op for body in gathering.computations.values() for op in body if op.kind == "while"]
    assert sorted(str(trip_count(gathering, loop)) for loop in loops) == [str(LAYERS), "None"]


def test_arrays_are_those_in_memory(gathering):
    shapes = {sizes for _, sizes in gathering.arrays()}
    assert (LAYERS, WIDTH // 8, WIDTH) in shapes, "a device's part of the weights"
    assert (LAYERS, WIDTH, WIDTH) not in shapes, "the weights are never whole"


HLO = """
%cond (p: (s32[], f32[8])) -> pred[] {
  %p = (s32[], f32[8]) parameter(0)
  %i = s32[] get-tuple-element(%p), index=0
  %n = s32[] constant(28)
  ROOT %lt = pred[] compare(%i, %n), direction=LT
}

%body (q: (s32[], f32[8])) -> (s32[], f32[8]) {
  %q = (s32[], f32[8]) parameter(0)
  %ar = (bf16[4,10]{1,0}, f32[6]{0}) all-reduce(%a, %b), channel_id=1, replica_groups=[2,4]<=[4,2]T(1,0), to_apply=%add
  %rs = f32[4]{0} reduce-scatter(%x), channel_id=2, replica_groups={{0,1},{2,3}}, dimensions={0}, to_apply=%add
  %cp = (f32[5]{0}, f32[5]{0}, u32[], u32[]) collective-permute-start(%y), channel_id=3, source_target_pairs={{0,1}}
  %fa = f32[8] fusion(%q), kind=kCustom, calls=%part_a
  %fb = f32[8] fusion(%q), kind=kCustom, calls=%part_b
}

%part_a (r: f32[2]) -> f32[8] {
  ROOT %ag = f32[8]{0} all-gather(%r), channel_id=7, replica_groups=[2,4]<=[8], dimensions={0}
}

%part_b (r: f32[2]) -> f32[8] {
  ROOT %ag.1 = f32[8]{0} all-gather(%r), channel_id=7, replica_groups=[2,4]<=[8], dimensions={0}
}

ENTRY %main (p: f32[8]) -> f32[8] {
  %w = (s32[], f32[8]) while(%t), condition=%cond, body=%body, metadata={op_name="jit(f)/layers/while"}
}
"""


def test_volumes_of_ring_algorithms():
    """All-reduce: twice what a device lacks; reduce-scatter: all other parts; one gather though two fusions show it."""
    found = Module.parse(HLO).collectives("", lambda name: "layers" if "layers" in name else None, lambda name: 1 / 0)
    wanted = {
        "all-reduce": 2 * (4 * 10 * 2 + 6 * 4) * 3 / 4, "reduce-scatter": 4 * 4, "collective-permute": 5 * 4,
        "all-gather": 8 * 4 * 3 / 4,
    }  # fmt: skip
    assert found == {("layers", kind): Use(28, 28 * size) for kind, size in wanted.items()}


@pytest.mark.parametrize(
    ("attribute", "size"),
    [
        ("replica_groups={{0,2,4,6},{1,3,5,7}}, x", 4),
        ("replica_groups=[4,2]<=[8], x", 2),
        ("replica_groups=[2,4]<=[4,2]T(1,0), x", 4),
        ("replica_groups=mesh['axis_0'=1,'axis_1'=4,'axis_2'=2] {'axis_1','axis_2'}, x", 8),
    ],
)
def test_group_sizes(attribute, size):
    assert group_size(attribute) == size


def test_logits_are_found_however_they_lie():
    """6 rows of 100 tokens, a vocabulary of 5,000 over 4 chips, a model of width 700."""
    hlo = "ENTRY %f (p: f32[1]) -> f32[1] {{\n  %a = {} fusion(%p), kind=kLoop, calls=%g\n}}\n"
    find = lambda shape: logits_among(Module.parse(hlo.format(shape)).arrays(), 600, 5000, 4, 700)  # noqa: E731
    for shape in (
        "f32[6,100,1250]{2,1,0}",
        "bf16[600,5000]{1,0}",
        "f32[1250,600]{0,1}",
        "(s32[], f32[2,600,1250]{2,1,0})",
    ):
        assert find(shape), shape
    for shape in ("f32[6,100,1024]{2,1,0}", "f32[1250,700]{1,0}", "f32[5000,175]{1,0}", "s32[600,5000]{1,0}"):
        assert not find(shape), shape
