"""What README says of one host is so: its command, with a local folder, lacks nothing but models and profiles."""

import re
import shlex
from pathlib import Path

import pytest

from rlver_jax import train

ROOT = Path(__file__).resolve().parents[1]


@pytest.mark.parametrize("file", ["README.md", "docs/pods.md"])
def test_the_launchers_command_on_one_host(file, tmp_path, capsys, monkeypatch):
    monkeypatch.chdir(tmp_path)
    text = (ROOT / file).read_text(encoding="utf-8").replace("\\\n", " ")
    command = re.search(
        r"^ +\./launch/tpu_pod\.sh MY_TPU --zone.*? -- (python -m rlver_jax\.train .*)$", text, re.MULTILINE
    )
    words = shlex.split(command[1])[3:]
    assert train.main(words) == 2
    told = capsys.readouterr().err
    assert re.search(r"--workdir=gs://\w+/runs/first: is a URL.*gcsfuse.*launch/tpu_pod.sh", told), told
    local = [re.sub(r"gs://\w+", str(tmp_path), word) for word in words]
    assert train.main(local) == 2
    faults = capsys.readouterr().err.splitlines()[1:]
    wanting = {
        "policy.path",
        "user.path",
        "data.train",
        "data.eval",
        "mesh.replica",
    }  # the last: this machine's devices
    assert faults
    assert {re.match(r"  - ([\w.]+)=", fault)[1] for fault in faults} <= wanting
