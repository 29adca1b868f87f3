"""One side on the device, the other at a real server: compared with plain forward passes, `verify`, and the sampler."""

import json
from pathlib import Path

import jax
import numpy as np
import pytest

from rlver_jax import verify
from rlver_jax.evaluate import main
from rlver_jax.models.hf_weights import save_params
from rlver_jax.text.chat import ChatTemplate
from tests.conftest import SHORT_PROMPTS, plain
from tests.endpoints.server import ChatServer, rule
from tests.test_evaluate import CONFIG


@pytest.fixture(autouse=True)
def one_device(monkeypatch):
    """Without a mesh: programs for eight devices take long to compile, and sharding has its own tests."""
    monkeypatch.setattr(jax, "device_count", lambda: 1)


@pytest.fixture(scope="module")
def world(policy_lm, user_lm, bpe_folder, prompts, tmp_path_factory):
    """Flags for two tiny trained models, a greedy policy without thoughts, and three profiles."""
    folder = tmp_path_factory.mktemp("world")
    for name, lm in (("policy", policy_lm), ("user", user_lm)):
        save_params(folder / name, lm.params, lm.model.config, tokenizer_from=bpe_folder)
    profile = {"player": "calm", "scene": "said goodbye", "main_cha": "calm", "cha_group": [], "task": "advice"}
    talks = ["my boss did not listen.", "I felt awful", None]
    lines = [profile | {"id": f"p{i}"} | ({"first_talk": talk} if talk else {}) for i, talk in enumerate(talks)]
    (folder / "profiles.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    (folder / "config.py").write_text(CONFIG)
    fields = {
        "data.eval": folder / "profiles.jsonl",
        "user.prompts": Path(prompts.origins["reply.script"]).parent,
        "eval.temperature": 0.0,
        "eval.batch": 3,
        "eval.max_turns": 3,
        "emotion.floor": -1,
        "emotion.ceiling": 100,
        "mesh.fsdp": 1,
        "mesh.tensor": 1,
        "policy.path": folder / "policy",
        "user.path": folder / "user",
    }
    return folder, [f"--config={folder / 'config.py'}", *(f"--config.{k}={v}" for k, v in fields.items())]


def evaluate(world, out, **urls):
    remote = [f"--config.remote.{s}.{k}={v}" for s, url in urls.items() for k, v in (("url", url), ("model", "m"))]
    assert main([*world[1], *remote, f"--out={world[0] / out}"]) == 0
    return [json.loads(line) for line in (world[0] / out / "dialogues.jsonl").read_text().splitlines()]


def test_a_policy_on_the_device_hears_a_user_at_an_endpoint(world, policy_lm, bpe, capsys):
    """Its log-probabilities are those of plain forward passes over the conversation; `verify` holds what it can."""
    with ChatServer() as server:
        played = evaluate(world, "policy_here", user=server.url)
    assert [record["end_reason"] for record in played] == ["turn_limit"] * 3
    rows, claims = [], []
    for record in played:
        messages = [{"role": "system", "content": SHORT_PROMPTS["policy_direct.j2"]}]
        for message in record["messages"]:
            if message["role"] == "assistant":
                context = ChatTemplate(bpe).conversation(messages, generation_prompt=True)
                tokens = message["tokens"]
                rows.append(context + tokens)
                claims.append((len(context), tokens, message["raw_logprobs"]))
                assert bpe.encode(message["content"]) == message["say_tokens"], "says of this model encode back"
            messages.append({"role": message["role"], "content": message["content"]})
        assert record["messages"][2]["tokens"] is None
    assert len(rows) == 9
    _, logp = plain(policy_lm, rows)
    for (start, tokens, logged), scores in zip(claims, logp, strict=True):
        own = [scores[start - 1 + i, token] for i, token in enumerate(tokens)]
        np.testing.assert_allclose(logged, own, atol=2e-4)
        allowed = [
            t for t in range(bpe.vocab_size) if t not in bpe.special_ids.values() or t in (bpe.im_end_id, bpe.pad_id)
        ]
        assert all(token == allowed[int(np.argmax(scores[start - 1 + i, allowed]))] for i, token in enumerate(tokens))
    assert all(
        "words" in m["content"]
        for r in played
        for m in r["messages"]
        if m["role"] == "user" and "change" in m and m["content"]
    )
    capsys.readouterr()
    assert verify.main([str(world[0] / "policy_here" / "dialogues.jsonl"), *world[1]]) == 2
    assert "its user was behind an endpoint" in capsys.readouterr().err
    remote = ["--config.remote.user.url=http://127.0.0.1:1/v1", "--config.remote.user.model=m"]
    assert verify.main([str(world[0] / "policy_here" / "dialogues.jsonl"), *world[1], *remote]) == 0
    output = capsys.readouterr().out
    assert "recomputed 3 dialogues, 9 turns, 0 tokens: 0 ties, 0 faults" in output
    assert (
        "not recomputed: the policy's words and log-probs (--policy=…), what the user said and felt at its end"
        in output
    )
    policy = f"--policy={world[0] / 'policy'}"
    assert verify.main([str(world[0] / "policy_here" / "dialogues.jsonl"), *world[1], *remote, policy]) == 0
    output = capsys.readouterr().out
    generated = sum(len(m["tokens"]) for record in played for m in record["messages"][1::2])
    assert f"recomputed 3 dialogues, 9 turns, {generated} tokens: 0 ties, 0 faults" in output
    assert "not recomputed: what the user said and felt at its endpoint" in output


@pytest.mark.slow
def test_a_user_on_the_device_hears_a_policy_at_an_endpoint(world, capsys):
    """`verify` recomputes every appraisal, change and reply from one forward pass."""
    with ChatServer() as server:
        played = evaluate(world, "user_here", policy=server.url)
    assert {record["readout"] for record in played} == {"argmax"}
    for record in played:
        spoken = [m for m in record["messages"] if m["role"] == "assistant"]
        assert spoken
        assert all(m["content"].startswith("I hear you, ") and m["tokens"] is None for m in spoken)
    capsys.readouterr()
    log = str(world[0] / "user_here" / "dialogues.jsonl")
    assert verify.main([log, *world[1]]) == 0
    output = capsys.readouterr().out
    assert "0 faults" in output
    assert "not recomputed: what the policy said at its endpoint" in output
    remote = [f"--config.remote.{s}.{k}=http://x/v1" for s in ("user", "policy") for k in ("url", "model")]
    assert verify.main([log, *world[1], *remote[2:]]) == 0
    assert verify.main([log, *world[1], *remote[:2]]) == 2, "its user was on the device"
    assert "with a user on the device (readout 'argmax')" in capsys.readouterr().err
    assert verify.main([log, *world[1], f"--policy={world[0] / 'policy'}"]) == 2
    assert "was behind an endpoint, so nothing of it can be recomputed; leave out" in capsys.readouterr().err
    # A change of one heard token makes every appraisal after it another's.
    played[0]["messages"][1]["say_tokens"][0] += 1
    (world[0] / "forged.jsonl").write_text("".join(json.dumps(record) + "\n" for record in played))
    assert verify.main([str(world[0] / "forged.jsonl"), *world[1]]) == 1


@pytest.mark.slow
def test_the_same_policy_here_and_behind_a_server(world, policy_lm, bpe):
    """A server that decodes the policy's own weights greedily, by plain passes: the dialogues of the sampler."""
    chat = ChatTemplate(bpe)
    banned = np.ones(policy_lm.model.config.vocab_size, bool)
    banned[: bpe.vocab_size] = False
    banned[[i for i in bpe.special_ids.values() if i not in (bpe.im_end_id, bpe.pad_id)]] = True

    def answer(body):
        assert body["temperature"] == 0
        tokens = chat.conversation(body["messages"], generation_prompt=True)
        start = len(tokens)
        while len(tokens) < start + body["max_tokens"]:
            scores = np.where(banned, -np.inf, plain(policy_lm, [tokens], batch=1)[1][0][-1])
            token = int(np.argmax(scores))
            if token in (bpe.im_end_id, bpe.pad_id):
                break
            tokens.append(token)
        return bpe.decode(tokens[start:])

    here = evaluate(world, "both_here")
    with ChatServer(answer) as server:
        there = evaluate(world, "policy_there", policy=server.url)
    for ours, theirs in zip(here, there, strict=True):
        for name in ("emotions", "end_reason", "turns", "reward"):
            assert ours[name] == theirs[name]
        for one, other in zip(ours["messages"], theirs["messages"], strict=True):
            for name in ("content", "change", "appraisal", "considerations", "emotion"):
                assert one.get(name) == other.get(name)
            if one["role"] == "user" and "change" in one:
                np.testing.assert_allclose(one["change_logprobs"], other["change_logprobs"], atol=2e-4)


@pytest.mark.slow
def test_a_dialogue_that_fills_the_context_ends(world):
    with ChatServer(
        lambda body: "felt awful " * 150 if "Say." in body["messages"][0]["content"] else rule(body)
    ) as server:
        played = evaluate((world[0], [*world[1], "--config.rollout.context=1000"]), "full", policy=server.url)
    assert {record["end_reason"] for record in played} == {"context"}
    for record in played:
        assert len(record["emotions"]) == record["turns"] + 1
