"""Serves a policy to anything that speaks OpenAI's protocol: chat completions and completions.

    rlver serve --config=FILE[:ARG] [--config.a.b=v …] [--checkpoint=WORKDIR|HF_FOLDER] [--adapter=NAME=FOLDER …]
                [--port=8000]

Requests that come together are answered together, --rows at a time. Of a training run the checkpoint with the best
eval/score is taken, or the last one where none has a score; --step chooses another. The server listens on this machine
only, unless --host says otherwise, and asks for a bearer token where the environment holds RLVER_JAX_SERVE_TOKEN.
GET /stats tells how busy it is. --adapter, given once for each, names low-rank adapters on the model (folders of
`peft`), which requests then name as their model; SIGHUP has them read anew.
Needs the extra `serve`: pip install -e '.[serve]' in the clone.
Exit status: 0 stopped by a signal, 1 the engine has failed, 2 bad usage, 130 interrupted before it served.
"""

import gc
import ipaddress
import os
import signal
import socket
import sys
import threading
import time
from collections.abc import Sequence
from typing import Any

import jax
from absl import flags
from ml_collections import ConfigDict
from rich.console import Console

from rlver_jax.config.credentials import key_fault
from rlver_jax.config.flags import config_from_flags, define_path, path_override
from rlver_jax.config.hub import fetch, short_name
from rlver_jax.config.validate import ConfigError, validate
from rlver_jax.decoding.cache import LM
from rlver_jax.parallel.mesh import make_sampling_mesh
from rlver_jax.rollout.agents import load_model, make_model
from rlver_jax.rollout.ready import sampling_copy
from rlver_jax.serving.adapters import Adapters, named_folders
from rlver_jax.serving.engine import Engine
from rlver_jax.serving.listening import base_url, check_installed, listen
from rlver_jax.text.command import Command, run_command
from rlver_jax.training.trained_policy import take_checkpoint
from rlver_jax.user.prompts import load_prompts

TOKEN_VARIABLE = "RLVER_JAX_SERVE_TOKEN"
SWITCH_S = 0.0005  # after which a thread yields to the one that answers; Python's 5 ms add up
LOOK_S = 2.0  # between two status lines in a terminal


def main(argv: Sequence[str] | None = None) -> int:
    """The command line; returns the exit status."""
    return run_command("serve", _run, argv)


def _run(command: Command, argv: Sequence[str]) -> int:
    config, options = _arguments(argv)
    check_installed()
    _check_token(os.environ.get(TOKEN_VARIABLE, ""))
    checkpoint = options.checkpoint or config.policy.path
    trained = take_checkpoint(config, options.checkpoint, options.step, path_override(options))
    name = options.name or short_name(checkpoint)
    folders = named_folders(options.adapter, name)
    validate(config, jax.device_count(), ["policy"])
    fetch({"policy": (config.policy.path, trained is None and config.policy.init == "path")})
    system = _system(config) if options.policy_prompt else ""
    with listen(options.host, options.port) as listening:
        with command.console.status("loading the model"):
            engine, adapters = _load(config, options, trained.weights if trained else None, folders)
        with command.console.status("compiling"):
            engine.warm_up()
        thinking = False if config.policy.mode == "direct" else None  # as it was trained; else as its template says
        _serve(engine, name, adapters, system, thinking, listening, command.console)
    if engine.failure is not None:
        command.error(f"the engine has failed: {engine.failure!r}")
        return 1
    return 0


def _arguments(argv: Sequence[str]) -> tuple[ConfigDict, flags.FlagValues]:
    def define(values: flags.FlagValues) -> None:
        common: dict[str, Any] = {"flag_values": values}
        define_path("checkpoint", None, "training run or Hugging Face folder to take the policy from", values)
        flags.DEFINE_string("step", "", "of a training run: best | last | a number", **common)
        flags.DEFINE_multi_string("adapter", [], "NAME=FOLDER of an adapter on the model; for each one again", **common)
        flags.DEFINE_string("name", "", "of the model in requests; default: the checkpoint's folder", **common)
        flags.DEFINE_boolean(
            "policy_prompt", False, "put the policy's own system prompt (policy.mode) where a chat has none", **common
        )
        flags.DEFINE_string("host", "127.0.0.1", "address to listen on", **common)
        flags.DEFINE_integer("port", 8000, "port to listen on; 0: any free one", 0, 65535, **common)
        flags.DEFINE_integer("rows", 16, "requests answered at once", 1, **common)
        flags.DEFINE_integer("context", 0, "tokens of prompt and reply; 0: rollout.context", 0, **common)
        flags.DEFINE_integer("block", 8, "tokens generated between two looks at the queue", 1, **common)
        flags.DEFINE_integer("queue", 256, "replies that may wait for a row", 1, **common)

    config, options, rest = config_from_flags(argv, __doc__, define)
    if rest:
        raise ConfigError(f"found {rest[0]!r}, expected flags only, such as --port=8000; --help lists them")
    return config, options


