"""Finished dialogues of either schema: scores as published, and an arithmetic that is really checked."""

import copy
import json

import pytest

from rlver_jax.dialogues.log import write_dialogues
from rlver_jax.evaluate import main
from rlver_jax.evaluation.transcripts import TranscriptFiles, faults, read_finished, turns_of
from rlver_jax.report import main as report
from tests.dialogues.rlver_log import logged

# SAGE's published table: score, successes, failures.
PUBLISHED = {"gpt-4.1": (68.2, 35, 13), "llama3.3-70b": (33.3, 7, 47), "qwen2.5-72b": (19.1, 4, 70)}


def write(path, objects):
    path.write_text("".join(json.dumps(o, ensure_ascii=False) + "\n" for o in objects), encoding="utf-8")
    return path


@pytest.mark.parametrize("name", PUBLISHED)
def test_published_scores(name, published, tmp_path, capsys):
    file = published.parent / "sage" / f"{name}_result.jsonl"
    if not file.exists():
        pytest.skip(f"no {file}")
    assert main([f"--from={file}", f"--out={tmp_path}"]) == 0
    summary = json.loads((tmp_path / "summary.json").read_text())
    score, success, failure = PUBLISHED[name]
    assert summary["score"] == pytest.approx(score, abs=0.1)
    assert (summary["success"], summary["failure"], summary["n"], summary["faults"]) == (success, failure, 100, 0)
    assert f"score {summary['score']:.2f} of 100" in capsys.readouterr().out.splitlines()[-1]
    low, high = summary["score_interval"]
    half = 1.96 * summary["score_std"] / 10  # a mean of 100
    assert summary["score"] - low == pytest.approx(half, rel=0.15)
    assert high - summary["score"] == pytest.approx(half, rel=0.15)
    again = read_finished(tmp_path / "dialogues.jsonl")
    assert [d.record["emotion"] for d in again] == [d.record["emotion"] for d in read_finished(file)]


def test_turns_are_those_that_were_appraised(results, tmp_path):
    first, second, *_ = read_finished(write(tmp_path / "r.jsonl", results))
    turns = turns_of(first.record)
    assert [(t.turn, t.emotion, t.change) for t in turns] == [(0, 40, 5), (1, 45, -3), (2, 42, 0)]
    assert [t.heard["content"] for t in turns] == ["my boss did not listen.", "and she", "I"]
    assert [t.reply["content"] for t in turns] == ["my sister felt awful", "I felt awful", "said goodbye"]
    assert first.record["turns"] == 4
    assert second.record["emotion"] == 100
    assert faults([first, second]) == []


def broken(results, change):
    results = copy.deepcopy(results)
    change(results[0])
    return results


@pytest.mark.parametrize(
    ("change", "says"),
    [
        (lambda r: r["history"][4].update({"emotion-point": 43}), "turn 2: emotion 43, but 45 -3 makes 42"),
        (lambda r: r["history"][2]["planning"].update(change=6), "turn 1: emotion 45, but 40 +6 makes 46"),
        (lambda r: r["history"][2]["planning"].update(change=11), "turn 1: change +11, expected -10 to +10"),
        (lambda r: r.update(emo_point=50), "[40, 45, 42, 42, 50] are not those after each turn"),
    ],
)
def test_an_emotion_that_is_not_the_sum_is_found(results, change, says, tmp_path, capsys):
    file = write(tmp_path / "r.jsonl", broken(results, change))
    assert main([f"--from={file}"]) == 1
    out = capsys.readouterr().out
    assert f"{file}:1: {says}" in out.replace("\n", "") or says in out
    assert "14 changes checked" in out


