"""A policy and a user on the device with two tokenizers: text passes between them, in training and evaluations."""

import functools
import json

import jax
import pytest

from configs import debug
from rlver_jax import verify
from rlver_jax.dialogues.device_agents import USER_SAY
from rlver_jax.evaluate import main as evaluate
from rlver_jax.text.tokenizer import load_tokenizer
from tests.training.test_loop import SEED, records_of, rows_of, run


def make_bpe_world(folder, bpe_folder, bpe) -> None:
    """A model like debug's with Qwen's kind of tokenizer."""
    for file in bpe_folder.iterdir():
        (folder / file.name).write_bytes(file.read_bytes())
    config = json.loads((debug.WORLD / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | {"vocab_size": bpe.vocab_size + 3}))


@pytest.fixture(scope="module")
def worlds(bpe_folder, bpe, tmp_path_factory):
    """(folder of a model with Qwen's kind of tokenizer, one with SentencePiece)."""
    folder = tmp_path_factory.mktemp("bpe_world")
    make_bpe_world(folder, bpe_folder, bpe)
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


pytestmark = pytest.mark.slow
SWAPPED = [False, True]  # whether the policy has SentencePiece


@pytest.fixture(scope="module")
def played(worlds, tmp_path_factory):
    """swapped -> (folder of a run of one step, flags of its config)."""

    @functools.cache
    def of(swapped):
        policy, user = worlds[::-1] if swapped else worlds
        fields = {"policy.path": str(policy), "user.path": str(user), "rollout.context": 1600, "train.seed": SEED}
        folder = tmp_path_factory.mktemp("run")
        run(folder, **fields, **{"train.steps": 1, "eval.every": 2, "checkpoint.every": 1})
        return folder, [f"--config={debug.__file__}", *(f"--config.{n}={value}" for n, value in fields.items())]

    return of


@pytest.mark.parametrize("swapped", SWAPPED)
def test_one_step_is_played_and_learned_from(worlds, played, swapped):
    (policy, user), (folder, _) = worlds[::-1] if swapped else worlds, played(swapped)
    rows, records = rows_of(folder), records_of(folder, 1)
    assert [row["step"] for row in rows] == [0, 1]
    assert "eval/score" in rows[0]
    assert rows[1]["policy/grad_norm"] > 0
    assert abs(rows[1]["policy/ratio_max_first"] - 1) < 1e-4, "what is learned from is what was sampled"
    assert len(records) == 8
    check_texts(records, policy, user)


def tokens_of(records) -> int:
    """Tokens that either side has generated, and the ends of first words that no log holds."""
    count = 0
    for record in records:
        first = record["messages"][0]
        count += (len(first["tokens"]) + 1) * first["generated"]
        for message in record["messages"][1:]:
            if message["role"] == "assistant":
                count += len(message["tokens"])
            else:
                lines = [*message["appraisal_tokens"].values(), *message["consideration_tokens"].values()]
                count += sum(map(len, [*lines, message["all_tokens"]]))
    return count


