import pytest

from tests.endpoint.server import ChatServer


@pytest.fixture
def server():
    with ChatServer() as running:
        yield running
