"""launch/gke_jobset.yaml: the numbers in it belong together, and its command does what it says when it is stopped."""

import math
import os
import signal
import subprocess
from pathlib import Path

import pytest
import yaml

ROOT = Path(__file__).resolve().parents[2]


@pytest.fixture(scope="module")
def job():
    text = (ROOT / "launch" / "gke_jobset.yaml").read_text()
    return yaml.safe_load(text)["spec"]["replicatedJobs"][0]["template"]["spec"]


def test_the_example_fits_its_slice(job):
    pod = job["template"]["spec"]
    chips = math.prod(map(int, pod["nodeSelector"]["cloud.google.com/gke-tpu-topology"].split("x")))
    container = pod["containers"][0]
    assert job["parallelism"] == job["completions"] == chips // container["resources"]["limits"]["google.com/tpu"]
    mounts = {mount["name"]: mount["mountPath"] for mount in container["volumeMounts"]}
    assert mounts == {"bucket": "/bucket"}
    assert [volume["name"] for volume in pod["volumes"]] == ["bucket"]


@pytest.mark.parametrize("finishes", [True, False])
def test_only_a_finished_run_is_done(job, tmp_path, finishes):
    """The command itself, with a `python` that ends as training does on SIGTERM: with 0."""
    bash, flag, script = job["template"]["spec"]["containers"][0]["command"]
    assert (ROOT / script.split("--config=")[1].split()[0]).is_file()
    (tmp_path / "runs" / "first").mkdir(parents=True)
    ending = f"touch {tmp_path}/runs/first/finished.json" if finishes else "true"
    python = tmp_path / "python"
    python.write_text(
        f"#!/bin/bash\ntrap '{ending}; echo saved; exit 0' TERM\necho ready\nwhile :; do sleep 0.05; done\n"
    )
    python.chmod(0o755)
    environ = os.environ | {"PATH": f"{tmp_path}:{os.environ['PATH']}"}
    script = script.replace("/bucket", str(tmp_path))
    run = subprocess.Popen([bash, flag, script], env=environ, stdout=subprocess.PIPE, text=True)
    assert run.stdout.readline() == "ready\n"
    run.send_signal(signal.SIGTERM)
    printed = run.communicate(timeout=30)[0]
    assert printed == "saved\n", "the signal has reached it, and its end was waited for"
    assert (run.returncode == 0) == finishes
