"""A real server in a thread: uvicorn on a free port, an engine of four rows, the tiny policy of the dialogue tests."""

import contextlib
import socket
import threading
import time

import openai
import pytest
import uvicorn

from rlver_jax.serving.app import Service
from rlver_jax.serving.engine import Engine

ROWS, CONTEXT, BLOCK, QUEUE = 4, 320, 3, 40


@contextlib.contextmanager
def serving(engine: Engine, **service):
    """Base URL of a running server."""
    engine.warm_up()
    engine.start()
    app = Service(engine, "tiny", 1_700_000_000, **service).app()
    server = uvicorn.Server(uvicorn.Config(app, log_level="warning"))
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
    return Engine(policy_lm, bpe, rows=ROWS, context=CONTEXT, block=BLOCK, queue=QUEUE)


@pytest.fixture(scope="session")
def url(engine):
    with serving(engine) as address:
        yield address


@pytest.fixture(scope="session")
def client(url):
    """OpenAI's own client, without its retries."""
    with openai.OpenAI(base_url=f"{url}/v1", api_key="none", max_retries=0) as made:
        yield made
