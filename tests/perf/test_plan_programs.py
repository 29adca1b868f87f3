"""A plan compiles the programs that the trainer runs: their text is the same, letter by letter."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import NamedSharding, PartitionSpec

from configs import debug
from rlver_jax.decoding.cache import LM
from rlver_jax.learning.train_step import compile_step
from rlver_jax.parallel.distributed import replicate
from rlver_jax.perf.plan_measure import turns_of_loops
from rlver_jax.perf.plan_programs import Texts, bytes_per_chip, programs_of, shapes_of
from rlver_jax.rollout.ready import rollout_model, sampling_copy, sampling_params, sampling_program
from rlver_jax.rollout.rewards import Rewards
from rlver_jax.rollout.sampler import sample_dialogues
from rlver_jax.training.programs import row_sharding


@pytest.fixture(scope="module")
def config():
    c = debug.get_config("ppo")
    c.mesh.fsdp, c.mesh.tensor = 4, 2
    c.mesh_sampling.replica, c.mesh_sampling.fsdp = 4, 1
    return c


@pytest.fixture(scope="module")
def programs(planned):
    return {program.name: program for program in programs_of(planned)}


def test_state_takes_what_it_takes(run_and_state, planned):
    """Parts of real arrays on one device; among them each moment where its parameter is."""
    state, device = run_and_state[1], jax.devices()[3]
    held = [part for x in jax.tree.leaves(state) for part in x.addressable_shards if part.device == device]
    assert bytes_per_chip(planned.state) == sum(part.data.nbytes for part in held)


def test_the_sampler(run_and_state, programs):
    """The copies of both models, and the dialogues."""
    run, state = run_and_state
    agents = run.agents
    params = {"policy": state.params["policy"], "user": agents.user.params}
    ready = {}
    for name, tree in params.items():
        model = getattr(agents, name).model
        copied = sampling_program(sampling_params(model, agents.mesh)).lower(tree)
        assert programs[f"copy {name}"].lower().as_text() == copied.as_text()
        ready[name] = LM(sampling_copy(model, agents.mesh)(tree), model)
    batch, count = run.reader.next_batch(), agents.spec.group
    profiles = run.tokens.batch([index for index, _ in batch], range(len(batch) * count))
    arguments = agents.replicate((profiles, jax.random.key(0), run.limits))
    with jax.set_mesh(agents.mesh):
        played = sample_dialogues.lower(ready["policy"], ready["user"], agents.tables, *arguments, spec=agents.spec)
    assert programs["play"].lower().as_text() == played.as_text()


def test_a_sampler_that_plays_in_int8(config, run_and_state):
    """`copy policy` rounds, as the trainer's copy does, and `play` reads what it gives."""
    run, state = run_and_state
    rounded = config.copy_and_resolve_references()
    rounded.rollout.param_dtype = "int8"
    texts = Texts(run.agents.tokenizer, config.data.language, run.tokens.prefix_width, run.tokens.first_width)
    programs = {program.name: program for program in programs_of(shapes_of(rounded, run.mesh, texts))}
    model, policy = rollout_model(rounded, run.agents.policy.model), state.params["policy"]
    copied = sampling_program(sampling_params(model, run.agents.mesh)).lower(policy)
    assert programs["copy policy"].lower().as_text() == copied.as_text()
    ready = programs["play"].arguments["policy's copy"]
    assert jax.tree.map(lambda x: (x.shape, x.dtype), ready) == jax.tree.map(
        lambda x: (x.shape, x.dtype), sampling_copy(model, run.agents.mesh)(policy)
    )
    assert "xi8>" in programs["play"].lower().as_text()


def test_the_update(run_and_state, programs):
    """On rows as `pack` returns them."""
    run, state = run_and_state
    packed = programs["pack"].lower().out_info
    assert packed.tokens.shape == (8, run.lengths[-1])
    assert programs["learn"].lower().as_text() == _real_update(run, state, packed).as_text()


def _real_update(run, state, packed):
    rows, size = row_sharding(run.mesh), packed.tokens.shape[0]
    packed = jax.tree.map(lambda x: jax.device_put(jnp.zeros(x.shape, x.dtype), rows), packed)
    zeros = Rewards(jnp.zeros(size), jnp.zeros((size, run.agents.spec.max_turns)))
    layout = replicate(run.plan_rows(np.full(size, 9), np.arange(size)[None])[1], run.mesh)
    key = jax.device_put(jax.random.key(0), NamedSharding(run.mesh, PartitionSpec()))
    with jax.set_mesh(run.mesh):
        step = compile_step(run.setup, state)
        arguments = (packed, jax.device_put(zeros, rows), run.grammar, key, run.reference, layout)
        return step.lower(state, *arguments)


def test_loops_that_data_ends(config, planned):
    """Every text at its limit; within a token, attention goes through a cache in eighths, not by the limit again."""
    turns, play = turns_of_loops(planned), "jit(sample_dialogues)/while/body"
    assert turns("jit(sample_dialogues)/while") == config.rollout.max_turns
    assert turns(f"{play}/policy_turn/while") == config.rollout.think_tokens + config.rollout.say_tokens
    assert turns(f"{play}/user_turn/appraise/while/body/closed_call/while") == config.user.field_tokens
    for where in (f"{play}/policy_turn", f"{play}/user_turn/appraise/while/body"):
        assert turns(f"{where}/while/body/jit(_read)/Qwen2/Qwen2._layers/while/body/layers/attn/while") == 8
