"""A plan of a run with LoRA: the trainer's own programs, and one base counted once."""

import jax
import pytest

from configs import debug
from rlver_jax.decoding.cache import LM
from rlver_jax.models.families import Qwen2Config
from rlver_jax.models.lora import split
from rlver_jax.perf import flops
from rlver_jax.perf.plan_programs import bytes_per_chip, programs_of
from rlver_jax.rollout.sampler import sample_dialogues
from rlver_jax.training.learners import lora_of, playing_copy
from tests.conftest import write_debug_model


@pytest.fixture(scope="module")
def config(tmp_path_factory):
    folder = tmp_path_factory.mktemp("base") / "model"
    write_debug_model(folder)
    c = debug.get_config("ppo")
    c.policy.path = c.user.path = str(folder)
    c.critic.path, c.loss.kl, c.lora.rank = "", 0.1, 4
    c.policy.init = c.user.init = c.critic.init = "path"
    c.mesh.fsdp, c.mesh.tensor = 4, 2
    return c


@pytest.fixture(scope="module")
def programs(planned):
    return {program.name: program for program in programs_of(planned)}


def held(tree, device):
    """Bytes of real arrays on a device, each buffer once."""
    return sum(
        part.data.nbytes for x in jax.tree.leaves(tree) for part in x.addressable_shards if part.device == device
    )


def test_the_base_is_there_once(run_and_state, programs, planned):
    (run, state), device = run_and_state, jax.devices()[3]
    base = held(run.base, device)
    assert base == held(run.agents.user.params, device) > 0
    assert bytes_per_chip(planned.state) == held(state, device)
    assert list(programs) == ["play", "pack", "learn"], "float32 is played in float32: nothing is copied"
    learn, play = programs["learn"], programs["play"]
    assert bytes_per_chip(learn.arguments) == base + held(state.params, device) + held(state.opt_state, device)
    assert learn.idle == {}, "the user is the base"
    assert bytes_per_chip(play.arguments) == base + held(state.params, device)
    assert bytes_per_chip(play.again) == base, "policy and user are two arguments"
    assert set(play.idle) == {"adapters' moments"}


def test_dialogues_are_played_by_the_trainers_program(run_and_state, programs):
    run, state = run_and_state
    agents = run.agents
    copy = playing_copy(agents.policy.model, lora_of(run.config), run.base, agents.mesh)
    policy = LM(copy(state.params["policy"]), agents.policy.model)
    user = LM(split(policy.params)[0], agents.user.model)
    batch, count = run.reader.next_batch(), agents.spec.group
    profiles = run.tokens.batch([index for index, _ in batch], range(len(batch) * count))
    arguments = agents.replicate((profiles, jax.random.key(0), run.limits))
    with jax.set_mesh(agents.mesh):
        played = sample_dialogues.lower(policy, user, agents.tables, *arguments, spec=agents.spec)
    assert programs["play"].lower().as_text() == played.as_text()


def test_the_update_gets_one_base(programs, run_and_state):
    """Its arguments are the state, the base, and small things: no second model."""
    inputs = jax.tree.leaves(programs["learn"].lower().in_avals)
    largest = run_and_state[0].base.policy["embed"]["kernel"].shape
    assert sum(x.shape == largest for x in inputs) == 1


def test_frozen_weights_have_no_gradients_and_no_moments():
    c = Qwen2Config(57, 32, 48, num_layers=2, num_heads=4, num_kv_heads=2, head_dim=8)
    sizes = {"logits": True, "itemsize": 2, "parts": 1, "remat": "none", "chunked": False}
    full, frozen = (flops.packed_update(c, 2, 16, **sizes, frozen=x) for x in (False, True))
    per_token = 2 * (2 * (32 * 32 * 2 + 32 * 16 * 2 + 3 * 32 * 48) + 32 * 57)
    assert full.useful - frozen.useful == 2 * 16 * per_token
    assert frozen.spread_bytes == 0 < full.spread_bytes
