"""A process with other devices: reads a checkpoint onto them, compares it with NumPy's numbers, saves it again.

Use: python -m tests.training.move FOLDER STEP REPLICA FSDP TENSOR
"""

import sys

import jax
import numpy as np

from rlver_jax.parallel.mesh import make_mesh
from rlver_jax.parallel.rules import sharding
from rlver_jax.training.checkpoints import Checkpoints

AXES = {"embed": ("vocab", "embed"), "layers": ("layers", "embed", "mlp"), "moment": ("layers", "embed", "mlp")}
SHAPES = {"embed": (48, 32), "layers": (3, 32, 16), "moment": (3, 32, 16)}


def numbers() -> dict[str, np.ndarray]:
    draw = np.random.default_rng(5)
    values = {name: draw.normal(size=shape).astype(np.float32) for name, shape in SHAPES.items()}
    return values | {"moment": values["moment"].astype(jax.numpy.bfloat16)}


def shardings(mesh) -> dict:
    return {name: sharding(AXES[name], SHAPES[name], mesh) for name in AXES}


def move(folder: str, step: int, *shape: int) -> None:
    where, expected = shardings(make_mesh(*shape)), numbers()
    like = {name: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=where[name]) for name, x in expected.items()}
    checkpoints = Checkpoints(folder, keep_last=9, keep_best=0)
    restored = checkpoints.restore(like)
    assert restored.step == step
    for name, x in restored.state.items():
        assert x.sharding == where[name]
        np.testing.assert_array_equal(np.asarray(x), expected[name])
    parts = {s.data.shape for s in restored.state["layers"].addressable_shards}
    assert parts == {(3, 32 // shape[1], 16 // shape[2])}
    checkpoints.save(step + 1, restored.state, {})
    checkpoints.close()
    print(f"moved to {jax.device_count()} devices")


if __name__ == "__main__":
    move(sys.argv[1], *map(int, sys.argv[2:]))
