"""What the parser reads from compiled programs, against figures worked out by hand."""

import contextlib

import jax
import jax.numpy as jnp
import pytest
from jax.sharding import NamedSharding, PartitionSpec

from rlver_jax.parallel.mesh import make_mesh
from rlver_jax.perf.chips import topology_devices
from rlver_jax.perf.hlo import Module, Use, array_bytes, group, trip_count
from rlver_jax.perf.plan_measure import logits_among, uncounted

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
    collectives = gathering.collectives(
        "", lambda name: "scope" if "until" in name else None, lambda name: asked.append(name) or 3
    )
    assert asked
    assert all("until" in name for name in asked)
    gathers = {phase: use for (phase, kind), use in collectives.items() if kind == "all-gather"}
    assert gathers == {"scope": Use(3 * LAYERS, 3 * LAYERS * LAYER_BYTES * 7 / 8)}


def test_hops_count_as_often_as_their_collectives(gathering):
    collectives = gathering.collectives("", lambda name: None, lambda name: 3, lambda kind, chips: 10 * len(chips))
    assert collectives["", "all-gather"].hops == 3 * LAYERS * 10 * 8


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


def test_copies_of_large_arrays():
    """Each is read and written, in each turn of its loop. Small ones and those inside a fusion do not count."""
    text = (
        HLO.replace(
            "  %fa =",
            "  %big = bf16[8192,2048]{0,1} copy(%w1)\n  %small = bf16[64,64]{0,1} copy(%w2)\n"
            "  %f = s8[8192,8192]{1,0} fusion(%w3), kind=kLoop, calls=%inner\n  %fa =",
        )
        + "\n%inner (r: s8[8192,8192]) -> s8[8192,8192] {\n  ROOT %c = s8[8192,8192]{1,0} copy(%r)\n}\n"
    )
    copied = Module.parse(text).copied("play", lambda name: "layers" if "layers" in name else None, lambda name: 1 / 0)
    assert copied == {"layers": 28 * 2 * 8192 * 2048 * 2}


def test_volumes_of_ring_algorithms():
    """All-reduce: twice what a device lacks; reduce-scatter: all other parts; one gather though two fusions show it."""
    collectives = Module.parse(HLO).collectives(
        "", lambda name: "layers" if "layers" in name else None, lambda name: 1 / 0
    )
    wanted = {
        "all-reduce": 2 * (4 * 10 * 2 + 6 * 4) * 3 / 4, "reduce-scatter": 4 * 4, "collective-permute": 5 * 4,
        "all-gather": 8 * 4 * 3 / 4,
    }  # fmt: skip
    assert collectives == {("layers", kind): Use(28, 28 * size) for kind, size in wanted.items()}


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
    assert len(group(attribute)) == size


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


@pytest.mark.parametrize(
    ("name", "sizes", "wanted"),
    [
        ("pred", (5,), 5), ("s4", (5,), 3), ("u4", (4, 2), 4), ("s2", (9,), 3), ("u8", (3,), 3), ("bf16", (3,), 6),
        ("f8e4m3fn", (3,), 3), ("f8e5m2", (3,), 3), ("f8e4m3b11fnuz", (3,), 3), ("f8e8m0fnu", (3,), 3),
        ("f4e2m1fn", (4,), 2), ("c64", (2,), 16), ("c128", (2,), 32), ("f64", (2,), 16), ("u16", (), 2),
        ("bool", (3,), 3), ("int8", (3,), 3), ("uint8", (3,), 3), ("int4", (3,), 2), ("bfloat16", (3,), 6),
        ("float8_e4m3fn", (3,), 3), ("float4_e2m1fn", (4,), 2), ("complex64", (2,), 16), ("int16", (2,), 4),
    ],
)  # fmt: skip
def test_bytes_of_a_dtype(name, sizes, wanted):
    """By HLO's names and by NumPy's; numbers of less than a byte are packed."""
    assert array_bytes(name, sizes) == wanted


def of_one(line: str, header: str = "") -> dict[str, Use]:
    """Kinds and uses of a program of one line."""
    module = Module.parse(f"{header}\nENTRY %main (p: f32[8]) -> f32[8] {{\n  {line}\n}}\n")
    collectives = module.collectives("all", lambda name: None, lambda name: 1 / 0)
    assert {phase for phase, _ in collectives} <= {"all"}
    return {kind: use for (_, kind), use in collectives.items()}


