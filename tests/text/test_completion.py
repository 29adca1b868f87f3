"""What a real bash completes: with the functions of the script, and with the tabulator on a terminal."""

import os
import pty
import select
import shutil
import subprocess
import sys
import time
from pathlib import Path

import pytest

from rlver_jax.__main__ import COMMANDS, main

ROOT = Path(__file__).resolve().parents[2]
pytestmark = pytest.mark.skipif(not shutil.which("bash"), reason="there is no bash")


@pytest.fixture(scope="module")
def script(tmp_path_factory):
    """The file that `rlver completion bash` prints, in a process of its own as a user makes it."""
    file = tmp_path_factory.mktemp("completion") / "rlver.bash"
    command = [sys.executable, "-m", "rlver_jax", "completion", "bash"]
    environment = os.environ | {"PYTHONPATH": str(ROOT), "PYTHONIOENCODING": "utf-8"}
    with file.open("w") as out:
        done = subprocess.run(command, env=environment, stdout=out, stderr=subprocess.PIPE, text=True, timeout=300)
    assert (done.returncode, done.stderr) == (0, "")
    return file


@pytest.fixture
def folder(tmp_path):
    for name in ("runs", "own config.py", "notes.txt"):
        (tmp_path / name).mkdir() if name == "runs" else (tmp_path / name).touch()
    return tmp_path


def completed(script, folder, line):
    """What is offered at the end of a command line, with bash's own breaks of words."""
    words = ["rlver"]
    for word in line.split(" ")[1:]:
        parts = word.replace("=", "\0=\0").replace(":", "\0:\0").split("\0")
        words += [part for i, part in enumerate(parts) if part or i == len(parts) - 1]
    code = f"""
source '{script}'
COMP_LINE="$1" COMP_POINT=${{#1}}; shift; COMP_WORDS=("$@") COMP_CWORD=$(($# - 1))
_rlver 2> /dev/null
printf '%s\\n' "${{COMPREPLY[@]}}"
"""
    done = subprocess.run(
        ["bash", "-c", code, "bash", line, *words], cwd=folder, capture_output=True, text=True, timeout=60, check=True
    )
    return done.stdout.split("\n")[:-1]


@pytest.mark.parametrize(
    ("line", "offered"),
    [
        ("rlver tr", ["train"]),
        ("rlver train --wo", ["--workdir="]),
        ("rlver verify --par", ["--partial"]),
        ("rlver prepare --", ["--data_dir=", "--eval=", "--help", "--profiles="]),
        ("rlver train --config.policy.pa", ["--config.policy.path=", "--config.policy.param_dtype="]),
        ("rlver train --config.train.steps=", [""]),
        ("rlver train --config.policy.mode=", ["think", "direct"]),
        ("rlver verify x --config.log.tensorboard=", ["True", "False"]),
        ("rlver evaluate --config.data.eval=no", ["notes.txt"]),
        ("rlver export --dtype=", ["bfloat16", "float32"]),
        ("rlver export --dtype=b", ["bfloat16"]),
        ("rlver bench --config.", [""]),
        ("rlver train --workdir=r", ["runs"]),
        ("rlver train --workdir=runs --config=configs/ppo", ["configs/ppo_direct_7b.py", "configs/ppo_think_7b.py"]),
        ("rlver train --config=o", ["own config.py"]),
        ("rlver report r", ["runs"]),
        ("rlver serve --port=", [""]),
        ("rlver completion ", ["bash"]),
    ],
)
def test_what_is_offered(line, offered, script, folder):
    assert completed(script, folder, line) == offered


def test_every_command_is_offered_with_its_flags(script, folder):
    assert completed(script, folder, "rlver ") == [*COMMANDS, "completion", "--help", "--version"]
    for name in COMMANDS:
        assert "--help" in completed(script, folder, f"rlver {name} -"), name


def test_the_tabulator_on_a_terminal(script, folder):
    """The whole way through readline, which cuts words at = and adds a space after one that is complete."""
    try:
        master, other = pty.openpty()
    except OSError as error:  # containers without /dev/pts
        pytest.skip(f"no pseudo-terminal here: {error}")
    shell = ["bash", "--noprofile", "--norc", "-i"]
    environment = os.environ | {"TERM": "dumb", "PS1": "> ", "INPUTRC": os.devnull, "HISTFILE": ""}
    with subprocess.Popen(shell, stdin=other, stdout=other, stderr=other, cwd=folder, env=environment,
                          start_new_session=True) as process:  # fmt: skip
        os.close(other)
        lines = [f"source '{script}'; rlver() {{ printf '<%s>' \"$@\"; }}"]
        lines += ["rlver exp\t--dt\tb\t --wor\tr\t", "rlver tra\t--config=ow\t", "exit"]
        for line in lines:
            os.write(master, line.encode() + b"\n")
            time.sleep(0.3)
        shown, deadline = "", time.monotonic() + 60
        while process.poll() is None or select.select([master], [], [], 0)[0]:
            assert time.monotonic() < deadline, shown
            if select.select([master], [], [], 0.2)[0]:
                try:
                    shown += os.read(master, 65536).decode("utf-8", "replace")
                except OSError:
                    break
    os.close(master)
    assert "<export><--dtype=bfloat16><--workdir=runs/>" in shown, shown
    assert "<train><--config=own config.py>" in shown, shown


@pytest.mark.parametrize("words", [[], ["tcsh"], ["bash", "x"]])
def test_other_shells_are_refused(words, capsys):
    assert main(["completion", *words]) == 2
    assert capsys.readouterr().err == f"rlver: completion: found {' '.join(words) or 'no shell'}, expected bash\n"
