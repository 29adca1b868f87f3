"""A run, and the plan of it: each module has a `config` of its own."""

import jax
import pytest

from rlver_jax.parallel.mesh import make_mesh
from rlver_jax.perf.plan_programs import Texts, shapes_of
from rlver_jax.training.setup import build_run


@pytest.fixture(scope="module")
def run_and_state(config):
    mesh = make_mesh(**config.mesh)
    with jax.set_mesh(mesh):
        return build_run(config, mesh)


@pytest.fixture(scope="module")
def planned(config, run_and_state):
    run = run_and_state[0]
    texts = Texts(run.agents.tokenizer, config.data.language, run.tokens.prefix_width, run.tokens.first_width)
    return shapes_of(config, run.mesh, texts)
