"""A learning rate that ruins the policy: an alarm stops the run and says which figure gave it away."""

import json
from pathlib import Path

import jax
import pytest
from rich.console import Console

from configs import debug
from rlver_jax.models.hf_weights import save_params
from rlver_jax.parallel.mesh import make_mesh
from rlver_jax.training.alarms import CollapseError
from rlver_jax.training.checkpoints import Checkpoints
from rlver_jax.training.loop import train
from rlver_jax.training.metrics_file import read_metrics
from tests.conftest import make_profiles

STEPS = 10
FIGURES = ("reply/readable_share", "policy/update_kl", "policy/ratio_max", "policy/entropy", "emotion/final_std")


@pytest.fixture(scope="module")
def config(policy_lm, user_lm, bpe_folder, prompts, tmp_path_factory):
    """Two tiny models that have learned to write replies and appraisals."""
    folder = tmp_path_factory.mktemp("ruin")
    for name, lm in (("policy", policy_lm), ("user", user_lm)):
        save_params(folder / name, lm.params, lm.model.config, tokenizer_from=bpe_folder)
    with (folder / "profiles.jsonl").open("w", encoding="utf-8") as file:
        for p in make_profiles(8):
            fields = {"id": p.id, "player": p.persona, "scene": p.scene, "main_cha": "calm", "cha_group": []}
            file.write(json.dumps(fields | {"task": "advice", "first_talk": "my boss did not listen."}) + "\n")
    c = debug.get_config("direct")
    for name in ("policy", "user"):
        c[name].path, c[name].init = str(folder / name), "path"
    c.user.prompts = str(Path(prompts.origins["reply.script"]).parent)
    c.data.train = str(folder / "profiles.jsonl")
    c.user.field_tokens, c.user.reply_tokens, c.user.readout = 8, 12, "sample"
    c.policy.enforce_format = False
    c.rollout.batch, c.rollout.say_tokens, c.rollout.context = 16, 24, 640
    c.train.steps, c.checkpoint.every, c.eval.every, c.log.tensorboard = STEPS, 1, 0, False
    c.alarms.readable_min = 0.5
    return c


def run(config, workdir, rate, **alarms):
    config = config.copy_and_resolve_references()
    config.train.learning_rate = rate
    config.alarms.update(alarms)
    mesh = make_mesh(1, 1, 1, devices=jax.devices()[:1])
    message = None
    try:
        train(config, workdir, mesh, Console(quiet=True))
    except CollapseError as error:
        message = str(error)
    rows = read_metrics(workdir / "metrics.jsonl")
    print(f"learning rate {rate:g}: {message}", [{name: round(row[name], 3) for name in FIGURES} for row in rows])
    return message, rows


@pytest.mark.slow
def test_a_learning_rate_of_1e_2_is_stopped_within_ten_steps(config, tmp_path):
    message, rows = run(config, tmp_path, 1e-2)
    assert "policy/update_kl" in message
    assert rows[-1]["step"] <= STEPS
    assert rows[0]["reply/readable_share"] > 0.5, "the replies themselves were still fine"


@pytest.mark.slow
def test_without_that_alarm_the_replies_give_it_away(config, tmp_path):
    """At 1e-2 it depends on rounding whether ten steps end in garbage; at 1 nothing of the policy is left."""
    message, rows = run(config, tmp_path, 1.0, kl_max=0.0)
    assert "reply/readable_share" in message
    assert rows[-1]["step"] <= STEPS
    assert Checkpoints.reader(tmp_path / "checkpoints").steps(), "what was saved before stays"


@pytest.mark.slow
def test_a_learning_rate_of_1e_4_is_not_stopped(config, tmp_path):
    message, rows = run(config, tmp_path, 1e-4)
    assert message is None
    assert rows[-1]["step"] == STEPS
