"""launch/local.sh goes through to its end, whatever becomes of its output."""

import os
import subprocess
from pathlib import Path

import pytest

SCRIPT = Path(__file__).resolve().parents[2] / "launch" / "local.sh"


@pytest.mark.parametrize("output", ["> /dev/full", ">&-", "2>&- >&-", "| head -c 1"])
def test_its_output_ends_no_run(output, tmp_path):
    """With an interpreter that only notes what it is asked to do."""
    python = tmp_path / "venv" / "bin" / "python"
    python.parent.mkdir(parents=True)
    python.write_text(f'#!/bin/bash\necho "$2" >> {tmp_path}/asked\n')
    python.chmod(0o755)
    environment = os.environ | {"VENV": str(tmp_path / "venv"), "PYTHON": str(python), "RUN": str(tmp_path / "run")}
    shell = ["bash", "-c", f'set -o pipefail; "$0" {output}', str(SCRIPT)]
    done = subprocess.run(shell, env=environment, capture_output=True, text=True, timeout=60)
    assert done.returncode == 0, done.stderr
    asked = (tmp_path / "asked").read_text().split()
    modules = [word for word in asked if word.startswith("rlver_jax.")]
    assert modules == [f"rlver_jax.{name}" for name in ("train", "evaluate", "evaluate", "report")]
