"""Runs that train adapters: what they save, how they resume, who reads them, and what is refused."""

import importlib
import io
import json

import jax
import numpy as np
import pytest
from rich.console import Console

from configs import debug
from rlver_jax import export, verify
from rlver_jax import train as command
from rlver_jax.config.validate import ConfigError, check_training, validate
from rlver_jax.models.hf_weights import load_params, save_params
from rlver_jax.models.lora import merged, split
from rlver_jax.models.qwen import init_params
from rlver_jax.parallel.mesh import make_mesh
from rlver_jax.rollout.agents import Agents, same_parameters, spec_of
from rlver_jax.training.learners import shares_base
from rlver_jax.training.loop import fingerprints_of, train
from rlver_jax.training.metrics_file import read_metrics
from rlver_jax.training.setup import build_run
from rlver_jax.training.trained_policy import TrainedPolicy
from rlver_jax.training.workdir import Contents, RunFolder
from tests.compare_runs import differences
from tests.conftest import write_debug_model

FIELDS = {
    "train.steps": 2, "checkpoint.every": 1, "checkpoint.keep_last": 9, "log.dialogues_every": 1, "eval.every": 0,
    "log.tensorboard": False, "lora.rank": 4, "loss.kl": 0.1,
}  # fmt: skip

ROUNDING = 1e-12  # of a KL estimate, d^2 / 2 for log-probs that differ by d: a few of their last bits


@pytest.fixture(scope="module")
def base(tmp_path_factory):
    """Folder of a tiny model with weights, and its model."""
    folder = tmp_path_factory.mktemp("base") / "model"
    return folder, write_debug_model(folder)


def config_of(folder, arg="ppo", **fields):
    config = debug.get_config(arg)
    for model in (config.policy, config.user):
        model.path, model.init = str(folder), "path"
    config.critic.path, config.critic.init = "", "path"
    config.update_from_flattened_dict(FIELDS | {name.replace("__", "."): x for name, x in fields.items()})
    return config


def one_device():
    return make_mesh(1, 1, 1, devices=jax.devices()[:1])


def run(config, workdir, mesh=None):
    train(config, workdir, mesh or one_device(), Console(file=io.StringIO(), width=200))
    return workdir


@pytest.fixture(scope="module")
def unbroken(base, tmp_path_factory):
    """A finished run of two steps: PPO with a critic and a KL penalty, all on one base."""
    return run(config_of(base[0]), tmp_path_factory.mktemp("unbroken") / "run")


def test_one_base_serves_all(base):
    """No second copy: policy, critic, reference and user read the same arrays."""
    made, state = build_run(config_of(base[0]), one_device())
    assert made.base.policy is made.agents.policy.params is made.agents.user.params
    assert made.base.critic is None
    assert made.reference is None
    assert made.setup.models.reference_is_base
    weights = sum(x.size for x in jax.tree.leaves(made.base.policy))
    learned = sum(x.size for x in jax.tree.leaves(state.params))
    rank, config = 4, made.agents.policy.model.config
    d, f, q, kv = config.hidden_size, config.intermediate_size, *(
        heads * config.head_dim for heads in (config.num_heads, config.num_kv_heads)
    )  # fmt: skip
    adapter = config.num_layers * rank * (2 * (d + q) + 2 * (d + kv) + 3 * (d + f))
    assert learned == 2 * adapter + d + 1, "two adapters and a value head"
    assert weights == config.num_params


def test_other_bases_are_loaded_beside(base):
    made, _ = build_run(config_of(base[0], critic__param_dtype="bfloat16", loss__kl=0.0), one_device())
    assert made.base.critic is not None
    assert made.base.critic["norm"]["scale"].dtype == "bfloat16"
    assert not made.setup.models.reference_is_base


@pytest.mark.slow
def test_it_learns_from_where_the_base_is(unbroken):
    rows = read_metrics(unbroken / "metrics.jsonl")
    assert [row["step"] for row in rows] == [1, 2]
    assert rows[0]["policy/reference_kl"] < ROUNDING, "the untrained policy is its base"
    assert rows[1]["policy/reference_kl"] > 1e-5
    for row in rows:
        assert abs(row["policy/ratio_max_first"] - 1) < 1e-4, "sampler and trainer agree"
        assert row["policy/grad_norm"] > 0 < row["critic/grad_norm"]


@pytest.mark.slow
def test_a_checkpoint_holds_adapters_and_moments_alone(unbroken):
    record = json.loads((unbroken / "checkpoints" / "000002" / "record" / "metadata").read_text())["record"]
    names = [name for name in record["leaves"] if name.startswith("params/")]
    assert all(name.endswith(("lora_a", "lora_b")) or name.startswith("params/critic/head/") for name in names)
    assert {name.split("/")[1] for name in names} == {"policy", "critic"}
    moments = [name for name in record["leaves"] if "/mu/" in name]
    assert len(moments) == len(names)


@pytest.mark.slow
def test_resumed_it_ends_as_one_that_was_never_interrupted(base, unbroken, tmp_path):
    run(config_of(base[0], train__steps=1), tmp_path / "run")
    run(config_of(base[0]), tmp_path / "run")
    assert differences(unbroken, tmp_path / "run") == []


