"""Entry points keep what they compile, and find the package's configs from anywhere."""

import platform

import jax
import pytest

from rlver_jax.command_line import config_from_flags, keep_compiled


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
