"""docs/how_to_add.md works as it stands: every section is followed on a copy of the repository, and tests then pass."""

import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
COPIED = ("pyproject.toml", "setup.py", "README.md", "rlver_jax", "configs", "docs", "tests")
# Tests that know all entries of the tables, or read the pages that list them.
KNOWING = (
    *("tests/user/test_prompts.py", "tests/user/test_text_forms.py", "tests/evaluation/test_forms.py"),
    *("tests/evaluation/test_text_forms.py", "tests/evaluation/test_measures.py", "tests/training/test_setup.py"),
    *("tests/rollout/test_rollout_metrics.py", "tests/training/test_metrics_page.py", "tests/reports/test_charts.py"),
)
# What a section tells its reader to do, followed by a block of code.
STEP = re.compile(
    r"^(?:In `(?P<file>[^`]+)`,\s(?P<where>above|below|in place of)\s(?:`` ?(?P<odd>.+?) ?``|`(?P<line>[^`]+)`)"
    r"|New file `(?P<new>[^`]+)`|(?P<run>Run)):\n\n```\w*\n(?P<code>.*?)^```$",
    re.MULTILINE | re.DOTALL,
)


def sections() -> dict[str, list[re.Match[str]]]:
    text = (ROOT / "docs" / "how_to_add.md").read_text(encoding="utf-8")
    titled = re.split(r"^## (.*)$", text, flags=re.MULTILINE)[1:]
    return {title: list(STEP.finditer(body)) for title, body in zip(titled[::2], titled[1::2], strict=True)}


def follow(step: re.Match[str], root: Path) -> Path | None:
    """Does what a step says; returns the file that it changes, if it is one."""
    code = step["code"]
    if step["run"]:
        subprocess.run(["bash", "-euc", code], cwd=root, check=True)
        return None
    file = root / (step["new"] or step["file"])
    if step["new"]:
        assert not file.exists(), f"{file} is there already"
        file.write_text(code, encoding="utf-8")
    else:
        wanted, lines = step["line"] or step["odd"], file.read_text(encoding="utf-8").splitlines(keepends=True)
        matches = [i for i, line in enumerate(lines) if line.strip().startswith(wanted.strip())]
        assert len(matches) == 1, f"{file}: {len(matches)} lines begin with {wanted!r}"
        start = matches[0] + (step["where"] == "below")
        blank = re.match(r"( *)(?:def|async def|class) ", code) if step["where"] == "above" else None
        space = "" if blank is None else "\n" if blank[1] else "\n\n"  # as a reader would leave
        lines[start : matches[0] + (step["where"] != "above")] = [code + space]
        file.write_text("".join(lines), encoding="utf-8")
    return file


def test_every_section_has_steps():
    """And every block of code belongs to a step."""
    steps = sections()
    assert all(steps.values())
    text = (ROOT / "docs" / "how_to_add.md").read_text(encoding="utf-8")
    assert len(re.findall(r"^```$", text, re.MULTILINE)) >= sum(map(len, steps.values())) > 30
    assert text.count("```") == 2 * sum(map(len, steps.values()))


@pytest.mark.slow
def test_followed_word_by_word(tmp_path):
    """All sections one after the other: their tests pass, and so do lint, types and the tests that know all entries."""
    for name in COPIED:
        copy = shutil.copytree if (ROOT / name).is_dir() else shutil.copy
        copy(ROOT / name, tmp_path / name)
    steps = [step for steps in sections().values() for step in steps]
    files = {str(file.relative_to(tmp_path)) for step in steps if (file := follow(step, tmp_path))}
    python = sorted(name for name in files if name.endswith(".py"))
    library = [name for name in python if not name.startswith("tests/")]
    added = [step["new"] for step in steps if (step["new"] or "").startswith("tests/")]
    added += [f"{step['file']}::{name}" for step in steps for name in re.findall(r"^def (test_\w+)", step["code"], re.M)
              if step["file"]]  # fmt: skip
    assert len(added) >= 9
    tests = [*(name for name in added if name.partition("::")[0] not in KNOWING), *KNOWING]
    checks = (["ruff", "check", *python], ["ruff", "format", "--check", *python], ["mypy", *library])
    for command in (*checks, ["pytest", *tests]):
        whole = [sys.executable, "-m", *command]
        environment = os.environ | {"PYTHONPATH": str(tmp_path)}
        done = subprocess.run(whole, cwd=tmp_path, capture_output=True, text=True, env=environment)
        assert done.returncode == 0, done.stdout + done.stderr
