"""A restored state is the saved one to the bit, or an older one that is."""

import dataclasses
import functools
import json
import math
import os
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any, NamedTuple

import flax.struct
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from jax.sharding import NamedSharding, PartitionSpec

from rlver_jax.parallel.mesh import make_mesh
from rlver_jax.training.checkpoints import CheckpointError, Checkpoints, MismatchError
from rlver_jax.training.leaves import checksum
from tests.training.move import numbers, shardings


@flax.struct.dataclass
class State:
    step: jax.Array
    params: dict[str, Any]
    opt_state: Any
    flags: jax.Array
    nothing: None = None


@pytest.fixture(scope="module")
def mesh():
    return make_mesh(fsdp=4, tensor=2)


def random_bits(seed: int, shape, dtype) -> np.ndarray:
    """Any bits, NaNs of all kinds and subnormal numbers among them.

    bfloat16 has one NaN of each sign: XLA's plain emitter, which default tests are compiled with, knows no others.
    """
    count = int(np.prod(shape)) * np.dtype(dtype).itemsize
    array = np.frombuffer(np.random.default_rng(seed).bytes(count), dtype).reshape(shape)
    if dtype != jnp.bfloat16:
        return array
    raw = array.view(np.uint16)
    return np.where(np.isnan(array), raw & 0x8000 | 0x7FC0, raw).astype(np.uint16).view(dtype)


def make_state(mesh, seed=0, width=64) -> State:
    """Split over eight devices; an optimizer of which some containers are empty."""
    put = lambda x, *spec: jax.device_put(x, NamedSharding(mesh, PartitionSpec(*spec)))  # noqa: E731
    params = {
        "policy": {"w": put(random_bits(seed, (8, width), np.float32), "fsdp", "tensor"), "b": put(np.ones(4, "f4"))},
        "critic": {"w": put(random_bits(seed + 1, (4, 2, 6), jnp.bfloat16), "fsdp")},
    }
    mask = {"policy": True, "critic": False}
    optimizer = optax.chain(optax.clip(1.0), optax.masked(optax.adam(1e-3, mu_dtype=jnp.bfloat16), mask))
    opt_state = jax.tree.map(lambda x: put(x), optimizer.init(params))
    moment = random_bits(seed + 2, (8, width), np.float32)
    opt_state = jax.tree.map(lambda x: put(moment) if x.shape == moment.shape and x.dtype == "f4" else x, opt_state)
    flags = put(np.array([True, False, True]))
    return State(put(np.int32(seed + 7)), params, opt_state, flags)


def bits(tree) -> list[tuple[str, tuple, bytes]]:
    return [(str(x.dtype), x.shape, np.array(x, copy=True).tobytes()) for x in jax.tree.leaves(tree)]


def abstract(tree):
    return jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=x.sharding), tree)


def saved(folder, *steps, mesh, keep_last=9):
    """A folder with a checkpoint of each step, whose state is `make_state(mesh, step)`."""
    checkpoints = Checkpoints(folder, keep_last=keep_last, keep_best=0)
    for step in steps:
        checkpoints.save(step, make_state(mesh, step), {"step": step})
    checkpoints.close()
    return folder


@pytest.fixture(scope="module")
def origin(mesh, tmp_path_factory):
    """A folder with steps 1 and 2, to be copied."""
    return saved(tmp_path_factory.mktemp("checkpoints"), 1, 2, mesh=mesh)


def test_a_state_comes_back_to_the_bit_and_where_it_was(mesh, tmp_path):
    state, extra = make_state(mesh), {"reader": {"epoch": 2, "at": [3, 4]}, "名": 0.1}
    first = Checkpoints(tmp_path / "new", keep_last=2, keep_best=0)
    assert first.restore(abstract(state)) is None
    first.save(12, state, extra)
    first.close()
    again = Checkpoints(tmp_path / "new", keep_last=2, keep_best=0)
    for like in (abstract(state), make_state(mesh, 5)):
        restored = again.restore(like)
        assert (restored.step, restored.extra) == (12, extra)
        assert jax.tree.structure(restored.state) == jax.tree.structure(state)
        assert bits(restored.state) == bits(state)
        assert jax.tree.map(lambda x: x.sharding, restored.state) == jax.tree.map(lambda x: x.sharding, state)
    again.close()


