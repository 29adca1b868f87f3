"""Functions of one's own: docs/extending.md's examples, word by word, and what is said of functions that don't work."""

import json
import re
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from configs import debug
from rlver_jax.config.own_code import load_functions
from rlver_jax.config.validate import ConfigError
from rlver_jax.dialogues import own_functions
from rlver_jax.dialogues.log import record_faults
from rlver_jax.dialogues.own_functions import OwnFunctions, entries_of, logged_reward, means_of, numbers_of
from rlver_jax.dialogues.own_sample import sample_dialogues
from rlver_jax.evaluation.play import eval_metrics, scores
from rlver_jax.reports.charts import CHARTS
from rlver_jax.reports.sources import read_runs
from rlver_jax.rollout.rewards import Rewards
from rlver_jax.training.own_rewards import as_rewards
from tests.reports.conftest import row, write_run

PAGE = Path(__file__).resolve().parents[2] / "docs" / "extending.md"
NAMES = {
    "reward.function": "mine/reward.py:brief",
    "metrics.functions": "mine/metrics.py:questions,mine/metrics.py:moods",
    "eval.judge": "mine/judge.py:on_topic",
}


def write_mine(folder: Path) -> None:
    """The page's files."""
    files = re.findall(r"^New file `([\w./]+)`:\n\n```python\n(.*?)^```$", PAGE.read_text("utf-8"), re.M | re.S)
    for name, text in files:
        (folder / name).parent.mkdir(exist_ok=True)
        (folder / name).write_text(text, encoding="utf-8")
    assert [name for name, _ in files] == ["mine/reward.py", "mine/metrics.py", "mine/judge.py"]


def config_with(**names):
    config = debug.get_config()
    config.update_from_flattened_dict({name.replace("__", "."): value for name, value in names.items()})
    return config


@pytest.fixture
def mine(tmp_path, monkeypatch):
    """The working folder holds the page's files."""
    write_mine(tmp_path)
    monkeypatch.chdir(tmp_path)
    return tmp_path


def test_samples_are_dialogues_of_a_log():
    ends = []
    for record, profile in sample_dialogues():
        assert list(record_faults(record)) == []
        assert record["profile"] == profile.id
        ends.append(record["end_reason"])
    assert ends == ["goodbye", "format", "turn_limit"]
    assert sample_dialogues()[2][0]["messages"][-1]["content"] is None


def test_the_pages_functions_by_hand(mine):
    own = OwnFunctions.of(config_with(**NAMES))
    (first, profile), (broken, _), _ = sample_dialogues()
    first["messages"][1]["content"] = "Was the long shift hard? " + "word " * 41
    scored = own.apply([first, broken], [profile] * 2, evaluation=True)
    assert [record["reward"] for record in scored] == [pytest.approx(0.3), 0.0], "40 of 100, a long reply; format"
    assert numbers_of(scored[0]) == {
        "own/questions": 0.5, "own/best_change": 6.0, "own/worst_change": 4.0, "judge_score": 50.0
    }  # fmt: skip
    assert means_of(scored) == {
        "own/questions": 0.25, "own/best_change": 5.0, "own/worst_change": 4.0, "judge_score": 25.0
    }  # fmt: skip
    assert "judge_score" not in means_of(own.apply([first], [profile], evaluation=False)), "of evaluations alone"
    summary = scores(scored)
    assert summary["own/questions"] == eval_metrics(summary)["eval/own/questions"] == 0.25
    assert eval_metrics(summary)["eval/judge_score"] == 25.0
    assert list(own.faults(json.loads(json.dumps(scored[0])), profile, evaluation=True)) == []


def test_what_a_log_says_otherwise_is_named(mine):
    config = config_with(**NAMES)
    own, (record, profile) = OwnFunctions.of(config), sample_dialogues()[0]
    scored = json.loads(json.dumps(own.apply([record], [profile], evaluation=True)[0]))
    forged = json.loads(json.dumps(scored))
    forged["functions"][1]["value"] = 0.5
    assert list(own.faults(forged, profile, evaluation=True)) == [
        "metrics.functions=mine/metrics.py:questions: the log has 0.5, but the function gives 0.0"
    ]
    none = OwnFunctions()
    assert len(list(none.faults(scored, profile, evaluation=True))) == 4
    own_functions._tried.cache_clear()
    own_code = own_functions.load_functions.__globals__
    own_code["_load"].cache_clear(), own_code["_module"].cache_clear()
    with (mine / "mine/reward.py").open("a") as file:
        file.write("# another word\n")
    (fault,) = OwnFunctions.of(config).faults(scored, profile, evaluation=True)
    assert re.fullmatch(
        r"reward.function=mine/reward.py:brief: has changed since: its file is \w{16}, it was \w{16}", fault
    )


