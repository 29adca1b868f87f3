"""The command itself, with the TPU compiler: what it finds, against sizes worked out by hand."""

import json
import re

import pytest

from rlver_jax import plan
from rlver_jax.perf.plan_remedies import candidates

GIB = 2**30
PARAMS = 1_543_714_304  # of Qwen2.5-1.5B, as published
SMALL = ["--config.policy.size=1.5b", "--config.user.size=1.5b", "--config.rollout.batch=8", "--config.mesh.tensor=2"]
# Texts so short that attention needs no chunks: each is compiled.
SHORT = ["--config.rollout.think_tokens=64", "--config.rollout.say_tokens=64", "--config.user.reply_tokens=64"]
DENSE = [f"--config.{name}.attention=dense" for name in ("policy", "user")]


@pytest.mark.tpu
def test_a_model_must_be_named(capsys):
    pytest.importorskip("libtpu", reason="needs the TPU compiler: pip install '.[tpu]'")
    assert plan.main(["--config=configs/base.py", "--topology=v5e:2x4"]) == 2
    assert "set --config.policy.size to a published size" in capsys.readouterr().err


@pytest.mark.tpu
def test_a_mesh_must_fit(capsys):
    pytest.importorskip("libtpu", reason="needs the TPU compiler: pip install '.[tpu]'")
    argv = ["--config=configs/rlver_plus.py:ppo,think", "--topology=v5e:2x4", "--config.mesh.tensor=3"]
    assert plan.main(argv) == 2
    assert "mesh.tensor=3: 8 devices cannot be divided by 3" in capsys.readouterr().err


@pytest.mark.tpu
@pytest.mark.parametrize(
    ("slices", "message"),
    [
        ("0", "--slices=0: expected 1 or more slices of v5e:2x4"),
        (
            "2",
            "mesh.replica=1: the devices are of 2 slices, and only replica may go across them; choose mesh.replica=2",
        ),
    ],
)
def test_slices_must_fit(slices, message, capsys):
    pytest.importorskip("libtpu", reason="needs the TPU compiler: pip install '.[tpu]'")
    argv = ["--config=configs/rlver_plus.py:ppo,think", "--topology=v5e:2x4", f"--slices={slices}"]
    assert plan.main(argv) == 2
    assert message in capsys.readouterr().err


@pytest.mark.long
def test_two_slices(tmp_path, capsys):
    """Tiny models on two slices: gradients cross the data center's network, each chip's part of them once an update."""
    pytest.importorskip("libtpu", reason="needs the TPU compiler: pip install '.[tpu]'")
    file = tmp_path / "plan.json"
    argv = ["--config=configs/debug.py", "--topology=v5e:2x2", "--slices=2", "--config.mesh.replica=2"]
    argv += ["--config.mesh.fsdp=4", "--config.loss.vocab_chunk=48", f"--json={file}"]
    assert plan.main(argv) == 0
    assert "2 slices of v5e:2x2" in capsys.readouterr().out
    result = json.loads(file.read_text(encoding="utf-8"))
    assert (result["slices"], result["chips"], result["mesh"]["replica"]) == (2, 8, 2)
    assert not result["warnings"], "every transfer is known"
    phases = {phase["name"]: phase for phase in result["phases"]}
    for phase in phases.values():
        received = sum(use["bytes"] for use in phase["dcn_per_chip"].values())
        assert phase["seconds"]["dcn"] == pytest.approx(received / 3.125e9)
        assert phase["seconds"]["roofline"] >= phase["seconds"]["dcn"]
    (program,) = (one for one in result["programs"] if one["name"] == "learn")
    parameters = program["hbm_gib"]["arguments"] * GIB / 3  # two moments are as large
    assert phases["policy update"]["dcn_per_chip"]["all-reduce"]["bytes"] > 0.5 * parameters
    assert phases["pack"]["dcn_per_chip"] == {}