def every_bfloat16(folder: str) -> None:
    """Saves and restores all 65,536, signalling NaNs and payloads among them; fails unless they come back."""
    mesh = make_mesh(fsdp=4, tensor=2)
    state, every = make_state(mesh), np.arange(2**16, dtype=np.uint16).view(jnp.bfloat16).reshape(4, 2, -1)
    sharding = state.params["critic"]["w"].sharding
    state = dataclasses.replace(state, params=state.params | {"critic": {"w": jax.device_put(every, sharding)}})
    checkpoints = Checkpoints(folder, keep_last=1, keep_best=0)
    checkpoints.save(1, state, {})
    restored = checkpoints.restore(abstract(state))
    checkpoints.close()
    assert restored.step == 1
    assert np.array(restored.state.params["critic"]["w"]).tobytes() == every.tobytes()


@pytest.mark.slow
def test_every_bfloat16_comes_back(tmp_path):
    """As programs of users are compiled: in a process of its own, without the flags that tests may be started with."""
    script = "import sys; from tests.training.test_checkpoints import every_bfloat16; every_bfloat16(sys.argv[1])"
    environ = os.environ | {"XLA_FLAGS": "--xla_force_host_platform_device_count=8"}
    run = functools.partial(subprocess.run, cwd=Path(__file__).parents[2], capture_output=True, text=True)
    done = run([sys.executable, "-c", script, str(tmp_path)], env=environ)
    assert done.returncode == 0, done.stderr


def test_another_mesh_may_read_it(origin, mesh):
    state, other = make_state(mesh, 2), make_mesh(fsdp=1, tensor=2, devices=jax.devices()[:2])
    sharding = lambda x: NamedSharding(other, PartitionSpec(*("tensor",) * (x.shape[:1] == (8,))))  # noqa: E731
    like = jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=sharding(x)), state)
    restored = Checkpoints.reader(origin).restore(like)
    assert bits(restored.state) == bits(state)
    assert restored.state.params["policy"]["w"].sharding == NamedSharding(other, PartitionSpec("tensor"))


def test_a_write_sees_nothing_of_later_steps(mesh, tmp_path):
    """Donates and overwrites the state while it is being written, on one device and on eight.

    What must be saved is computed by NumPy, and nothing here looks into the arrays: a view that is held by anyone
    already keeps a buffer from being overwritten.
    """
    spread = NamedSharding(mesh, PartitionSpec("fsdp"))
    values = {name: np.arange(count, dtype=np.uint32) for name, count in (("one", 400_000), ("all", 800_000))}
    state = {"one": jnp.array(values["one"]), "all": jax.device_put(jnp.array(values["all"]), spread)}
    steps = {name: jax.jit(lambda x: x * 3 + 1, donate_argnums=0) for name in state}
    overwritten = set()
    for step in range(1, 4):
        checkpoints = Checkpoints(tmp_path, keep_last=1, keep_best=0)
        checkpoints.save(step, state, {})
        wanted = values
        for _ in range(20):
            previous, state = state, {name: steps[name](x) for name, x in state.items()}
            values = {name: x * np.uint32(3) + np.uint32(1) for name, x in values.items()}
            overwritten |= {name for name, x in previous.items() if x.is_deleted()}
        restored = checkpoints.restore(abstract(state))
        assert restored.step == step
        assert bits(restored.state) == [
            ("uint32", wanted[name].shape, wanted[name].tobytes()) for name in sorted(wanted)
        ]
        checkpoints.close()
    assert overwritten == {"one", "all"}, "buffers were indeed donated"


