"""Every remat policy compiled for a TPU: what it keeps, against what it computes twice."""

import pytest

from configs import rlver_plus
from rlver_jax.parallel.mesh import make_mesh
from rlver_jax.perf.chips import CHIPS, topology_devices
from rlver_jax.perf.plan_measure import compile_all
from rlver_jax.perf.plan_programs import programs_of, shapes_of
from rlver_jax.perf.plan_remat import Remat, lightest, remats_of
from rlver_jax.plan import texts_of

SMALL = {
    **{
        f"{name}.{field}": value
        for name in ("policy", "user")
        for field, value in (("size", "0.5b"), ("attention", "dense"))
    },
    **{"rollout.batch": 16, "rollout.think_tokens": 64, "rollout.say_tokens": 64, "user.reply_tokens": 64},
    **{"mesh.tensor": 2, "train.microbatches": 1},
}


def test_the_lightest_that_fits():
    kinds = [
        Remat({"policy.remat": name}, 0, 1.0, fits) for name, fits in (("none", False), ("dots", True), ("full", True))
    ]
    assert lightest(kinds) is kinds[1]
    assert str(kinds[1]) == "--config.policy.remat=dots"
    assert lightest(kinds[:1]) is None


@pytest.mark.long
def test_each_keeps_less_and_computes_more():
    """0.5B on one v5e host: 24 layers, of which `none` keeps all, `full` only what comes in."""
    pytest.importorskip("libtpu", reason="needs the TPU compiler: pip install '.[tpu]'")
    config = rlver_plus.get_config("grpo,think")
    config.update_from_flattened_dict(SMALL)
    mesh = make_mesh(**config.mesh, devices=topology_devices("v5e:2x4"))
    texts, _ = texts_of(config)
    remake = lambda changed: shapes_of(changed, mesh, texts)  # noqa: E731
    shapes, told = remake(config), []
    learn = [program for program in programs_of(shapes) if program.name == "learn"]
    measurements = compile_all(learn, shapes, told.append)
    remats = remats_of(config, shapes, measurements, CHIPS["v5e"], remake, told.append)
    assert [one.fields for one in remats] == [{"policy.remat": name} for name in ("none", "dots", "full")]
    none, dots, full = remats
    tokens = (
        config.rollout.batch // 4 * shapes.lengths[-1]
    )  # of a chip's rows; each keeps 2 bytes x 896 a layer at least
    assert none.total - full.total > 24 * 896 * 2 * tokens / 2
    assert none.total > dots.total > full.total
    assert none.seconds < dots.seconds < full.seconds
    assert sum(line.startswith("trying ") for line in told) == 2, "the config's own is not compiled again"