def test_our_own_logs_are_read_too(results, tmp_path):
    """A format violation leaves a last reply without appraisal; a missing reaction does not pass for one."""
    record = read_finished(write(tmp_path / "r.jsonl", results))[3].record
    record |= {"seed": 0}
    ours = tmp_path / "ours.jsonl"
    write_dialogues(ours, [record])
    assert faults(read_finished(ours)) == []
    message = {**record["messages"][1], "violation": True}
    broke = record | {
        "violation": True,
        "turns": 2,
        "emotions": [40, 44, 44],
        "messages": [*record["messages"], message],
    }
    write_dialogues(ours, [broke])
    assert faults(read_finished(ours)) == []
    write_dialogues(ours, [broke | {"violation": False}])
    assert "are not those after each turn" in faults(read_finished(ours))[0]


def test_several_files_are_numbered_over_all(results, tmp_path, capsys):
    a, b = write(tmp_path / "a.jsonl", results[:2]), write(tmp_path / "b.jsonl", results[2:])
    files = TranscriptFiles([str(a), str(b)])
    seen = list(files.scan())
    assert [(path, d.record["dialogue"]) for path, d in seen] == [(str(f), i) for i, f in enumerate((a, a, b, b))]
    assert list(files) == [d for _, d in seen], "read again, one by one"
    assert files[-1] == files[3] == seen[3][1]
    assert main([f"--from={a},{b}", f"--out={tmp_path / 'out'}"]) == 0
    summary = json.loads((tmp_path / "out" / "summary.json").read_text())
    assert [summary["files"][str(f)]["score"] for f in (a, b)] == [(42 + 100) / 2, (5 + 44) / 2]
    assert summary["score"] == (42 + 100 + 5 + 44) / 4
    assert (summary["success"], summary["failure"]) == (1, 1)


@pytest.mark.parametrize(
    ("text", "says"),
    [
        ("", "is empty"),
        ('{"history": 3}', "r.jsonl:1: not a result of SAGE"),
        ('{"history": []', "r.jsonl:1:"),
        ('{"a": 1}', "no field dialogue"),
        ("no json", "not a JSON object"),
    ],
)
def test_other_files_are_refused(text, says, tmp_path, capsys):
    (tmp_path / "r.jsonl").write_text(text)
    assert main([f"--from={tmp_path / 'r.jsonl'}"]) == 2
    assert says in capsys.readouterr().err


@pytest.mark.parametrize(
    ("args", "says"),
    [
        (["--from=nowhere.jsonl"], "nowhere.jsonl"),
        (["--from="], "one of them"),
        (["--from=FILE", "--agreement=FILE"], "found --from and --agreement together"),
        (["--from=FILE,FILE"], "found a file twice"),
        (["--from=FILE", "extra"], "found 'extra'"),
        (["--from=FILE", "--judge=nowhere.py"], "nowhere.py"),
        (["--from=FILE", "--judge=FOLDER"], "a model's folder needs settings"),
        (["--from=FILE", "--judge=configs/base.py"], "judge configs/base.py: user.path is empty"),
        (["--from=FILE", "--measures=configs/base.py"], "user.path is empty"),
        (["--from=FILE", "--judge=configs/debug.py,configs/debug.py"], "two judges are called 'debug'"),
        (["--from=FILE", "--judge=configs/debug.py:ppo,direct,configs/debug.py:ppo,direct"], "'debug_ppo_direct'"),
        (["--agreement=FILE", "--judge=configs/debug.py"], "give --config=FILE too"),
        (["--agreement=FILE", "--contexts=15"], "hold 14 appraised replies"),
        (["--agreement=FILE", "--config=configs/debug.py", "--contexts=15"], "hold 14 appraised replies"),
        (["--agreement=FILE", "--config=configs/debug.py", "--contexts=-1"], "contexts"),
        (["--agreement=FILE", "--config=configs/debug.py", "--config.user.readout=mode"], "expected one of argmax"),
    ],
)
def test_bad_usage(args, says, results, tmp_path, capsys):
    file = write(tmp_path / "r.jsonl", results)
    args = [a.replace("FILE", str(file)).replace("FOLDER", str(tmp_path)) for a in args]
    assert main(args) == 2
    assert says in capsys.readouterr().err


