"""Every kind of fault is reported with its field, value and remedy; the shipped configs are valid."""

import importlib.util
from pathlib import Path

import pytest
from ml_collections import ConfigDict

from configs.base import get_config
from rlver_jax.config.fields import FIELDS, FREE_FIELDS, TABLE
from rlver_jax.config.schema import AllBut, Field, flat_fields, free_names, listing, without_effect
from rlver_jax.config.validate import ConfigError, flatten, validate
from rlver_jax.parallel.mesh import ATTENTION_DATA, AXES

CONFIGS = sorted(Path(__file__).resolve().parents[2].joinpath("configs").glob("[!_]*.py"))


def changed(**fields):
    config = get_config()
    for name, value in fields.items():
        with config.unlocked(), config.ignore_type():
            config.update_from_flattened_dict({name.replace("__", "."): value})
    return config


def faults(config, devices=None):
    with pytest.raises(ConfigError) as error:
        validate(config, devices)
    return str(error.value)


@pytest.mark.parametrize("path", CONFIGS, ids=lambda p: p.name)
def test_shipped_configs_are_valid(path):
    spec = importlib.util.spec_from_file_location(path.stem, path)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    validate(module.get_config(), 8)
    assert "python -m rlver_jax." in module.__doc__, "the docstring holds the command"
    validate(module.get_config("challenging"), 8)
    assert module.get_config("challenging").user.style == "challenging"


@pytest.mark.parametrize("name", FIELDS)
def test_every_field_says_what_it_means_and_may_hold(name):
    field = FIELDS[name]
    assert field.doc
    assert not field.choices or field.default in field.choices, "the default is a choice"
    low, high = field.range
    assert low is None or low <= field.default
    assert high is None or field.default <= high
    number = isinstance(field.default, int | float) and not isinstance(field.default, bool)
    assert number == (low is not None), "every number has a lower bound, and nothing else has one"
    for other, unused in field.unused.items():
        values = unused.values if isinstance(unused, AllBut) else unused
        assert {type(value) for value in values} == {type(FIELDS[other].default)}
        assert not FIELDS[other].choices or set(values) < set(FIELDS[other].choices)
        assert not FIELDS[other].registry or set(values) < {"gae", "ppo", "grpo", "rloo", "reinforce_pp"}


def test_meshes_have_all_axes():
    """The table itself imports no JAX, so that profiles are prepared and read without it (tests/profiles)."""
    assert tuple(TABLE["mesh"]) == AXES
    assert set(TABLE["mesh_sampling"]) == {*AXES, ATTENTION_DATA}


def test_fields_that_may_change_between_the_parts_of_a_run():
    """None of them changes what is computed, beyond rounding; a section stands for all its fields."""
    assert sorted(FREE_FIELDS) == sorted(
        [
            "train.steps",
            "checkpoint",
            "log",
            "alarms",
            "mesh",
            "mesh_sampling",
            "rollout.rows",
            "eval.rows",
            "eval.relationship",
            "policy.remat",
            "critic.remat",
            "train.microbatches",
            "loss.vocab_chunk",
        ]
        + [f"remote.{name}" for name in ("concurrency", "timeout", "deadline", "budget", "unanswered_max")]
        + [f"remote.{side}.price_{way}" for side in ("policy", "user") for way in ("in", "out")]
    )
    table = {"a": {"x": Field(1, "", free=True)}, "b": {"x": Field(1, "", free=True), "y": Field(1, "")}}
    assert free_names(table) == ("a", "b.x")


def test_a_field_is_one_entry():
    """Type, choices, range, unit and help are read off it."""
    table = {**TABLE, "loss": {**TABLE["loss"], "margin": Field(0.5, "how far", range=(0, 1), unit="nats")}}
    assert dict(flat_fields(table))["loss.margin"].unit == "nats"
    assert "  --config.loss.margin=0.5 (≥ 0 and ≤ 1 nats): how far\n" in listing(table)
    assert "--config.policy.mode='think' (think | direct): think:" in listing(table)
    assert "--config.loss.ratio='token' (a name in rlver_jax/learning/loss_terms.py:RATIOS): " in listing(table)