def _check_token(token: str) -> None:
    """Raises ConfigError for one that no client could bring, without printing it."""
    if token and (fault := key_fault(token)):
        raise ConfigError(f"{TOKEN_VARIABLE}: the token in this variable {fault}")


def _load(
    config: ConfigDict, options: flags.FlagValues, weights: Any, folders: dict[str, str]
) -> tuple[Engine, Adapters]:
    context = options.context or config.rollout.context
    model_config = make_model(config.policy, "policy").config
    field = "--context" if options.context else "--config.rollout.context"
    model_config.check_context(context, "policy", f"{field}={context}", f"set {field}={model_config.context} or lower")
    mesh = make_sampling_mesh(config.mesh, config.mesh_sampling)
    lm, tokenizer = load_model(config.policy, "policy", mesh, weights)
    lm = LM(sampling_copy(lm.model, mesh)(lm.params), lm.model)
    adapters = Adapters(lm, folders, mesh)
    lm, owners = adapters.beside_model()
    sizes = {"rows": options.rows, "context": context, "block": options.block, "queue": options.queue}
    return Engine(lm, tokenizer, owners=owners, **sizes), adapters


def _system(config: ConfigDict) -> str:
    """The system prompt that the policy was trained with."""
    return load_prompts(config.data.language, config.user.prompts or None).policy_system(
        config.policy.mode, config.policy.prompt
    )


def _serve(
    engine: Engine,
    name: str,
    adapters: Adapters,
    system: str,
    thinking: bool | None,
    listening: socket.socket,
    console: Console,
) -> None:
    """Answers until a signal comes or the engine fails."""
    from rlver_jax.serving.app import Service
    from rlver_jax.serving.connection import make_server

    token = os.environ.get(TOKEN_VARIABLE, "")
    host = listening.getsockname()[0]
    app = Service(engine, name, int(time.time()), token, system, thinking, tuple(adapters.folders)).app()
    server = make_server(app)
    engine.start()
    sys.setswitchinterval(SWITCH_S)
    gc.collect()
    gc.freeze()  # what is there stays: a full collection would take a part of a second, in which nobody is answered
    # uvicorn raises the signal again once it has stopped: by then there is nothing left to interrupt.
    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, lambda *_: None)
    again = lambda: console.print(adapters.swap(engine), markup=False)  # noqa: E731
    signal.signal(signal.SIGHUP, lambda *_: threading.Thread(target=again, daemon=True).start())
    console.print(f"{name} at {base_url(listening)} · {engine.rows} rows of {engine.context} tokens", markup=False)
    if not token and not ipaddress.ip_address(host).is_loopback:
        console.print(f"anyone who reaches {host} can use it; set {TOKEN_VARIABLE} to ask for a token", markup=False)
    threading.Thread(target=_watch, args=(engine, server, console), daemon=True).start()
    server.run(sockets=[listening])
    stats = engine.stats()
    engine.close()
    console.print(_status_line(stats, stats["uptime_s"], 0), markup=False, highlight=False, soft_wrap=True)


def _watch(engine: Engine, server: Any, console: Console) -> None:
    """Shows a status line in a terminal; stops the server when the engine has failed."""
    status = console.status("waiting for requests") if console.is_terminal else None
    if status is not None:
        status.start()
    before = 0
    while not server.should_exit:
        time.sleep(LOOK_S)
        stats = engine.stats()
        if status is not None:
            status.update(_status_line(stats, LOOK_S, before))
        before = stats["tokens"]["generated"]
        server.should_exit |= engine.failure is not None
    if status is not None:
        status.stop()


def _status_line(stats: dict[str, Any], seconds: float, before: int) -> str:
    rate = (stats["tokens"]["generated"] - before) / max(seconds, 1e-9)
    return (
        f"{stats['replies']['finished']} replies · {stats['busy']} of {stats['rows']} rows busy · {stats['waiting']} "
        f"waiting · {rate:.1f} tokens/s · {stats['rows_mean']:.1f} rows a step ({stats['occupancy']:.0%})"
    )


if __name__ == "__main__":
    sys.exit(main())
