"""Whatever stdout and stderr can or cannot take, commands do their work: real processes with such streams."""

import json
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
from rich.table import Table
from rich.text import Text

from rlver_jax.text.console import consoles
from tests.config.test_paths import COMMANDS
from tests.quick import QUICK

ROOT = Path(__file__).resolve().parents[2]
PLAIN = {"LC_ALL": "C", "PYTHONUTF8": "0", "PYTHONCOERCECLOCALE": "0"}  # an ASCII locale that Python doesn't correct
ENCODINGS = [PLAIN, *({"PYTHONIOENCODING": name} for name in ("gbk", "latin-1", "ascii", "ascii:strict"))]
# Says more than a pipe holds, then shows that it came to its end.
TALKER = """
import os, sys
from rlver_jax.text.console import consoles
console, errors = consoles()
for _ in range(9):
    console.print("\\n".join(["情绪 42 → 52 · é"] * 1000), markup=False, highlight=False, soft_wrap=True)
errors.print("talker: 出错了 …")
open("done", "w").write(" ".join(str(os.fstat(n).st_rdev) for n in (0, 1, 2)))
"""


def start(words, folder, changes, **streams):
    inherited = {
        name: value for name, value in os.environ.items() if name not in ("PYTHONIOENCODING", "COLUMNS", "LINES")
    }
    pipes = {"stdin": subprocess.DEVNULL, "stdout": subprocess.PIPE, "stderr": subprocess.PIPE} | streams
    environment = inherited | {"PYTHONPATH": str(ROOT), "JAX_PLATFORMS": "cpu", "XLA_FLAGS": QUICK} | changes
    return subprocess.Popen(words, cwd=folder, env=environment, **pipes)


def run(words, folder, changes=None, **streams):
    with start(words, folder, changes or {}, **streams) as process:
        out, err = process.communicate(timeout=300)
    return process.returncode, out, err


@pytest.fixture(scope="module")
def talker(tmp_path_factory):
    file = tmp_path_factory.mktemp("talker") / "talker.py"
    file.write_text(TALKER, encoding="utf-8")
    return [sys.executable, str(file)]


@pytest.mark.parametrize("changes", ENCODINGS, ids=str)
def test_characters_that_an_encoding_lacks(changes, talker, tmp_path):
    status, out, err = run(talker, tmp_path, changes)
    assert status == 0, err
    encoding = changes.get("PYTHONIOENCODING", "ascii").split(":")[0]
    line = "情绪 42 → 52 · é".encode(encoding, "backslashreplace")
    assert out.splitlines() == [line] * 9000
    assert err.strip() == "talker: 出错了 …".encode(encoding, "backslashreplace")


def test_a_handler_of_the_users_own_is_left(talker, tmp_path):
    assert run(talker, tmp_path, {"PYTHONIOENCODING": "ascii:replace"})[1].splitlines()[0] == b"?? 42 ? 52 ? ?"


@pytest.mark.parametrize("closed", ["1", "2", "12", "012"])
def test_closed_streams(closed, talker, tmp_path):
    """A file that is opened later doesn't take the stream's number, or what is said would lie in it."""
    words = " ".join(f"{number}>&-" for number in closed)
    shell = ["bash", "-c", f'exec "$0" "$1" {words}', *talker]
    status, _, err = run(shell, tmp_path)
    assert status == 0, err
    null = str(os.stat(os.devnull).st_rdev)
    targets = (tmp_path / "done").read_text().split()
    assert all(targets[int(number)] == null for number in closed)


def test_a_reader_that_goes(talker, tmp_path):
    with start(talker, tmp_path, {"PYTHONIOENCODING": "utf-8"}) as process:
        process.stdout.readline()
        process.stdout.close()
        told = process.stderr.read().decode()
    assert process.returncode == 0
    assert told.strip() == "talker: 出错了 …", "the reader meant to go: nothing is said of it"
    assert (tmp_path / "done").exists()


def test_both_streams_in_one_broken_pipe(talker, tmp_path):
    shell = ["bash", "-c", '"$0" "$1" 2>&1 | head -n 1; exit ${PIPESTATUS[0]}', *talker]
    assert run(shell, tmp_path)[0] == 0
    assert (tmp_path / "done").exists()


