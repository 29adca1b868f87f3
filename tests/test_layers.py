"""The layer rule: a file imports only from its own layer or from layers below it."""

import ast
from pathlib import Path

import pytest

PACKAGE = Path(__file__).resolve().parents[1] / "rlver_jax"

# Top first. A name is a module or a sub-package of rlver_jax.
LAYERS = [
    {"train", "evaluate", "verify", "plan", "export", "chat", "bench", "report", "serve", "miniature"},
    {"reports", "judging", "plans", "benches"},
    {"trainer", "assembly", "evaluation", "remote_evaluation", "serving"},
    {"sides"},
    {"runs"},
    {"learning"},
    {"agents"},
    {"dialogue", "policy", "policy_packed", "spec"},
    {"rewards"},
    {"user"},
    {"sampling"},
    {"models"},
    {"profiles"},
    {"text"},
    {"command_line", "endpoint"},
    {"config", "config_fields"},
    {"hub"},
    {"foreign_weights"},
    {"parallel"},
    {"advice", "config_files", "credentials", "output", "paths"},
]
HEIGHT = {name: len(LAYERS) - i for i, names in enumerate(LAYERS) for name in names}


def imported(path: Path) -> set[str]:
    """First-level names of rlver_jax that a file imports."""
    names = set()
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            names |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path}: relative import; write rlver_jax.… instead"
            names.add(node.module or "")
            names |= {f"{node.module}.{alias.name}" for alias in node.names}
    return {n.split(".")[1] for n in names if n.startswith("rlver_jax.")}


FILES = sorted(p for p in PACKAGE.rglob("*.py") if p.relative_to(PACKAGE).parts != ("__init__.py",))


@pytest.mark.parametrize("path", FILES, ids=lambda p: str(p.relative_to(PACKAGE)))
def test_imports_go_downwards(path):
    own = path.relative_to(PACKAGE).parts[0].removesuffix(".py")
    assert own in HEIGHT, f"{own} has no layer: add it to LAYERS where it belongs"
    for name in imported(path) & set(HEIGHT):
        assert HEIGHT[name] <= HEIGHT[own], f"{path.name} (layer {own}) imports {name}, which lies above it"


@pytest.mark.parametrize("path", FILES, ids=lambda p: str(p.relative_to(PACKAGE)))
def test_files_stay_small(path):
    lines = path.read_text(encoding="utf-8").count("\n")
    assert lines <= 400, f"{path.name} has {lines} lines; split it at an idea"
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.FunctionDef):
            length = node.end_lineno - node.lineno + 1
            assert length <= 50, f"{path.name}: {node.name} has {length} lines (with its docstring)"
