"""Qwen3 in the whole program: trained for a step, all of its log recomputed; the user is of either family."""

import json

import pytest

from configs import debug
from rlver_jax import verify
from rlver_jax.models.families import Qwen2Config, Qwen3Config
from rlver_jax.profiles.schema import read_profiles
from rlver_jax.text.tokenizer import load_tokenizer
from tests.text.conftest import ADDED, THINK, write_bpe, write_qwen3
from tests.training.test_loop import SEED, records_of, rows_of, run

SIZES = {"num_layers": 1, "num_heads": 4, "num_kv_heads": 2, "head_dim": 16, "init_std": 0.2, "tie_embeddings": True}

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


def trained(folder, folders, profiles, **fields) -> list[str]:
    """A step of a Qwen3 policy, whose flags are returned: layers scanned and computed again, gradients not zero."""
    fields |= {"policy.path": str(folders["qwen3"]), "data.train": str(profiles), "data.eval": str(profiles)}
    fields |= {"policy.remat": "full", "policy.scan_layers": True, "user.scan_layers": True, "train.seed": SEED}
    fields |= {"rollout.batch": 4, "rollout.group": 2, "rollout.context": 1024}
    run(folder, **fields, **{"train.steps": 1, "eval.every": 0, "checkpoint.every": 1})
    row, records = rows_of(folder)[-1], records_of(folder, 1)
    assert row["policy/grad_norm"] > 0
    assert abs(row["policy/ratio_max_first"] - 1) < 1e-4, "what is learned from is what was sampled"
    assert {record["messages"][0]["generated"] for record in records} == {False, True}
    return [f"--config={debug.__file__}", *(f"--config.{name}={value}" for name, value in fields.items())]


def test_one_step_with_a_user_of_qwen25(folders, silent, tmp_path):
    """With thoughts. The two families share a tokenizer here, so tokens pass between them."""
    fields = {"user.path": str(folders["qwen2"]), "policy.attention": "chunked"}
    trained(tmp_path, folders, silent, **fields)
    replies = [message for record in records_of(tmp_path, 1) for message in record["messages"][1::2]]
    (close,) = load_tokenizer(folders["qwen3"]).encode("</think>")
    assert all(close in reply["tokens"] for reply in replies), "the tag that closes a thought at its limit is one token"


def test_every_word_of_direct_dialogues_is_recomputed(folders, silent, tmp_path, capsys):
    """Replies, appraisals and made-up first words follow an empty thought; the user is rounded to int8."""
    fields = {"user.path": str(folders["qwen3"]), "user.param_dtype": "int8", "policy.mode": "direct"}
    flags = trained(tmp_path, folders, silent, **fields)
    capsys.readouterr()
    assert verify.main([str(tmp_path / "dialogues" / "step_000001.jsonl"), *flags, f"--policy={tmp_path}"]) == 0
    words = " ".join(capsys.readouterr().out.split())
    assert "recomputed 4 dialogues" in words
    assert " 0 faults" in words
    assert "not recomputed" not in words
