"""Scores, gaps and agreement from a judge whose appraisals are given, so that every figure can be worked out apart."""

import json

import numpy as np
import pytest
from rich.console import Console
from scipy import stats

from rlver_jax.dialogues.sage import from_sage
from rlver_jax.evaluation.judge import Appraised, Work
from rlver_jax.evaluation.score import judge_transcripts, measure_agreement, measure_record
from rlver_jax.evaluation.transcripts import Transcript, turns_of
from rlver_jax.profiles.schema import Profile

QUIET = Console(quiet=True)


class Given:
    """Not a model: what a judge elsewhere, such as a person, has said."""

    name, settings, readouts = "given", {"who": "a person"}, ("argmax", "mean")

    def __init__(self, logprobs):
        self.logprobs, self.asked = logprobs, []

    def appraise(self, dialogues, *, own, progress):
        for i, dialogue in enumerate(dialogues):
            number = dialogue.record["dialogue"]
            self.asked.append(number)
            ours = self.logprobs[number]
            changes = [int(np.argmax(one)) - 10 for one in ours]
            emotions = [40, *np.clip(40 + np.cumsum(changes), 0, 100).tolist()]
            progress(Work(len(ours), 0))
            yield [(i, Appraised(emotions, changes, ours, [{} for _ in ours]))]


@pytest.fixture
def dialogues(results):
    return [Transcript(from_sage(r, i), Profile.from_json(r), r["id"]) for i, r in enumerate(results)]


@pytest.fixture
def judge(dialogues):
    draw = np.random.default_rng(1)
    return Given([draw.normal(0, 3, (len(turns_of(d.record)), 21)).tolist() for d in dialogues])


def test_agreement_of_both_readouts(judge, dialogues, tmp_path):
    result = measure_agreement(judge, dialogues, tmp_path, QUIET)
    recorded = np.array([turn.change for d in dialogues for turn in turns_of(d.record)])
    before = np.array([turn.emotion for d in dialogues for turn in turns_of(d.record)])
    logprobs = np.concatenate([np.array(one) for one in judge.logprobs])
    p = np.exp(logprobs) / np.exp(logprobs).sum(1, keepdims=True)
    own = {"argmax": logprobs.argmax(1) - 10, "mean": np.round(p @ np.arange(-10, 11)).astype(int)}
    assert (result["n"], result["dialogues"]) == (14, 4)
    for readout, changes in own.items():
        assert result[readout]["spearman"]["value"] == pytest.approx(stats.spearmanr(changes, recorded).statistic)
        assert result[readout]["pearson"]["value"] == pytest.approx(np.corrcoef(changes, recorded)[0, 1])
        assert result[readout]["mae"]["value"] == pytest.approx(np.abs(changes - recorded).mean())
        assert result[readout]["sign_agreement"]["value"] == pytest.approx(
            (np.sign(changes) == np.sign(recorded)).mean()
        )
        low, high = result[readout]["mae"]["interval"]
        assert low <= result[readout]["mae"]["value"] <= high
        borders = [10, 40, 70, 100]
        ends = [np.digitize(np.clip(before + x, 0, 100), borders) for x in (changes, recorded)]
        assert result[readout]["band_agreement"]["value"] == pytest.approx((ends[0] == ends[1]).mean())
        for i, theirs in enumerate("FCBAS"):
            for j, ours in enumerate("FCBAS"):
                want = int(((ends[1] == i) & (ends[0] == j)).sum())
                assert result[readout]["band_confusion"][theirs][ours] == want