@pytest.mark.slow
def test_its_log_is_recomputed(base, unbroken):
    """The policy of step 2 is the base with the adapter of step 1."""
    flags = [f"--config.{side}.path={base[0]}" for side in ("policy", "user")]
    flags += [f"--config.{side}.init=path" for side in ("policy", "user")]
    log = unbroken / "dialogues" / "step_000002.jsonl"
    words = [str(log), "--config=configs/debug.py:ppo", f"--policy={unbroken}", *flags]
    assert verify.main([*words, "--config.train.steps=2", "--config.lora.rank=4"]) == 0


@pytest.mark.slow
def test_an_export_holds_the_adapter_or_the_whole_model(base, unbroken, tmp_path, capsys):
    folder, model = base
    assert export.main([f"--workdir={unbroken}", f"--out={tmp_path / 'adapter'}"]) == 0
    files = {file.name for file in (tmp_path / "adapter").iterdir()}
    assert files == {"adapter_config.json", "adapter_model.safetensors", "README.md"}
    assert export.main([f"--workdir={unbroken}", f"--out={tmp_path / 'whole'}", "--merged", "--dtype=float32"]) == 0
    whole, before = load_params(tmp_path / "whole", model), load_params(folder, model)
    policy = TrainedPolicy.open(unbroken, "last")
    factors = policy.weights(model)["layer_0"]["attn"]["q"]
    a, b = (np.asarray(factors[name], np.float64) for name in ("lora_a", "lora_b"))
    expected = np.asarray(before["layer_0"]["attn"]["q"]["kernel"], np.float64) + a @ b
    np.testing.assert_allclose(whole["layer_0"]["attn"]["q"]["kernel"], expected, atol=1e-6)
    np.testing.assert_array_equal(whole["embed"]["kernel"], before["embed"]["kernel"])


@pytest.mark.slow
def test_an_exported_adapter_is_read_beside_its_base(base, unbroken, tmp_path):
    """As policy: what was trained, with its weights merged."""
    folder, model = base
    assert export.main([f"--workdir={unbroken}", f"--out={tmp_path / 'adapter'}"]) == 0
    config = config_of(folder, policy__adapter=str(tmp_path / "adapter"), lora__rank=0)
    validate(config)
    made, _ = build_run(config, one_device())
    wanted = merged(TrainedPolicy.open(unbroken).weights(model))
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, atol=1e-6), made.agents.policy.params, wanted)
    assert made.agents.user.params is not made.agents.policy.params, "the user has no adapter"
    known = fingerprints_of(config)
    assert known["policy.adapter"] != fingerprints_of(config_of(folder)).get("policy.adapter")
    run_folder = RunFolder.open(tmp_path / "run", config, contents=Contents(fingerprints_of_(config), str))
    run_folder.metrics.write_text('{"step": 1}\n')
    plain = config_of(folder, lora__rank=0)
    with pytest.raises(ValueError, match=r"began with others than these: policy.adapter"):
        RunFolder.open(tmp_path / "run", plain, contents=Contents(fingerprints_of_(plain), str))
    config.policy.adapter = str(tmp_path)
    with pytest.raises(ConfigError, match=r"policy.adapter=.*: no folder with adapter_config.json"):
        validate(config)


def fingerprints_of_(config):
    return lambda gone: fingerprints_of(config, gone)


@pytest.mark.slow
def test_in_an_evaluation_one_base_serves_both(base, unbroken):
    """The user reads the very arrays that the policy's adapter stands on; one with its own precision does not."""
    trained = TrainedPolicy.open(unbroken)

    def agents(**fields):
        config = config_of(base[0], lora__rank=0, **fields)
        spec = spec_of(config, group=1, max_turns=2, initial_emotion=30)
        return Agents.load(config, spec, one_device(), trained.weights, policy_base=trained.base_section)

    shared, separate, separate_policy = (
        agents(),
        agents(user__param_dtype="bfloat16"),
        agents(policy__param_dtype="bfloat16"),
    )
    own, adapter = split(shared.policy.params)
    assert adapter
    for mine, policys in zip(jax.tree.leaves(shared.user.params), jax.tree.leaves(own), strict=True):
        assert mine is policys
    assert separate.user.params["norm"]["scale"].dtype == "bfloat16"
    assert separate_policy.policy.params["norm"]["scale"].dtype == "bfloat16"
    assert separate_policy.user.params["norm"]["scale"].dtype == "float32"


@pytest.mark.slow
def test_another_base_is_refused(base, unbroken, tmp_path):
    other = tmp_path / "other"
    save_params(other, init_params(base[1], jax.random.key(9)), base[1].config, tokenizer_from=debug.WORLD)
    with pytest.raises(ValueError, match=r"other weights than those that the adapter in .* was trained on"):
        TrainedPolicy.open(unbroken, "last", str(other)).weights(base[1])


