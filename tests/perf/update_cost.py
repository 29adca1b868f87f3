"""Runs one update of the real 0.5B's size and prints what it costs: python -m tests.perf.update_cost [lora]

The program is the one that `configs/qwen25_0p5b_cpu.py` trains with, layers scanned, for short dialogues. Weights and
tokens are made up; what is computed does not depend on them.
"""

import json
import resource
import sys
import time
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from configs import qwen25_0p5b_cpu
from rlver_jax.parallel.mesh import make_mesh
from rlver_jax.perf.plan_programs import Program, Shapes, programs_of, shapes_of
from rlver_jax.plan import texts_of

SMALL = {
    "policy.scan_layers": True, "user.scan_layers": True,
    "policy.mode": "direct", "rollout.max_turns": 2, "rollout.context": 512, "train.share_rows": False,
}  # fmt: skip


def update_program(arg: str, fields: dict[str, Any]) -> tuple[Program, Shapes]:
    """The program of the update of `configs/qwen25_0p5b_cpu.py:arg` on one device, and its shapes."""
    config = qwen25_0p5b_cpu.get_config(arg)
    config.update_from_flattened_dict({"policy.size": "0.5b", "user.size": "0.5b"} | fields)
    mesh = make_mesh(**config.mesh, devices=jax.devices("cpu")[:1])
    shapes = shapes_of(config, mesh, texts_of(config)[0])
    return next(program for program in programs_of(shapes) if program.name == "learn"), shapes


def value(draw: np.random.Generator, info) -> jax.Array:
    """An argument of the program: small numbers, tokens of any kind, half of the positions learned from."""
    shape, dtype = info.shape, info.dtype
    if jnp.issubdtype(dtype, jax.dtypes.prng_key):
        return jax.random.key(0)
    if dtype == jnp.bool_:
        return jnp.asarray(draw.random(shape) < 0.5)
    if jnp.issubdtype(dtype, jnp.integer):
        return jnp.asarray(draw.integers(1, 100, shape), dtype)
    return jnp.full(shape, 0.01, dtype)


def main(arg: str) -> None:
    """Prints GiB of this process at most, processor seconds and seconds of the update."""
    learn, shapes = update_program(arg, SMALL)
    lowered = learn.lower()
    compiled = lowered.compile()
    draw = np.random.default_rng(0)
    arguments, options = jax.tree.map(lambda info: value(draw, info), lowered.args_info)
    jax.block_until_ready(arguments)
    processor, clock = time.process_time(), time.monotonic()
    jax.block_until_ready(compiled(*arguments, **options))
    cost = {"processor_s": time.process_time() - processor, "clock_s": time.monotonic() - clock}
    cost |= {"gib": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20, "tokens": shapes.lengths[-1]}
    print(json.dumps({name: round(number, 2) for name, number in cost.items()}))


if __name__ == "__main__":
    main(*(sys.argv[1:] or [""]))