def damage(kind, path):
    data = path.read_bytes()
    if kind == "delete":
        path.unlink()
    elif kind == "truncate":
        path.write_bytes(data[: len(data) // 2])
    else:
        middle = len(data) // 2
        path.write_bytes(data[:middle] + bytes([data[middle] ^ 1]) + data[middle + 1 :])


@pytest.mark.parametrize("kind", ["flip", *(pytest.param(x, marks=pytest.mark.slow) for x in ("delete", "truncate"))])
def test_whatever_is_damaged_no_wrong_state_is_used(kind, origin, mesh, tmp_path):
    """Every file of the newest checkpoint in turn."""
    expected = {step: bits(make_state(mesh, step)) for step in (1, 2)}
    like = abstract(make_state(mesh))
    files = sorted(p.relative_to(origin) for p in (origin / "000002").rglob("*") if p.is_file())
    fell_back = []
    for number, file in enumerate(files):
        folder = shutil.copytree(origin, tmp_path / str(number))
        damage(kind, folder / file)
        reports = []
        restored = Checkpoints(folder, keep_last=2, keep_best=0).restore(like, report=reports.append)
        assert bits(restored.state) == expected[restored.step]
        assert restored.extra == {"step": restored.step}
        if restored.step == 1:
            fell_back.append(file)
            assert reports[0].startswith("checkpoint of step 2 cannot be used (")
            assert reports[0].endswith("; it is now 000002.broken")
            assert reports[1:] == ["using the checkpoint of step 1 instead"]
        else:
            assert not reports
    # Orbax merges what each process writes; parts that the merged files don't refer to may be the largest.
    assert any(file.parent.name == "d" for file in fell_back), "where values lie"
    assert any(file.parts[1] == "record" for file in fell_back)


def test_broken_steps_make_room_for_new_ones(mesh, tmp_path):
    saved(tmp_path, 1, 2, 3, mesh=mesh)
    for step in ("000002", "000003"):
        shutil.rmtree(tmp_path / step / "state")
    checkpoints, reports = Checkpoints(tmp_path, keep_last=9, keep_best=0), []
    assert checkpoints.restore(abstract(make_state(mesh)), report=reports.append).step == 1
    assert [text.split(" cannot")[0] for text in reports[:2]] == ["checkpoint of step 3", "checkpoint of step 2"]
    assert checkpoints.steps() == [1]
    checkpoints.save(2, make_state(mesh, 22), {})
    checkpoints.close()
    shutil.rmtree(tmp_path / "000002" / "state")
    checkpoints = Checkpoints(tmp_path, keep_last=9, keep_best=0)
    assert checkpoints.restore(abstract(make_state(mesh)), report=reports.append).step == 1
    assert {p.name for p in tmp_path.iterdir()} == {"000001", "000002.broken", "000002.broken-2", "000003.broken"}


def test_no_whole_checkpoint_is_an_error_that_lists_them(origin, mesh, tmp_path):
    shutil.copytree(origin, tmp_path, dirs_exist_ok=True)
    for step in ("000001", "000002"):
        damage("truncate", tmp_path / step / "record" / "metadata")
    with pytest.raises(CheckpointError, match=r"no checkpoint can be used(.|\n)*- step 2: JSON(.|\n)*- step 1: JSON"):
        Checkpoints(tmp_path, keep_last=2, keep_best=0).restore(abstract(make_state(mesh)))
    assert {p.name for p in tmp_path.iterdir()} == {"000001", "000002"}


def test_a_changed_record_is_noticed(origin, mesh, tmp_path):
    """One that is JSON still."""
    shutil.copytree(origin, tmp_path, dirs_exist_ok=True)
    path = tmp_path / "000002" / "record" / "metadata"
    path.write_text(path.read_text().replace('"step": 2', '"step": 3'))
    reports = []
    restored = Checkpoints(tmp_path, keep_last=2, keep_best=0).restore(
        abstract(make_state(mesh)), report=reports.append
    )
    assert restored.extra == {"step": 1}
    assert "its record was changed after it was saved" in reports[0]


def test_an_interrupted_save_is_no_checkpoint(origin, mesh, tmp_path):
    """Its folder keeps the name that it is written under."""
    left = tmp_path / "000002.orbax-checkpoint-tmp"
    shutil.copytree(origin / "000001", tmp_path / "000001")
    shutil.copytree(origin / "000001", left)
    assert Checkpoints.reader(tmp_path).steps() == [1]
    assert left.exists(), "a reader leaves alone what another process may be writing"
    checkpoints = Checkpoints(tmp_path, keep_last=2, keep_best=0)
    checkpoints.save(2, make_state(mesh, 2), {})
    assert checkpoints.restore(abstract(make_state(mesh))).step == 2
    assert {p.name for p in tmp_path.iterdir()} == {"000001", "000002"}


def test_another_models_state_is_refused_not_passed_over(origin, mesh):
    checkpoints = Checkpoints(origin, keep_last=2, keep_best=0)
    with pytest.raises(MismatchError, match=r"000002: \S*/w is float32\[8, 64\], expected float32\[8, 66\]; it is of"):
        checkpoints.restore(abstract(make_state(mesh, width=66)))
    state = make_state(mesh)
    with pytest.raises(MismatchError, match=r"step is int32\[\], expected float32\[\]"):
        checkpoints.restore(abstract(state.replace(step=jnp.float32(0))))
    with pytest.raises(MismatchError, match="holds a leaf params/critic/w, expected none"):
        checkpoints.restore(abstract(state.replace(params={"policy": state.params["policy"]})))
    with pytest.raises(MismatchError, match="holds no leaf nothing, expected one"):
        checkpoints.restore(abstract(state.replace(nothing=jnp.zeros(3))))
    assert checkpoints.steps() == [1, 2]


def test_the_newest_and_the_best_are_kept(tmp_path):
    scores = {1: 50.0, 2: 80.0, 3: None, 4: 80.0, 5: float("nan"), 6: 70.0, 7: None, 8: 10.0}
    checkpoints = Checkpoints(tmp_path, keep_last=2, keep_best=2)
    history = []
    for step, score in scores.items():
        checkpoints.save(step, {"x": jnp.int32(step)}, {}, score)
        checkpoints.wait()
        history.append((checkpoints.steps(), checkpoints.best_step()))
        assert [int(p.name) for p in sorted(tmp_path.iterdir())] == history[-1][0]
    assert history == [
        ([1], 1),
        ([1, 2], 2),
        ([1, 2, 3], 2),
        ([2, 3, 4], 4),
        ([2, 4, 5], 4),
        ([2, 4, 5, 6], 4),
        ([2, 4, 6, 7], 4),
        ([2, 4, 7, 8], 4),
    ]
    checkpoints.close()
    again = Checkpoints(tmp_path, keep_last=1, keep_best=1)
    assert again.best_step() == 4
    again.save(9, {"x": jnp.int32(9)}, {}, 79.0)
    again.wait()
    assert again.steps() == [4, 9]


def test_without_a_score_nothing_is_the_best(tmp_path):
    checkpoints = Checkpoints(tmp_path, keep_last=1, keep_best=3)
    for step in (1, 2):
        checkpoints.save(step, {"x": jnp.int32(step)}, {})
    assert (checkpoints.steps(), checkpoints.best_step()) == ([2], None)


def test_a_part_is_read_alone(mesh, tmp_path):
    """The state's other leaves are damaged, which doesn't matter to it."""
    checkpoints = Checkpoints(tmp_path, keep_last=3, keep_best=1)
    params = {step: {"policy": {"w": jnp.arange(step, step + 6.0), "b": jnp.int32(step)}} for step in (1, 2, 3)}
    for step, score in ((1, 10.0), (2, 30.0), (3, None)):
        noise = jnp.asarray(np.random.default_rng(step).integers(0, 2**31, 50_000, np.int32))
        checkpoints.save(step, {"params": params[step], "moments": noise, "params2": jnp.int32(0)}, {}, score)
        checkpoints.wait()
        files = [p for p in (tmp_path / f"{step:06d}").rglob("*") if p.is_file()]
        damage("flip", max(files, key=lambda p: p.stat().st_size))
    reader = Checkpoints.reader(tmp_path)
    like = abstract(params[1]["policy"])
    for which, step in ((1, 1), (2, 2), ("best", 2), ("last", 3), (None, 3)):
        assert bits(reader.restore_part(which, like, "params/policy")) == bits(params[step]["policy"])
    assert int(reader.restore_part(2, like["b"], "params/policy/b")) == 2
    with pytest.raises(CheckpointError, match=r"step 3 cannot be used \(.* moments\); there are steps 1, 2, 3"):
        reader.restore_part(3, jax.ShapeDtypeStruct((50_000,), jnp.int32), "moments")
    with pytest.raises(MismatchError, match="holds no leaf params/critic/w, expected one"):
        reader.restore_part(3, {"w": like["w"]}, "params/critic")
    with pytest.raises(CheckpointError, match=r"no checkpoint is of step 4; there are steps 1, 2, 3"):
        reader.restore_part(4, like, "params/policy")


def test_a_part_that_is_not_there_yet(tmp_path):
    with pytest.raises(CheckpointError, match="no such folder; expected the checkpoints of a training run"):
        Checkpoints.reader(tmp_path / "none")
    with pytest.raises(CheckpointError, match=r"no checkpoint has a score; there are steps \(none\)"):
        Checkpoints.reader(tmp_path).restore_part("best", {}, "params")
    with pytest.raises(CheckpointError, match=r"no checkpoint is there; there are steps \(none\)"):
        Checkpoints.reader(tmp_path).restore_part("last", {}, "params")


def test_what_cannot_be_saved(tmp_path):
    checkpoints = Checkpoints(tmp_path, keep_last=1, keep_best=0)
    with pytest.raises(ValueError, match="count is int, expected an array; put what is none into `extra`"):
        checkpoints.save(1, {"count": 3}, {})
    with pytest.raises(ValueError, match="rng/0 is a typed key"):
        checkpoints.save(1, {"rng": [jax.random.key(0)]}, {})
    with pytest.raises(ValueError, match="keys without slashes"):
        checkpoints.save(1, {"a/b": jnp.int32(1), "a": {"b": jnp.int32(2)}}, {})
    checkpoints.save(1, {"x": jnp.int32(3)}, {})
    with pytest.raises(ValueError, match="step 1 has been saved before"):
        checkpoints.save(1, {"x": jnp.int32(4)}, {})
    with pytest.raises(ValueError, match="was opened to be read only"):
        Checkpoints.reader(tmp_path).save(2, {"x": jnp.int32(4)}, {})
    with pytest.raises(ValueError, match="keep_last=0, keep_best=0: expected at least 1"):
        Checkpoints(tmp_path, keep_last=0, keep_best=0)


class Case(NamedTuple):
    shape: tuple[int, ...]
    dtype: Any


@functools.lru_cache
def weights(count: int) -> np.ndarray:
    """The checksum's, element by element, in Python's integers."""
    multipliers = []
    for i in range(count):
        x = i * 0x9E3779B1 % 2**32
        x = (x ^ (x >> 15)) * 0x85EBCA6B % 2**32
        multipliers.append((x ^ (x >> 13)) | 1)
    return np.array(multipliers, np.uint64)


@pytest.mark.parametrize(
    "case",
    [
        Case((), np.int32),
        Case((7, 5, 3), np.float32),
        Case((12,), jnp.bfloat16),
        Case((4, 6), bool),
        Case((0, 3), "f4"),
    ],
)
def test_checksum_is_the_weighted_sum_of_the_bits(case):
    x = random_bits(3, case.shape, case.dtype) if case.dtype is not bool else random_bits(3, case.shape, "u1") > 99
    unsigned = {4: np.uint32, 2: np.uint16, 1: np.uint8}[x.dtype.itemsize]
    elements = x.reshape(-1).view(unsigned).astype(np.uint64)
    expected = sum(int(e) * int(w) for e, w in zip(elements, weights(x.size), strict=True)) % 2**32
    assert int(checksum(jnp.asarray(x))) == expected


def test_checksum_notices_every_flipped_bit_and_a_swap(mesh):
    x = random_bits(4, (8, 4), np.float32)
    whole = int(checksum(jnp.asarray(x)))
    assert int(checksum(jax.device_put(x, NamedSharding(mesh, PartitionSpec("fsdp", "tensor"))))) == whole
    changed = np.repeat(x.view(np.uint32)[None], 1024, axis=0)
    indices = np.arange(1024)
    changed.reshape(1024, 32)[indices, indices // 32] ^= np.uint32(1) << (indices % 32).astype(np.uint32)
    sums = jax.vmap(checksum)(jnp.asarray(changed.view(np.float32)))
    assert whole not in set(np.asarray(sums).tolist())
    assert int(checksum(jnp.asarray(x[::-1]))) != whole


def test_the_record_is_plain_json(mesh, tmp_path):
    """Which other tools can read: shapes and types of all leaves, the score, what was added."""
    checkpoints = Checkpoints(tmp_path, keep_last=1, keep_best=1)
    checkpoints.save(3, {"a": [jnp.zeros((2, 3), jnp.bfloat16)]}, {"note": 1}, 45.5)
    checkpoints.close()
    record = json.loads((tmp_path / "000003" / "record" / "metadata").read_text())["record"]
    assert record == {
        "extra": {"note": 1},
        "score": 45.5,
        "leaves": {"a/0": {"shape": [2, 3], "dtype": "bfloat16", "checksum": 0}},
    }


@pytest.mark.slow
def test_from_8_to_4_to_16_devices(tmp_path):
    """Equal values to the bit, in processes with so many devices; each saves what it read."""
    state = jax.device_put(numbers(), shardings(make_mesh(2, 2, 2)))
    checkpoints = Checkpoints(tmp_path, keep_last=9, keep_best=0)
    checkpoints.save(1, state, {})
    checkpoints.close()
    for step, shape in ((1, (1, 4, 1)), (2, (2, 4, 2))):
        count = math.prod(shape)
        environ = os.environ | {"XLA_FLAGS": f"--xla_force_host_platform_device_count={count}"}
        command = [sys.executable, "-m", "tests.training.move", tmp_path, step, *shape]
        done = subprocess.run(
            list(map(str, command)), cwd=Path(__file__).parents[2], env=environ, capture_output=True, text=True
        )
        assert f"moved to {count} devices" in done.stdout, done.stderr
