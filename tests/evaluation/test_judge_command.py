"""The command lines with a model: on eight devices, over made-up results of SAGE."""

import json

import pytest
from scipy import stats

from rlver_jax.evaluate import main
from tests.dialogues.rlver_log import logged
from tests.evaluation.test_transcripts import write


@pytest.fixture(scope="module")
def file(results, tmp_path_factory):
    return write(tmp_path_factory.mktemp("sage") / "r.jsonl", results)


@pytest.mark.slow
def test_agreement_as_a_user_runs_it(file, results, tmp_path, capsys):
    args = [f"--agreement={file}", "--config=configs/debug.py", "--contexts=8", f"--out={tmp_path}"]
    assert main(args) == 0
    out = capsys.readouterr().out
    assert "user, argmax" in out
    assert "previous change" in out
    assert "bands with mean" in out
    result = json.loads((tmp_path / "agreement.json").read_text())["user"]
    lines = [json.loads(line) for line in (tmp_path / "agreement" / "user.jsonl").read_text().splitlines()]
    recorded, own = [], []
    for line in lines:
        history = next(r for r in results if r["id"] == line["profile"])["history"]
        recorded += [message["planning"]["change"] for message in history if "planning" in message]
        own += [max(range(21), key=one.__getitem__) - 10 for one in line["change_logprobs"]]
    assert result["n"] == len(recorded) == len(own) >= 8
    assert len(lines) < 4, "whole dialogues, as few as hold eight contexts"
    errors = [abs(a - b) for a, b in zip(own, recorded, strict=True)]
    assert result["argmax"]["mae"]["value"] == pytest.approx(sum(errors) / len(errors))
    if len(set(own)) > 1:
        assert result["argmax"]["spearman"]["value"] == pytest.approx(stats.spearmanr(own, recorded).statistic)
    before = [0, *recorded[:-1]]
    first = [i for i, line in enumerate(lines) for _ in line["changes"]]
    first = [i == 0 or first[i] != first[i - 1] for i in range(len(first))]
    persistent = [0 if new else change for new, change in zip(first, before, strict=True)]
    errors = [abs(a - b) for a, b in zip(persistent, recorded, strict=True)]
    assert result["without_the_reply"]["previous_change"]["mae"]["value"] == pytest.approx(sum(errors) / len(errors))
    assert result["argmax"]["first_replies"]["n"] == sum(first) == len(lines)
    assert result["settings"]["fingerprint.user"]
    before = (tmp_path / "agreement" / "user.jsonl").read_bytes()
    assert main(args) == 0, "nothing is left to do, and the figures are the same"
    assert (tmp_path / "agreement" / "user.jsonl").read_bytes() == before
    assert json.loads((tmp_path / "agreement.json").read_text())["user"] == result
    assert main([*args, "--config.user.style=challenging"]) == 2
    assert "user.style was 'vanilla', is 'challenging'" in capsys.readouterr().err


@pytest.mark.slow
def test_agreement_with_a_log_of_rlver(tmp_path, capsys):
    """Its emotions go below 0, its changes beyond ten; the user of a config is compared with it all the same."""
    file = write(
        tmp_path / "r.jsonl", [logged(("+5", 35, "嗯"), ("-40", -5, "嗯"), ("-3", -8, "嗯")), logged(("+7", 37, "嗯"))]
    )
    assert main([f"--agreement={file}", "--config=configs/debug.py", f"--out={tmp_path / 'out'}"]) == 0
    result = json.loads((tmp_path / "out" / "agreement.json").read_text())["user"]
    line = json.loads((tmp_path / "out" / "agreement" / "user.jsonl").read_text().splitlines()[0])
    own = [max(range(21), key=one.__getitem__) - 10 for one in line["change_logprobs"]]
    assert result["n"] == 4
    assert len(own) == 3
    assert result["argmax"]["mean_change"]["recorded"] == pytest.approx((5 - 40 - 3 + 7) / 4)
    bands = {band: sum(row.values()) for band, row in result["argmax"]["band_confusion"].items()}
    assert bands == {"S": 0, "A": 0, "B": 0, "C": 2, "F": 2}, "35, -5, -8 and 37"
    assert main([f"--from={file}", "--judge=configs/debug.py", f"--out={tmp_path / 'judged'}"]) == 0
    judges = json.loads((tmp_path / "judged" / "summary.json").read_text())["judges"]
    assert 0 <= next(iter(judges.values()))["score"] <= 100


def test_profiles_of_our_own_logs_are_asked_for(file, tmp_path, capsys):
    assert main([f"--from={file}", f"--out={tmp_path}"]) == 0
    ours = tmp_path / "dialogues.jsonl"
    assert main([f"--from={ours}", "--judge=configs/debug.py"]) == 2
    message = capsys.readouterr().err
    assert "dialogue 0: its profile 'p0' is not among the" in message
    assert "--config.data.eval=FILE" in message


@pytest.mark.parametrize("source", ["--from", "--agreement"])
def test_what_no_judge_can_read_is_named_before_models_are_loaded(results, tmp_path, capsys, source):
    torn = json.loads(json.dumps(results[:2]))
    torn[1]["history"][1]["content"] += "\ud83d"
    file = tmp_path / "r.jsonl"
    file.write_text("".join(json.dumps(one) + "\n" for one in torn))
    flags = {"--from": "--judge=configs/debug.py", "--agreement": "--config=configs/debug.py"}
    assert main([f"{source}={file}", flags[source]]) == 2
    message = capsys.readouterr().err
    assert "r.jsonl:2: messages[1] holds half of a surrogate pair (\\ud83d), which no judge can read" in message
    if source == "--from":
        assert main([f"--from={file}"]) == 0, "scores alone need no tokens"
