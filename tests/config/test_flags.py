"""Entry points keep what they compile, and find the package's configs from anywhere."""

import platform

import jax
import pytest

from configs.base import get_config
from rlver_jax.config.fields import FIELDS, PATHS
from rlver_jax.config.flags import config_from_flags, keep_compiled
from rlver_jax.config.validate import ConfigError, flatten, validate


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


@pytest.mark.parametrize("url", ["https://host/x", "file:///x", "gs:/b/x", "hf://a/b"])
def test_a_url_that_jax_would_fail_at_or_make_a_folder_of(url, monkeypatch):
    monkeypatch.setenv("JAX_COMPILATION_CACHE_DIR", url)
    with pytest.raises(ConfigError, match=f"JAX_COMPILATION_CACHE_DIR={url}: is a URL"):
        config_from_flags(["--config=configs/debug.py"], "")
    monkeypatch.setenv("JAX_COMPILATION_CACHE_DIR", "gs://bucket/x")  # JAX has a way to it
    config_from_flags(["--config=configs/debug.py"], "")


def test_the_home_folder_in_the_environment(folder, monkeypatch, tmp_path):
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.setenv("JAX_COMPILATION_CACHE_DIR", "~/x")
    keep_compiled()
    assert folder() == f"{tmp_path}/x"


def test_flags_in_a_file(tmp_path):
    (tmp_path / "flags").write_text("--config=configs/miniature.py:ppo\n--config.train.steps=3\n")
    config, _, _ = config_from_flags([f"--flagfile={tmp_path}/flags"], "")
    assert (config.algorithm.estimator, config.train.steps) == ("gae", 3)
    (tmp_path / "flags").write_text("--config=gs://bucket/x.py\n")
    with pytest.raises(ConfigError, match="is a URL"):
        config_from_flags([f"--flagfile={tmp_path}/flags"], "")
    with pytest.raises(ConfigError, match=r"Unable to open flagfile.*a flag a line"):
        config_from_flags(["--config=configs/debug.py", f"--flagfile={tmp_path}/none"], "")


NO_CONFIGS = {  # what a file may hold: what is said of it
    "x = 1": "has no attribute 'get_config'; expected a Python file whose get_config",
    "def get_config(arg=''): return None": "its get_config returns None; expected",
    "def get_config(arg=''): return {'a': 1}": "returns {'a': 1}; expected",
    "def get_config(arg=''): raise KeyError('gone')": "KeyError: gone; expected",
    "def get_config(arg=''): raise SystemExit(3)": r"ends the process \(SystemExit: 3\)",
    "def get_config(arg=''): raise ValueError('no\\nsuch: thing')": "cannot be loaded: ValueError: no",
    "def get_config(arg=''": "SyntaxError",
    "from configs import debug\ndef get_config(arg=''):\n c = debug.get_config()\n c.train.steps = 2.5\n return c": (
        "TypeError: Could not override field 'steps'.*2.5"
    ),
    "from ml_collections import ConfigDict as C\ndef get_config(arg=''):\n c = C({'a': 1})\n c[5] = 1\n return c": (
        "no text for its name"
    ),
}


@pytest.mark.parametrize("text", NO_CONFIGS)
def test_files_that_hold_no_config(text, tmp_path):
    (tmp_path / "own.py").write_text(text)
    with pytest.raises(ConfigError, match=NO_CONFIGS[text]) as caught:
        config_from_flags([f"--config={tmp_path}/own.py"], "")
    assert "Traceback" not in str(caught.value)


@pytest.mark.parametrize(
    ("argument", "says"),
    [
        ("configs/debgu.py", "there is no such file; did you mean configs/debug.py?"),
        ("debug", "did you mean configs/debug.py?"),
        ("zzz.py", "the package has configs/base.py, "),
        ("configs", "is a folder; name a Python file"),
        ("", "is empty; name a Python file"),
        ("configs/debug.py:nonsense", "config argument 'nonsense'; expected any of ppo, direct, challenging"),
    ],
)
def test_config_files_that_are_not_there(argument, says, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "configs").mkdir()
    with pytest.raises(ConfigError) as caught:
        config_from_flags([f"--config={argument}"], "")
    assert says in str(caught.value)
    assert "Traceback" not in str(caught.value)


@pytest.mark.parametrize("arguments", [["--config=configs/miniature.py:ppo"], ["--config", "configs/miniature.py:ppo"]])
def test_the_packages_configs_are_found_from_any_folder(arguments, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    config, _, rest = config_from_flags([*arguments, "--config.train.steps=3"], "")
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


@pytest.mark.parametrize("name", flatten(get_config()))
def test_wrong_values_are_refused_by_their_fields_name(name):
    """Of every field: the message names it and holds the value, and nothing but a ConfigError comes out."""
    field = flatten(get_config())[name]
    wrong = WRONG[type(field)]
    if FIELDS[name].choices:
        wrong = ["xyz", "nan", "-1", "1" * 5000]
    elif name in set(PATHS) - {"data.dir", "remote.cache"}:  # these two need not exist
        wrong = ["./no/such", "nan", "x" * 5000, "\0", "no\0such"]  # no/such may be a model of the hub
    for value in wrong:
        with pytest.raises(ConfigError) as caught:
            validate(config_from_flags(["--config=configs/base.py", f"--config.{name}={value}"], "")[0], 8)
        message = str(caught.value)
        assert name in message, message
        assert any(words in message for words in ("expected", "no such", "too long", "zero byte")), message
        assert len(message) < 2000, message
    if (low := FIELDS[name].range[0]) is not None:
        beyond = f"--config.{name}={int(low) - 1 if isinstance(field, int) else low - 1}"
        with pytest.raises(ConfigError, match=rf"{name}=.*expected"):
            validate(config_from_flags(["--config=configs/base.py", beyond], "")[0], 8)


@pytest.mark.parametrize(
    ("override", "says"),
    [
        ("eval.btch=3", "eval.btch=3: unknown field; did you mean eval.batch?"),
        ("checkpoint.keep=3", "checkpoint.keep=3: unknown field; did you mean checkpoint.keep_last?"),
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
        validate(config_from_flags(["--config=configs/base.py", f"--config.{override}"], "")[0], 8)
