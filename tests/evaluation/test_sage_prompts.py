"""`evaluate --sage=CLONE`: whole command lines against a server on loopback; the clone is made up."""

import json

import pytest

from configs import debug
from rlver_jax import verify
from rlver_jax.dialogues.sage import from_sage, to_sage
from rlver_jax.evaluate import main
from rlver_jax.profiles.schema import Profile
from tests.endpoints.server import ChatServer, digest
from tests.evaluation.test_endpoint_play import arguments, records
from tests.user.made_up_clone import SIMULATOR, write_clone

DIRECT = "--config.policy.mode=direct"  # nothing in SAGE's sentence asks for a thought
SENTENCE = "Chat so that they feel good. {{ braces }} stay."


def answer(body):
    """A policy that says something; a user that fills in SAGE's fields, a fifth of its appraisals too badly."""
    (first, *others), number = body["messages"], digest(body["messages"], body["seed"])
    if first["role"] == "system":
        return f"I hear you, {number % 1000}."
    assert not others, "one message holds everything"
    if first["content"].startswith("Judge"):
        change = "up" if number % 5 == 0 else f"{number % 31 - 15:+d}"
        return f"Content:\nc{number % 9}\nTargetCompletion:\nt\nActivity:\na\nb\nAnalyse:\nwarm\nChange:\n{change}"
    return f"Thinking:\nshort\nOrigin:\nx\nChange:\ny\nResponse:\n[so {number % 1000}]"


@pytest.fixture(scope="module")
def played(tmp_path_factory):
    """(clone, records, requests) of an evaluation with both sides at one server."""
    folder = tmp_path_factory.mktemp("sage")
    clone = write_clone(folder / "clone")
    with ChatServer(answer) as server:
        urls = {"policy": server.url, "user": server.url}
        assert main([*arguments(folder / "out", f"--sage={clone}", DIRECT, **urls)]) == 0
        return clone, records(folder / "out"), server.bodies, server.url


def test_the_requests_are_sages(played):
    _, records, bodies, _ = played
    policy = [body for body in bodies if body["messages"][0]["role"] == "system"]
    appraisals = [body for body in bodies if body["messages"][0]["content"].startswith("Judge")]
    replies = [body for body in bodies if body["messages"][0]["content"].startswith("Say")]
    assert len(policy) == 24
    assert {body["messages"][0]["content"] for body in policy} == {SENTENCE}
    assert {body["temperature"] for body in appraisals + replies} == {1.0}
    assert len(bodies) == len(policy) + len(appraisals) + len(replies)
    record = records[0]
    first, reply, _, second = record["messages"][:4]
    history = [{"role": "ME", "content": first["content"]}, {"role": "THEM", "content": reply["content"]}]
    shown = json.dumps(history, ensure_ascii=False, indent=2)
    asked = [b["messages"][0]["content"] for b in appraisals if f"so far\n{shown}\n" in b["messages"][0]["content"]]
    assert asked
    assert "**mood 40\n" in asked[0]
    assert any(second["content"] in b["messages"][0]["content"] for b in appraisals)


def test_the_answers_are_read_as_sage_does(played):
    _, records, bodies, _ = played
    asked_again = sum(record["remote"]["user"]["asked_again"] for record in records)
    texts = [answer(body) for body in bodies if body["messages"][0]["content"].startswith("Judge")]
    assert asked_again == sum(text.endswith("up") for text in texts) > 0
    for record in records:
        emotion = 40
        for message in record["messages"]:
            if "change" in message:
                assert set(message["appraisal"]) == {"content", "target", "activity", "feeling"}
                assert (message["appraisal"]["activity"], message["appraisal"]["feeling"]) == ("a\nb", "warm")
                assert -10 <= message["change"] <= 10
                emotion = max(0, min(100, emotion + message["change"]))
                assert message["emotion"] == emotion
                assert message["content"] is None or message["content"].startswith("so ")
        profiles = [json.loads(line) for line in (debug.WORLD / "profiles.jsonl").read_text().splitlines()]
        profile = Profile.from_json(profiles[record["dialogue"]])
        sage = to_sage(record, profile)
        assert sage["history"][2]["planning"].keys() == {"activity", "TargetCompletion", "content", "analyse", "change"}
        assert from_sage(sage)["emotions"] == record["emotions"]


def test_such_a_log_is_verified_and_resumed_with_the_same_prompts_alone(played, tmp_path, capsys):
    clone, records, _, url = played
    log = tmp_path / "log.jsonl"
    log.write_text("".join(json.dumps(record) + "\n" for record in records))
    flags = [one for one in arguments(tmp_path, policy=url, user=url) if not one.startswith("--out")]
    assert verify.main([str(log), *flags, f"--config.user.prompts={clone}", DIRECT]) == 0, capsys.readouterr()
    other = write_clone(tmp_path / "other", SIMULATOR.replace("Judge the latest", "Judge the last"))
    out = clone.parent / "out"
    assert main([*arguments(out, f"--sage={other}", DIRECT, policy=url, user=url)]) == 2
    assert "fingerprint.texts was" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("flags", "says"),
    [
        ([], "guided scripts on the device can't be that user: set remote.user.url"),
        (["--config.user.style=challenging"], "which has vanilla alone"),
    ],
)
def test_a_user_on_the_device_is_refused(tmp_path, capsys, flags, says):
    clone = write_clone(tmp_path / "clone")
    assert main([*arguments(tmp_path / "out"), f"--sage={clone}", *flags]) == 2
    assert says in capsys.readouterr().err
    assert not (tmp_path / "out" / "progress.json").exists()


def test_what_is_no_clone_is_said(tmp_path, capsys):
    assert main([*arguments(tmp_path / "out"), f"--sage={tmp_path}"]) == 2
    assert "holds no SAGE/simulator_response.py; expected a clone" in capsys.readouterr().err
    clone = write_clone(tmp_path / "clone")
    assert main([f"--from={tmp_path / 'x'}", f"--sage={clone}"]) == 2
    assert "no user here has prompts; give --judge" in capsys.readouterr().err