GROUPS = "channel_id=3, replica_groups={{0,1,2,3},{4,5,6,7}}"


@pytest.mark.parametrize(
    ("line", "kind", "size"),
    [
        (f"%a = f8e4m3fn[8,100]{{1,0}} all-gather(%x), {GROUPS}, dimensions={{0}}", "all-gather", 800 * 3 / 4),
        (f"%a = (bf16[2]{{0}}, bf16[8]{{0}}) all-gather-start(%x), {GROUPS}", "all-gather", 16 * 3 / 4),
        (f"%a = ((f32[2], s4[6]), (f32[8], s4[24])) all-gather-start(%x, %y), {GROUPS}", "all-gather", 44 * 3 / 4),
        (f"%a = (f32[], f32[]) all-reduce(%x, %y), {GROUPS}, to_apply=%add", "all-reduce", 8 * 2 * 3 / 4),
        (f"%a = (f32[6], bf16[4]) all-reduce-start(%x, %y), {GROUPS}, to_apply=%add", "all-reduce", 32 * 2 * 3 / 4),
        (f"%a = ((f32[8]), f32[2], u32[]) reduce-scatter-start(%x), {GROUPS}", "reduce-scatter", 8 * 3),
        (f"%a = (f32[2], f32[2], f32[2], f32[2]) all-to-all(%x, %y, %z, %w), {GROUPS}", "all-to-all", 32 * 3 / 4),
        (f"%a = ((f32[8]), f32[8], u32[], u32[]) all-to-all-start(%x), {GROUPS}", "all-to-all", 32 * 3 / 4),
        (f"%a = f32[8] ragged-all-to-all(%x, %y, %z), {GROUPS}", "ragged-all-to-all", 32 * 3 / 4),
        (f"%a = f32[8] collective-broadcast(%x), {GROUPS}", "collective-broadcast", 32),
        ("%a = f32[8] collective-permute(%x), source_target_pairs={{0,1}}", "collective-permute", 32),
        ("%a = ((f32[2],s8[3]), (f32[2],s8[3]), u32[]) collective-permute-start(%x, %y), source_target_pairs={{0,1}}",
         "collective-permute", 11),
        ("%a = f32[] collective-permute(%x), source_target_pairs={{0,1}}", "collective-permute", 4),
        (f"%a = (f32[8]{{0}}, f32[5]) all-scatter(%x), {GROUPS}", "all-scatter (unknown)", 52),
        (f"%a = ((f32[8]), f32[5], u32[]) all-scatter-start(%x), {GROUPS}", "all-scatter (unknown)", 20),
        ("%a = (f32[8]{0:S(5)}, f32[8]{0}, u32[]) copy-start(%x)", "host copy", 32),
        ("%a = (f32[4]{0}, u32[], token[]) send(%x, %t), channel_id=9", "send", 16),
        ("%a = (f32[4]{0}, u32[], token[]) recv(%t), channel_id=9, is_host_transfer=true", "host recv", 16),
    ],
)  # fmt: skip
def test_every_kind_of_collective(line, kind, size):
    """Over groups of four chips, from sizes by hand; what is only started returns its operands, too."""
    assert of_one(line) == {kind: Use(1, size)}


@pytest.mark.parametrize(
    "line",
    [
        "%a = f32[8] all-gather-done(%x)", "%a = f32[8] async-done(%x), calls=%g", "%a = f32[8] scatter(%x, %y, %z)",
        "%a = token[] send-done(%x), channel_id=2, is_host_transfer=true", "%a = f32[8] all-scatter-done(%x)",
        "%a = (f32[8]{0}, f32[8]{0:S(1)}, u32[]) copy-start(%x)", "%a = f32[8] broadcast(%x), dimensions={}",
    ],
)  # fmt: skip
def test_what_sends_nothing(line):
    assert of_one(line) == {}


