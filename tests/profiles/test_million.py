"""Memory of a large prepared data set, in processes of their own: python tests/profiles/test_million.py prints it."""

import json
import subprocess
import sys
import time
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
BATCHES, BATCH = 2000, 32
HWM = 'lambda: int(re.search(r"VmHWM:\\s+(\\d+)", open("/proc/self/status").read())[1]) / 1024'

PREPARE = f"""
import re, sys, json, time
from rlver_jax.profiles import builder
began = time.monotonic()
status = builder.main(["--profiles=" + sys.argv[1], "--data_dir=" + sys.argv[2]])
print(json.dumps({{"status": status, "hwm_mb": ({HWM})(), "seconds": time.monotonic() - began}}))
"""

WALK = f"""
import re, sys, json, time
from rlver_jax.config.fields import get_config
from rlver_jax.profiles.reader import ProfileReader, shared_personas
from rlver_jax.profiles.schema import Profile
from rlver_jax.profiles.sources import open_profiles
began = time.monotonic()
config = get_config()
config.data.train, config.data.dir, batches, batch = sys.argv[1], sys.argv[2], int(sys.argv[3]), int(sys.argv[4])
source = open_profiles(config, "data.train")
opened = time.monotonic() - began
reader = ProfileReader(source, seed=3, batch_size=batch)
reader.restore({{"epoch": 0, "position": len(source) // batch * batch - batch * (batches // 4)}})
seen = [[index for index, _ in reader.next_batch()] for _ in range(batches // 2)]  # across an epoch's end
state = reader.state()
resumed = ProfileReader(source, seed=3, batch_size=batch)
resumed.restore(state)
for _ in range(batches // 4):
    step = reader.next_batch()
    assert step == resumed.next_batch() and all(profile.id == f"id{{index}}" for index, profile in step)
assert source.with_id(f"id{{len(source) - 1}}") == source[-1] and source.with_id("nobody") is None
assert shared_personas(source, [source[7], Profile("x", "stranger", "s", "w", "c")]) == [source[7].persona]
modules = sorted({{"jax", "tensorflow"}} & set(sys.modules))
print(json.dumps({{"profiles": len(source), "opened": opened, "hwm_mb": ({HWM})(), "seconds": time.monotonic() - began,
                   "modules": modules}}))
"""

JSONL = f"""
import re, sys, json
from rlver_jax.profiles.reader import ProfileReader
from rlver_jax.profiles.schema import read_profiles
reader = ProfileReader(read_profiles(sys.argv[1]), seed=3, batch_size=32)
for _ in range(1000):
    reader.next_batch()
print(json.dumps({{"hwm_mb": ({HWM})()}}))
"""


def measure(folder: Path, count: int) -> dict:
    """Prepares `count` profiles and walks through them; {"prepare": …, "walk": …}, VmHWM in MiB."""
    file = folder / "profiles.jsonl"
    with file.open("w", encoding="utf-8") as stream:
        for number in range(count):
            persona = f"Person {number}. " + "quiet, tired " * 20
            scene, intention = f"It rained on day {number}. " + "And on. " * 40, "You want to be heard"
            row = {"id": f"id{number}", "player": persona, "scene": scene, "main_cha": "calm", "cha_group": ["a", "b"]}
            stream.write(json.dumps(row | {"task": intention, "first_talk": f"Hello {number}"}) + "\n")
    prepared = run(PREPARE, file, folder / "sets") | {"jsonl_mb": file.stat().st_size / 2**20}
    walked = run(WALK, "tfds:rlver_profiles:1.0.0?split=train", folder / "sets", BATCHES, BATCH)
    return {"prepare": prepared, "walk": walked}


def run(code: str, *arguments: object) -> dict:
    command = [sys.executable, "-c", code, *map(str, arguments)]
    done = subprocess.run(command, cwd=ROOT, env=None, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout.splitlines()[-1])


@pytest.mark.slow
def test_a_large_set_is_not_read_into_memory(tmp_path):
    results = measure(tmp_path, 20_000)
    assert results["prepare"]["status"] == 0
    assert results["walk"]["profiles"] == 20_000
    assert results["walk"]["modules"] == []
    assert results["walk"]["hwm_mb"] <= 200


@pytest.mark.long
def test_a_million_profiles_take_200_mb_at_most(tmp_path):
    results = measure(tmp_path, 1_000_000)
    print(results)
    assert results["walk"]["profiles"] == 1_000_000
    assert results["walk"]["hwm_mb"] <= 200


if __name__ == "__main__":
    import tempfile

    with tempfile.TemporaryDirectory() as name:
        began, count = time.monotonic(), int((sys.argv[1:] or ["1000000"])[0])
        for what, results in measure(Path(name), count).items():
            print(what, json.dumps(results))
        few = Path(name) / "few.jsonl"
        with (Path(name) / "profiles.jsonl").open(encoding="utf-8") as lines, few.open("w", encoding="utf-8") as out:
            out.writelines(line for line, _ in zip(lines, range(100_000), strict=False))
        print("jsonl of 100,000", json.dumps(run(JSONL, few)))
        print(f"{time.monotonic() - began:.0f} s in all")
