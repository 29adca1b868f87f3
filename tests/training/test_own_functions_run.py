"""A whole run with functions of one's own: what is learned from, logged, verified, resumed and reported."""

import json

import pytest

from rlver_jax import evaluate, report, train, verify
from rlver_jax.config import own_code
from rlver_jax.dialogues import own_functions
from rlver_jax.dialogues.log import read_dialogues, write_dialogues
from rlver_jax.profiles.schema import read_profiles
from rlver_jax.training.metrics_file import read_metrics
from tests.dialogues.test_own_functions import NAMES, write_mine

pytestmark = pytest.mark.slow
CONFIG = "--config=configs/debug.py:direct"
FLAGS = [CONFIG, *(f"--config.{name}={value}" for name, value in NAMES.items())]
pytestmark = pytest.mark.slow
RUN = ["--config.log.dialogues_every=1", "--config.checkpoint.every=1", "--config.eval.every=2"]


def forget():
    """As another process: files are read again."""
    for cached in (own_functions._tried, own_code._load, own_code._module):
        cached.cache_clear()


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    """Two steps, in a folder beside the functions' files."""
    folder = tmp_path_factory.mktemp("own")
    write_mine(folder)
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(folder)
        assert train.main([*FLAGS, *RUN, "--config.train.steps=2", f"--workdir={folder}/run"]) == 0
        yield folder


def test_rewards_and_metrics_are_those_of_the_functions(run):
    rows = read_metrics(run / "run" / "metrics.jsonl")
    for step in (1, 2):
        records = read_dialogues(run / "run" / "dialogues" / f"step_{step:06d}.jsonl")
        words = [[len(m["content"].split()) for m in r["messages"] if m["role"] == "assistant"] for r in records]
        by_hand = [r["emotion"] / 100 - 0.1 * sum(n > 40 for n in ns) for r, ns in zip(records, words, strict=True)]
        assert [r["reward"] for r in records] == pytest.approx(by_hand)
        assert rows[step]["reward/mean"] == pytest.approx(sum(by_hand) / len(by_hand), abs=1e-6)
        best = [max(m["change"] for m in r["messages"] if "change" in m) for r in records]
        assert rows[step]["own/best_change"] == pytest.approx(sum(best) / len(best))
    assert {"eval/judge_score", "eval/own/questions"} <= rows[0].keys() & rows[2].keys()


def test_verify_calls_the_functions_again(run, capsys):
    log = run / "run" / "dialogues" / "step_000002.jsonl"
    assert verify.main([str(log), *FLAGS]) == 0
    records = read_dialogues(log)
    for record in records:
        for one in record["functions"]:
            if one["field"] == "reward.function":
                one["value"] = record["reward"] = 0.5
    write_dialogues(run / "forged" / "step_000002.jsonl", records)
    assert verify.main([str(run / "forged" / "step_000002.jsonl"), *FLAGS]) == 1
    out = capsys.readouterr().out
    assert out.count("the log has 0.5, but the function gives") == len(records)
    assert verify.main([str(log), CONFIG]) == 1
    assert "the config doesn't name this function" in capsys.readouterr().out


def test_an_evaluation_has_its_judge_and_the_report_its_charts(run, capsys):
    assert evaluate.main([*FLAGS, f"--checkpoint={run}/run", f"--out={run}/judged"]) == 0
    summary = json.loads((run / "judged" / "summary.json").read_text())
    records = read_dialogues(run / "judged" / "dialogues.jsonl")
    judge = [one["value"] for record in records for one in record["functions"] if one["field"] == "eval.judge"]
    assert len(judge) == len(records) == len(read_profiles(summary["settings"]["data.eval"]))
    assert summary["judge_score"] == pytest.approx(sum(judge) / len(judge))
    assert f"judge_score {summary['judge_score']:.3g}" in capsys.readouterr().out
    assert verify.main([f"{run}/judged/dialogues.jsonl", *FLAGS]) == 0
    assert report.main([f"{run}/run", f"{run}/judged", f"--out={run}/report.html"]) == 0
    page = (run / "report.html").read_text()
    assert "Metrics of your own" in page
    assert "own/questions" in page


def test_a_run_that_resumes_names_the_file_that_changed(run, capsys):
    file = run / "mine" / "reward.py"
    before = file.read_text()
    again = [*FLAGS, *RUN, f"--workdir={run}/run", "--config.train.steps=3"]
    try:
        file.write_text(before + "\n# changed\n")
        forget()
        assert train.main(again) == 2
        assert "the source of reward.function=mine/reward.py:brief" in capsys.readouterr().err
        file.write_text(before.replace('"""From', 'if dialogue["dialogue"] == 21:\n        boom\n    """From'))
        forget()
        noted = run / "run" / "fingerprints.json"
        known = json.loads(noted.read_text())
        del known["contents"]["functions.reward.function=mine/reward.py:brief"]
        noted.write_text(json.dumps(known))
        assert train.main(again) == 1, "dialogue 21 is of step 3"
        err = capsys.readouterr().err
        assert "stopped after step 2: reward.function=mine/reward.py:brief, dialogue 21" in err
        assert "NameError: name 'boom' is not defined" in err
    finally:
        file.write_text(before)
        forget()
