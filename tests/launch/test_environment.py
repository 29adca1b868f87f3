"""launch/environment.sh: which Python the scripts take."""

import subprocess
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]


def write_python(folder: Path, name: str, version: tuple[int, int]) -> None:
    """An interpreter of a version: answers the script's question as that one would, and notes the rest."""
    status = int(version < (3, 11))
    (folder / name).write_text(
        "#!/bin/bash\n"
        f'case "$*" in *version_info*) exit {status} ;; --version) echo Python {version[0]}.{version[1]} ;;\n'
        f'"-m venv "*) echo {name} makes $3; mkdir -p $3/bin; cp $0 $3/bin/python ;;\n'
        f"*) echo {name} $* ;; esac\n"
    )
    (folder / name).chmod(0o755)


def make(tmp_path: Path, **environ: str) -> subprocess.CompletedProcess:
    command = ["bash", "-c", f"cd {tmp_path}; source {ROOT}/launch/environment.sh; make_environment '[test]'"]
    path = f"{tmp_path}:/usr/bin:/bin"
    return subprocess.run(command, env={"PATH": path} | environ, capture_output=True, text=True)


@pytest.mark.parametrize(
    ("there", "taken"),
    [
        ({"python3": (3, 13), "python3.11": (3, 11)}, "python3"),
        ({"python3": (3, 10), "python3.12": (3, 12), "python3.11": (3, 11)}, "python3.12"),
        ({"python3": (3, 9), "python3.11": (3, 11)}, "python3.11"),
    ],
)
def test_the_users_own_python_where_it_is_new_enough(tmp_path, there, taken):
    for name, version in there.items():
        write_python(tmp_path, name, version)
    for name in {"python3.11", "python3.12", "python3.13"} - set(there):  # none of this machine's
        write_python(tmp_path, name, (3, 1))
    done = make(tmp_path)
    assert done.returncode == 0, done.stderr
    assert done.stdout.splitlines()[0] == f"{taken} makes .venv"
    assert "pip install --quiet --disable-pip-version-check -e .[test]" in done.stdout


def test_a_named_python_is_taken_or_refused(tmp_path):
    write_python(tmp_path, "python3", (3, 13))
    write_python(tmp_path, "own", (3, 12))
    write_python(tmp_path, "old", (3, 10))
    assert make(tmp_path, PYTHON=str(tmp_path / "own")).stdout.startswith("own makes .venv")
    refused = make(tmp_path, PYTHON=str(tmp_path / "old"), VENV="other")
    assert refused.returncode == 2
    assert "old is Python 3.10, but Python 3.11 or newer is needed; set PYTHON=" in refused.stderr
    assert not (tmp_path / "other").exists()
