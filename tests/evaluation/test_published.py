"""SAGE's published results (arXiv 2505.02847, table 3), scored again: a folder of them in RLVER_JAX_SAGE_RESULTS."""

import decimal
import json
import os
from pathlib import Path

import pytest

from rlver_jax.config.fields import get_config
from rlver_jax.evaluate import main
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
    found = [folder / f"{name}_result.jsonl" for name in PUBLISHED if (folder / f"{name}_result.jsonl").exists()]
    if not found:
        pytest.skip("no published results: name a folder with *_result.jsonl of SAGE in RLVER_JAX_SAGE_RESULTS")
    return found


def half_up(score: float) -> str:
    return str(decimal.Decimal(repr(score)).quantize(decimal.Decimal("0.1"), decimal.ROUND_HALF_UP))


def test_scores_are_those_of_the_paper(files, tmp_path):
    assert main([f"--from={','.join(map(str, files))}", f"--out={tmp_path}"]) == 0
    summary = json.loads((tmp_path / "summary.json").read_text())
    assert summary["faults"] == 0
    each = summary.get("files") or {str(files[0]): summary}
    for file in files:
        one = each[str(file)]
        found = (half_up(one["score"]), one["success"], one["failure"])
        assert found == PUBLISHED[file.name.removesuffix("_result.jsonl")], file.name


def test_no_tenth_reply_is_appraised(files):
    """Why `eval.max_turns` is 9: there are tenth replies, and nobody says what became of the emotion."""
    most = {"replies": 0, "appraised": 0}
    for _, one in TranscriptFiles(files).scan():
        most["replies"] = max(most["replies"], one.record["turns"])
        most["appraised"] = max(most["appraised"], len(turns_of(one.record)))
    assert most == {"replies": 10, "appraised": 9}
    assert get_config().eval.max_turns == 9
