"""A real server in a thread: uvicorn on a free port, an engine of four rows, the tiny policy of the dialogue tests."""

import contextlib
import socket
import threading
import time
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import openai
import pytest

from rlver_jax.profiles.schema import Profile
from rlver_jax.rollout.agents import Agents
from rlver_jax.rollout.spec import RolloutConfig, RolloutLimits
from rlver_jax.serving.app import Service
from rlver_jax.serving.connection import make_server
from rlver_jax.serving.engine import Engine
from rlver_jax.user.emotion import EmotionRules
from rlver_jax.user.turn import UserLimits
from tests.conftest import make_profiles

ROWS, CONTEXT, BLOCK, QUEUE = 4, 320, 3, 40


@contextlib.contextmanager
def serving(engine: Engine, **service):
    """Base URL of a running server."""
    engine.warm_up()
    engine.start()
    app = Service(engine, "tiny", 1_700_000_000, **service).app()
    server = make_server(app)
    with socket.create_server(("127.0.0.1", 0)) as listening:
        thread = threading.Thread(target=server.run, kwargs={"sockets": [listening]})
        thread.start()
        while not server.started:
            time.sleep(0.01)
        try:
            yield f"http://127.0.0.1:{listening.getsockname()[1]}"
        finally:
            server.should_exit = True
            thread.join()
            engine.close()


@pytest.fixture(scope="session")
def engine(policy_lm, bpe) -> Engine:
    loaded = jax.device_put(policy_lm, jax.devices()[0])  # bound to a device, as weights read from a file are
    return Engine(loaded, bpe, rows=ROWS, context=CONTEXT, block=BLOCK, queue=QUEUE)


@pytest.fixture(scope="session")
def url(engine):
    with serving(engine) as address:
        yield address


@pytest.fixture(scope="session")
def client(url):
    """OpenAI's own client, without its retries."""
    with openai.OpenAI(base_url=f"{url}/v1", api_key="none", max_retries=0) as made:
        yield made


class Played(NamedTuple):
    """Dialogues that the sampler played as one batch, the policy greedily, and with what."""

    agents: Agents
    profiles: list[Profile]
    limits: RolloutLimits
    seed: int
    dialogues: Any  # on the host


@pytest.fixture(scope="session")
def played(policy_lm, user_lm, bpe, prompts) -> Played:
    spec = RolloutConfig(
        "think", False, 1, 3, 700, 24, 16, 16, "sample", EmotionRules(initial=40, floor=-1, ceiling=100)
    )
    agents = Agents.build(policy_lm, user_lm, bpe, prompts, spec, style="vanilla", scenario="heart_to_heart")
    user = UserLimits(jnp.int32(8), jnp.int32(12), jnp.float32(1))
    limits = RolloutLimits(jnp.int32(3), jnp.int32(24), jnp.int32(16), jnp.float32(0), jnp.int32(40), user)
    # Ids all 0: each dialogue is one that a conversation of its own would have.
    encoded = agents.encode(make_profiles(4), [0] * 4)
    dialogues = jax.device_get(agents.play(encoded, jax.random.key(3), limits))
    return Played(agents, make_profiles(4), limits, 3, dialogues)
