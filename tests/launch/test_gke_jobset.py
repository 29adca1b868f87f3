"""launch/gke_jobset.yaml: the numbers in it belong together, and its command is one that exists."""

import math
from pathlib import Path

import yaml

from rlver_jax import train

ROOT = Path(__file__).resolve().parents[2]


def test_the_example_fits_its_slice():
    text = (ROOT / "launch" / "gke_jobset.yaml").read_text()
    job = yaml.safe_load(text)["spec"]["replicatedJobs"][0]["template"]["spec"]
    pod = job["template"]["spec"]
    chips = math.prod(map(int, pod["nodeSelector"]["cloud.google.com/gke-tpu-topology"].split("x")))
    container = pod["containers"][0]
    assert job["parallelism"] == job["completions"] == chips // container["resources"]["limits"]["google.com/tpu"]
    assert container["command"][:3] == ["python", "-m", train.__name__]
    assert (ROOT / container["command"][3].removeprefix("--config=")).is_file()
    mounts = {mount["name"]: mount["mountPath"] for mount in container["volumeMounts"]}
    assert mounts == {"bucket": "/bucket"}
    assert [volume["name"] for volume in pod["volumes"]] == ["bucket"]
