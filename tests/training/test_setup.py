"""How a run's rows are read: lengths that may be compiled, and what one device holds of a microbatch."""

import importlib

import jax
import numpy as np
import pytest

from configs import debug
from rlver_jax.config.fields import FIELDS
from rlver_jax.config.validate import ConfigError
from rlver_jax.decoding.cache import LM
from rlver_jax.learning.advantages import ESTIMATORS, Advantages, Estimator, broadcast
from rlver_jax.learning.loss_terms import KL_ESTIMATORS, NORMALIZATIONS, RATIOS
from rlver_jax.learning.sequences import max_length
from rlver_jax.models.families import Qwen2Config
from rlver_jax.models.qwen import Qwen2
from rlver_jax.parallel.mesh import make_mesh
from rlver_jax.rollout.agents import Agents
from rlver_jax.rollout.spec import RolloutConfig
from rlver_jax.training.setup import (
    REGISTRIES,
    build_run,
    check_learning,
    dialogues_a_row,
    has_critic,
    microbatches_at_most,
    models_of,
    row_lengths,
)


def config_of(**fields):
    config = debug.get_config()
    config.update_from_flattened_dict({name.replace("__", "."): x for name, x in fields.items()})
    return config


@pytest.mark.parametrize(
    ("fields", "devices", "fit", "expected"),
    [
        ({}, 1, 2, 4),  # eight rows at a time otherwise: now one of twice the length, four times
        ({}, 4, 2, 1),
        ({}, 8, 1, 1),  # a row for each device, and no room for more
        ({"train__microbatches": 2}, 4, 1, 2),
        ({"train__microbatches": 8}, 1, 1, 8),
        ({"train__share_rows": False, "train__microbatches": 2}, 1, 1, 2),
    ],
)
def test_a_device_never_reads_more_at_a_time_than_it_has_room_for(fields, devices, fit, expected):
    config, mesh = config_of(**fields), make_mesh(1, devices, 1, devices=jax.devices()[:devices])
    assert dialogues_a_row(config, mesh) == fit
    assert microbatches_at_most(config, mesh, config.rollout.batch) == expected


def test_lengths_are_spread_up_to_the_longest_row(bpe, prompts):
    spec = RolloutConfig(
        mode="think", enforce_format=False, group=1, max_turns=2, context=768, think_tokens=24, say_tokens=12,
        user_tokens=8,
    )  # fmt: skip
    lm = LM({}, Qwen2(Qwen2Config(bpe.vocab_size, 8, 8, 1, num_heads=1, num_kv_heads=1, head_dim=8)))
    agents = Agents.build(lm, lm, bpe, prompts, spec, style="vanilla", scenario="heart_to_heart")
    longest = max_length(agents.tables[0], spec, 10)
    one = make_mesh(1, 1, 1, devices=jax.devices()[:1])
    for fields, most in (({}, 2 * longest), ({"train__share_rows": False}, longest)):
        lengths = np.array(row_lengths(config_of(train__length_buckets=8, **fields), agents, 10, one))
        assert not (lengths % 64).any()
        assert most <= lengths[-1] < most + 64
        assert (lengths[1:] <= np.maximum(lengths[:-1] * 9 / 8, lengths[:-1] + 64)).all(), "an eighth more, or 64"
        assert (np.diff(lengths) > 0).all()
    lengths = row_lengths(config_of(train__length_buckets=1), agents, 10, one)
    assert lengths[:-1] == tuple(64 << i for i in range(len(lengths) - 1))


def test_kernels_for_tpu_are_refused_elsewhere():
    config = config_of(critic__attention="splash")
    with pytest.raises(ValueError, match="critic.attention='splash' is made of kernels for TPU, but the devices are"):
        build_run(config, make_mesh(1, 1, 1, devices=jax.devices()[:1]))


def without_groups():
    """The estimators that compare no dialogues of one profile, as messages list them."""
    names = " or ".join(name for name, estimator in ESTIMATORS.items() if not estimator.needs_group)
    assert "gae or reinforce_pp or ppo" in names
    return names