def test_what_is_without_effect():
    values = flatten(get_config())
    assert not [*without_effect(TABLE, values, ["algorithm.lam", "algorithm.gamma", "critic.learning_rate"])]
    assert [*without_effect(TABLE, values | {"algorithm.estimator": "grpo"}, ["train.seed", "algorithm.lam"])] == [
        "--config.algorithm.lam is without effect where algorithm.estimator='grpo'"
    ]
    read_by_others = ["algorithm.credit", "algorithm.scale", "algorithm.whiten", "critic.learning_rate"]
    new = [
        *without_effect(TABLE, values | {"algorithm.estimator": "brand_new"}, ["algorithm.estimator", *read_by_others])
    ]
    assert new == [
        f"--config.{name} is without effect where algorithm.estimator='brand_new'" for name in read_by_others
    ]
    told = [*without_effect(TABLE, values, ["algorithm.turn_discount", "loss.kl_estimator", "no.such"])]
    assert told == [
        "--config.algorithm.turn_discount is without effect where algorithm.estimator='gae'",
        "--config.algorithm.turn_discount is without effect where algorithm.credit='dialogue'",
        "--config.loss.kl_estimator is without effect where loss.kl=0.0",
    ]


@pytest.mark.parametrize(
    ("fields", "parts"),
    [
        ({"rollout__bacth": 3}, ["rollout.bacth=3", "unknown field", "did you mean rollout.batch?"]),
        ({"train__padding": 1.5}, ["train.padding=1.5", "0 to 1"]),
        ({"alarms__ratio_max": 0.5}, ["alarms.ratio_max=0.5", "or 0 for none"]),
        ({"policy__mode": "thikn"}, ["policy.mode='thikn'", "think, direct", "did you mean 'think'"]),
        ({"rollout__top_p": 1.5}, ["rollout.top_p=1.5", "0 to 1"]),
        ({"rollout__rows": -1, "eval__rows": -2}, ["rollout.rows=-1", "eval.rows=-2", "at least 0 dialogues"]),
        ({"rollout__batch": 0}, ["rollout.batch=0", "at least 1 dialogues"]),
        ({"rollout__batch": "many"}, ["rollout.batch='many'", "is str, expected int"]),
        ({"rollout__group": 5}, ["rollout.batch=32", "multiple of rollout.group=5", "choose 30"]),
        ({"emotion__thresholds": (100, 40, 70, 10)}, ["emotion.thresholds=(100, 40, 70, 10)", "falling"]),
        *(
            ({"emotion__thresholds": wrong}, [f"emotion.thresholds={wrong!r}", "four falling whole numbers"])
            for wrong in [
                (90.5, 70, 40, 10),
                (90, 70, 40),
                (101, 70, 40, 10),
                (100, 70, 40, 0),
                ("a", "b", "c", "d"),
                (),
            ]
        ),
        ({"loss__kl": float("nan")}, ["loss.kl=nan", "at least 0 and at most 3.40"]),
        ({"train__learning_rate": float("inf")}, ["train.learning_rate=inf", "at most 3.40"]),
        ({"train__steps": 2**31}, ["train.steps=2147483648", "at most 2147483647"]),
        ({"mesh__fsdp": -2}, ["mesh.fsdp=-2", "at least -1 devices"]),
        ({"policy__path": "x" * 300}, ["policy.path='xxx", "too long"]),
        ({"train__minibatches": 0}, ["train.minibatches=0", "at least 1 updates"]),
        ({"emotion__initial": 5}, ["emotion.initial=5", "emotion.floor=9"]),
        (
            {"rollout__context": 4096},
            ["rollout.context=4096", "rollout.max_turns=8", "rollout.say_tokens=512", "5632"],
        ),
        ({"policy__path": "/no/such"}, ["policy.path='/no/such'", "no such folder"]),
        ({"data__train": "/no/such.jsonl"}, ["data.train", "/no/such.jsonl is not a file"]),
    ],
)
def test_faults(fields, parts):
    message = faults(changed(**fields))
    for part in parts:
        assert part in message, message