@pytest.mark.parametrize(
    ("text", "wanted"),
    [
        ("replica_groups={{0,4},{1,5},{2,6},{3,7}}", (0, 4)),
        ("replica_groups=[2,4]<=[8]", (0, 1, 2, 3)),
        ("replica_groups=[4,2]<=[2,4]T(1,0)", (0, 4)),
        ("replica_groups=[2,4]<=[2,2,2]T(1,0,2)", (0, 1, 4, 5)),
        ("replica_groups=mesh['replica'=2,'fsdp'=2,'tensor'=2]{'replica','tensor'}", (0, 1, 4, 5)),
        ("replica_groups={}", (0, 1, 2, 3, 4, 5, 6, 7)),
    ],
)
def test_the_chips_of_a_group(text, wanted):
    """Of eight, in the three ways in which XLA writes groups."""
    assert group(f"channel_id=3, {text}, use_global_device_ids=true", 8) == wanted


def test_groups_that_are_not_named_are_all_chips():
    line = "%a = f32[8] all-reduce(%x), channel_id=1, replica_groups={}, to_apply=%add"
    assert of_one(line, "HloModule jit_f, is_scheduled=true, num_partitions=16") == {
        "all-reduce": Use(1, 32 * 2 * 15 / 16)
    }


def test_loops_whose_turns_the_compiler_knows():
    text = HLO.replace("constant(28)", "parameter(1)").replace(
        "body=%body,", 'body=%body, backend_config={"known_trip_count":{"n":"7"}},'
    )
    collectives = Module.parse(text).collectives("", lambda name: None, lambda name: 1 / 0)
    assert collectives["", "all-gather"] == Use(7, 7 * 8 * 4 * 3 / 4)


def test_loops_that_begin_later():
    """The compiler takes the first turn out of a loop: 27 of 28 are left."""
    begun = "  %one = s32[] constant(1)\n  %i.0 = s32[]{:T(128)} copy(%one)\n"
    begun += "  %t = (s32[], f32[8]) tuple(%i.0, /*index=1*/%p)\n"
    text = HLO.replace("ENTRY %main (p: f32[8]) -> f32[8] {\n", "ENTRY %main (p: f32[8]) -> f32[8] {\n" + begun)
    assert of(text)["all-gather"] == Use(27, 27 * 8 * 4 * 3 / 4)
    assert of(text.replace("constant(1)", "constant(0)"))["all-gather"] == Use(28, 28 * 8 * 4 * 3 / 4)


def of(text: str) -> dict[str, Use]:
    return {kind: use for (_, kind), use in Module.parse(text).collectives("", str, lambda name: 1 / 0).items()}


MEGASCALE = 'is_host_transfer=true, frontend_attributes={_xla_host_transfer_handler_name="xla_megascale_runtime"'


def across(
    kind: str, sent: str, received: str, target: str = '"{1,2,3}x{0:7}"', name: str = "t", start: int = 1
) -> str:
    """Both ends of a transfer between slices, as the compiler writes them; their channels are numbered apart."""
    attributes = f'{MEGASCALE},_xla_host_transfer_rendezvous="{name}",_xla_megascale_target={target}'
    attributes += f',_xla_megascale_transfer_type="{kind}"}}'
    return f"""  %send = ({sent}{{1,0}}, u32[], token[]) send(%x, %after-all), channel_id={start + 1}, {attributes}
  %recv = ({received}{{1,0}}, u32[], token[]) recv(%after-all), channel_id={start}, {attributes}
  %send-done = token[] send-done(%send), channel_id={start + 1}, {MEGASCALE}}}
  %recv-done = ({received}{{1,0}}, token[]) recv-done(%recv), channel_id={start}, {MEGASCALE}}}
"""


@pytest.mark.parametrize(
    ("kind", "sent", "received", "target", "name", "size"),
    [
        ("ALL_REDUCE", "bf16[32,9]", "bf16[32,9]", '"{1,2,3}x{0:7}"', "DCN all-reduce", 576 * 2 * 2 / 3),
        ("ALL_REDUCE", "bf16[32,9]", "bf16[32,9]", '"{1,2}x{0:7}"', "DCN all-reduce", 576),
        ("ALL_REDUCE", "bf16[32,9]", "bf16[32,9]", '"{1:4}x{0:7}"', "DCN all-reduce", 576 * 2 * 3 / 4),
        ("ALL_GATHER", "f32[2,5]", "f32[6,5]", '"{1,2,3}x{0:7}"', "DCN all-gather", 80),
        ("REDUCE_SCATTER", "f32[6,5]", "f32[2,5]", '"{1,2,3}x{0:7}"', "DCN reduce-scatter", 80),
        ("ALL_TO_ALL", "f32[2,5]", "f32[2,5]", "{{100000,200000},{100001,200001}}", "DCN all-to-all", 20),
        ("ALL_TO_ALL", "f32[4,5]", "f32[4,5]", "{{100000,100001,200000,200001}}", "DCN all-to-all", 40),
        ("ONE_TO_ONE", "f32[4,5]", "f32[4,5]", "{{100000->200000},{200000->100000}}", "DCN collective-permute", 80),
        ("MANY_TO_ONE", "f32[4,5]", "f32[4,5]", '"{1,2}x{0:7}"', "DCN many-to-one (unknown)", 80),
    ],
)  # fmt: skip
def test_transfers_between_slices(kind, sent, received, target, name, size):
    """What arrives at a chip from other slices; both ends are one transfer, and each alone says the same."""
    lines = across(kind, sent, received, target)
    assert of_one(lines) == {name: Use(1, size)}
    for end in ("send", "recv"):
        assert of_one("\n".join(line for line in lines.splitlines() if f"%{end}" in line)) == {name: Use(1, size)}


