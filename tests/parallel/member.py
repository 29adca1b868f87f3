"""One of the processes of test_distributed.py: goes through what parallel/distributed.py offers, tells what it saw.

python -m tests.parallel.member --coordinator=… --processes=2 --process=0|1
"""

import sys
import time

import jax
import jax.numpy as jnp
import numpy as np
from absl import flags
from jax.sharding import NamedSharding, PartitionSpec

from rlver_jax.parallel import distributed
from rlver_jax.parallel.mesh import make_mesh


def tell(name: str, value: object) -> None:
    print(f"{name}={value}", flush=True)


def refused(action) -> str:
    try:
        action()
    except ValueError as error:
        return str(error)
    return "nothing"


def share() -> None:
    """Decisions and values that all take over from one."""
    me = jax.process_index()
    tell("devices", f"{jax.local_device_count()} of {jax.device_count()}")
    tell("from_main", distributed.from_main(lambda: {"process": me, "text": "知道"}))
    tell("same", refused(lambda: distributed.check_same("the config", {"a": 1, "b.c": 2})))
    tell("other", refused(lambda: distributed.check_same("the config", {"a": 1, "b.c": 2 + me})))

    def fails_on(process: int):
        if me == process:
            raise ValueError(f"disk full on {process}")
        return "fine"

    tell("together", refused(lambda: distributed.all_or_none(lambda: fails_on(1))))
    tell("main_fails", refused(lambda: distributed.from_main(lambda: fails_on(0))))


def spread() -> None:
    """Rows of a batch, made where they lie, and fetched whole."""
    mesh = make_mesh(replica=1, fsdp=-1, tensor=2)  # four rows of devices, two of each process
    table, asked = np.arange(24).reshape(8, 3), set()

    def rows(part: slice) -> np.ndarray:
        asked.update(range(8)[part])
        return table[part]

    array = distributed.rows_on(mesh, 8, rows)
    tell("asked", sorted(asked))
    odd = distributed.rows_on(mesh, 3, lambda part: table[:3][part])
    by_column = jax.jit(lambda x: x * 2.0, out_shardings=NamedSharding(mesh, PartitionSpec(None)))(array)
    key = distributed.replicate(jax.random.key(7), mesh)
    tell("key", (key.is_fully_replicated, len(key.sharding.device_set)))
    tree = {"rows": array, "odd": odd, "sum": jnp.float32(1) + array.sum(), "whole": by_column, "host": np.arange(2)}
    tell("addressable", array.is_fully_addressable)
    tell("fetched", {name: np.asarray(x).tolist() for name, x in distributed.fetch(tree).items()})


def stop() -> int:
    """Steps until SIGTERM has come to one of them; as if four had been done by an earlier start."""
    done = 4
    with distributed.stop_signal(done) as stopped:
        while not stopped(done):
            done += 1
            distributed.all_or_none(lambda: time.sleep(0.05))
            tell("step", done)
    tell("stopped", done)
    return done


def main() -> int:
    values = flags.FlagValues()
    distributed.define_flags(values)
    values(sys.argv)
    distributed.initialize(values, finish_steps=True)
    share()
    spread()
    stop()
    try:
        for step in range(10**6):
            distributed.all_or_none(lambda: time.sleep(0.05))
            if not step:
                tell("going", "on")
    except jax.errors.JaxRuntimeError as error:
        tell("lost", distributed.peer_failure(error))
        return distributed.shutdown(1)
    return distributed.shutdown(0)


if __name__ == "__main__":
    sys.exit(main())
