"""Files with a byte order mark or Windows' line ends, files that hold nothing, sizes that are no numbers."""

import codecs

import pytest

from rlver_jax import evaluate, report, verify
from rlver_jax.config.files import FOLDER
from rlver_jax.user.prompts import load_prompts

PROMPTS = FOLDER / "debug_world" / "prompts"


def test_prompts_of_other_editors(tmp_path):
    """A mark that is kept would be the first character of a prompt, unseen, and change every reward."""
    for file in PROMPTS.iterdir():
        text = file.read_bytes().replace(b"\r\n", b"\n").replace(b"\n", b"\r\n")
        (tmp_path / file.name).write_bytes(codecs.BOM_UTF8 + text)
    ours, theirs = load_prompts("en", PROMPTS), load_prompts("en", tmp_path)
    assert [theirs.policy_system(mode) for mode in ("think", "direct")] == [
        (PROMPTS / f"policy_{mode}.j2").read_text().strip() for mode in ("think", "direct")
    ]
    assert (theirs.opening, theirs.appraisal, theirs.reply) == (ours.opening, ours.appraisal, ours.reply)
    assert theirs.opening == (PROMPTS / "opening.txt").read_text().strip()


@pytest.mark.parametrize("text", ["", "\n", "\ufeff"])
@pytest.mark.parametrize("command", ["verify", "evaluate"])
def test_logs_without_a_dialogue(command, text, tmp_path, capsys):
    file = tmp_path / "d.jsonl"
    file.write_text(text, encoding="utf-8")
    words = {"verify": [str(file), "--config=configs/debug.py"], "evaluate": [f"--from={file}"]}[command]
    exit_status, status = {"verify": verify, "evaluate": evaluate}[command].main(words), {"verify": 1, "evaluate": 2}
    assert exit_status == status[command]
    told = capsys.readouterr()
    assert str(file) in (told.out if command == "verify" else told.err)


def test_no_file_between_commas(capsys):
    assert evaluate.main(["--from=,"]) == 2
    assert "no dialogue in it" in capsys.readouterr().err


@pytest.mark.parametrize("size", ["inf", "nan"])
def test_sizes_that_are_no_numbers(size, tmp_path, capsys):
    assert report.main([str(tmp_path), f"--out={tmp_path}/r.html", f"--max_mb={size}"]) == 2
    assert f"--max_mb={size}: expected a number" in capsys.readouterr().err
