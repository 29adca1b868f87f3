"""Several processes that run one program: how they start, what they share, and how they end.

One process per host, same command on each. On TPU VMs (also in GKE) they find each other by themselves, elsewhere by
three flags or the environment variables JAX_COORDINATOR_ADDRESS, JAX_NUM_PROCESSES and JAX_PROCESS_ID. Each holds the
rows and weights of its own devices; only process 0 writes files other than checkpoints. All processes take a decision
(to stop, to refuse) together: one that leaves alone would keep the others waiting in a collective.
"""

import contextlib
import importlib.util
import json
import os
import signal
import sys
import time
from collections.abc import Callable, Iterator
from typing import Any, TypeVar

import jax
import numpy as np
from absl import flags
from jax.experimental import multihost_utils
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from rlver_jax.parallel.mesh import batch_parts
from rlver_jax.parallel.rules import axes_on

_T = TypeVar("_T")
SILENCE = 30  # seconds without a sign of life after which a process counts as dead; the others then end
GRACE = 3  # seconds that process 0 outlives its fault: without it the others end too, and may have the same to say
# How JAX's runtime errors begin that are about the program or the memory of this process.
_OWN_FAULTS = ("INVALID_ARGUMENT", "RESOURCE_EXHAUSTED", "UNIMPLEMENTED")
_ENVIRONMENT = {
    "coordinator": "JAX_COORDINATOR_ADDRESS",
    "processes": "JAX_NUM_PROCESSES",
    "process": "JAX_PROCESS_ID",
}


def define_flags(values: flags.FlagValues) -> None:
    """--coordinator, --processes and --process; the defaults come from the environment."""
    flags.DEFINE_string(
        "coordinator",
        None,
        "several processes, not on TPU VMs: HOST:PORT of process 0, free on that host (or JAX_COORDINATOR_ADDRESS)",
        flag_values=values,
    )
    flags.DEFINE_integer("processes", None, "how many there are (or JAX_NUM_PROCESSES)", flag_values=values)
    flags.DEFINE_integer("process", None, "which this one is, from 0 on (or JAX_PROCESS_ID)", flag_values=values)


def initialize(options: flags.FlagValues, *, finish_steps: bool) -> None:
    """Connects to the other processes, if there are any; call it before anything uses devices.

    Args:
        finish_steps: SIGTERM is left to `stop_signal`; otherwise it ends the process at once.

    Raises:
        ValueError: flags or variables that don't belong together.
    """
    if jax.distributed.is_initialized():
        return
    jax.config.update("jax_enable_preemption_service", finish_steps)
    limits: dict[str, Any] = {"heartbeat_timeout_seconds": SILENCE, "shutdown_timeout_seconds": SILENCE}
    address = _cluster_address(options)
    if address:
        jax.distributed.initialize(*address, cluster_detection_method="deactivate", **limits)
    elif _among_tpu_workers():
        try:
            jax.distributed.initialize(**limits)
        except ValueError as error:
            if "coordinator_address" not in str(error):
                raise
            # A host with chips, but of no cluster that JAX knows: a process alone.
    if jax.distributed.is_initialized() and (getattr(jax.config, "jax_platforms", None) or "").startswith("cpu"):
        # On CPU each process has a key of its own for a program, and process 0 alone keeps any: it would find its own,
        # begin while the others compile, and give them up after half a minute in the first collective.
        jax.config.update("jax_enable_compilation_cache", False)