def test_cheap_remedies_come_first():
    from configs import rlver_plus

    config = rlver_plus.get_config()
    config.critic.remat = "none"
    remedies = list(candidates(config, ["learn"]))
    assert remedies[0] == {"critic.remat": "full"}
    assert remedies[1] == {"train.microbatches": 2 * config.train.microbatches}
    base = {"policy.param_dtype": "bfloat16", "critic.param_dtype": "bfloat16"}
    assert remedies[-3] == {"lora.rank": 16, "lora.alpha": 32.0} | base, "before fewer dialogues"
    assert remedies[-1] == {"rollout.batch": config.rollout.batch // 4}
    config.lora.rank = 8
    assert not any("lora.rank" in step for step in candidates(config, ["learn"]))
    assert all("mesh_sampling.fsdp" not in step for step in remedies), "of no use to the update"


@pytest.mark.slow
def test_a_small_plan(tmp_path, capsys):
    """1.5B with GRPO on one v5e host: state and user over 8 chips, the sampler's copies of two models over 2."""
    pytest.importorskip("libtpu", reason="needs the TPU compiler: pip install '.[tpu]'")
    file = tmp_path / "plan.json"
    argv = ["--config=configs/rlver_plus.py:grpo,think", "--topology=v5e:2x4", f"--json={file}", *SMALL, *SHORT, *DENSE]
    assert plan.main(argv) == 0
    out, told = capsys.readouterr()
    assert re.search(r"^learn: \d+\.\d\d GiB a chip", told, re.MULTILINE), "what is known is said at once"
    assert "fits: " in out
    assert "prediction, not a measurement" in out
    result = json.loads(file.read_text(encoding="utf-8"))
    assert result["fits"]
    assert result["hbm_gib_per_chip"] < result["hbm_capacity_gib"] == 15.75
    programs = {program["name"]: program for program in result["programs"]}
    assert list(programs) == ["copy policy", "copy user", "play", "pack", "learn"]
    state, user, copy = 12 * PARAMS / 8 / GIB, 2 * PARAMS / 8 / GIB, 2 * PARAMS / 2 / GIB
    assert sum(programs["copy user"]["idle_gib"].values()) == pytest.approx(state + copy, rel=0.01)
    assert sum(programs["play"]["idle_gib"].values()) == pytest.approx(state + user, rel=0.01)
    assert programs["learn"]["hbm_gib"]["arguments"] == pytest.approx(state, rel=0.02)
    assert programs["learn"]["idle_gib"]["user"] == pytest.approx(user, rel=0.01)
    assert programs["play"]["hbm_gib"]["arguments"] == pytest.approx(2 * copy, rel=0.02)
    assert result["hbm_gib_per_chip"] == max(program["hbm_gib"]["total"] for program in result["programs"])
    phases = {phase["name"]: phase for phase in result["phases"]}
    steps = 8 * 128  # of the policy; each reads a half of the weights
    assert phases["policy turns"]["hbm_bytes_per_chip"] > steps * PARAMS
    gathered = phases["policy turns"]["collectives_per_chip"].get("all-gather", {"bytes": 0})["bytes"]
    assert gathered < 0.001 * PARAMS, "decoding gathers no weights"
    for name in ("copy policy", "copy user"):
        sent = phases[name]["collectives_per_chip"]["all-gather"]["bytes"]
        assert sent >= 0.7 * 2 * PARAMS / 2 * 3 / 4
    tokens = 8 * result["packed_length"]
    assert phases["policy update"]["useful_flops"] > 6 * (PARAMS - 151_936 * 1536) * tokens
    assert result["faults"] == result["warnings"] == []


@pytest.mark.long
def test_a_remedy_that_works(tmp_path, capsys):
    """Tiny models, so many dialogues that their activations exceed a chip: the plan says what to do, and it is so."""
    pytest.importorskip("libtpu", reason="needs the TPU compiler: pip install '.[tpu]'")
    file = tmp_path / "plan.json"
    argv = ["--config=configs/debug.py", "--topology=v5e:2x2", f"--json={file}", "--config.rollout.batch=32768"]
    assert plan.main(argv) == 1
    result = json.loads(file.read_text(encoding="utf-8"))
    assert not result["fits"]
    assert result["remedy"]
    assert "does not fit: " in capsys.readouterr().out
    flags = [f"--config.{name}={value}" for name, value in result["remedy"].items()]
    assert plan.main([*argv, *flags]) == 0
    assert json.loads(file.read_text(encoding="utf-8"))["fits"]
