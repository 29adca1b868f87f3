"""What a server does before anything slow: it looks whether its packages are there, and takes its port."""

import socket

from rlver_jax.config.extras import install_command
from rlver_jax.config.validate import ConfigError


def check_installed() -> None:
    """Raises ConfigError: a package of the extra `serve` is missing."""
    try:
        import pydantic  # noqa: F401
        import starlette  # noqa: F401
        import uvicorn  # noqa: F401
    except ImportError as error:
        raise ConfigError(f"{error.name} is not installed; {install_command('serve')}") from None


def listen(host: str, port: int) -> socket.socket:
    """A listening socket; port 0 takes any free one.

    Raises:
        ConfigError: there is no such address here, or the port is taken.
    """
    try:
        return socket.create_server((host, port), family=socket.AF_INET6 if ":" in host else socket.AF_INET)
    except OSError as error:
        raise ConfigError(f"cannot listen on {host} port {port} ({error.strerror}); choose another --port") from None


def base_url(listening: socket.socket) -> str:
    """What clients are given: http://HOST:PORT/v1."""
    host, port = listening.getsockname()[:2]
    return f"http://{f'[{host}]' if ':' in host else host}:{port}/v1"
