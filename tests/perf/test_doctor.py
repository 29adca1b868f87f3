"""`rlver doctor` as a process: on a machine that is fine, and on one with each thing broken in turn."""

import os
import re
import shutil
import subprocess
import sys
from importlib import metadata
from pathlib import Path

import pytest

from rlver_jax.perf.doctor import main

ROOT = Path(__file__).resolve().parents[2]
ENVIRONMENT = {name: value for name, value in os.environ.items() if not name.startswith(("HF_", "HUGGING_FACE"))} | {
    "PYTHONPATH": str(ROOT),
    "PYTHONIOENCODING": "utf-8",
    "JAX_PLATFORMS": "cpu",
    "XLA_FLAGS": "--xla_force_host_platform_device_count=3",
    "COLUMNS": "300",
    "LINES": "100",
}


def doctor(folder, *words, **changes):
    """(exit status, {row: (state, text)}, the last line of standard output, standard error)."""
    command = [sys.executable, "-m", "rlver_jax", "doctor", *words]
    environment = {**ENVIRONMENT, **changes}
    done = subprocess.run(command, cwd=folder, env=environment, capture_output=True, text=True, timeout=300)
    lines = done.stdout.splitlines()
    rows = re.findall(r"^│ (\S+) +│ (.*?) +│ (.*?) +│$", done.stdout, re.MULTILINE)
    return done.returncode, {what: (state, text) for state, what, text in rows}, (lines or [""])[-1], done.stderr


def test_a_machine_that_can_train(tmp_path):
    status, rows, last, err = doctor(tmp_path, HF_TOKEN="hf_a_secret_of_mine", XDG_CACHE_HOME=str(tmp_path / "cache"))
    assert (status, last, err) == (0, "training can start", ""), rows
    assert not [row for row in rows.values() if row[0] == "broken"]
    assert rows["Python"][1] == f"{sys.version.split()[0]}, {sys.executable}"
    for name in ("jax", "flax", "optax", "orbax-checkpoint", "transformers"):
        assert rows[name] == ("ok", metadata.version(name))
    for number in range(3):
        assert re.fullmatch(r"cpu, compiled and ran a program in \d\.\d\d s", rows[f"device {number}"][1])
    assert "device 3" not in rows
    assert rows["cores"][1] == str(len(os.sched_getaffinity(0)))
    free = float(re.fullmatch(rf"{tmp_path} can be written, ([\d.]+) GB free.*", rows["checkpoints"][1])[1])
    assert free == pytest.approx(shutil.disk_usage(tmp_path).free / 1e9, abs=1)
    assert rows["token of the hub"] == ("ok", "is set")
    assert "secret" not in str(rows), "never its value"
    assert {path.name for path in tmp_path.iterdir()} <= {"cache"}, "nothing else is left behind"
    check_extras(rows)


def check_extras(rows):
    """`test` is here, since these tests run; of the others those are absent whose packages cannot be found."""
    names = metadata.metadata("rlver_jax").get_all("Provides-Extra")
    assert {name for name in rows if name.startswith("extra ")} == {f"extra {name}" for name in names}
    assert rows["extra test"][0] == "ok"
    for name, package in (("wandb", "wandb"), ("parity", "torch"), ("tpu", "libtpu")):
        try:
            metadata.version(package)
        except metadata.PackageNotFoundError:
            state, text = rows[f"extra {name}"]
            assert state == "absent"
            assert f"{package} is not installed" in text
            assert text.endswith(f"pip install -e '.[{name}]' in the clone")


def test_devices_and_folders_that_cannot_be_used(tmp_path):
    (tmp_path / "file").touch()
    changes = {"JAX_PLATFORMS": "rocm", "JAX_COMPILATION_CACHE_DIR": "s3:/x", "HF_HOME": "file"}
    status, rows, _, err = doctor(tmp_path, "--workdir=file/run", **changes)
    assert status == 1
    assert [name for name, row in rows.items() if row[0] == "broken"] == ["JAX", "checkpoints", "compiled programs"]
    assert rows["models of the hub"][0] == "note", "local folders need none"
    platform, checkpoints, compiled = err.splitlines()
    assert platform.startswith("doctor: JAX: ")
    assert platform.endswith("unset JAX_PLATFORMS=rocm, or install it")
    assert checkpoints.startswith("doctor: checkpoints: ")
    assert f"file/run: cannot be made, since {tmp_path}/file is no folder" in checkpoints
    assert compiled.startswith("doctor: compiled programs: JAX_COMPILATION_CACHE_DIR=s3:/x: is a URL")
    assert list(tmp_path.iterdir()) == [tmp_path / "file"]


def test_a_package_that_is_old_and_broken(tmp_path):
    """Before the real optax lies another: its metadata are of an old version, and it cannot be imported."""
    old = tmp_path / "optax-0.0.1.dist-info"
    old.mkdir()
    (old / "METADATA").write_text("Metadata-Version: 2.1\nName: optax\nVersion: 0.0.1\n")
    (tmp_path / "optax.py").write_text("raise ImportError('cannot import name jaxlib')\n")
    status, rows, _, err = doctor(tmp_path, PYTHONPATH=f"{tmp_path}:{ROOT}")
    assert status == 1
    assert rows["optax"][0] == rows["rlver_jax.train"][0] == "broken"
    train, optax = err.splitlines()
    assert train.startswith("doctor: rlver_jax.train: ImportError: cannot import name jaxlib; reinstall")
    assert re.fullmatch(
        r"doctor: optax: optax 0\.0\.1 is installed, expected >=[\d.]+; pip install 'optax>=[\d.]+'", optax
    )


@pytest.mark.parametrize("word", ["--wrkdir=x", "run", "--workdir=gs://b/x"])
def test_bad_usage(word, capsys):
    assert main([word]) == 2
    out, err = capsys.readouterr()
    assert out == ""
    assert err.startswith("doctor: ")
