"""The update of the real 0.5B model as configured for CPU: what remat saves, by the compiler's own count."""

import pytest

from configs import qwen25_0p5b_cpu
from rlver_jax.parallel.mesh import make_mesh
from rlver_jax.perf.plan_measure import GIB
from rlver_jax.perf.plan_programs import programs_of, shapes_of
from rlver_jax.plan import texts_of


def temporaries(remat: str, scan: bool) -> float:
    """GiB of one device while the update runs, beside its state and its batch."""
    import jax

    config = qwen25_0p5b_cpu.get_config()
    fields = {"policy.size": "0.5b", "user.size": "0.5b", "policy.remat": remat, "policy.scan_layers": scan}
    config.update_from_flattened_dict(fields)
    mesh = make_mesh(**config.mesh, devices=jax.devices("cpu")[:1])
    shapes = shapes_of(config, mesh, texts_of(config)[0])
    learn = next(program for program in programs_of(shapes) if program.name == "learn")
    return learn.lower().compile().memory_analysis().temp_size_in_bytes / GIB


@pytest.mark.long
def test_what_is_computed_again_is_not_kept(capsys):
    """Layers unrolled, as decoding on CPU wants them: `full` saves as much as it does of scanned ones."""
    assert qwen25_0p5b_cpu.get_config().policy.remat == "full"
    cases = [("none", False), ("full", False), ("full", True)]
    found = {}
    for remat, scan in cases:
        found[remat, scan] = temporaries(remat, scan)
        with capsys.disabled():
            print(f"{'scanned' if scan else 'unrolled'} layers, remat={remat}: {found[remat, scan]:.2f} GiB")
    assert found["full", False] < 0.6 * found["none", False]
    assert found["full", False] < 1.1 * found["full", True]
