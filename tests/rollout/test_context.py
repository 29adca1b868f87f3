"""A context beyond what a model reads is refused by every command before it loads weights or compiles."""

import json
import shutil

import pytest

from configs import (
    debug,
    grpo_direct_7b,
    grpo_think_7b,
    miniature,
    ppo_direct_7b,
    ppo_think_7b,
    qwen3_8b,
    qwen25_0p5b_cpu,
)
from rlver_jax import chat, evaluate, serve, train
from rlver_jax.decoding.cache import LM
from rlver_jax.evaluation.judge_on_device import check_length
from rlver_jax.models.families import PRESETS, Qwen2Config
from rlver_jax.models.qwen import Qwen2
from rlver_jax.perf.plan_programs import architecture
from rlver_jax.rollout.spec import check_context
from rlver_jax.training import setup

FLAGS = [f"--config={debug.__file__}"]
YARN = {"type": "yarn", "factor": 2.0, "original_max_position_embeddings": 512}


@pytest.fixture
def short(tmp_path):
    """The debug world's folder, of a model that reads 512 tokens; its weights are a file that nobody can read."""
    folder = tmp_path / "short"
    shutil.copytree(debug.WORLD, folder)
    change(folder, max_position_embeddings=512)
    (folder / "model.safetensors").write_bytes(b"no weights")
    return folder


def change(folder, **fields):
    file = folder / "config.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | fields))


@pytest.mark.parametrize("name", ["policy", "user", "critic", "reference"])
def test_each_model_of_a_run(name, short):
    config = debug.get_config("ppo")
    config.loss.kl = 0.1
    config.reference.path = str(debug.WORLD)
    names = setup.models_of(config)
    assert names == ["policy", "user", "critic", "reference"]
    check_context(config, *names)
    config[name].path = str(short)
    wanted = f"rollout.context=768, but the model of {name} reads at most 512 tokens .*"
    with pytest.raises(ValueError, match=wanted + "--config.rollout.context=512 or lower, or .*YaRN"):
        check_context(config, *names)
    change(short, rope_scaling=YARN)
    check_context(config, *names)


def test_models_that_are_not_loaded_are_not_asked():
    assert setup.models_of(debug.get_config()) == ["policy", "user"]
    config = debug.get_config("ppo")
    config.critic.kind = "shared"
    assert setup.models_of(config) == ["policy", "user"]


@pytest.mark.parametrize(
    ("command", "flags", "field"),
    [
        (train, ["--config.policy.path={short}", "--workdir={out}"], "rollout.context=768"),
        (train, ["--config.user.path={short}", "--workdir={out}"], "rollout.context=768"),
        (
            evaluate,
            ["--config.policy.path={short}", "--config.user.path={short}", "--out={out}"],
            "rollout.context=768",
        ),
        (chat, ["--config.policy.path={short}", "--out={out}"], "rollout.context=768"),
        (chat, ["--config.user.path={short}", "--side=policy", "--out={out}"], "rollout.context=768"),
        (serve, ["--config.policy.path={short}", "--port=0"], "--config.rollout.context=768"),
        (serve, ["--config.policy.path={short}", "--port=0", "--context=513"], "--context=513"),
    ],
)
def test_commands(command, flags, field, short, tmp_path, capsys):
    arguments = [flag.format(short=short, out=tmp_path / "out") for flag in flags]
    arguments += ["--config.policy.init=path", "--config.user.init=path"]  # weights would be refused, if they were read
    assert command.main([*FLAGS, *arguments]) == 2
    told = capsys.readouterr().err
    assert f"{command.__name__.split('.')[-1]}: {field}, but the model of" in told
    assert "reads at most 512 tokens" in told


def test_plans_ask_sizes_too(short):
    config = debug.get_config()
    config.policy.path, config.policy.size = "", "7b"
    assert architecture(config, "policy") == PRESETS["7b"]
    config.rollout.context = 32_769
    with pytest.raises(ValueError, match="rollout.context=32769, but the model of policy reads at most 32768"):
        architecture(config, "policy")


def test_dialogues_that_a_judge_cannot_read():
    model = Qwen2(Qwen2Config(57, 32, 48, 2, num_heads=4, num_kv_heads=2, head_dim=8, max_positions=100))
    check_length(LM({}, model), 100)
    with pytest.raises(ValueError, match="may take 101 tokens, but the model of user reads at most 100"):
        check_length(LM({}, model), 101)


@pytest.mark.parametrize(
    "module", [debug, miniature, qwen25_0p5b_cpu, qwen3_8b, grpo_direct_7b, grpo_think_7b, ppo_direct_7b, ppo_think_7b]
)
def test_shipped_configs_fit_what_qwen_reads(module):
    assert module.get_config().rollout.context <= min(config.context for config in PRESETS.values())
