"""`evaluate` with endpoints: a real server on loopback, whole command lines, faults, kills, and the API key."""

import json
import os
import re
import subprocess
import sys
import time
from pathlib import Path

import pytest

from configs import debug
from rlver_jax.evaluate import main
from tests.endpoints.server import ChatServer, digest, one_in_five, rule

ROOT = Path(__file__).resolve().parents[2]
KEY = "sk-secret-0123456789"


def arguments(out, *more, **urls):
    remote = [
        f"--config.remote.{side}.{name}={x}" for side, url in urls.items() for name, x in (("url", url), ("model", "m"))
    ]
    fields = ["--config.eval.max_turns=3", "--config.remote.deadline=60", "--config.rollout.context=1600"]
    return [f"--config={debug.__file__}", f"--out={out}", *fields, *remote, *more]


def evaluate(out, *more, **urls):
    assert main(arguments(out, *more, **urls)) == 0
    return records(out), json.loads((out / "summary.json").read_text())


def records(out):
    return [json.loads(line) for line in (out / "dialogues.jsonl").read_text().splitlines()]


@pytest.fixture(scope="module")
def both(tmp_path_factory):
    """An evaluation with both sides at one server: (records, summary, what the server was asked)."""
    out = tmp_path_factory.mktemp("both")
    with ChatServer() as server:
        prices = ["--config.remote.user.price_in=2", "--config.remote.user.price_out=8"]
        return *evaluate(out, *prices, policy=server.url, user=server.url), server.bodies


def test_the_dialogues_are_what_the_server_said(both):
    """Every change is the one that it filled in, every emotion their sum, every history plain."""
    played, _, bodies = both
    assert [record["dialogue"] for record in played] == list(range(8))
    answers = {rule(body) for body in bodies}
    for record in played:
        emotion, heard = 40, []
        for message in record["messages"]:
            if message["role"] == "assistant":
                assert f"<think>\n{message['thought']}\n</think>\n\n{message['content']}" in answers
            elif "change" in message:
                assert any(
                    f"[change]  {message['change']:+d}" in a or f"[change] {message['change']:+d}" in a for a in answers
                )
                emotion = min(max(emotion + message["change"], 0), 100)
                assert message["appraisal"]["content"].startswith("words ")
            assert message.get("emotion", emotion) == emotion
            heard.append(message["content"])
        assert record["emotion"] == record["emotions"][-1] == emotion
        assert record["end_reason"] == "turn_limit"
        assert record["messages"][-1]["content"] is None, "no reply behind the last turn"
        assert record["readout"] == "text"
        asked = [
            b["messages"]
            for b in bodies
            if b["messages"][0]["content"].startswith("Listen") and b["messages"][1]["content"] == heard[0]
        ]
        assert any([m["content"] for m in messages[1:]] == heard[:5] for messages in asked), "no thoughts, no reasoning"