@pytest.mark.parametrize(
    ("body", "message"),
    [
        ("return 'good'", "returned 'good', expected a number, or a list with a number for each turn"),
        ("return [0.1]", r"returned \[0.1\], 1 long, expected .* for each turn \(2 here: of emotions the first one"),
        ("return sum(len(m['content']) for m in dialogue['messages'])", "'NoneType' has no len"),
        ("import random; return random.random()", r"returned 0\.\d+, and then 0\.\d+, for one dialogue"),
        ("return float('nan')", "returned nan, expected"),
        ("return dialogue['no']", r"raised KeyError: 'no' \(.*f\.py:2\)"),
        ("return len(dialogue['messages'][2]['content'][99])", "raised IndexError"),
    ],
)  # fmt: skip
def test_a_reward_that_does_not_work_is_refused_at_the_start(body, message, tmp_path):
    (tmp_path / "f.py").write_text(f"def f(dialogue, profile):\n    {body}\n")
    with pytest.raises(ConfigError, match=rf"(?s)tried on a made-up dialogue.*reward.function=.*{message}"):
        OwnFunctions.of(config_with(reward__function=f"{tmp_path}/f.py:f"))


OTHERS = "def one(dialogue):\n    return 1\n\n\ndef three(dialogue, profile, scale):\n    return 1\n"


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("f.py", "expected FILE.py:FUNCTION or PACKAGE.MODULE:FUNCTION"),
        ("gone.py:f", "gone.py is no file; expected FILE.py:FUNCTION"),
        ("borken.py:f", "borken.py is no file; did you mean"),
        ("f.py:one", "takes (dialogue), expected two arguments, (dialogue, profile): too many positional arguments"),
        ("f.py:three", "takes (dialogue, profile, scale), expected two arguments, (dialogue, profile): missing"),
        ("f.py:goood", "goood is not there; did you mean good?"),
        ("f.py:number", "number is no function"),
        ("broken.py:f", "cannot be imported: ModuleNotFoundError: No module named 'no_such_module'"),
        ("no_such_module.x:f", "cannot be imported: ModuleNotFoundError"),
        ("f.py:good,f.py:good", "names 2 functions, expected one"),
    ],
)
def test_a_name_that_leads_nowhere_is_explained(name, message, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "f.py").write_text("number = 3\n\n\ndef good(dialogue, profile):\n    return 1\n" + OTHERS)
    (tmp_path / "broken.py").write_text("import no_such_module\n")
    with pytest.raises(ConfigError, match=re.escape(message)):
        OwnFunctions.of(config_with(reward__function=name))


def test_a_module_is_found_from_the_working_folder_and_its_helpers_count(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "own_package_of_a_test").mkdir()
    (tmp_path / "own_package_of_a_test" / "__init__.py").touch()
    file = tmp_path / "own_package_of_a_test" / "rewards.py"
    file.write_text("def f(dialogue, profile):\n    return [x / 10 for x in range(dialogue['turns'])]\n")
    (function,) = load_functions("reward.function", "own_package_of_a_test.rewards:f")
    assert function.call({"turns": 2}, None) == [0.0, 0.1]
    own = OwnFunctions.of(config_with(reward__function="own_package_of_a_test.rewards:f"))
    record, profile = sample_dialogues()[0]
    assert own.apply([record], [profile], evaluation=False)[0]["reward"] == pytest.approx(0.1)


def test_rewards_of_the_batch_are_those_of_the_functions():
    """A number at the last turn, a list at each; a dialogue without an entry keeps the formula's."""
    formula = Rewards(jnp.array([0.9, 0.8, 0.7]), jnp.array([[0, 0.9, 0], [0, 0, 0.8], [0.7, 0, 0.0]]))
    entry = {"field": "reward.function", "function": "f.py:f", "source": "0"}
    records = [
        {"turns": 2, "reward": 0.25, "functions": [entry | {"value": 0.25}]},
        {"turns": 3, "reward": 0.6, "functions": [entry | {"value": [0.1, 0.2, 0.3]}]},
        {"turns": 1, "reward": 0.7},
    ]
    actual = as_rewards(records, formula)
    np.testing.assert_array_equal(actual.reward, np.array([0.25, 0.6, 0.7], np.float32))
    expected = np.array([[0, 0.25, 0], [0.1, 0.2, 0.3], [0.7, 0, 0]], np.float32)
    np.testing.assert_array_equal(actual.turns, expected)
    assert isinstance(actual.turns, jax.Array)


def test_the_report_draws_own_metrics_without_an_edit(tmp_path):
    rows = [row(step, 40.0, **{"own/questions": 0.1 * step, "eval/judge_score": 10.0}) for step in (1, 2)]
    run = write_run(tmp_path / "run", rows, {})
    charts = CHARTS["Metrics of your own"].figures(read_runs([run]), [])
    assert [figure.title for figure in charts] == ["eval/judge_score", "own/questions"]
    assert CHARTS["Metrics of your own"].figures(read_runs([write_run(tmp_path / "b", [row(1, 4.0)], {})]), []) == []


def test_a_log_from_anywhere_is_read_as_far_as_it_has_the_form():
    odd = {
        "functions": [3, {"field": "eval.judge"}, {"field": "eval.judge", "function": "f", "source": "", "value": "x"}]
    }
    assert len(entries_of(odd)) == 1
    assert numbers_of(odd) == numbers_of({"functions": 7}) == {}
    entry = {"field": "reward.function", "function": "f", "source": "", "value": 10**400}
    assert logged_reward({"turns": 1, "functions": [entry]}) is None
    assert numbers_of({"functions": [entry | {"field": "eval.judge"}]}) == {}, "no float holds it"