def test_beside_a_judge_stands_what_needs_no_look_at_the_reply(judge, dialogues, tmp_path):
    """Changes of 5 -3 0 · 10 10 10 10 10 10 · -10 -10 -10 -5 · 4, from 40 on; the own ones don't matter."""
    result = measure_agreement(judge, dialogues, tmp_path, QUIET)
    recorded = [5, -3, 0, *[10] * 6, -10, -10, -10, -5, 4]
    emotion = [40, 45, 42, 40, 50, 60, 70, 80, 90, 40, 30, 20, 10, 40]
    previous = [0, 5, -3, 0, *[10] * 5, 0, -10, -10, -10, 0]
    alone = result["without_the_reply"]
    for name, values in {"emotion": emotion, "previous_change": previous}.items():
        assert alone[name]["spearman"]["value"] == pytest.approx(stats.spearmanr(values, recorded).statistic)
    assert alone["previous_change"]["mae"]["value"] == pytest.approx(np.abs(np.subtract(previous, recorded)).mean())
    first = [0, 3, 9, 13]
    assert result["argmax"]["first_replies"]["n"] == 4
    own = [int(np.argmax(ours[0])) - 10 for ours in judge.logprobs]
    want = np.abs(np.array(own) - np.array(recorded)[first]).mean()
    assert result["argmax"]["first_replies"]["mae"]["value"] == pytest.approx(want)
    assert measure_record(dialogues) == {"n": 14, "dialogues": 4, "without_the_reply": alone}


def test_turns_that_a_judge_left_unanswered_count_for_none(judge, dialogues):
    """Also what came before a turn stays the record's, whether the judge answered there or not."""
    appraise = judge.appraise
    gap = lambda i: (0,) if i == 1 else (0, 1, 2, 3) if i == 2 else ()  # noqa: E731
    judge.appraise = lambda *args, **kwargs: (
        [(i, one._replace(unanswered=gap(i))) for i, one in results] for results in appraise(*args, **kwargs)
    )
    result = measure_agreement(judge, dialogues, None, QUIET)
    assert (result["n"], result["dialogues"]) == (9, 3)
    recorded, previous = [5, -3, 0, *[10] * 5, 4], [0, 5, -3, *[10] * 5, 0]
    want = np.abs(np.subtract(previous, recorded)).mean()
    assert result["without_the_reply"]["previous_change"]["mae"]["value"] == pytest.approx(want)
    assert result["mean"]["first_replies"]["n"] == 2


def test_scores_and_the_gap(judge, dialogues, tmp_path):
    """The training user's ends are 42, 100, 5 and 44."""
    result = judge_transcripts(judge, dialogues, tmp_path, QUIET)
    ends = [40 + sum(int(np.argmax(one)) - 10 for one in ours) for ours in judge.logprobs]
    assert all(0 < end < 100 for end in ends), "no clipping, so the sum is the end"
    assert result["score"] == pytest.approx(np.mean(ends))
    assert result["gap"] == pytest.approx((42 + 100 + 5 + 44) / 4 - np.mean(ends))
    assert result["gap_interval"][0] < result["gap"] < result["gap_interval"][1]
    assert result["spearman_final"] == pytest.approx(stats.spearmanr(ends, [42, 100, 5, 44]).statistic)
    assert (result["success"], result["failure"]) == (0, sum(end < 10 for end in ends))
    lines = [json.loads(line) for line in (tmp_path / "judges" / "given.jsonl").read_text().splitlines()]
    assert [line["emotions"][-1] for line in lines] == ends


def test_an_interrupted_judge_goes_on(judge, dialogues, tmp_path):
    whole = judge_transcripts(judge, dialogues, tmp_path, QUIET)
    file = tmp_path / "judges" / "given.jsonl"
    lines = file.read_bytes().splitlines(keepends=True)
    file.write_bytes(lines[0] + lines[1] + lines[2][:30])
    judge.asked.clear()
    assert judge_transcripts(judge, dialogues, tmp_path, QUIET) == whole
    assert judge.asked == [2, 3]
    assert file.read_bytes() == b"".join(lines)
    with pytest.raises(ValueError, match="fingerprint.dialogues was"):
        judge_transcripts(judge, dialogues[:3], tmp_path, QUIET)
    file.write_text("[]\n")
    with pytest.raises(ValueError, match="is no work of a judge"):
        judge_transcripts(judge, dialogues, tmp_path, QUIET)