def _cluster_address(options: flags.FlagValues) -> tuple[str, int, int] | None:
    """(address of process 0, number of processes, index of this one) as given; None where nothing is."""
    settings = {name: getattr(options, name) for name in _ENVIRONMENT}
    settings = {name: os.environ.get(_ENVIRONMENT[name]) if x is None else x for name, x in settings.items()}
    missing = [name for name, x in settings.items() if x is None]
    if len(missing) == len(settings):
        return None
    if missing:
        raise ValueError(
            f"--{missing[0]} (or {_ENVIRONMENT[missing[0]]}) is missing: --coordinator=HOST:PORT, --processes=N and "
            f"--process=I belong together; give all three, or none for a process alone"
        )
    address, (count, index) = str(settings["coordinator"]), (int(settings["processes"]), int(settings["process"]))
    if not address.rpartition(":")[2].isdigit() or ":" not in address:
        raise ValueError(f"--coordinator={address}: expected HOST:PORT of process 0, such as 10.0.0.2:8476")
    if not 0 <= index < count:
        raise ValueError(f"--process={index} of --processes={count}: expected 0 to {count - 1}, another for each")
    return address, count, index


def _among_tpu_workers() -> bool:
    """Whether this host is one of a TPU's: GKE lists the workers; elsewhere chips and libtpu are there, and wanted."""
    if "TPU_WORKER_HOSTNAMES" in os.environ:
        return True
    wanted = "tpu" in (jax.config.jax_platforms or "tpu")  # type: ignore[attr-defined]
    return wanted and "TPU_SKIP_MDS_QUERY" not in os.environ and importlib.util.find_spec("libtpu") is not None


def shutdown(status: int) -> int:
    """Ends this process's part with its exit status: orderly with the others after 0, else at once.

    An orderly end waits for the others. After a fault they may be waiting for this process in a collective, and JAX
    would abort all of them.
    """
    if not jax.distributed.is_initialized():
        return status
    sys.stdout.flush()
    sys.stderr.flush()
    try:
        if status == 0:
            multihost_utils.sync_global_devices("done")
            jax.distributed.shutdown()
            return status
    except (RuntimeError, ValueError) as error:
        print(f"the other processes have not ended orderly: {_first_line(error)}", file=sys.stderr, flush=True)
        status = 1
    if is_main():
        time.sleep(GRACE)
    os._exit(status)


def peer_failure(error: Exception) -> str | None:
    """The message for a runtime error that may come from another process; None for this process's own error."""
    if jax.process_count() == 1 or str(error).startswith(_OWN_FAULTS):
        return None
    return (
        f"process {jax.process_index()} of {jax.process_count()} cannot continue without the others: one of them has "
        f"ended or cannot be reached, and its own log says why ({_first_line(error)}). The same command, on all of "
        f"them, resumes from the last checkpoint"
    )


def is_main() -> bool:
    """Whether this is process 0, which writes logs, metrics and dialogues, and talks to the terminal."""
    return jax.process_index() == 0


def all_or_none(action: Callable[[], _T], otherwise: Exception | None = None) -> _T:
    """The result of `action`; where it fails on one process it fails on all, so that none waits for another.

    Args:
        otherwise: raised where `action` succeeded here, but not on all processes.
    """
    failure: Exception | None = None
    try:
        result = action()
    except Exception as error:
        failure = error
    if jax.process_count() > 1:
        fine = multihost_utils.process_allgather(np.asarray(failure is None))
        if failure is None and not fine.all():
            raise otherwise or ValueError(f"process {np.argmin(fine)} failed; its own log says why")
    if failure is not None:
        raise failure
    return result


def from_main(action: Callable[[], _T]) -> _T:
    """What `action` returns on process 0, on every process; of JSON types. Where it fails it fails on all."""
    if jax.process_count() == 1:
        return action()
    data = all_or_none(lambda: json.dumps(action()).encode() if is_main() else b"")
    size = int(multihost_utils.broadcast_one_to_all(np.int32(len(data))))
    mine = np.zeros(size, np.uint8)
    mine[: len(data)] = np.frombuffer(data, np.uint8)
    return json.loads(multihost_utils.broadcast_one_to_all(mine).tobytes())