@pytest.mark.parametrize(
    ("fields", "parts"),
    [
        ({"mesh__fsdp": 3}, ["mesh.fsdp=3", "product 3, but there are 8 devices"]),
        ({"mesh__fsdp": -1, "mesh__tensor": -1}, ["at most one of them -1"]),
        ({"rollout__batch": 12}, ["rollout.batch=12", "mesh.replica x mesh.fsdp = 8", "choose 16"]),
        ({"rollout__rows": 12}, ["rollout.rows=12", "mesh.replica x mesh.fsdp = 8", "choose 16"]),
        ({"mesh_sampling__tensor": 3}, ["mesh_sampling.fsdp=8, mesh_sampling.tensor=3: product 24, but there are 8"]),
        (
            {"mesh__tensor": 8, "mesh_sampling__fsdp": 8, "mesh_sampling__tensor": 1, "eval__batch": 12},
            ["eval.batch=12", "mesh_sampling.replica x mesh_sampling.fsdp = 8", "choose 16"],
        ),
        (
            {"mesh__tensor": 8, "mesh_sampling__fsdp": 2, "mesh_sampling__tensor": 2, "eval__batch": 6}
            | {"mesh_sampling__attention_data": 2},
            ["eval.batch=6", "mesh_sampling.fsdp x mesh_sampling.attention_data = 4", "choose 8"],
        ),
    ],
)
def test_mesh_faults(fields, parts):
    message = faults(changed(**fields), devices=8)
    for part in parts:
        assert part in message, message


def test_limits_of_dialogues_that_nobody_plays_are_not_looked_at():
    config = get_config()
    config.rollout.max_turns, config.rollout.batch, config.rollout.group = 500, 7, 2
    with pytest.raises(ConfigError, match=r"max_turns=500(?s:.)*rollout.batch=7"):
        validate(config)
    validate(config, plays=())


def test_limits_of_an_evaluation_that_a_training_does_not_play_are_not_looked_at():
    config = changed(eval__max_turns=500)
    with pytest.raises(ConfigError, match="eval.max_turns=500"):
        validate(config)
    validate(config, plays=("rollout",))


def test_all_faults_are_listed_at_once():
    message = faults(changed(policy__mode="x", rollout__top_k=-1, emotion__initial=100))
    assert message.count("\n  - ") == 3


def test_a_missing_field_is_named():
    config = ConfigDict(get_config().to_dict())
    del config.emotion["floor"]
    assert "emotion.floor: missing" in faults(config)


@pytest.mark.parametrize(
    "url",
    [
        *("http://127.0.0.1:99999/v1", "http://h:port", "http://h:-5", "http://[::1/v1", "http://a b/v1", "http://"),
        *("127.0.0.1:8000/v1", "ftp://h", "http://ex..ample/v1", "http:///v1", "localhost", "http://h:0"),
    ],
)
def test_what_is_no_address_of_an_endpoint(url):
    """Each would be asked until the deadline, or end in an OverflowError of asyncio's."""
    config = get_config()
    config.remote.user.url, config.remote.user.model = url, "m"
    assert f"remote.user.url={url!r}: expected the base address" in faults(config)


@pytest.mark.parametrize(
    "url", ["http://[::1]:80/v1", "http://[fe80::1%eth0]/v1", "http://münchen.example", "http://a_b"]
)
def test_addresses_of_endpoints(url):
    config = get_config()
    config.remote.user.url, config.remote.user.model = url, "m"
    validate(config)


@pytest.mark.parametrize("url", ["http://me:pa/ss@h/v1", "http://me:secret@h:port", "http://h/v1?key=secret"])
def test_an_address_with_a_secret_is_not_repeated(url):
    config = get_config()
    config.remote.user.url, config.remote.user.model = url, "m"
    assert "remote.user.url: holds a user" in (told := faults(config))
    assert "secret" not in told
    assert "pa/ss" not in told


@pytest.mark.parametrize(("field", "value"), [("beta1", 1.0), ("beta2", 1.0), ("adam_eps", 0.0)])
def test_values_that_adam_would_divide_by_zero_with(field, value):
    config = get_config()
    config.train[field] = value
    assert f"train.{field}={value}: expected" in faults(config)
