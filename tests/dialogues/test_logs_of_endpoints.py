"""`verify` of evaluations with both sides behind a server: 0 faults on what was played, and forgeries are found."""

import copy
import json
import re

import pytest

from configs import debug
from rlver_jax import verify
from rlver_jax.dialogues.log import write_dialogues
from tests.endpoints.server import ChatServer, rule
from tests.evaluation.test_endpoint_play import arguments, evaluate, garbled

REMOTE = [
    f"--config.remote.{side}.{k}={v}"
    for side in ("policy", "user")
    for k, v in (("url", "http://x/v1"), ("model", "m"))
]


def manners(body):
    """Policies that break the format, say nothing, or think apart; users that cannot be read, or take leave."""
    system, first = (message["content"] for message in body["messages"][:2])
    if "Listen" not in system:
        reply = garbled(body)
        return re.sub(r"(\[reply\])", r"\1 goodbye,", reply) if "praise" in system else reply
    number = int(first[-1]) if first[-1].isdigit() else 0
    return {3: "b", 4: "", 5: {"content": "b", "reasoning_content": " a "}}.get(number, rule(body))


@pytest.fixture(scope="module")
def profiles(tmp_path_factory):
    """The flag of a file whose first words tell the profiles apart; the last has none."""
    lines = [json.loads(line) for line in (debug.WORLD / "profiles.jsonl").read_text().splitlines()]
    lines = [line | {"first_talk": f" I am no. {i} "} for i, line in enumerate(lines)]
    del lines[-1]["first_talk"]
    file = tmp_path_factory.mktemp("profiles") / "profiles.jsonl"
    file.write_text("".join(json.dumps(line) + "\n" for line in lines))
    return f"--config.data.eval={file}"


@pytest.fixture(scope="module")
def played(profiles, tmp_path_factory):
    """Dialogues with all that can go wrong at endpoints."""
    with ChatServer(manners) as server:
        return evaluate(tmp_path_factory.mktemp("played") / "out", profiles, policy=server.url, user=server.url)[0]


@pytest.fixture
def check(profiles, tmp_path, capsys):
    def run(records, *more):
        write_dialogues(tmp_path / "log.jsonl", records)
        flags = [word for word in arguments(tmp_path) if not word.startswith("--out")]
        status = verify.main([str(tmp_path / "log.jsonl"), *flags, *more, profiles])
        out, err = capsys.readouterr()
        return status, out + err

    return run


def test_honest_logs(played, check):
    ends = {record["end_reason"] for record in played}
    assert ends >= {"unreadable", "format", "goodbye", "turn_limit"}
    status, output = check(played, *REMOTE)
    assert status == 0, output
    turns = sum("change" in message for record in played for message in record["messages"])
    assert f"recomputed 8 dialogues, {turns} turns, 0 tokens: 0 ties, 0 faults" in output
    told = "what the policy said at its endpoint, what the user said and felt at its endpoint, counts of what endpoints"
    assert told in output


def test_a_plain_evaluation(profiles, tmp_path, check):
    with ChatServer() as server:
        records, _ = evaluate(tmp_path / "out", "--repeats=2", profiles, policy=server.url, user=server.url)
    status, output = check(records, *REMOTE)
    assert status == 0, output
    assert "recomputed 16 dialogues, 48 turns" in output
    status, output = check(records)
    assert status == 2
    assert "its user was behind an endpoint" in output


def appraised(records):
    return next(r for r in records if r["end_reason"] == "turn_limit")


def cut(records):
    record = appraised(records)
    del record["messages"][3:]
    record |= {"turns": 1, "emotions": record["emotions"][:2], "emotion": record["emotions"][1]}
    record["reward"] = record["emotion"] / 100


FORGED = {
    "cut": (cut, "end_reason is 'turn_limit', but it ended for context or unreadable"),
    "end": (lambda rs: appraised(rs).update(end_reason="success"), "end_reason is 'success'"),
    "change": (lambda rs: appraised(rs)["messages"][2].update(change=11), "expected 0 to 100 after -10 to +10"),
    "emotion": (lambda rs: appraised(rs)["messages"][2].update(emotion=99), "makes"),
    "reward": (lambda rs: appraised(rs).update(reward=0.99), "but its formula gives"),
    "violation": (lambda rs: appraised(rs)["messages"][1].update(violation=True), "but the policy said something"),
    "opening": (lambda rs: rs[0]["messages"][0].update(content="great"), "the first utterance is not the profile's"),
    "tokens": (lambda rs: appraised(rs)["messages"][1].update(tokens=[1]), "the policy is behind an endpoint"),
    "field": (lambda rs: appraised(rs)["messages"][2]["appraisal"].clear(), "appraisal has the fields []"),
    "lines": (lambda rs: appraised(rs)["messages"][2].update(content="a\nb"), "the text of 'reply' is not one line"),
    "spaces": (lambda rs: appraised(rs)["messages"][1].update(content=" b "), "white space around"),
    "thought": (lambda rs: appraised(rs)["messages"][1].update(thought=None), "no thought in think mode"),
    "remote": (lambda rs: rs[0].pop("remote"), "remote is missing"),
    "counts": (lambda rs: rs[0]["remote"]["user"].update(requests=-1), "remote.user has no whole numbers"),
    "dropped": (lambda rs: rs.pop(0), "dialogues 0 are missing"),
    "readout": (lambda rs: rs[0].update(readout="sample"), "readout is 'sample', but the config's is 'text'"),
}


@pytest.mark.parametrize("name", FORGED)
def test_forged_logs(played, check, name):
    records = copy.deepcopy(played)
    FORGED[name][0](records)
    assert json.dumps(records) != json.dumps(played)
    status, output = check(records, *REMOTE)
    assert status == 1, output
    assert FORGED[name][1] in output
    assert int(re.search(r"ties, (\d+) faults", output)[1]) > 0
