"""`serve` as a process: it starts, says where, answers, keeps its memory, and stops at a signal."""

import contextlib
import json
import os
import re
import signal
import socket
import subprocess
import sys
from pathlib import Path

import openai
import pytest

from rlver_jax.serve import main
from tests.quick import QUICK
from tests.serving import load, stall

ROOT = Path(__file__).resolve().parents[1]


@contextlib.contextmanager
def served(*args: str, **env: str):
    """(process, base URL) of a server of the debug world on one device."""
    env = os.environ | {"XLA_FLAGS": QUICK, "PYTHONPATH": str(ROOT), "COLUMNS": "200", "PYTHONUNBUFFERED": "1"} | env
    command = [sys.executable, "-m", "rlver_jax.serve", "--config=configs/debug.py", "--port=0", *args]
    process = subprocess.Popen(command, env=env, cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
    assert process.stdout is not None
    line = ""
    try:
        while not (match := re.search(r"(http://127\.0\.0\.1:\d+)/v1", line)):
            line = process.stdout.readline()
            assert line, "it ended before it served"
        yield process, match[1]
    finally:
        process.kill()
        process.wait()


def test_a_server_starts_answers_and_stops(tmp_path):
    environment = {"RLVER_JAX_SERVE_TOKEN": "s3cret"}
    with served("--rows=2", "--name=mine", "--policy_prompt", **environment) as (process, url):
        with openai.OpenAI(base_url=f"{url}/v1", api_key="s3cret", max_retries=0) as client:
            reply = client.chat.completions.create(model="mine", messages=[{"role": "user", "content": "hello"}], n=2)
            assert reply.usage.completion_tokens > 0
            # --policy_prompt: what the policy is trained under (configs/debug_world/prompts) stands in front.
            trained = {"role": "system", "content": "Listen and help. Think first, then say it."}
            for messages, same in (([trained], True), ([{"role": "system", "content": "Listen."}], False)):
                asked = [*messages, {"role": "user", "content": "hello"}]
                other = client.chat.completions.create(model="mine", messages=asked, n=2)
                assert (other.usage.prompt_tokens == reply.usage.prompt_tokens) == same
        other = openai.OpenAI(base_url=f"{url}/v1", api_key="-", max_retries=0)
        with other, pytest.raises(openai.AuthenticationError):
            other.models.list()
        process.send_signal(signal.SIGTERM)
        assert process.wait(20) == 0
        told = process.stdout.read()
        assert "6 replies" in told
        assert "s3cret" not in told


@pytest.mark.slow
def test_a_hundred_clients(tmp_path):
    """No error, busy rows, nothing compiled, flat memory: for half a minute, or RLVER_JAX_LOAD_SECONDS."""
    seconds = float(os.environ.get("RLVER_JAX_LOAD_SECONDS", "30"))
    with served("--rows=16") as (process, url):
        results = load.run(url, clients=100, seconds=seconds, pid=process.pid)
        print(json.dumps(results, indent=1))
        assert not results["errors"], results["first_errors"]
        assert results["requests"] > 100
        assert results["occupancy"] > 0.5
        assert results["programs_compiled"] == [4, 4]
        assert results["left"] == {"busy": 0, "waiting": 0}
        first, last = results["rss_mib"]
        assert last < 1.05 * first
        process.send_signal(signal.SIGTERM)
        assert process.wait(20) == 0


@pytest.mark.slow
def test_health_is_told_while_large_bodies_arrive(tmp_path):
    """Bodies of 4 MB of thirty kinds, four at once: 100 ms, times the processes that share a core."""
    with served("--rows=4") as (_, url):
        results = stall.run(url, senders=4, seconds=20)
        print(json.dumps(results))
        assert set(results["status"]) <= {400, 413, 429}
        assert results["bodies"] > 30
        assert results["health_ms"]["max"] < 100 * max(1, os.getloadavg()[0] / (os.cpu_count() or 1))


@pytest.mark.parametrize("token", ["s3cret\n", " s3cret", "s3\tcret", "s3crét"])
def test_a_token_that_no_client_could_bring_is_refused_unprinted(token, capsys, monkeypatch):
    monkeypatch.chdir(ROOT)
    monkeypatch.setenv("RLVER_JAX_SERVE_TOKEN", token)
    assert main(["--config=configs/debug.py", "--port=0"]) == 2
    told = capsys.readouterr()
    assert "RLVER_JAX_SERVE_TOKEN" in told.err
    assert "s3" not in told.err + told.out


@pytest.mark.parametrize(
    ("args", "told"),
    [
        ([], "no --config"),
        (["--config=configs/debug.py", "--port=99999"], "port"),
        (["--config=configs/debug.py", "--rows=0"], "rows"),
        (["--config=configs/debug.py", "--checkpoint=/no/such"], "/no/such"),
        (["--config=configs/debug.py", "--host=no.such.host.invalid"], "cannot listen on"),
        (["--config=configs/debug.py", "--config.policy.dtype=float8"], "policy.dtype"),
        (["--config=configs/debug.py", "extra"], "extra"),
        (["--config=configs/base.py", "--port=0"], "policy.path"),
    ],
)
def test_bad_usage(args, told, capsys, monkeypatch):
    monkeypatch.chdir(ROOT)
    assert main(args) == 2
    assert told in capsys.readouterr().err


def test_a_port_that_is_taken_is_refused_before_anything_slow(capsys, monkeypatch):
    monkeypatch.chdir(ROOT)
    with socket.create_server(("127.0.0.1", 0)) as taken:
        assert main(["--config=configs/debug.py", f"--port={taken.getsockname()[1]}"]) == 2
    assert "choose another --port" in capsys.readouterr().err