def test_transfers_between_slices_in_loops():
    """28 turns with one transfer each and one after them; a collective of the slice has the receiver's channel."""
    text = HLO.replace("  %fa = ", across("ALL_REDUCE", "bf16[4,9]", "bf16[4,9]", name="inside", start=7) + "  %fa = ")
    after = across("ALL_REDUCE", "f32[3]", "f32[3]", '"{1,2}x{0:7}"', name="after").replace("{1,0}", "{0}")
    text = text.replace("ENTRY %main (p: f32[8]) -> f32[8] {\n", "ENTRY %main (p: f32[8]) -> f32[8] {\n" + after)
    collectives = Module.parse(text).collectives(
        "", lambda name: "layers" if "layers" in name else None, lambda name: 1 / 0
    )
    assert collectives["layers", "DCN all-reduce"] == Use(28, 28 * 72 * 2 * 2 / 3)
    assert collectives["", "DCN all-reduce"] == Use(1, 12)
    assert collectives["layers", "all-gather"] == Use(28, 28 * 24), "as without"


def test_what_is_not_known_is_said():
    """Its bytes count; a transfer to the host counts no time."""
    uses = {("learn", "all-scatter (unknown)"): Use(3, 6e9), ("learn", "host copy"): Use(2, 1e9)}
    warnings = uncounted(uses | {("learn", "all-reduce"): Use(1, 1)})
    assert len(warnings) == 2
    assert "all-scatter in learn: 3 of 6.00 GB in all; this version doesn't know what it sends" in warnings[0]
    assert "host copy in learn: 2 of 1.00 GB in all, over the link of chip and host" in warnings[1]


@pytest.mark.slow
def test_the_compilers_own_transfers():
    """Gradients of layers, replicated over two slices of eight chips: each layer's are summed across slices, once.

    A chip holds a quarter by a half of each of four bfloat16 matrices of 512 x 512, and receives as much.
    """
    pytest.importorskip("libtpu", reason="needs the TPU compiler: pip install '.[tpu]'")
    mesh = make_mesh(2, 4, 2, devices=topology_devices("v5e:2x4", 2))
    sharded = lambda *axes: NamedSharding(mesh, PartitionSpec(*axes))  # noqa: E731

    @jax.named_scope("layers")
    def loss(weights, x):
        y, _ = jax.lax.scan(lambda x, w: (jnp.tanh(x @ w).astype(x.dtype), None), x, weights)
        return (y.astype(jnp.float32) ** 2).mean()

    shape = lambda sizes, *axes: jax.ShapeDtypeStruct(sizes, jnp.bfloat16, sharding=sharded(*axes))  # noqa: E731
    weights, x = shape((4, 512, 512), None, "fsdp", "tensor"), shape((64, 512), ("replica", "fsdp"))
    gradient = jax.jit(jax.grad(loss), out_shardings=weights.sharding)
    with jax.enable_compilation_cache(False) if hasattr(jax, "enable_compilation_cache") else contextlib.nullcontext():
        module = Module.parse(gradient.lower(weights, x).compile().as_text())
    collectives = module.collectives("", lambda name: None, lambda name: 1 / 0)
    assert collectives["", "DCN all-reduce"].bytes == pytest.approx(4 * 512 * 512 * 2 / 8, rel=0.02)
    assert not [kind for _, kind in collectives if "unknown" in kind or "host" in kind]
