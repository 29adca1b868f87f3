"""Logs that are larger than memory should be: `evaluate --from` and `report` keep figures, not dialogues."""

import hashlib
import json
import os
import random
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from rlver_jax.evaluate import main as evaluate
from rlver_jax.evaluation.judge_folder import dialogues_fingerprint
from rlver_jax.evaluation.transcripts import TranscriptFiles
from tests.evaluation.conftest import result
from tests.reports.conftest import make_records, record, write_evaluation, write_lines

ROOT = Path(__file__).resolve().parents[2]
# Runs a command line of ours and prints the largest memory that it has had, in MB.
PEAK = """
import importlib, re, sys
code = importlib.import_module(sys.argv[1]).main(sys.argv[2:])
# Of this process alone: ru_maxrss begins with the size of the one that it was forked from.
print(int(re.search(r"VmHWM:\\s+(\\d+) kB", open("/proc/self/status").read())[1]) // 1024, file=sys.stderr)
sys.exit(code)
"""


def peak(module, *args):
    """(largest memory in MB, standard output) of a process."""
    env = os.environ | {"PYTHONPATH": str(ROOT), "JAX_PLATFORMS": "cpu"}
    command = [sys.executable, "-c", PEAK, module, *map(str, args)]
    done = subprocess.run(command, env=env, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    return int(done.stderr.split()[-1]), done.stdout


def ours(number, draw):
    """A dialogue of about 60 kB, nine tenths of it tokens and log-probabilities."""
    words = lambda _: " ".join(draw.choices(WORDS, k=25))  # noqa: E731
    made = record(number, f"p{number % 50}", [40, 45, 50, 45, 52, 60, 58], words=words)
    for message in made["messages"][1:]:
        message |= {"tokens": draw.choices(range(150_000), k=200)}
        message |= {name: [round(-draw.random(), 6) for _ in range(200)] for name in ("logprobs", "raw_logprobs")}
    return made


def sages(number, draw):
    """A dialogue of about 30 kB, all of it text."""
    made = result(number % 5, [5, -3, 0, 4, 4, 2, 1, 0, 3])
    for message in made["history"][1:]:
        message["content"] = " ".join(draw.choices(WORDS, k=60))
        if "planning" in message:
            message["planning"] |= {"activity": " ".join(draw.choices(WORDS, k=300))}
    return made | {"id": f"p{number}"}


WORDS = ["".join(random.Random(i).choices("abcdefghijklmnopqrstuvwxyz", k=2 + i % 8)) for i in range(2000)]


def write_log(path, make, megabytes):
    """A log of that size; a hundred dialogues that differ, again and again under other numbers."""
    draw = random.Random(0)
    made = [make(i, draw) for i in range(100)]
    size = number = 0
    with path.open("w", encoding="utf-8") as file:
        while size < megabytes * 1e6:
            name = "dialogue" if make is ours else "id"
            line = json.dumps(made[number % 100] | {name: number if make is ours else f"p{number}"}) + "\n"
            size += file.write(line)
            number += 1
    return number


@pytest.mark.slow
@pytest.mark.parametrize("make", [ours, sages])
def test_memory_does_not_grow_with_the_logs(make, tmp_path):
    """30 MB of dialogues more take less than 60 MB more, where they took 200."""
    grown = []
    for megabytes in (1, 31):
        log, out = tmp_path / f"{megabytes}.jsonl", tmp_path / str(megabytes)
        count = write_log(log, make, megabytes)
        scored, output = peak("rlver_jax.evaluate", f"--from={log}", f"--out={out}")
        assert f"n {count}" in output.replace("\n", " ")
        shown, output = peak("rlver_jax.report", out, f"--out={out}.html")
        assert f"of {count} dialogues" in output
        grown.append((scored, shown))
    (small_scored, small_shown), (scored, shown) = grown
    assert scored - small_scored < 60
    assert shown - small_shown < 60


@pytest.mark.long
@pytest.mark.parametrize("make", [ours, sages])
def test_385_megabytes_take_at_most_600(make, tmp_path):
    """In two files, which are numbered over both; then as two runs of one report."""
    logs = [tmp_path / f"{name}.jsonl" for name in "ab"]
    counts = [write_log(log, make, 193) for log in logs]
    scored, _ = peak("rlver_jax.evaluate", f"--from={logs[0]},{logs[1]}", f"--out={tmp_path / 'both'}")
    lines = (tmp_path / "both" / "dialogues.jsonl").open(encoding="utf-8")
    assert [json.loads(line)["dialogue"] for line in lines] == list(range(sum(counts)))
    shown, _ = peak("rlver_jax.report", tmp_path / "both", f"--out={tmp_path / 'r.html'}")
    assert max(scored, shown) <= 600
    assert (tmp_path / "r.html").stat().st_size <= 5_000_000


def as_before(dialogues):
    """What summary.json said of dialogues when all were in memory: (figures, their fingerprint)."""
    records = [one.record for one in dialogues]
    digest = hashlib.sha256()
    for one in dialogues:
        profile = one.profile.to_json() if one.profile else None
        digest.update(json.dumps([one.record, profile], sort_keys=True).encode())
    changes = [m["change"] for r in records for m in r["messages"] if "change" in m]
    summary = {
        "score": float(np.mean([r["emotion"] for r in records])),
        "turns_mean": float(np.mean([r["turns"] for r in records])),
        "acceptance": float(np.mean([change > 0 for change in changes])),
        "reward_mean": float(np.mean([r["reward"] for r in records])),
        "score_std": float(np.std([r["emotion"] for r in records], ddof=1)),
        "n": len(records),
    }
    return summary, digest.hexdigest()[:16]


def check_equal(files, out):
    assert evaluate([f"--from={','.join(map(str, files))}", f"--out={out}"]) == 0
    summary = json.loads((out / "summary.json").read_text())
    transcripts = TranscriptFiles(files)
    dialogues = [one for _, one in transcripts.scan()]
    expected, fingerprint = as_before(dialogues)
    assert {name: summary[name] for name in expected} == expected, "bit by bit"
    assert summary["settings"]["fingerprint.dialogues"] == fingerprint == dialogues_fingerprint(transcripts)
    logged = (out / "dialogues.jsonl").read_text(encoding="utf-8").split("\n")[:-1]
    assert [json.loads(line) for line in logged] == [one.record for one in dialogues]


def test_figures_of_published_dialogues_are_the_same_as_in_memory(published, tmp_path):
    files = sorted((published.parent / "sage").glob("*_result.jsonl"))
    if not files:
        pytest.skip("no results of SAGE")
    check_equal(files[:1], tmp_path / "one")
    check_equal(files, tmp_path / "all")


def test_figures_of_our_own_logs_are_the_same_as_in_memory(tmp_path):
    draw = random.Random(1)
    a, b = tmp_path / "a.jsonl", tmp_path / "b.jsonl"
    write_lines(a, [ours(i, draw) for i in range(7)])
    write_lines(b, [ours(i, draw) for i in range(5)])
    check_equal([a], tmp_path / "one")
    source = [json.loads(line) for line in a.open(encoding="utf-8")]
    compact = "".join(json.dumps(one, ensure_ascii=False, separators=(",", ":")) + "\n" for one in source)
    assert (tmp_path / "one" / "dialogues.jsonl").read_text(encoding="utf-8") == compact, "tokens and all"
    check_equal([a, b], tmp_path / "all")


def test_a_pipe_is_read_though_it_can_be_read_only_once(tmp_path):
    file = write_evaluation(tmp_path / "seen", make_records(0, 3)) / "dialogues.jsonl"
    script = f"{sys.executable} -m rlver_jax.evaluate --from=/dev/stdin --out={tmp_path / 'out'}"
    env = os.environ | {"PYTHONPATH": str(ROOT)}
    piped = f"cat {file} | {script}"
    done = subprocess.run(piped, shell=True, env=env, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert len((tmp_path / "out" / "dialogues.jsonl").read_text().splitlines()) == 3


def test_a_file_that_changes_while_it_is_read_is_noticed(tmp_path):
    file = write_evaluation(tmp_path / "seen", make_records(0, 3)) / "dialogues.jsonl"
    files = TranscriptFiles([file])
    assert len(list(files.scan())) == 3
    file.write_bytes(file.read_bytes().replace(b"say 1", b"SAY 1"))
    with pytest.raises(ValueError, match=r"dialogues.jsonl: was changed while it was read"):
        files[1]


@pytest.mark.parametrize(
    ("change", "says"),
    [
        ({"emotions": [40, "x", 45]}, "emotions[1] is 'x', expected a whole number"),
        ({"reward": float("nan")}, "reward is nan, expected a number"),
        ({"emotion": 10**400}, "emotion is a number of many digits, expected a whole number"),
    ],
)
def test_numbers_that_are_none_are_named(change, says, tmp_path, capsys):
    """By file and line, whichever command meets them, and nothing is written."""
    from rlver_jax.report import main as report

    folder = write_evaluation(tmp_path / "seen", [*make_records(0, 2), make_records(2, 1)[0] | change])
    out = tmp_path / "out"
    assert evaluate([f"--from={folder / 'dialogues.jsonl'}", f"--out={out}"]) == 2
    assert report([str(folder), f"--out={tmp_path / 'r.html'}"]) == 2
    error_text = capsys.readouterr().err
    assert error_text.count(f"dialogues.jsonl:3: {says}; restore the line") == 2
    assert sorted(p.name for p in tmp_path.iterdir()) == ["seen"]