@pytest.mark.skipif(not os.path.exists("/dev/full"), reason="there is no /dev/full")
def test_a_full_disk(talker, tmp_path):
    with open("/dev/full", "wb") as full:
        status, _, err = run(talker, tmp_path, {"PYTHONIOENCODING": "utf-8"}, stdout=full)
        assert status == 0
        assert err.decode().splitlines() == [
            "standard output cannot be written to (No space left on device); continuing without it",
            "talker: 出错了 …",
        ]
        assert run(talker, tmp_path, stdout=full, stderr=full)[0] == 0


@pytest.mark.parametrize(
    ("changes", "width"),
    [
        ({}, 200),  # a file: no cell of a table is cut short
        ({"COLUMNS": "1"}, 80),
        ({"COLUMNS": "0"}, 80),
        ({"COLUMNS": "²"}, 80),
        ({"LINES": "0"}, 200),
        ({"COLUMNS": "33"}, 33),
    ],
    ids=str,
)
def test_sizes_that_nobody_could_read(changes, width, tmp_path):
    code = "from rlver_jax.text.console import consoles; c, e = consoles(); c.rule('x'); print(c.width, e.width)"
    status, out, err = run([sys.executable, "-c", code], tmp_path, changes | {"PYTHONIOENCODING": "utf-8"})
    assert (status, out.decode().splitlines()[-1]) == (0, f"{width} {width}"), err


def test_input_of_any_encoding(tmp_path):
    code = "from rlver_jax.text.console import consoles; consoles(); print(ascii(input()), ascii(input()))"
    for changes, expected in [(PLAIN, "'h\\xe9' '\\ufffd!'"), ({"PYTHONIOENCODING": "utf-8"}, "'h\\xe9' '\\ufffd!'")]:
        with start([sys.executable, "-c", code], tmp_path, changes, stdin=subprocess.PIPE) as process:
            out, err = process.communicate(b"h\xc3\xa9\n\xff!\n", timeout=60)
        assert out.decode().strip() == expected, err


def test_a_program_that_has_read_its_input_calls_a_command(tmp_path):
    code = (
        "input(); from rlver_jax.text.console import consoles; "
        "consoles()[0].print('file:x:1', markup=False); print(input())"
    )
    with start([sys.executable, "-c", code], tmp_path, {}, stdin=subprocess.PIPE) as process:
        out, err = process.communicate(b"a\nb\n", timeout=60)
    assert out.split() == [b"file:x:1", b"b"], err  # rich's `:x:` is a picture


@pytest.mark.parametrize("changes", ENCODINGS[:2], ids=str)
def test_every_command_speaks_in_every_encoding(changes, tmp_path):
    """Its help, which has dashes and dots that ASCII lacks, and a message about a file with a Chinese name."""
    code = f"""
import importlib, sys
for name in {COMMANDS}:
    main = importlib.import_module(name).main
    try:
        main(["--help"])
    except SystemExit as end:
        assert end.code == 0
    assert main(["--没有=…"]) == 2
"""
    (tmp_path / "all.py").write_text(code, encoding="utf-8")
    status, out, err = run([sys.executable, "all.py"], tmp_path, changes)
    assert status == 0, err
    assert out.count(b"--help: show this text") == len(COMMANDS)
    assert err.count(b"Unknown command line flag") == len(COMMANDS), err


NAMELESS = """
import pwd, runpy, sys
def nobody(*_):
    raise KeyError("uid not found")
pwd.getpwuid = nobody  # a container's user without a name
sys.argv = sys.argv[1:]
runpy.run_module(sys.argv[0], run_name="__main__", alter_sys=True)
"""
DEBUG = ["--config=configs/debug.py:direct", "--config.train.steps=1", "--config.eval.every=0"]


@pytest.mark.slow
def test_a_training_without_a_home(tmp_path):
    changes = {"XDG_CACHE_HOME": "", "HOME": ""}
    words = ["env", "-u", "HOME", "-u", "JAX_COMPILATION_CACHE_DIR", sys.executable, "-c", NAMELESS]
    status, out, err = run([*words, "rlver_jax.train", *DEBUG, "--workdir=w"], tmp_path, changes)
    assert status == 0, err
    assert b"1 of 1 steps" in out
    assert b"JAX_COMPILATION_CACHE_DIR names one" in err