@pytest.mark.parametrize(
    ("table", "names"),
    [
        (ESTIMATORS, "gae, grpo, rloo, reinforce_pp, ppo"),
        (NORMALIZATIONS, "token_mean, turn_mean, dialogue_mean, dr_grpo"),
        (KL_ESTIMATORS, "k1, k2, k3"),
        (RATIOS, "token, sequence"),
    ],
)
def test_names_that_configs_use_stay_in_their_tables(table, names):
    assert ", ".join(name for name in table if name in names.split(", ")) == names


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"algorithm__estimator": "grop"}, f"algorithm.estimator='grop': expected one of {', '.join(ESTIMATORS)};"
         " did you mean 'grpo'?"),
        ({"loss__normalization": "mean"}, f"loss.normalization='mean': expected one of {', '.join(NORMALIZATIONS)}"),
        ({"loss__kl_estimator": "k4"}, f"loss.kl_estimator='k4': expected one of {', '.join(KL_ESTIMATORS)}"),
        ({"loss__ratio": "dialogue"}, f"loss.ratio='dialogue': expected one of {', '.join(RATIOS)}"),
        ({"algorithm__estimator": "rloo", "rollout__group": 1}, "algorithm.estimator='rloo' compares dialogues of one"
         f" profile, but rollout.group=1; raise rollout.group (RLVER: 4 with GRPO), or use {without_groups()}"),
    ],
)  # fmt: skip
def test_names_in_registries_are_checked_before_anything_is_loaded(fields, message):
    with pytest.raises(ConfigError) as error:
        check_learning(config_of(**fields))
    assert f"\n  - {message}" in str(error.value)


@pytest.mark.parametrize("command", ["train", "plan"])
def test_commands_refuse_an_unknown_estimator(command, capsys, tmp_path):
    flags = {"train": [f"--workdir={tmp_path / 'run'}"], "plan": ["--topology=v5e:2x4", "--config.policy.size=0.5b"]}
    main = importlib.import_module(f"rlver_jax.{command}").main
    assert main(["--config=configs/debug.py", "--config.algorithm.estimator=grop", *flags[command]]) == 2
    expected = f"algorithm.estimator='grop': expected one of {', '.join(ESTIMATORS)}"
    assert expected in (told := capsys.readouterr().err)
    assert told.startswith(f"{command}: ")
    assert not (tmp_path / "run").exists()


def test_registries_are_those_that_the_fields_name():
    assert set(REGISTRIES) == {name for name, field in FIELDS.items() if field.registry}
    for name, registry in REGISTRIES.items():
        assert FIELDS[name].default in registry
        file, _, attribute = FIELDS[name].registry.partition(":")
        module = importlib.import_module(file.removesuffix(".py").replace("/", "."))
        assert getattr(module, attribute) is registry


def test_all_faults_are_told_at_once():
    with pytest.raises(ConfigError) as error:
        check_learning(config_of(algorithm__estimator="x", loss__ratio="y"))
    assert str(error.value).count("\n  - ") == 2


def test_a_new_estimator_is_an_entry_of_the_table(monkeypatch):
    """Its name, and what it needs, are known to the config's check and to what loads models."""

    def compute(config, inputs):
        return Advantages(broadcast(inputs.rewards.reward, inputs.mask), None)

    monkeypatch.setitem(ESTIMATORS, "plain", Estimator(compute))
    monkeypatch.setitem(ESTIMATORS, "paired", Estimator(compute, needs_critic=True, needs_group=True))
    check_learning(config_of(algorithm__estimator="plain", rollout__group=1))
    assert models_of(config_of(algorithm__estimator="plain")) == ["policy", "user"]
    assert without_groups().endswith(" or plain")
    with pytest.raises(ConfigError, match=f"estimator='paired' compares .* or use {without_groups()}$"):
        check_learning(config_of(algorithm__estimator="paired", rollout__group=1))
    assert has_critic(config_of(algorithm__estimator="paired"))


def test_fields_reach_the_update_by_their_names():
    """What a config says is what the update is compiled for."""
    fields = {
        "algorithm__lam": 0.9, "loss__clip_high": 0.28, "loss__value_weight": 0.7, "loss__recompute": True,
        "loss__vocab_chunk": 77, "train__epochs": 3, "critic__warmup_steps": 5, "rollout__temperature": 0.8,
        "emotion__floor": 5,
    }  # fmt: skip
    config = debug.get_config("ppo")
    config.update_from_flattened_dict({name.replace("__", "."): x for name, x in fields.items()})
    run, state = build_run(config, make_mesh(1, 1, 1, devices=jax.devices()[:1]))
    setup, loss = run.setup, run.setup.models.loss
    assert (setup.advantage.lam, setup.advantage.group) == (0.9, config.rollout.group)
    assert (loss.clip_high, loss.value_weight, loss.ratio) == (0.28, 0.7, "token")
    assert loss.length == config.rollout.max_turns * run.agents.spec.policy_tokens
    assert (setup.models.vocab_chunk, setup.models.temperature) == (77, 0.8)
    assert (setup.update.recompute, setup.update.epochs, setup.update.critic_warmup_steps) == (True, 3, 5)
    assert (run.agents.spec.rules.floor, run.agents.spec.rules.initial) == (5, config.emotion.initial)
    assert set(state.params) == {"policy", "critic"}
