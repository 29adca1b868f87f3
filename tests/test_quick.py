"""The tests' own settings: flags that the installed XLA knows, and programs that are let go of."""

import jax
import jax.numpy as jnp
import pytest

from tests.quick import QUICK, free_programs, known, memory_maps


def test_flags_that_this_xla_does_not_know_are_left_out():
    """XLA would end the process over them; JAX 0.12 has dropped one that 0.10 knows."""
    assert known(("--xla_no_such_flag=1", "--xla_backend_optimization_level=0")) == "--xla_backend_optimization_level=0"


def test_every_jax_can_leave_out_the_optimization():
    assert "--xla_backend_optimization_level=0" in QUICK


@pytest.mark.skipif(not memory_maps(), reason="nothing counts memory maps here")
def test_compiled_programs_give_their_memory_maps_back():
    jnp.ones((8, 8)).block_until_ready()  # XLA's own threads and pools
    before = memory_maps()
    programs = [jax.jit(lambda x, n=n: jnp.sin(x) @ x + n) for n in range(40)]
    for program in programs:
        program(jnp.ones((8, 8))).block_until_ready()
    made = memory_maps() - before
    assert made >= 40, "a program takes at least one map: what is freed below would show nothing"
    free_programs(most_maps=before + made + 1_000)
    assert memory_maps() - before >= made // 2, "freed too early: tests would compile everything again"
    free_programs(most_maps=0)
    assert memory_maps() - before <= made // 4
