"""`report` as a user runs it."""

import json
import os
import re
import subprocess
import sys
import xml.etree.ElementTree as ET
from pathlib import Path

import pytest

from rlver_jax.report import main
from tests.quick import QUICK
from tests.reports.conftest import make_records, row, write_evaluation, write_run

ROOT = Path(__file__).resolve().parents[1]


def test_a_process_writes_page_and_curve(tmp_path):
    run = write_run(tmp_path / "run", [row(1, 40.0), row(2, 90.0)], {1: make_records(0, 3)})
    seen = write_evaluation(tmp_path / "seen", make_records(0, 2))
    out, curve = tmp_path / "r.html", tmp_path / "c.svg"
    command = [sys.executable, "-m", "rlver_jax.report", run, seen, "--out", out, f"--curve={curve}"]
    env = os.environ | {"PYTHONPATH": str(ROOT)}
    result = subprocess.run(command, env=env, cwd=tmp_path, capture_output=True, text=True, check=False)
    assert result.returncode == 0, result.stderr
    assert result.stdout.splitlines()[-1].startswith(f"{out}: ")
    assert result.stdout.splitlines()[-1].endswith("MB, 5 of 5 dialogues")
    assert out.read_text(encoding="utf-8").startswith("<!DOCTYPE html>")
    root = ET.parse(curve).getroot()
    assert root.tag == "{http://www.w3.org/2000/svg}svg"
    (line,) = (e for e in root.iter("{http://www.w3.org/2000/svg}path") if e.get("class") == "line c0")
    # the chart is drawn from step 1 at x = 38 to step 2 at x = 342; 90 lies above 40
    (x0, y0), (x1, y1) = (map(float, p.split()) for p in line.get("d")[1:].split("L"))
    assert (x0, x1) == (38, 342)
    assert y1 < y0
    assert sorted(p.name for p in tmp_path.iterdir()) == ["c.svg", "r.html", "run", "seen"], "nothing else is left"


@pytest.mark.slow
def test_a_run_and_an_evaluation_as_the_program_writes_them(tmp_path):
    """The debug config's own folders; their dialogues, counted in the files, are all on the page."""
    env = os.environ | {"PYTHONPATH": str(ROOT), "XLA_FLAGS": QUICK}

    def python(module, *args):
        command = [sys.executable, "-m", f"rlver_jax.{module}", *args]
        return subprocess.run(command, env=env, cwd=ROOT, capture_output=True, text=True, check=True).stdout

    config, run, seen = "--config=configs/debug.py", tmp_path / "run", tmp_path / "seen"
    python("train", config, f"--workdir={run}", "--config.train.steps=2", "--config.eval.every=2")
    python("evaluate", config, f"--checkpoint={run}", f"--out={seen}")
    output = python("report", str(run), str(seen), f"--out={tmp_path / 'r.html'}")
    logs = [*(run / "dialogues").glob("*.jsonl"), seen / "dialogues.jsonl"]
    count = sum(len(log.read_text().splitlines()) for log in logs)
    assert output.strip().endswith(f"{count} of {count} dialogues")
    text = (tmp_path / "r.html").read_text()
    score = json.loads((seen / "summary.json").read_text())["score"]
    assert re.search(rf'<th scope="row">score</th><td></td><td>{score:.1f}</td>', text)
    rows = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    for numbers in rows[1:]:
        shown = f"step {numbers['step']} · {numbers['emotion/final_mean']:.2f} ± {numbers['emotion/final_std']:.2f}"
        assert f'data-tip="{shown}"' in text
    for title in ("Held-out score", "Success and failure: run", "How dialogues ended: run", "Length of a reply"):
        assert f"<h3>{title}</h3>" in text


@pytest.mark.parametrize(
    ("args", "says"),
    [
        (["--out=r.html"], "no folder was given"),
        (["RUN"], "neither --out nor --curve was given"),
        (["RUN", "--out=nowhere/r.html"], "nowhere/r.html: its folder does not exist"),
        (["nowhere", "--out=r.html"], "nowhere: holds neither metrics.jsonl nor dialogues.jsonl"),
        (["RUN", "RUN", "--out=r.html"], "is the same folder as"),
        (["RUN", "--out=r.html", "--max_mb=0.01"], "0.01 is not number >= 0.1"),
        (["RUN", "--out=r.html", "--mx_mb=1"], "Unknown command line flag 'mx_mb'"),
        (["SEEN", "--curve=c.svg"], "--curve needs a training run"),
    ],
)
def test_bad_usage(args, says, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    write_run(tmp_path / "RUN", [row(1, 40.0)], {1: make_records(0, 1)})
    write_evaluation(tmp_path / "SEEN", make_records(0, 1))
    assert main(args) == 2
    assert says in capsys.readouterr().err
    assert not list(tmp_path.glob("*.html")) + list(tmp_path.glob("*.svg"))
