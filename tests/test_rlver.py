"""`rlver`, as a process: it answers at once, hands on to the commands, and ends as they do."""

import importlib
import os
import re
import resource
import signal
import subprocess
import sys
import time
from importlib import metadata
from pathlib import Path

import pytest

import rlver_jax
from rlver_jax.__main__ import COMMANDS, main
from tests.config.test_paths import COMMANDS as MODULES
from tests.quick import QUICK

ROOT = Path(__file__).resolve().parents[1]
ENVIRONMENT = os.environ | {"PYTHONPATH": str(ROOT), "PYTHONIOENCODING": "utf-8", "COLUMNS": "100"}


def rlver(*words, folder=ROOT, **changes):
    """(exit status, standard output, standard error)."""
    command = [sys.executable, "-m", "rlver_jax", *words]
    environment = {**ENVIRONMENT, **changes}
    done = subprocess.run(command, cwd=folder, env=environment, capture_output=True, text=True, timeout=300)
    return done.returncode, done.stdout, done.stderr


def test_every_command_for_users_is_one_of_rlver():
    known = {f"rlver_jax.{module}" for module in COMMANDS.values()}
    assert {name for name in MODULES if ".miniature." not in name} == known


@pytest.mark.parametrize("words", [[], ["--help"], ["-h"]])
def test_help_describes_each_command(words):
    status, out, err = rlver(*words)
    assert (status, err) == (0, "")
    for name, module in COMMANDS.items():
        docstring = importlib.import_module(f"rlver_jax.{module}").__doc__
        first = docstring.partition("\n")[0]
        assert len(first) < 100, f"{module}: a line of a terminal"
        assert re.search(rf"^ +{name} +{re.escape(first)}$", out, re.MULTILINE), name
        assert f"\n    rlver {name} " in docstring, "the usage as rlver has it"
    assert re.search(r"^ +completion +Prints ", out, re.MULTILINE)


def test_versions():
    status, out, err = rlver("--version")
    assert (status, err) == (0, "")
    python = ".".join(map(str, sys.version_info[:3]))
    assert out == f"rlver_jax {rlver_jax.__version__} · Python {python} · JAX {metadata.version('jax')}\n"


def test_a_clone_in_the_working_folder_hides_the_package_and_says_so(tmp_path):
    """As Python's editable installs look for a package: after the working folder."""
    (tmp_path / "rlver_jax").mkdir()
    main = Path(rlver_jax.__file__).with_name("__main__.py")
    command = [sys.executable, "-c", f"import runpy; runpy.run_path({str(main)!r}, run_name='__main__')"]
    environment = {name: value for name, value in ENVIRONMENT.items() if name != "PYTHONPATH"}
    done = subprocess.run(command, cwd=tmp_path, env=environment, capture_output=True, text=True, timeout=60)
    assert done.returncode == 1
    assert done.stderr.startswith("rlver_jax: the folder rlver_jax in the working folder, probably a clone, hides ")


@pytest.mark.parametrize("word", ["--help", "--version", "nonsense"])
def test_nothing_slow_is_imported_to_say_so(word):
    """Python's own start, and rich: no JAX, no NumPy, no command."""
    code = f"""
import sys
from rlver_jax.__main__ import main
main([{word!r}])
ours = {{name for name in sys.modules if name.startswith("rlver_jax")}}
assert ours == {{"rlver_jax", "rlver_jax.__main__", "rlver_jax.text", "rlver_jax.text.console"}}, ours
assert not {{"jax", "numpy", "absl", "ml_collections", "transformers"}} & set(sys.modules)
"""
    subprocess.run([sys.executable, "-c", code], env=ENVIRONMENT, check=True, capture_output=True)
    before = resource.getrusage(resource.RUSAGE_CHILDREN)
    rlver(word)
    after = resource.getrusage(resource.RUSAGE_CHILDREN)
    seconds = after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime
    print(f"rlver {word}: {seconds:.2f} s of a processor")  # others may hold it up; JAX alone would take a second
    assert seconds < 0.5


@pytest.mark.parametrize(
    ("words", "told"),
    [
        (["trian", "--workdir=x"], "rlver: trian: no such command; did you mean train?\n"),
        (["verfy"], "rlver: verfy: no such command; did you mean verify?\n"),
        (["zzz"], f"rlver: zzz: no such command; the commands are {', '.join(COMMANDS)}, completion\n"),
        (["--config=configs/debug.py"], None),
        ([""], None),
    ],
)
def test_what_is_no_command(words, told, capsys):
    assert main(words) == 2
    out, err = capsys.readouterr()
    assert out == ""
    assert err.count("\n") == 1
    assert err == told or (told is None and err.startswith(f"rlver: {words[0]}: no such command; "))


def test_a_command_gets_its_arguments_and_gives_its_status(tmp_path):
    status, out, err = rlver("report", "nowhere", "--out=r.html", folder=tmp_path)
    assert (status, out) == (2, "")
    assert err.startswith("report: nowhere")
    module = subprocess.run(
        [sys.executable, "-m", "rlver_jax.report", "nowhere", "--out=r.html"],
        cwd=tmp_path, env=ENVIRONMENT, capture_output=True, text=True,
    )  # fmt: skip
    assert (module.returncode, module.stdout, module.stderr) == (status, out, err)


def test_a_command_sets_variables_before_jax_is_imported():
    """`plan` leaves accelerators alone."""
    code = """
import sys
from rlver_jax.__main__ import main
assert main(["plan"]) == 2
import jax
assert jax.config.jax_platforms == "cpu"
"""
    environment = {name: value for name, value in ENVIRONMENT.items() if name != "JAX_PLATFORMS"}
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert done.stderr.startswith("plan: no --config was given; name one")


def test_a_package_that_is_missing_is_named(tmp_path):
    (tmp_path / "absl.py").write_text("raise ModuleNotFoundError('none', name='absl')\n")
    status, out, err = rlver("doctor", PYTHONPATH=f"{tmp_path}:{ROOT}")
    assert (status, out) == (1, "")
    assert err == "rlver doctor: the package absl is not installed; pip install --upgrade -e . in the clone\n"


@pytest.mark.slow
@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_signals_reach_the_training(number, tmp_path):
    """SIGTERM finishes the step and saves, Ctrl-C ends the run at once; as `python -m rlver_jax.train` does."""
    words = ["--config=configs/debug.py:direct", "--config.train.steps=500", "--config.eval.every=0", "--workdir=w"]
    command, environment = [sys.executable, "-m", "rlver_jax", "train", *words], ENVIRONMENT | {"XLA_FLAGS": QUICK}
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True}
    with subprocess.Popen(command, cwd=tmp_path, env=environment, **pipes) as process:
        try:
            deadline, metrics = time.monotonic() + 600, tmp_path / "w" / "metrics.jsonl"
            while not (metrics.exists() and '"step": 1,' in metrics.read_text()):
                assert process.poll() is None, process.stderr.read()
                assert time.monotonic() < deadline
                time.sleep(0.1)
            process.send_signal(number)
            out, err = process.communicate(timeout=300)
        finally:
            process.kill()
    if number == signal.SIGTERM:
        assert process.returncode == 0, err
        assert "of 500 steps" in out
        assert "stopped by a signal: the same command resumes\nw\n" in out
    else:
        assert process.returncode == 130
        assert (
            err.splitlines()[-1]
            == "train: interrupted; the same command resumes in w after the last checkpoint, if there is one"
        )