def test_an_evaluation_is_not_overwritten(results, tmp_path, capsys):
    (tmp_path / "progress.json").write_text("{}")
    assert main([f"--from={write(tmp_path / 'r.jsonl', results)}", f"--out={tmp_path}"]) == 2
    assert "holds an evaluation that played dialogues" in capsys.readouterr().err


def test_rlver_logs_are_scored(tmp_path, capsys):
    """Two dialogues of one profile, as in training; the scores are means of what is logged, -5 included."""
    dialogues = [logged(("+5", 35, "嗯"), ("-40", -5, "嗯")), logged(("+70", 100, "再见"))]
    file = write(tmp_path / "0626_dsv3_ppo.jsonl", dialogues)
    assert main([f"--from={file}", f"--out={tmp_path / 'out'}"]) == 0
    summary = json.loads((tmp_path / "out" / "summary.json").read_text())
    assert summary["score"] == (-5 + 100) / 2
    assert summary["reward_mean"] == (0 + 1) / 2
    assert [summary[name] for name in ("success", "failure", "n", "faults", "turns_mean")] == [1, 1, 2, 0, 1.5]
    assert "3 changes checked, 0 faults" in capsys.readouterr().out
    again = read_finished(tmp_path / "out" / "dialogues.jsonl")
    assert faults(again) == [], "the record says whose arithmetic it is"
    assert [d.record["emotions"] for d in again] == [[30, 35, -5], [30, 100]]
    assert report([str(tmp_path / "out"), f"--out={tmp_path / 'report.html'}"]) == 0
    assert "47.5 ± 52.5" in (tmp_path / "report.html").read_text(encoding="utf-8"), "mean and deviation of -5 and 100"


def test_a_judge_reads_emotions_of_0_to_100(tmp_path):
    file = write(tmp_path / "r.jsonl", [logged(("-40", -10, "嗯"), ("+3", -7, "嗯"))])
    (one,) = read_finished(file)
    assert [(t.emotion, t.change) for t in turns_of(one.record)] == [(30, -40), (0, 3)]
    assert one.profile.hidden_intention == "你希望对方用心倾听你的情绪宣泄"


def test_faults_of_rlver_logs_are_named(tmp_path, capsys):
    file = write(tmp_path / "r.jsonl", [logged(("+5", 35, "嗯")), logged(("+5", 40, "嗯"))])
    assert main([f"--from={file}"]) == 1
    assert f"fault: {file}:2: turn 1: emotion 40, but 30 +5 makes 35" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("line", "says"),
    [
        (b'{"history": [', "text that is not JSON"),
        (json.dumps(logged())[:-20].encode(), "text that is not JSON"),
        (b'{"history": "\xff"}', "byte 0xff at column 14, expected UTF-8"),
        (b"[" * 100_000, "can't be read"),
        (b'{"history": [], "history": []}', "field 'history' more than once"),
        (b"3", "not a result of SAGE or a log of RLVER's simulator"),
        (json.dumps(logged(ending="")).encode(), "nor a scene that ends with the hidden intention"),
        (json.dumps(logged() | {"player": 3}).encode(), "found the number 3 in field 'player'"),
        (json.dumps(logged() | {"id": None}).encode(), "found null in field 'id'"),
    ],
)
def test_malformed_lines_are_named(line, says, tmp_path, capsys):
    """By file and line; blank lines count."""
    file = tmp_path / "r.jsonl"
    good = json.dumps(logged(("+5", 35, "a\u2028b")), ensure_ascii=False).encode()
    file.write_bytes(b"\xef\xbb\xbf" + good + b"\r\n\n" + line + b"\n")
    assert main([f"--from={file}"]) == 2
    message = capsys.readouterr().err
    assert f"evaluate: {file}:3: " in message
    assert says in message
    assert "restore the line, or remove it" in message
    file.write_bytes(b"\xef\xbb\xbf" + good + b"\r\n\n")
    assert main([f"--from={file}"]) == 0