def test_appraisals_are_asked_for_coldly_and_never_enter_the_history(both):
    _, _, bodies = both
    users = [body for body in bodies if body["messages"][0]["content"].startswith("You are this person")]
    appraisals = [body for body in users if "[change]" in body["messages"][-1]["content"]]
    replies = [body for body in users if "[reply]" in body["messages"][-1]["content"]]
    assert len(appraisals) == 24
    assert len(replies) == 16
    assert {body["temperature"] for body in appraisals} == {0}
    assert {body["temperature"] for body in replies} == {1}
    for body in appraisals:
        roles = [message["role"] for message in body["messages"]]
        assert roles == ["system", *["user", "assistant"] * (len(roles) // 2 - 1), "user"]
        assert not any("[" in message["content"] for message in body["messages"][:-1])
    for body in replies:
        assert "[change]" in body["messages"][-2]["content"], "its own appraisal stands before the reply's form"
    assert len({body["seed"] for body in bodies}) == len(bodies)


def test_the_summary_counts_and_prices(both):
    played, summary, bodies = both
    users = [body for body in bodies if body["messages"][0]["content"].startswith("You are this person")]
    prompt_tokens = sum(len(message["content"].split()) for body in users for message in body["messages"])
    completion_tokens = sum(len(rule(body).split()) for body in users)
    assert summary["remote"]["user"] == {
        "requests": 40,
        "asked_again": 0,
        "prompt_tokens": prompt_tokens,
        "completion_tokens": completion_tokens,
        "cost": pytest.approx((2 * prompt_tokens + 8 * completion_tokens) / 1e6),
        "models": ["rule-1"],
    }
    assert summary["remote"]["policy"]["requests"] == 24
    assert summary["remote"]["policy"]["cost"] == 0
    assert summary["score"] == pytest.approx(sum(record["emotion"] for record in played) / 8)
    changes = [int(re.search(r"\[change\] +(\S+)", rule(body))[1]) for body in users if "[change]" in rule(body)]
    assert summary["acceptance"] == pytest.approx(sum(change > 0 for change in changes) / 24)
    settings = summary["settings"]
    assert settings["remote.user.model"] == "m"
    assert settings["user.field_tokens"] == 6
    for name in ("user.path", "policy.dtype", "fingerprint.user", "backend", "remote.concurrency"):
        assert name not in settings


def test_faults_change_no_dialogue(both, tmp_path, capsys):
    with ChatServer(fault=one_in_five(5)) as server:
        played, summary = evaluate(tmp_path, policy=server.url, user=server.url)
        assert server.count > 1.1 * len(server.bodies)
    assert played == both[0]
    assert {**summary["remote"]["user"], "cost": 0} == {**both[1]["remote"]["user"], "cost": 0}
    assert len(server.bodies) == len(both[2]), "nothing lost, nothing twice"


def process(out, **urls):
    env = os.environ | {"PYTHONPATH": str(ROOT), "XLA_FLAGS": "", "EVAL_KEY": KEY}
    command = [sys.executable, "-m", "rlver_jax.evaluate", *arguments(out, "--config.eval.batch=2", **urls)]
    command += [f"--config.remote.{side}.key_env=EVAL_KEY" for side in urls]
    return subprocess.Popen(command, env=env, cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)


@pytest.mark.slow
def test_killed_in_the_middle_and_taken_up_again(both, tmp_path):
    """With faults, and a server that repeats the API key in its errors: no file and no printed line holds it."""
    with ChatServer(fault=one_in_five(6)) as server:
        server.key, server.before = KEY, lambda: time.sleep(0.03)
        run = process(tmp_path, policy=server.url, user=server.url)
        log = tmp_path / "dialogues.jsonl"
        while run.poll() is None and (not log.exists() or log.read_bytes().count(b"\n") < 2):
            time.sleep(0.01)
        run.kill()
        printed = run.communicate()[0]
        done = [
            json.loads(line)["dialogue"] for line in log.read_text().splitlines(keepends=True) if line.endswith("\n")
        ]
        assert 2 <= len(done) < 8
        before = len(server.bodies)
        again = process(tmp_path, policy=server.url, user=server.url)
        printed += again.communicate(timeout=120)[0]
        assert again.returncode == 0, printed
        assert f"{len(done)} of 8 dialogues are in" in printed
    assert records(tmp_path) == both[0]
    bodies = [json.dumps(body) for body in server.bodies]
    twice = len(bodies) - len(set(bodies))
    assert set(bodies) == {json.dumps(body) for body in both[2]}
    assert twice <= 2, "at most what was on its way when the process was killed"
    assert len(bodies) - before < len(both[2]) - before + 3
    assert KEY not in printed
    assert all(KEY.encode() not in file.read_bytes() for file in tmp_path.rglob("*") if file.is_file())


def test_repeats(both, tmp_path, capsys):
    with ChatServer() as server:
        urls = {"policy": server.url, "user": server.url}
        assert evaluate(tmp_path, **urls)[0] == both[0]
        asked = len(server.bodies)
        played, summary = evaluate(tmp_path, "--repeats=3", **urls)
        assert "8 of 24 dialogues are in" in capsys.readouterr().out
        assert len(server.bodies) == 3 * asked, "the first repeat is not played again"
        assert main(arguments(tmp_path, **urls)) == 2
        assert "of more --repeats" in capsys.readouterr().err
    assert played[:8] == both[0]
    assert [record["profile"] for record in played] == [f"debug-{i % 8}" for i in range(24)]
    means = [sum(record["emotion"] for record in played[i : i + 8]) / 8 for i in (0, 8, 16)]
    mean = sum(means) / 3
    deviation = (sum((x - mean) ** 2 for x in means) / 2) ** 0.5
    assert deviation > 0
    repeats = summary["repeats"]
    assert repeats == {"count": 3, "scores": means, "mean": pytest.approx(mean), "std": pytest.approx(deviation)}
    low, high = summary["interval"]["score"]
    assert low < summary["score"] < high


def garbled(body):
    """No number for one person's appraisals, at first or ever; no reply for another's."""
    messages = body["messages"]
    who, last = messages[0]["content"], messages[-1]["content"]
    again = "by how many points" in last or "Never mind the form" in last
    if "advice" in who and ("[change]" in last or again):
        return "-2" if again else "[content] so it is\n[change] a bit less"
    if "every side" in who:
        return "[content] well\n[change] quite a lot" if "[change]" in last or again else rule(body)
    if "work out why" in who:
        return "[tone] flat" if "[reply]" in last or again else rule(body)
    return rule(body)


def test_answers_that_cannot_be_read(tmp_path, capsys):
    """Asked again with what they lack, three times at most; then the dialogue ends, and says why."""
    with ChatServer(garbled) as server:
        played, summary = evaluate(tmp_path, policy=server.url, user=server.url)
    corrected, never, silent = played[:3]
    assert corrected["end_reason"] == "turn_limit"
    assert corrected["remote"]["user"]["asked_again"] == 3
    assert corrected["emotions"] == [40, 38, 36, 34]
    assert corrected["messages"][2]["appraisal"] == {"content": "so it is", "target": ""}
    assert never["end_reason"] == "unreadable"
    assert never["remote"]["user"]["requests"] == 3
    assert (never["turns"], never["emotions"], never["reward"]) == (1, [40, 40], pytest.approx(0.4))
    assert never["messages"][-1]["role"] == "assistant"
    assert silent["end_reason"] == "unreadable"
    assert silent["turns"] == 1
    assert silent["messages"][-1]["content"] is None
    assert silent["emotion"] == 40 + silent["messages"][-1]["change"]
    assert summary["end_reasons"]["unreadable"] == 2
    third = [body for body in server.bodies if "every side" in body["messages"][0]["content"]][2]["messages"]
    unsaid = [body for body in server.bodies if "work out why" in body["messages"][0]["content"]][3]["messages"]
    assert [message["role"] for message in third[-5:]] == ["user", "assistant", "user", "assistant", "user"]
    assert "by how many points" in third[-1]["content"]
    assert not re.search(r"\d", third[-1]["content"]), "a weak model would answer with a number that it reads there"
    assert "just say what you would say" in unsaid[-1]["content"].lower()
    assert "I say aloud" not in unsaid[-1]["content"], "or with the heading"


def test_policies_of_all_manners(tmp_path):
    """Thoughts in tags or apart, none, nothing at all, and a context that is full."""
    manners = [
        lambda body: "<think>a</think>b",
        lambda body: {"content": "b", "reasoning_content": "a"},
        lambda body: "b",
        lambda body: "",
        lambda body: "a</think>\n\nb",
        lambda body: "<think>a</think>  ",
    ]

    def answer(body):
        if "Listen" not in body["messages"][0]["content"]:
            return rule(body)
        return manners[
            digest(body["messages"][1]["content"]) % 1 or int(re.search(r"no. (\d)", body["messages"][1]["content"])[1])
        ](body)

    profiles = [json.loads(line) for line in (debug.WORLD / "profiles.jsonl").read_text().splitlines()[:6]]
    file = tmp_path / "profiles.jsonl"
    file.write_text("".join(json.dumps(p | {"first_talk": f"I am no. {i}"}) + "\n" for i, p in enumerate(profiles)))
    with ChatServer(answer) as server:
        played, _ = evaluate(tmp_path / "out", f"--config.data.eval={file}", policy=server.url, user=server.url)
    ends = [record["end_reason"] for record in played]
    assert ends == ["turn_limit", "turn_limit", "format", "unreadable", "turn_limit", "format"]
    for record in (played[0], played[1], played[4]):
        assert (record["messages"][1]["thought"], record["messages"][1]["content"]) == ("a", "b")
    assert played[2]["violation"]
    assert played[2]["reward"] == 0
    assert played[3]["remote"]["policy"]["requests"] == 3
    assert played[3]["turns"] == 0


def test_first_words_of_a_profile_without_any(tmp_path):
    profile = json.loads((debug.WORLD / "profiles.jsonl").read_text().splitlines()[0])
    del profile["first_talk"]
    (tmp_path / "profiles.jsonl").write_text(json.dumps(profile) + "\n")
    with ChatServer() as server:
        played, summary = evaluate(
            tmp_path / "out", f"--config.data.eval={tmp_path / 'profiles.jsonl'}", policy=server.url, user=server.url
        )
    first = played[0]["messages"][0]
    assert first["generated"]
    assert first["content"] == rule(server.bodies[0])
    assert server.bodies[0]["messages"][-1]["content"] == "Begin."
    assert summary["interval"]["score"] is None


@pytest.mark.parametrize(
    ("fields", "says"),
    [
        (["--config.remote.user.url=ftp://x"], "remote.user.url='ftp://x': expected the base address"),
        (["--config.remote.user.url=http://me:pw@x/v1"], "remote.user.url: holds a user, a password or a query"),
        (["--config.remote.user.url=http://x/v1"], "remote.user.model is empty"),
        (["--config.remote.user.extra=[1]"], "expected a JSON object"),
        (["--config.remote.user.key_env=NO_SUCH_KEY"], "NO_SUCH_KEY': no such variable in the environment"),
        (["--config.remote.policy.url=http://x/v1", "--checkpoint=runs/first"], "both name the policy"),
        (["--config.remote.policy.url=http://x/v1", "--config.rollout.top_k=5"], "rollout.top_k: the protocol"),
        (["--config.remote.asks=0"], "remote.asks=0: expected at least 1"),
        (["--repeats=0"], "repeats"),
    ],
)
def test_bad_usage(tmp_path, capsys, fields, says):
    user = [] if any("user.url" in field for field in fields) else ["--config.remote.user.url=http://x/v1"]
    model = [] if "is empty" in says else ["--config.remote.user.model=m", "--config.remote.policy.model=m"]
    assert main([*arguments(tmp_path / "out"), *user, *model, *fields]) == 2
    error = capsys.readouterr().err
    assert says in error
    assert "pw" not in error
    assert not (tmp_path / "out" / "progress.json").exists()


def test_an_endpoint_that_refuses_or_is_gone(tmp_path, capsys):
    with ChatServer(fault=lambda n: "404 The model m does not exist") as server:
        assert main(arguments(tmp_path, policy=server.url, user=server.url)) == 2
        assert "The model m does not exist" in capsys.readouterr().err
    with ChatServer(fault=lambda n: "" if n < 52 else "500") as server:
        assert main(arguments(tmp_path, "--config.remote.deadline=4", policy=server.url, user=server.url)) == 1
        assert "the same command resumes" in capsys.readouterr().err
        server.fault = lambda n: ""
        evaluate(tmp_path, policy=server.url, user=server.url)
        bodies = [json.dumps(body) for body in server.bodies]
        assert len(bodies) == len(set(bodies)) == 64


def test_training_needs_its_policy(tmp_path, capsys):
    from rlver_jax.train import main as train

    remote = ["--config.remote.policy.url=http://x/v1", "--config.remote.policy.model=m"]
    assert train([f"--config={debug.__file__}", f"--workdir={tmp_path / 'run'}", *remote]) == 2
    assert "training needs the policy on the device" in capsys.readouterr().err
