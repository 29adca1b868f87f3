"""A server that plays the miniature's people behind OpenAI's chat protocol: by the grammar's rule, without a model.

    python -m rlver_jax.miniature.people [--port=8100] [--host=127.0.0.1] [--latency=MS] [--fail=SHARE]

It is the simulated user that --config.remote.user.url names, for configs/miniature.py; no key is needed:

    python -m rlver_jax.evaluate --config=configs/miniature.py --out=DIR \
        --config.remote.user.url=http://127.0.0.1:8100/v1 --config.remote.user.model=people

A request holds the person, the hidden intention and the dialogue, so nothing of a dialogue is kept, and equal requests
have equal answers. A change is what the gold judge says of the reply. --latency delays every answer; --fail refuses a
share of all attempts with status 503, by a hash of the request and of how often it has been sent. GET /stats counts
requests. Needs the extra `serve`. Exit status: 0 stopped by a signal, 2 bad usage.
"""

import math
import signal
import socket
import sys
from collections.abc import Sequence
from typing import Any

from absl import flags

from rlver_jax.config.flags import parse_flags
from rlver_jax.config.validate import ConfigError
from rlver_jax.serving.listening import base_url, check_installed, listen
from rlver_jax.text.command import Command, run_command


def main(argv: Sequence[str] | None = None) -> int:
    """The command line; returns the exit status."""
    return run_command("people", _run, argv)


def _run(command: Command, argv: Sequence[str]) -> int:
    options = _arguments(argv)
    check_installed()
    with listen(options.host, options.port) as listening:
        _serve(options.latency / 1000, options.fail, listening, command)
    return 0


def _arguments(argv: Sequence[str]) -> flags.FlagValues:
    def define(values: flags.FlagValues) -> None:
        options: dict[str, Any] = {"flag_values": values}
        flags.DEFINE_string("host", "127.0.0.1", "address to listen on", **options)
        flags.DEFINE_integer("port", 8100, "port to listen on; 0: any free one", 0, 65535, **options)
        flags.DEFINE_float("latency", 0.0, "before every answer, in milliseconds", 0.0, 600_000.0, **options)
        flags.DEFINE_float("fail", 0.0, "share of attempts that are answered with status 503", 0.0, 1.0, **options)

    options, rest = parse_flags(argv, __doc__, define)
    if rest:
        raise ConfigError(f"found {rest[0]!r}, expected flags only, such as --port=8100; --help lists them")
    for name in ("latency", "fail"):
        if math.isnan(float(options[name].value or 0.0)):
            raise ConfigError(f"--{name}=nan: expected a number")
    return options


def _serve(latency: float, fail: float, listening: socket.socket, command: Command) -> None:
    """Answers until a signal comes."""
    from rlver_jax.miniature.people_service import MODEL, PeopleService
    from rlver_jax.serving.connection import make_server

    service = PeopleService(latency, fail)
    server = make_server(service.app())
    # uvicorn raises the signal again once it has stopped: by then there is nothing left to interrupt.
    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, lambda *_: None)
    command.print(f"{MODEL} at {base_url(listening)}")
    server.run(sockets=[listening])
    stats = service.stats
    command.print(
        f"{stats.requests} requests · {stats.answered} answered, {stats.distinct} of them different · "
        f"{stats.failed} failed · {stats.refused} refused"
    )


if __name__ == "__main__":
    sys.exit(main())
