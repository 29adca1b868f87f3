"""What else is called `configs` where a command runs changes nothing: real processes in such folders."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

from rlver_jax.config import files as config_files
from rlver_jax.config.flags import config_from_flags
from rlver_jax.config.validate import ConfigError

ROOT = Path(config_files.__file__).resolve().parents[2]
OWN = """from configs import base
def get_config(arg=""):
    config = base.get_config(arg)
    config.train.steps = 7
    return config
"""


def foreign(folder, kind):
    """A package, or a module, that has nothing to do with this one and fails when it is imported."""
    if kind == "module":
        (folder / "configs.py").write_text("raise RuntimeError('a foreign module')\n")
        return
    (folder / "configs").mkdir()
    (folder / "configs" / "__init__.py").write_text("raise RuntimeError('a foreign package')\n")
    (folder / "configs" / "base.py").write_text("raise RuntimeError('a foreign base')\n")


def run(folder, *words):
    """As `python -m` does: the working folder comes first on sys.path, the package later."""
    environment = os.environ | {"PYTHONPATH": str(ROOT), "JAX_PLATFORMS": "cpu", "PYTHONIOENCODING": "utf-8"}
    done = subprocess.run([sys.executable, *words], cwd=folder, env=environment, capture_output=True, timeout=300)
    return done.returncode, done.stdout.decode() + done.stderr.decode()


@pytest.mark.parametrize("kind", ["package", "module"])
@pytest.mark.slow
def test_commands_beside_a_foreign_configs(kind, tmp_path):
    foreign(tmp_path, kind)
    status, output = run(tmp_path, "-m", "rlver_jax.train", "--config=configs/grpo_think_7b.py", "--workdir=w")
    assert status == 2, output
    assert "data.train is empty" in output or "mesh.tensor=4: 1 devices" in output, "it was read, and checked"
    (tmp_path / "own.py").write_text(OWN)
    status, output = run(tmp_path, "-m", "rlver_jax.evaluate", "--config=own.py", "--out=o")
    assert (status, "data.eval" in output) == (2, True), output


@pytest.mark.slow
def test_no_command_imports_it(tmp_path):
    foreign(tmp_path, "package")
    code = f"""
import importlib, pathlib, sys
for file in sorted(pathlib.Path({str(ROOT)!r}, "rlver_jax").rglob("*.py")):
    importlib.import_module(".".join(file.relative_to({str(ROOT)!r}).with_suffix("").parts).removesuffix(".__init__"))
assert "configs" not in sys.modules
"""
    assert run(tmp_path, "-c", code) == (0, "")


@pytest.fixture
def folder(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.syspath_prepend(str(tmp_path))
    return tmp_path


def steps(*words):
    return config_from_flags([f"--config={words[0]}", *words[1:]], "")[0].train.steps


def test_a_users_file_means_the_packages_fields(folder):
    foreign(folder, "package")
    (folder / "own.py").write_text(OWN)
    assert steps("own.py") == 7
    assert steps("configs/debug.py") == 6, "of the package: there is no such file here"


def test_a_folder_of_configs_that_was_copied_and_changed(folder):
    """`configs/` is for editing: its files mean each other."""
    (folder / "configs").mkdir()
    (folder / "configs" / "base.py").write_text(
        "from rlver_jax.config import fields as base\n"
        "def get_config(arg=''):\n    c = base.get_config(arg)\n    c.train.steps = 501\n    return c\n"
    )
    (folder / "configs" / "own.py").write_text("from configs import base\nget_config = base.get_config\n")
    assert steps("configs/own.py") == 501
    (folder / "elsewhere.py").write_text("from configs import base\nget_config = base.get_config\n")
    assert steps("elsewhere.py") == 500
    (folder / "configs" / "base.py").unlink()
    (folder / "configs" / "__init__.py").write_text("STEPS = 9\n")
    (folder / "configs" / "own.py").write_text(
        "import configs\nfrom configs import debug\n"
        "def get_config(arg=''):\n    c = debug.get_config(arg)\n    c.train.steps = configs.STEPS\n    return c\n"
    )
    assert steps("configs/own.py") == 9, "its __init__.py counts, and what it lacks is the package's"


def test_a_users_own_modules_beside_the_packages(folder):
    (folder / "configs").mkdir()
    (folder / "configs" / "__init__.py").touch()
    (folder / "configs" / "shared.py").write_text("STEPS = 11\n")
    (folder / "own.py").write_text(
        "from configs import debug, shared\n"
        "def get_config(arg=''):\n    c = debug.get_config(arg)\n    c.train.steps = shared.STEPS\n    return c\n"
    )
    assert steps("own.py") == 11


def test_a_name_that_a_config_file_looks_for_in_vain(folder):
    (folder / "own.py").write_text("from configs import base\nget_config = base.get_confg\n")
    with pytest.raises(ConfigError, match=r"cannot be loaded: AttributeError: module .* has no attribute 'get_confg'"):
        steps("own.py")


def test_modules_are_as_before(folder):
    import configs
    from configs import debug

    foreign(folder, "package")
    steps("configs/ppo_think_7b.py")
    assert sys.modules["configs"] is configs
    assert sys.modules["configs.debug"] is debug
    (folder / "bad.py").write_text("import configs.base\nraise RuntimeError('broken')\n")
    with pytest.raises(ValueError, match="RuntimeError: broken"):
        steps("bad.py")
    assert sys.modules["configs"] is configs
