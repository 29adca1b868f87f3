"""Entry points keep what they compile, and find the package's configs from anywhere."""

import platform

import jax
import pytest

from configs.base import get_config
from rlver_jax.command_line import config_from_flags, keep_compiled
from rlver_jax.config import ConfigError, flatten, validate
from rlver_jax.config_fields import CHOICES, RANGES


@pytest.fixture
def folder():
    """What JAX has been told; put back afterwards."""
    before = jax.config.jax_compilation_cache_dir
    yield lambda: jax.config.jax_compilation_cache_dir
    jax.config.update("jax_compilation_cache_dir", before)


def test_programs_are_kept_in_the_users_cache(folder, tmp_path, monkeypatch):
    monkeypatch.delenv("JAX_COMPILATION_CACHE_DIR")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    keep_compiled()
    assert folder() == str(tmp_path / "rlver_jax" / "compiled" / platform.node())


@pytest.mark.parametrize("named", ["", "elsewhere"])
def test_the_environment_has_the_last_word(folder, named, monkeypatch):
    before = folder()
    monkeypatch.setenv("JAX_COMPILATION_CACHE_DIR", named)
    keep_compiled()
    assert folder() == before


@pytest.mark.parametrize("given", [["--config=configs/miniature.py:ppo"], ["--config", "configs/miniature.py:ppo"]])
def test_the_packages_configs_are_found_from_any_folder(given, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    config, _, rest = config_from_flags([*given, "--config.train.steps=3"], "")
    assert (config.algorithm.estimator, config.train.steps, rest) == ("gae", 3, [])


def test_the_working_folders_config_comes_first(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "configs").mkdir()
    lines = [
        "from configs import base",
        "def get_config():",
        "  c = base.get_config()",
        "  c.train.steps = 7",
        "  return c",
    ]
    (tmp_path / "configs" / "miniature.py").write_text("\n".join(lines))
    assert config_from_flags(["--config=configs/miniature.py"], "")[0].train.steps == 7


NO_NUMBERS = ["", "xyz", "None", "(1, 2)", "[1]", "{}", "'3'"]
WRONG = {  # by the type of a field: what none of its kind may be
    bool: ["", "xyz", "2", "1.5", "nan", "None"],
    int: [*NO_NUMBERS, "1.5", "1e3", "nan", "inf", "True", "1" * 40, "-" + "1" * 40, "1" * 5000],
    float: [*NO_NUMBERS, "True", "nan", "inf", "-inf", "1e400", "1e39", "-1e39", "1" * 5000],
    tuple: [
        *NO_NUMBERS[:4],
        "90.5,70,40,10",
        "100,70,40",
        "100,70,40,10,5",
        "10,40,70,100",
        "100,70,nan,10",
        "((((",
        "1 2",
    ],
    str: [],
}
PATHS = ("policy.path", "user.path", "critic.path", "reference.path", "user.prompts", "data.train", "data.eval")


@pytest.mark.parametrize("name", flatten(get_config()))
def test_wrong_values_are_refused_by_their_fields_name(name):
    """Of every field: the message names it and holds the value, and nothing but a ConfigError comes out."""
    field = flatten(get_config())[name]
    wrong = WRONG[type(field)]
    if name in CHOICES:
        wrong = ["xyz", "nan", "-1", "1" * 5000]
    elif name in PATHS:
        wrong = ["./no/such", "nan", "x" * 5000, "\0", "no\0such"]  # no/such may be a model of the hub
    for value in wrong:
        with pytest.raises(ConfigError) as caught:
            validate(
                config_from_flags(["--config=configs/base.py", f"--config.{name}={value}"], "")[0], get_config(), 8
            )
        message = str(caught.value)
        assert name in message, message
        assert any(words in message for words in ("expected", "no such", "too long", "zero byte")), message
        assert len(message) < 2000, message
    if name in RANGES and RANGES[name][0] is not None:
        low = RANGES[name][0]
        beyond = f"--config.{name}={int(low) - 1 if isinstance(field, int) else low - 1}"
        with pytest.raises(ConfigError, match=rf"{name}=.*expected"):
            validate(config_from_flags(["--config=configs/base.py", beyond], "")[0], get_config(), 8)


@pytest.mark.parametrize(
    ("override", "says"),
    [
        ("eval.btch=3", "eval.btch=3: unknown field; did you mean batch?"),
        ("emotion.thresholds.0=3", "emotion.thresholds.0=3: unknown field"),
        ("policy.path.x=3", "policy.path.x=3: unknown field"),
        ("rollout=3", "--config.rollout=3: .*expected its fields one by one"),
        ("rollout={'batch': 'x'}", "rollout.batch='x': is str, expected int"),
        ("rollout.batch", "Missing value for flag --config.rollout.batch"),
        (".=3", r"unknown field"),
    ],
)
def test_what_is_no_field_is_refused(override, says):
    with pytest.raises(ConfigError, match=says):
        validate(config_from_flags(["--config=configs/base.py", f"--config.{override}"], "")[0], get_config(), 8)