def check_same(what: str, value: Any) -> None:
    """Checks that all processes have the same `value`, of JSON types.

    Raises:
        ValueError: on all of them, which names `what` and the first difference.
    """
    theirs = from_main(lambda: value)
    mine = json.loads(json.dumps(value))
    all_or_none(lambda: _compare(what, mine, theirs))


def _compare(what: str, mine: Any, theirs: Any) -> None:
    if mine == theirs:
        return
    if isinstance(mine, dict) and isinstance(theirs, dict):
        name = next(n for n in {**mine, **theirs} if mine.get(n) != theirs.get(n))
        what, mine, theirs = f"{what} ({name})", mine.get(name), theirs.get(name)
    raise ValueError(f"{what}: {mine!r} here, {theirs!r} on process 0; start the same command on every process")


def rows_on(mesh: Mesh | None, count: int, rows: Callable[[slice], np.ndarray]) -> jax.Array:
    """An array of `count` rows, sharded like a batch; each process makes only the rows of its own devices.

    Where they cannot be divided every device gets all of them.

    Args:
        rows: the given rows, on the host.
    """
    if mesh is None:
        return jax.numpy.asarray(rows(slice(0, count)))
    rest = rows(slice(0, 0)).shape[1:]
    spec = PartitionSpec() if count % batch_parts(mesh) else PartitionSpec(axes_on(mesh, "batch"))
    where = NamedSharding(mesh, spec)

    def part(index: Any) -> np.ndarray:
        return rows(index[0])[(slice(None), *index[1:])]

    return jax.make_array_from_callback((count, *rest), where, part)


def replicate(tree: _T, mesh: Mesh) -> _T:
    """Arrays that every process has in equal form, whole on every device of the mesh."""
    whole = NamedSharding(mesh, PartitionSpec())
    if jax.process_count() == 1:
        return jax.device_put(tree, whole)
    return jax.jit(_identity, out_shardings=whole)(tree)  # device_put refuses typed keys here


def fetch(tree: Any) -> Any:
    """`jax.device_get` on every process, also of arrays that lie on several; all of them make the same calls."""
    if jax.process_count() == 1:
        return jax.device_get(tree)
    leaves, structure = jax.tree.flatten(tree)
    spread = [
        i
        for i, x in enumerate(leaves)
        if isinstance(x, jax.Array) and not (x.is_fully_addressable or x.is_fully_replicated)
    ]
    if spread:
        whole = NamedSharding(leaves[spread[0]].sharding.mesh, PartitionSpec())
        gathered = jax.jit(_identity, out_shardings=whole)([leaves[i] for i in spread])  # one program for all
        for i, x in zip(spread, gathered, strict=True):
            leaves[i] = x
    return jax.device_get(jax.tree.unflatten(structure, leaves))


def _identity(tree: Any) -> Any:
    return tree


@contextlib.contextmanager
def stop_signal(done: int) -> Iterator[Callable[[int], bool]]:
    """Whether to stop after a step, because of SIGTERM: pods are removed with it, and a step is worth finishing.

    With several processes the signal may come to any of them; all are told to stop after the same step, the one under
    way or the next. Each must ask for every step, the `done` ones of an earlier start are asked for here.
    """
    if jax.process_count() > 1:  # JAX has its own handler of the signal then
        ask = multihost_utils.reached_preemption_sync_point
        early = any(ask(step) for step in range(1, done + 1))
        yield lambda step: early or ask(step)
        return
    received: list[int] = []

    def receive(number: int, _: object) -> None:
        if not received:
            os.write(2, b"\nSIGTERM: finishing the step that is under way, then saving; a second one changes nothing\n")
        received.append(number)

    before = signal.signal(signal.SIGTERM, receive)
    try:
        yield lambda step: bool(received)
    finally:
        signal.signal(signal.SIGTERM, before)


def _first_line(error: Exception) -> str:
    text = (str(error).strip().splitlines() or [type(error).__name__])[0]
    return text if len(text) <= 200 else text[:200] + "…"