@pytest.mark.slow
@pytest.mark.parametrize("changes", [PLAIN, pytest.param({"PYTHONIOENCODING": "gbk"}, marks=pytest.mark.long)], ids=str)
def test_the_whole_chain_in_a_strange_encoding(changes, tmp_path):
    config, module = DEBUG[:1], [sys.executable, "-m"]
    play = [*config, "--config.eval.max_turns=1", "--config.eval.num_profiles=2"]
    for words in (
        ["rlver_jax.train", *DEBUG, "--config.log.dialogues_every=1", "--workdir=w"],
        ["rlver_jax.evaluate", *play, "--checkpoint=w", "--out=e"],
        ["rlver_jax.verify", "e/dialogues.jsonl", *play],
        ["rlver_jax.report", "w", "e", "--out=r.html", "--curve=c.svg"],
        ["rlver_jax.export", "--workdir=w", "--out=x"],
        ["rlver_jax.chat", *play, "--out=t.jsonl"],
    ):
        status, _, err = run([*module, *words], tmp_path, changes)
        assert status == 0, (words, err)
    texts = [file for file in tmp_path.rglob("*") if file.suffix in (".json", ".jsonl", ".html", ".svg")]
    assert len(texts) > 6
    for file in texts:
        file.read_bytes().decode("utf-8")
    assert "·" in (tmp_path / "r.html").read_text(encoding="utf-8")


@pytest.mark.slow
def test_a_training_whose_output_is_closed(tmp_path):
    """What was written to the run's files is the run's alone."""
    command = [sys.executable, "-m", "rlver_jax.train", *DEBUG, "--config.log.dialogues_every=1", "--workdir=w"]
    assert run(["bash", "-c", '"$@" 1>&- 2>&-', "x", *command], tmp_path)[0] == 0
    code = "from rlver_jax.training.metrics_file import read_metrics; from pathlib import Path\n"
    code += "from rlver_jax.dialogues.log import read_dialogues\n"
    code += "print(len(read_metrics(Path('w/metrics.jsonl'))), len(read_dialogues('w/dialogues/step_000001.jsonl')))"
    status, out, err = run([sys.executable, "-c", code], tmp_path)
    assert (status, out.split()) == (0, [b"1", b"8"]), err


def test_help_of_a_python_without_docstrings(tmp_path):
    status, out, err = run([sys.executable, "-OO", "-m", "rlver_jax.bench", "--help"], tmp_path)
    assert status == 0, err
    assert b"--json: file for all results" in out


def test_what_is_printed_moves_no_cursor_and_turns_no_line(tmp_path):
    """Names and texts of files, in tables and messages."""
    nasty = "\x1b]0;title\x07\x1b[2Jgood\u202e\x9b31m"
    log = tmp_path / f"{nasty}.jsonl"
    turn = {"change": 5}
    history = [{"role": "user", "content": "a", "emotion-point": 40}, {"role": "assistant", "content": "b"}]
    history += [{"role": "user", "content": "c", "thinking": "", "emotion-point": 99, "planning": turn}]
    profile = dict.fromkeys(("player", "scene", "task", "character", "topic"), nasty)
    log.write_text(json.dumps(profile | {"id": nasty, "emo_point": 99, "history": history}) + "\n")
    code = "import sys; from rlver_jax.evaluate import main; sys.exit(10 * main(sys.argv[1:2]) + main(sys.argv[2:]))"
    command = [sys.executable, "-c", code, f"--from={log}", f"--from={log}x"]
    env = os.environ | {"PYTHONPATH": str(ROOT)}
    done = subprocess.run(command, env=env, capture_output=True, text=True, check=False)
    assert done.returncode == 12, done.stderr  # a fault, then a file that is missing
    assert "fault: " in done.stdout
    for shown in (done.stdout, done.stderr):
        assert "good" in shown
        assert not UNSEEN.findall(shown)


UNSEEN = re.compile(r"[\x00-\x08\x0b-\x1f\x7f-\x9f\u200b\u202a-\u202e\u2066-\u2069\ud800-\udfff]")


def test_a_console_has_its_own_colours_and_movements_only(monkeypatch, capsys):
    monkeypatch.setenv("FORCE_COLOR", "1")
    console, _ = consoles()
    table = Table("\x1b[2Ja\u202e")
    table.add_row(Text("\x9b31m\ud800b\x00\u200b", "red"), "[green]c[/]\x1b[0m\r")
    console.print(table)
    console.print("\x1b]0;title\x07d", markup=False, highlight=False)
    shown = capsys.readouterr().out
    assert re.search(r"\x1b\[[0-9;]*m", shown), "coloured"
    left = re.sub(r"\x1b\[(31|32|1|0|1;3\d)m", "", shown)
    assert not UNSEEN.findall(left)
    for text in ("[2Ja", "31mb", "c[0m", "]0;titled"):
        assert text in left
