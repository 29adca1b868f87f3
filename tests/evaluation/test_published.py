"""SAGE's published results (arXiv 2505.02847, table 3), scored again: a folder of them in RLVER_JAX_SAGE_RESULTS."""

import decimal
import json
import os
from pathlib import Path

import numpy as np
import pytest
from scipy import stats

from rlver_jax.config.fields import get_config
from rlver_jax.evaluate import main
from rlver_jax.evaluation.score import measure_record
from rlver_jax.evaluation.transcripts import TranscriptFiles, turns_of

# Policy: score, successes, failures of 100 dialogues, as published (DeepSeek-V3 of 2024-12-27 as the user).
PUBLISHED = {
    "claude3.7-think": ("61.3", 23, 19),
    "deepseek-v3-0324": ("54.4", 19, 23),
    "deepseek-v3-1227": ("37.6", 5, 39),
    "gemini2.0-flash": ("32.9", 8, 45),
    "gpt-4.1": ("68.2", 35, 13),
    "gpt-4o-0808": ("31.8", 7, 51),
    "llama3.3-70b": ("33.3", 7, 47),
    "openai-o1": ("29.0", 5, 51),
    "qwen2.5-72b": ("19.1", 4, 70),
}


@pytest.fixture
def files():
    folder = Path(os.environ.get("RLVER_JAX_SAGE_RESULTS", "/nowhere"))
    paths = [folder / f"{name}_result.jsonl" for name in PUBLISHED if (folder / f"{name}_result.jsonl").exists()]
    if not paths:
        pytest.skip("no published results: name a folder with *_result.jsonl of SAGE in RLVER_JAX_SAGE_RESULTS")
    return paths


def half_up(score: float) -> str:
    return str(decimal.Decimal(repr(score)).quantize(decimal.Decimal("0.1"), decimal.ROUND_HALF_UP))


def test_scores_are_those_of_the_paper(files, tmp_path):
    assert main([f"--from={','.join(map(str, files))}", f"--out={tmp_path}"]) == 0
    summary = json.loads((tmp_path / "summary.json").read_text())
    assert summary["faults"] == 0
    each = summary.get("files") or {str(files[0]): summary}
    for file in files:
        one = each[str(file)]
        scores = (half_up(one["score"]), one["success"], one["failure"])
        assert scores == PUBLISHED[file.name.removesuffix("_result.jsonl")], file.name


def test_no_tenth_reply_is_appraised(files):
    """Why `eval.max_turns` is 9: there are tenth replies, and nobody says what became of the emotion."""
    most = {"replies": 0, "appraised": 0}
    for _, one in TranscriptFiles(files).scan():
        most["replies"] = max(most["replies"], one.record["turns"])
        most["appraised"] = max(most["appraised"], len(turns_of(one.record)))
    assert most == {"replies": 10, "appraised": 9}
    assert get_config().eval.max_turns == 9


def changes_of(history):
    """(emotion before, change, change before) of each reply, by SAGE's own fields."""
    emotion, before = history[0]["emotion-point"], 0
    for message in history[1:]:
        if message["role"] == "user":
            change = int(message["planning"]["change"])
            yield emotion, change, before
            emotion, before = message["emotion-point"], change


def test_a_change_is_predicted_without_a_look_at_the_reply(files):
    """Spearman 0.55 by the emotion before and 0.60 by the previous change, over all published dialogues."""
    if len(files) < len(PUBLISHED):
        pytest.skip(f"needs all of {', '.join(PUBLISHED)}")
    histories = [json.loads(line)["history"] for file in files for line in file.read_text("utf-8").splitlines()]
    rows = np.array([(*row, i) for history in histories for i, row in enumerate(changes_of(history))])
    emotion, change, before, turn = rows.T
    result = measure_record([one for _, one in TranscriptFiles(files).scan()])
    assert result["n"] == len(rows) == 7013
    alone = result["without_the_reply"]
    assert alone["emotion"]["spearman"]["value"] == pytest.approx(stats.spearmanr(emotion, change).statistic)
    assert alone["emotion"]["spearman"]["value"] == pytest.approx(0.55, abs=0.005)
    later = stats.spearmanr(before[turn > 0], change[turn > 0]).statistic
    assert alone["previous_change"]["later_replies"]["spearman"]["value"] == pytest.approx(later)
    assert later == pytest.approx(0.60, abs=0.005)
    assert alone["previous_change"]["mae"]["value"] == pytest.approx(np.abs(change - before).mean())
    assert alone["constant"]["mae"]["value"] == pytest.approx(np.abs(change - np.median(change)).mean())
    assert (emotion[turn == 0] == 40).all(), "so it explains nothing of what follows first replies"
