"""A policy and a user on the device with two tokenizers: text passes between them, in training and evaluations."""

import json

import jax
import pytest

from configs import debug
from rlver_jax import verify
from rlver_jax.dialogues.device_agents import USER_SAY
from rlver_jax.evaluate import main as evaluate
from rlver_jax.text.tokenizer import load_tokenizer
from tests.training.test_loop import records_of, rows_of, run


@pytest.fixture(scope="module")
def worlds(bpe_folder, bpe, tmp_path_factory):
    """(folder of a model with Qwen's kind of tokenizer, one with SentencePiece)."""
    folder = tmp_path_factory.mktemp("bpe_world")
    for file in bpe_folder.iterdir():
        (folder / file.name).write_bytes(file.read_bytes())
    config = json.loads((debug.WORLD / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | {"vocab_size": bpe.vocab_size + 3}))
    return folder, debug.WORLD


def check_texts(records, policy, user) -> None:
    """Each side's tokens are its own, and each hears the other's text in them."""
    mine, theirs = load_tokenizer(policy), load_tokenizer(user)
    changes = []
    for record in records:
        assert "remote" not in record
        for message in record["messages"]:
            if message["role"] == "assistant":
                assert mine.decode(message["say_tokens"]) == message["content"]
                assert message.get(USER_SAY, theirs.encode(message["content"])) == theirs.encode(message["content"])
            else:
                assert theirs.decode(message["tokens"]) == (message["content"] or "")
                changes += [message["change"]] if "change" in message else []
    assert len(set(changes)) > 3


@pytest.mark.parametrize("swapped", [False, True])
def test_one_step_is_played_and_learned_from(worlds, tmp_path, swapped):
    policy, user = worlds[::-1] if swapped else worlds
    fields = {"policy.path": str(policy), "user.path": str(user), "train.steps": 1, "eval.every": 2}
    run(tmp_path / "run", **fields, **{"rollout.context": 1600, "checkpoint.every": 1})
    rows, records = rows_of(tmp_path / "run"), records_of(tmp_path / "run", 1)
    assert [row["step"] for row in rows] == [0, 1]
    assert "eval/score" in rows[0]
    assert rows[1]["policy/grad_norm"] > 0
    assert abs(rows[1]["policy/ratio_max_first"] - 1) < 1e-4, "what is learned from is what was sampled"
    assert len(records) == 8
    check_texts(records, policy, user)


def test_an_evaluation_with_two_tokenizers(worlds, tmp_path, capsys, monkeypatch):
    """On one device, with the programs of a training's evaluation: sharding has its own tests."""
    monkeypatch.setattr(jax, "device_count", lambda: 1)
    policy, user = worlds
    fields = {"policy.path": policy, "user.path": user, "mesh.fsdp": 1, "mesh.tensor": 1, "rollout.context": 1600}
    flags = [f"--config={debug.__file__}", *(f"--config.{name}={value}" for name, value in fields.items())]
    assert evaluate([*flags, f"--out={tmp_path / 'played'}"]) == 0
    log = tmp_path / "played" / "dialogues.jsonl"
    records = [json.loads(line) for line in log.read_text().splitlines()]
    assert len(records) == 8
    check_texts(records, policy, user)
    capsys.readouterr()
    assert verify.main([str(log), *flags]) == 2
    assert "another tokenizer than its policy" in " ".join(capsys.readouterr().err.split())
