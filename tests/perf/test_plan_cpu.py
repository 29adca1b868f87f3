"""The update of the real 0.5B model as configured for CPU: what remat and adapters save, counted and measured."""

import json
import subprocess
import sys

import pytest

from configs import qwen25_0p5b_cpu
from rlver_jax.perf.plan_measure import GIB
from rlver_jax.perf.plan_programs import bytes_per_chip
from tests.conftest import ROOT
from tests.perf.update_cost import update_program


def update(arg: str = "", **fields):
    """(program of the update, GiB of one device while it runs, beside its state and its batch)."""
    learn, _ = update_program(arg, {name.replace("__", "."): x for name, x in fields.items()})
    return learn, learn.lower().compile().memory_analysis().temp_size_in_bytes / GIB


@pytest.mark.long
def test_what_is_computed_again_is_not_kept(capsys):
    """Layers unrolled, as decoding on CPU wants them: `full` saves as much as it does of scanned ones."""
    assert qwen25_0p5b_cpu.get_config().policy.remat == "full"
    cases = [("none", False), ("full", False), ("full", True)]
    sizes = {}
    for remat, scan in cases:
        _, sizes[remat, scan] = update(policy__remat=remat, policy__scan_layers=scan)
        with capsys.disabled():
            print(f"{'scanned' if scan else 'unrolled'} layers, remat={remat}: {sizes[remat, scan]:.2f} GiB")
    assert sizes["full", False] < 0.6 * sizes["none", False]
    assert sizes["full", False] < 1.1 * sizes["full", True]


@pytest.mark.long
def test_adapters_take_half_the_memory(capsys):
    """State, temporaries and what is alive beside them, with `:lora` and without."""
    sizes = {}
    for arg in ("", "lora"):
        learn, temporaries = update(arg, policy__scan_layers=True, user__scan_layers=True)
        sizes[arg] = temporaries + (bytes_per_chip(learn.arguments) + bytes_per_chip(learn.idle)) / GIB
        with capsys.disabled():
            print(f"{arg or 'all parameters'}: {sizes[arg]:.2f} GiB")
    assert sizes["lora"] < 0.5 * sizes[""]


@pytest.mark.long
def test_an_update_of_adapters_takes_two_thirds_of_the_time(capsys):
    """One update of four dialogues each, in processes of their own, in turn; 14 GiB of memory are needed."""
    costs = {}
    for arg in ("", "lora"):
        command = [sys.executable, "-m", "tests.perf.update_cost", *[arg] * bool(arg)]
        done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=True)
        costs[arg] = json.loads(done.stdout.splitlines()[-1])
        with capsys.disabled():
            print(f"{arg or 'all parameters'}: {costs[arg]}")
    assert costs["lora"]["processor_s"] < 0.7 * costs[""]["processor_s"]
    assert costs["lora"]["gib"] < 0.5 * costs[""]["gib"]
