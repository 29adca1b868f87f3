"""RLVER's published values: each is a field's, the four configs hold them, and what differs says why."""

import subprocess
import sys

import pytest

from configs import grpo_direct_7b, grpo_think_7b, ppo_direct_7b, ppo_think_7b, rlver_plus
from rlver_jax import __main__ as rlver
from rlver_jax.config.fields import FIELDS
from rlver_jax.config.published import RLVER, RUNS, UNKNOWN
from rlver_jax.config.validate import flatten, validate
from rlver_jax.reports.config_table import main, published_rows

CONFIGS = dict(zip(RUNS, (ppo_think_7b, ppo_direct_7b, grpo_think_7b, grpo_direct_7b), strict=True))


@pytest.mark.parametrize("name", RLVER)
def test_every_published_value_can_be_said(name):
    field = FIELDS[name]
    for run in RUNS:
        value = RLVER[name].of(run)
        assert value == UNKNOWN or type(value) in (type(field.default), int) or RLVER[name].ours
        assert not field.choices or value in field.choices or RLVER[name].ours
    assert RLVER[name].source


@pytest.mark.parametrize("run", RUNS)
def test_a_config_holds_rlvers_values(run):
    values = flatten(CONFIGS[run].get_config())
    differing = {name for name, known in RLVER.items() if values[name] != known.of(run)}
    assert differing <= {name for name, known in RLVER.items() if known.ours}, "each says why"


@pytest.mark.parametrize(
    ("run", "batch", "turns", "estimator", "warmup"),
    [
        ("ppo,think", 32, 32, "gae", 160),
        ("ppo,direct", 32, 0, "gae", 20),
        ("grpo,think", 128, 128, "grpo", 160),
        ("grpo,direct", 128, 0, "grpo", 20),
    ],
)
def test_the_four_runs(run, batch, turns, estimator, warmup):
    """By the script: 32 profiles, four dialogues each with GRPO; entropy 0.001; nine replies; no end at 100."""
    c = CONFIGS[run].get_config("challenging")
    assert (c.rollout.batch, c.train.turns_per_update, c.train.warmup_steps) == (batch, turns, warmup)
    assert (c.algorithm.estimator, c.loss.entropy, c.rollout.max_turns) == (estimator, 0.001, 9)
    assert (c.emotion.floor, c.emotion.ceiling, c.user.style) == (0, 101, "challenging")
    validate(c, 64, needs=())


def test_what_we_would_run_instead():
    c = rlver_plus.get_config("grpo,direct,challenging")
    assert (c.algorithm.estimator, c.policy.mode, c.user.style) == ("grpo", "direct", "challenging")
    assert (c.rollout.batch, c.rollout.group, c.policy.prompt) == (32, 4, "coach")
    validate(c, 64, needs=())
    with pytest.raises(ValueError, match="config argument 'gae'; expected any of ppo, grpo, think, direct"):
        rlver_plus.get_config("gae")


def test_a_difference_is_marked_with_its_reason():
    values = [flatten(CONFIGS[run].get_config()) for run in RUNS]
    values[0]["loss.entropy"] = 0.0
    rows = {row[0]: row[1:] for row in published_rows(values)}
    assert rows["loss.entropy"][:2] == ["0.0 | 0.001 | 0.001 | 0.001 *", "0.001"]
    assert rows["rollout.batch"][:2] == ["32 | 32 | 128 | 128"] * 2
    assert rows["rollout.think_tokens"][0] == "4000 | 512 | 4000 | 512 *" or rows["rollout.think_tokens"][3]
    assert rows["train.seed"][2] == "not decided by RLVER"
    assert set(rows) == set(FIELDS)


def test_the_command(tmp_path):
    run = [sys.executable, "-m", "rlver_jax", "config"]
    result = subprocess.run([*run, "--diff=rlver"], capture_output=True, text=True, cwd=tmp_path, timeout=300)
    assert result.returncode == 0, result.stderr
    assert "loss.entropy" in result.stdout


def test_configs_beside_each_other(capsys):
    assert rlver.main(["config", "configs/debug.py", "configs/debug.py:ppo"]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert lines[1].split() == ["algorithm.estimator", "'grpo'", "'gae'"]
    assert len(lines) == 2
    changed = ["--config=configs/debug.py:ppo", "--config.train.steps=7"]
    assert rlver.main(["config", *changed]) == 0
    rows = dict(line.split(maxsplit=1) for line in capsys.readouterr().out.splitlines())
    assert rows["train.steps"].split() == ["7"]
    assert rows["algorithm.estimator"].split() == ["'gae'"]
    assert main([*changed, "configs/debug.py"]) == 2
    assert "found 'configs/debug.py' beside --config" in capsys.readouterr().err
    for argv, told in (([], "no config was given"), (["--diff=rlver", "x"], "found 'x'"), (["zz.py"], "no such file")):
        assert main(argv) == 2
        assert told in capsys.readouterr().err
