"""How tests have XLA compile programs that run a few times only, and let go of them."""

import gc
import os
import subprocess
import sys
from pathlib import Path

import jax

# No LLVM optimization, the plain emitter of fused loops, one LLVM module a program, and loops as they were written (the
# passes over loops copy each loop to count its turns): compiles in a third of the time, runs slower.
WANTED = (
    "--xla_backend_optimization_level=0",
    "--xla_llvm_disable_expensive_passes=true",
    "--xla_cpu_parallel_codegen_split_count=1",
    "--xla_disable_hlo_passes=simplify-while-loops,while-loop-invariant-code-motion,while-loop-constant-sinking,"
    "while-loop-trip-count-annotator",
    "--xla_cpu_use_fusion_emitters=false",  # gone from the XLA of JAX 0.12, whose emitters have no plain form
)
ALL_PASSES = {"xla_disable_hlo_passes": ""}  # compiler options of tests that read a compiled program, or its figures
_KNOWN = "RLVER_JAX_TEST_XLA_FLAGS"  # what this process found, for those it starts: the question costs a second


def known(flags: tuple[str, ...]) -> str:
    """Those of `flags` that the installed XLA knows: it ends the process over one that it doesn't, naming it."""
    ask = [sys.executable, "-c", "import jax; jax.devices()"]
    env = os.environ | {"JAX_PLATFORMS": "cpu", "XLA_FLAGS": " ".join(flags)}
    asked = subprocess.run(ask, env=env, capture_output=True, text=True)
    if not asked.returncode:
        return " ".join(flags)
    left = tuple(flag for flag in flags if flag.split("=")[0] not in asked.stderr)
    if len(left) == len(flags):
        raise RuntimeError(f"XLA refuses {' '.join(flags)} without naming one of them:\n{asked.stderr}")
    return known(left)


QUICK = os.environ[_KNOWN] if _KNOWN in os.environ else os.environ.setdefault(_KNOWN, known(WANTED))


def memory_maps() -> int:
    """Memory maps of this process; 0 where nothing counts them."""
    maps = Path("/proc/self/maps")
    return maps.read_bytes().count(b"\n") if maps.exists() else 0


def free_programs(most_maps: int) -> None:
    """Lets go of all compiled programs where the process has more than so many memory maps.

    Each program takes several, and Linux ends a process that asks for more than 65,530.
    """
    if memory_maps() > most_maps:
        jax.clear_caches()
        gc.collect()
