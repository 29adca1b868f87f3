"""Qwen3 in the whole program: trained for a step, all of its log recomputed; the user is of either family."""

import json

import pytest

from configs import debug
from rlver_jax import verify
from rlver_jax.models.architecture import Qwen2Config, Qwen3Config
from rlver_jax.profiles.schema import read_profiles
from rlver_jax.text.tokenizer import load_tokenizer
from tests.text.conftest import ADDED, THINK, write_bpe, write_qwen3
from tests.training.test_loop import SEED, records_of, rows_of, run

SIZES = {"num_layers": 2, "num_heads": 4, "num_kv_heads": 2, "head_dim": 16, "init_std": 0.2, "tie_embeddings": True}

pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    """Models by family: one tokenizer, each with the chat template of its family."""
    made = {}
    for family, config_class in (("qwen2", Qwen2Config), ("qwen3", Qwen3Config)):
        folder = tmp_path_factory.mktemp(family)
        write_qwen3(folder) if family == "qwen3" else write_bpe(folder, [*ADDED, *THINK])
        rows = -(-load_tokenizer(folder).vocab_size // 8) * 8
        config = config_class(rows, 32, 64, **SIZES)
        (folder / "config.json").write_text(json.dumps(config.to_hf("float32")), encoding="utf-8")
        made[family] = folder
    return made


@pytest.fixture(scope="module")
def silent(tmp_path_factory):
    """Two profiles, of which one leaves its first words to the user."""
    file = tmp_path_factory.mktemp("profiles") / "profiles.jsonl"
    lines = [json.loads(line) for line in (debug.WORLD / "profiles.jsonl").read_text("utf-8").splitlines()[:2]]
    del lines[0]["first_talk"]
    file.write_text("".join(json.dumps(line) + "\n" for line in lines), encoding="utf-8")
    assert [profile.first_talk is None for profile in read_profiles([file])] == [True, False]
    return file


CASES = {
    "think, user of Qwen2.5": {"user": "qwen2", "policy.attention": "chunked"},
    "direct, user of Qwen3": {"user": "qwen3", "policy.mode": "direct", "user.param_dtype": "int8"},
}


@pytest.mark.parametrize("case", CASES)
def test_one_step_is_learned_from_and_recomputed(case, folders, silent, tmp_path, capsys):
    fields = dict(CASES[case])
    user = fields.pop("user")
    paths = {"policy.path": folders["qwen3"], "user.path": folders[user]}
    fields |= {name: str(path) for name, path in paths.items()} | {"data.train": str(silent), "data.eval": str(silent)}
    fields |= {"policy.remat": "full", "policy.scan_layers": True, "rollout.context": 1024, "train.seed": SEED}
    fields |= {"rollout.batch": 4, "rollout.group": 2}
    run(tmp_path, **fields, **{"train.steps": 1, "eval.every": 0, "checkpoint.every": 1})
    row, records = rows_of(tmp_path)[-1], records_of(tmp_path, 1)
    assert row["policy/grad_norm"] > 0
    assert abs(row["policy/ratio_max_first"] - 1) < 1e-4, "what is learned from is what was sampled"
    assert {record["messages"][0]["generated"] for record in records} == {False, True}
    capsys.readouterr()
    flags = [f"--config={debug.__file__}", *(f"--config.{name}={value}" for name, value in fields.items())]
    log = tmp_path / "dialogues" / "step_000001.jsonl"
    assert verify.main([str(log), *flags, f"--policy={tmp_path}"]) == 0
    words = " ".join(capsys.readouterr().out.split())
    assert "recomputed 4 dialogues" in words
    assert " 0 faults" in words
    assert "not recomputed" not in words