@pytest.mark.slow
def test_a_run_without_adapters_has_none_to_merge(tmp_path, capsys):
    words = ["--config=configs/debug.py", "--config.train.steps=1", "--config.eval.every=0", f"--workdir={tmp_path}/r"]
    assert command.main([*words, "--config.log.tensorboard=False"]) == 0
    assert export.main([f"--workdir={tmp_path / 'r'}", f"--out={tmp_path / 'out'}", "--merged"]) == 2
    assert "trained all parameters, so there is no adapter" in capsys.readouterr().err


def test_what_is_refused():
    config = debug.get_config()
    config.lora.rank, config.lora.targets = 4, "q,wv"
    with pytest.raises(ConfigError, match=r"lora.targets='q,wv': expected some of q, k, v.* found 'wv'"):
        validate(config)
    config.lora.targets, config.lora.rank, config.policy.param_dtype = "q", 0, "int8"
    with pytest.raises(ConfigError, match=r"policy.param_dtype='int8': .* set lora.rank"):
        check_training(config)


def first_row(workdir):
    return next(row for row in read_metrics(workdir / "metrics.jsonl") if row["step"] == 1)


@pytest.mark.slow
def test_a_mesh_learns_what_one_device_does(base, unbroken, tmp_path):
    """Also where dialogues are played on another mesh, for which the base is copied."""
    fields = {"mesh__fsdp": 4, "mesh__tensor": 2, "mesh_sampling__replica": 4, "mesh_sampling__fsdp": 1}
    config = config_of(base[0], train__steps=1, **fields)
    run(config, tmp_path / "run", make_mesh(1, 4, 2))
    one, many = first_row(unbroken), first_row(tmp_path / "run")
    for name in ("policy/grad_norm", "critic/grad_norm", "critic/loss", "reward/mean"):
        assert many[name] == pytest.approx(one[name], rel=1e-4), name
    log = "dialogues/step_000001.jsonl"
    tokens = lambda line: [message["tokens"] for message in json.loads(line)["messages"]]  # noqa: E731
    logs = [[tokens(line) for line in (w / log).open(encoding="utf-8")] for w in (unbroken, tmp_path / "run")]
    assert logs[0] == logs[1]


@pytest.mark.long
def test_it_moves_from_mesh_to_mesh(base, unbroken, tmp_path):
    """One step over eight devices, the next one over two replicas of two by two."""
    one, two = {"mesh__fsdp": 8, "mesh__tensor": 1}, {"mesh__replica": 2, "mesh__fsdp": 2, "mesh__tensor": 2}
    run(config_of(base[0], train__steps=1, **one), tmp_path / "run", make_mesh(1, 8, 1))
    run(config_of(base[0], **two), tmp_path / "run", make_mesh(2, 2, 2))
    rows = [read_metrics(folder / "metrics.jsonl") for folder in (unbroken, tmp_path / "run")]
    for alone, spread in zip(*rows, strict=True):
        for name in ("policy/grad_norm", "critic/grad_norm", "critic/loss", "reward/mean"):
            assert spread[name] == pytest.approx(alone[name], rel=1e-3), name


@pytest.mark.slow
def test_a_base_in_int8_under_a_policy_whose_critic_shares_its_trunk(base, tmp_path):
    rounded = {"policy__param_dtype": "int8", "user__param_dtype": "int8", "critic__kind": "shared"}
    workdir = run(config_of(base[0], train__steps=1, policy__scan_layers=True, **rounded), tmp_path / "run")
    row = first_row(workdir)
    assert abs(row["policy/ratio_max_first"] - 1) < 1e-4
    assert row["policy/reference_kl"] < ROUNDING
    assert row["policy/grad_norm"] > 0
    record = json.loads((workdir / "checkpoints" / "000001" / "record" / "metadata").read_text())["record"]
    critic = {name for name in record["leaves"] if name.startswith("params/critic/")}
    assert critic == {"params/critic/head/kernel", "params/critic/head/bias"}
    assert all("int8" not in leaf["dtype"] for leaf in record["leaves"].values())
    assert export.main([f"--workdir={workdir}", f"--out={tmp_path / 'whole'}", "--merged", "--dtype=float32"]) == 0
    before, whole = load_params(base[0], base[1]), load_params(tmp_path / "whole", base[1])
    moved = np.abs(np.asarray(whole["layer_0"]["up"]["kernel"]) - np.asarray(before["layer_0"]["up"]["kernel"])).max()
    assert 0 < moved < 0.05, "merged into the weights as they were before they were rounded"


@pytest.mark.parametrize(
    "name", ["ppo_think_7b", "ppo_direct_7b", "grpo_think_7b", "grpo_direct_7b", "rlver_plus", "qwen3_8b"]
)
def test_configs_for_7b_have_one_base(name):
    config = importlib.import_module(f"configs.{name}").get_config("lora,challenging")
    config.policy.path = config.user.path = "MODEL"
    assert (config.lora.rank, config.user.style) == (16, "challenging")
    assert shares_base(config)
    assert same_parameters(config.policy, config.user)
    full = importlib.import_module(f"configs.{name}").get_config("challenging")
    assert config.train.learning_rate == pytest.approx(10 * full.train.learning_rate)
    assert (full.lora.rank, full.policy.param_dtype) == (0, "float32")
