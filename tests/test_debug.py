"""configs/debug.py has something to learn from: rewards that differ, and a policy that every step moves."""

import dataclasses
import functools
import json
import math
import shutil
from pathlib import Path

import jax
import numpy as np
import pytest
from rich.console import Console

from configs import debug
from rlver_jax.models.families import Qwen2Config
from rlver_jax.parallel.mesh import make_mesh
from rlver_jax.rollout.agents import load_model
from rlver_jax.text.tokenizer import load_tokenizer
from rlver_jax.training.loop import train
from rlver_jax.training.metrics_file import read_metrics
from rlver_jax.user.prompts import load_prompts
from tests import compare_runs
from tests.conftest import option_logprobs
from tests.training.test_loop import policy_of, records_of

STEPS = 3
SLOW = [
    pytest.param(argument, marks=pytest.mark.slow)
    for argument in ("challenging", "ppo", "direct", "ppo,direct,challenging")
]


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    """The folder of an argument's run, which keeps every step's checkpoint."""

    @functools.cache
    def one(argument: str) -> Path:
        folder, config = tmp_path_factory.mktemp("debug"), debug.get_config(argument)
        config.train.steps, config.checkpoint.every, config.checkpoint.keep_last = STEPS, 1, STEPS
        config.log.dialogues_every, config.log.tensorboard, config.eval.every = 1, False, 0
        train(config, folder, make_mesh(1, 1, 1, devices=jax.devices()[:1]), Console(quiet=True))
        return folder

    return one


def test_every_change_has_as_many_tokens():
    """Of random weights each token costs about the same, so that an option with fewer would nearly always be chosen."""
    tokenizer = load_tokenizer(debug.WORLD)
    counts = {len(tokenizer.encode(f"{change:+d}\n" if change else "0\n")) for change in range(-10, 11)}
    assert counts == {2}


def test_changes_spread_and_depend_on_what_was_said():
    """By plain forward passes over two texts; ln 21 nats would be uniform."""
    lm, tokenizer = load_model(debug.get_config().user, "user")
    probabilities = []
    for text in ("I am with you.", "Then work harder!"):
        logp = option_logprobs(lm, tokenizer, tokenizer.encode(f"{text}\nChange:\n"))
        probabilities.append(np.exp(logp - np.logaddexp.reduce(logp)))
        entropy = -(probabilities[-1] * np.log(probabilities[-1])).sum()
        assert 0.5 * math.log(21) < entropy < math.log(21)
    assert np.abs(probabilities[0] - probabilities[1]).sum() / 2 > 0.05, "total variation"


@pytest.mark.parametrize("argument", ["", *SLOW])
@pytest.mark.slow
def test_rewards_differ_and_every_step_moves_the_policy(run, argument):
    folder, old = run(argument), None
    rows = read_metrics(folder / "metrics.jsonl")
    for step in range(1, STEPS + 1):
        rewards = [record["reward"] for record in records_of(folder, step)]
        assert len(set(rewards)) >= 4, rewards
        assert min(len(set(rewards[:4])), len(set(rewards[4:]))) >= 2, f"within each group: {rewards}"
        new = np.concatenate([np.asarray(x).ravel() for x in jax.tree.leaves(policy_of(folder, step))])
        if old is not None:
            moved = np.linalg.norm(new - old)
            print(f"{argument or 'grpo'}, step {step}: {len(set(rewards))} rewards, moved by {moved:.3g}")
            assert moved > 2e-3 * np.linalg.norm(old), "by more than 2 in 1000"
        assert rows[step - 1]["policy/update_kl"] > 1e-4
        old = new


@pytest.mark.parametrize("argument", SLOW)
def test_an_argument_changes_what_is_said_and_felt(run, argument):
    """From the same seed: the challenging user reads another prompt, a policy without thoughts says other words."""
    felt = [[record["emotions"] for record in records_of(run(name), 1)] for name in ("", argument)]
    assert (felt[0] == felt[1]) == (argument == "ppo"), "a critic changes nothing before the first update"


def test_the_user_is_told_that_it_is_challenging():
    prompts = load_prompts("en", debug.WORLD / "prompts")
    plain, hard = (prompts.user_system("A.", "B.", "C", style=style) for style in ("vanilla", "challenging"))
    assert hard.startswith(plain)
    assert hard != plain


def test_fresh_weights_are_as_wide_as_the_model_says():
    """`initializer_range`, as transformers has it."""
    configured = json.loads((debug.WORLD / "config.json").read_text())["initializer_range"]
    for width in (configured, 0.02):
        config = dataclasses.replace(Qwen2Config.from_hf(debug.WORLD), init_std=width, tie_embeddings=False)
        model = load_model(debug.get_config().user, "user")[0].model.clone(config=config)
        params = model.init(jax.random.key(0), np.zeros((1, 1), np.int32), np.zeros((1, 1), np.int32))["params"]
        leaves = jax.tree_util.tree_leaves_with_path(jax.tree.map(np.asarray, params))
        drawn = [x for path, x in leaves if "kernel" in str(path) or "lm_head" in str(path)]
        assert len(drawn) == 2 + 7, "embedding, head and the products of a layer"
        for x in drawn:
            assert x.std() == pytest.approx(width, rel=0.1)


@pytest.mark.slow
def test_runs_are_compared(run, tmp_path, capsys):
    """A run equals its copy; one digit of a metric, a word of a log and a checkpoint are noticed; times don't count."""
    mine, copy = run(""), tmp_path / "copy"
    shutil.copytree(mine, copy)
    metrics, log = copy / "metrics.jsonl", copy / "dialogues" / "step_000002.jsonl"
    rows = [json.loads(line) for line in metrics.read_text().splitlines()]
    rows[0]["time/rollout_s"] += 1
    metrics.write_text("".join(json.dumps(row) + "\n" for row in rows))
    assert compare_runs.main([str(mine), str(copy)]) == 0
    rows[1]["reward/mean"] += 1e-7
    metrics.write_text("".join(json.dumps(row) + "\n" for row in rows))
    log.write_text(log.read_text().replace('"profile"', '"Profile"', 1))
    shutil.rmtree(copy / "checkpoints" / "000003")
    assert compare_runs.differences(mine, copy) == [
        *("step 2: reward/mean", "dialogues/step_000002.jsonl", "checkpoint of step 3"),
    ]
    assert compare_runs.main([str(mine), str(copy)]) == 1
    assert "not equal" in capsys.readouterr().out
    assert compare_runs.main([str(mine), str(tmp_path)]) == 2