@pytest.mark.parametrize("swapped", SWAPPED)
def test_both_sides_of_a_log_are_recomputed(played, swapped, capsys):
    folder, flags = played(swapped)
    log = folder / "dialogues" / "step_000001.jsonl"
    capsys.readouterr()
    assert verify.main([str(log), *flags]) == 0
    words = " ".join(capsys.readouterr().out.split())
    assert words.endswith("nats; not recomputed: the policy's words and log-probs (--policy=…)")
    assert verify.main([str(log), *flags, f"--policy={folder}"]) == 0
    records = records_of(folder, 1)
    reactions = sum(len(record["messages"]) // 2 - record["violation"] for record in records)
    words = " ".join(capsys.readouterr().out.split())
    assert f"recomputed 8 dialogues, {reactions} turns, {tokens_of(records)} tokens: 0 ties, 0 faults" in words, words
    assert "not recomputed" not in words


def another(token: int) -> int:
    """A token with other text, of either vocabulary."""
    return token - 1 if token > 300 else token + 1


def edit_reward(record, policy, user) -> None:
    record["reward"] += 0.125


def edit_change(record, policy, user) -> None:
    """The last change and all that follows from it."""
    message = next(m for m in record["messages"][::-1] if "change" in m)
    step = 1 if message["change"] < 10 else -1
    message["change"] += step
    message["emotion"] += step
    record["emotion"] = record["emotions"][-1] = record["emotions"][-1] + step


def edit_heard(record, policy, user) -> None:
    """What the user is said to have read."""
    record["messages"][1][USER_SAY][0] = another(record["messages"][1][USER_SAY][0])


def edit_unheard(record, policy, user) -> None:
    del record["messages"][1][USER_SAY]


def edit_reply(record, policy, user) -> None:
    """A word of the policy, in all places."""
    message = record["messages"][1]
    index = len(message["say_tokens"]) - 1
    at = len(message["tokens"]) - message["stopped"] - 1
    message["tokens"][at] = message["say_tokens"][index] = another(message["say_tokens"][index])
    message["content"] = policy.decode(message["say_tokens"])
    message[USER_SAY] = user.encode(message["content"])


def edit_field(record, policy, user) -> None:
    """What the user felt, in tokens and text."""
    message = record["messages"][2]
    name = next(iter(message["appraisal_tokens"]))
    tokens = message["appraisal_tokens"][name]
    tokens[0] = another(tokens[0])
    message["appraisal"][name] = user.decode(tokens[: len(tokens) - message["appraisal_stopped"][name]])


def edit_end(record, policy, user) -> None:
    record["end_reason"] = "unreadable"


def edit_remote(record, policy, user) -> None:
    record["remote"] = {}


EDITS = {
    edit_change: "change: logged",
    edit_field: "not the user's own choice",
    edit_heard: "the say's tokens are not those of its text",
    edit_unheard: "say_tokens is null",
    edit_reply: "not the policy's own choice",
    edit_end: "end_reason is 'unreadable'",
    edit_remote: "remote is there",
    edit_reward: "its formula gives",
}


@pytest.mark.parametrize("swapped", SWAPPED)
def test_forged_logs(worlds, played, swapped, tmp_path, capsys, monkeypatch):
    """Each dialogue in another way."""
    (folder, flags), folders = played(swapped), worlds[::-1] if swapped else worlds
    tokenizers = list(map(load_tokenizer, folders))
    records = records_of(folder, 1)
    order = sorted(records, key=lambda record: len(record["messages"]) <= 2)  # edits of a reaction come first
    wanted = {}
    for record, edit in zip(order, EDITS, strict=True):
        edit(record, *tokenizers)
        wanted[record["dialogue"]] = EDITS[edit]
    log = tmp_path / "step_000001.jsonl"
    log.write_text("".join(json.dumps(record) + "\n" for record in records))
    monkeypatch.setattr(verify, "SHOWN", 10_000)
    capsys.readouterr()
    assert verify.main([str(log), *flags, f"--policy={folder}"]) == 1
    shown = capsys.readouterr().out
    lines = [line for line in shown.splitlines() if line.startswith("fault: ")]
    for dialogue, words in wanted.items():
        own = [
            line for line in lines if line.startswith(f"fault: dialogue {dialogue},") or f"dialogue {dialogue}:" in line
        ]
        assert any(words in line for line in own), (dialogue, words, own, shown)
        assert len(set(own)) == len(own)


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
    assert verify.main([str(log), *flags]) == 0
    assert "0 faults" in (words := " ".join(capsys.readouterr().out.split())), words
    assert verify.main([str(log), *flags, "--config.policy.path="]) == 2
    assert "set --config.policy.path to the folder of the policy's tokenizer" in " ".join(
        capsys.readouterr().err.split()
    )
