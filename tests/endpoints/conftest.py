import pytest

from tests.endpoints.server import ChatServer


@pytest.fixture
def server():
    with ChatServer() as running:
        yield running
