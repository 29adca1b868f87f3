"""Entry points keep what they compile."""

import platform

import jax
import pytest

from rlver_jax.command_line import keep_compiled


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
