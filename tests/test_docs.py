"""What the documents name is there: files and what they define, links between pages, headings, packages by layer."""

import ast
import functools
import re
import tomllib
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
PAGES = sorted([*ROOT.glob("*.md"), *ROOT.glob("docs/*.md")])
NAMED = re.compile(r"`((?:[\w.-]+/)+[\w.-]+\.py):([A-Za-z_][\w.]*)`")
FILE = re.compile(r"(?<!New file )`((?:[\w.-]+/)+[\w.-]+\.(?:py|sh))`")
ELSEWHERE = {"lcb_runner/lm_styles.py"}  # in other projects


def text_of(page: Path) -> str:
    return page.read_text(encoding="utf-8")


@functools.cache
def names_of(file: Path) -> set[str]:
    """Functions, classes, methods and top-level variables, as NAME or CLASS.NAME."""
    names = set()
    for node in ast.parse(text_of(file)).body:
        names |= _defined(node)
        if isinstance(node, ast.ClassDef):
            names |= {f"{node.name}.{name}" for inner in node.body for name in _defined(inner)}
    return names


def _defined(node: ast.stmt) -> set[str]:
    if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef | ast.ClassDef):
        return {node.name}
    targets = node.targets if isinstance(node, ast.Assign) else [getattr(node, "target", None)]
    names = [name for target in targets if target is not None for name in ast.walk(target)]
    return {name.id for name in names if isinstance(name, ast.Name)}


def located(name: str) -> Path | None:
    """The file of this name, in the repository or in the package."""
    return next((folder / name for folder in (ROOT, ROOT / "rlver_jax") if (folder / name).is_file()), None)


def faults(text: str) -> list[str]:
    """Files and definitions that a text names and that are not there."""
    missing = [name for name in FILE.findall(text) if name not in ELSEWHERE and located(name) is None]
    for name, what in NAMED.findall(text):
        file = located(name)
        if file is None or what not in names_of(file):
            missing.append(f"{name}:{what}")
    return missing


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_files_and_definitions_that_a_page_names_are_there(page):
    assert faults(text_of(page)) == []


def test_what_is_not_there_is_found():
    text = "`learning/loss.py:loss` `learning/loss.py:los` `learning/lost.py:loss` `tests/nowhere.py` `LossConfig.kl`"
    text += " `rollout/agents.py:Agents.play` `rollout/agents.py:Agents.replay` `config/languages.py:LANGUAGES`"
    assert faults(text) == [
        "tests/nowhere.py",
        "learning/loss.py:los",
        "learning/lost.py:loss",
        "rollout/agents.py:Agents.replay",
    ]


def test_a_training_step_is_told_in_ten_points():
    page = text_of(ROOT / "docs" / "architecture.md")
    step = page.split("## One training step")[1].split("\n## ")[0]
    points = re.split(r"^\d+\. ", step, flags=re.MULTILINE)[1:]
    assert len(points) == 10
    assert all(NAMED.search(point) for point in points)


def anchors(page: Path) -> set[str]:
    """Those that GitHub gives a page's headings."""
    headings = re.findall(r"^#+ (.*)$", text_of(page), flags=re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-") for heading in headings}


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_links_lead_somewhere(page):
    for link in re.findall(r"\]\(([^)\s]+)\)", text_of(page)):
        if link.startswith(("http://", "https://")):
            continue
        name, _, anchor = link.partition("#")
        target = page if not name else (page.parent / name)
        assert target.exists(), link
        assert not anchor or anchor in anchors(target), link


def test_every_page_is_in_the_index():
    index = text_of(ROOT / "docs" / "index.md")
    for page in PAGES:
        link = f"../{page.name}" if page.parent == ROOT else page.name
        assert page.name == "index.md" or f"]({link})" in index, page.name


def layers() -> list[set[str]]:
    """Packages and commands by layer, top first, as import-linter checks them."""
    settings = tomllib.loads(text_of(ROOT / "pyproject.toml"))["tool"]["importlinter"]["contracts"]
    (contract,) = [one for one in settings if one["type"] == "layers"]
    return [set(re.findall(r"\w+", layer)) for layer in contract["layers"]]


def test_the_picture_shows_the_layers_that_are_checked():
    picture = text_of(ROOT / "docs" / "architecture.md").split("```")[1]
    shown = re.split(r"^ *─+\n", picture, flags=re.MULTILINE)
    assert len(shown) == len(layers())
    for layer, lines in zip(layers()[1:], shown[1:], strict=True):  # commands come and go
        assert set(re.findall(r"[a-z]\w+", lines.splitlines()[0])) == layer


def test_pages_that_the_code_names_are_there():
    files = [file for folder in ("rlver_jax", "configs", "launch") for file in (ROOT / folder).rglob("*.*")]
    named = {
        page
        for file in files
        if file.suffix in (".py", ".sh", ".yaml")
        for page in re.findall(r"docs/\w+\.md", text_of(file))
    }
    assert {"docs/performance.md", "docs/pods.md"} <= named
    assert all((ROOT / page).is_file() for page in named), named
