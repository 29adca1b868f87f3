"""A suite of `bench` by this package and by another checkout, in turn, so that a busy machine slows both alike."""

import importlib
import json
import statistics
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from rlver_jax.config.validate import ConfigError
from rlver_jax.perf.bench_step import run_in
from rlver_jax.perf.bench_timing import Tell, ratios


def check_checkout(folder: Path) -> Path:
    """The folder, absolute; raises ConfigError unless it holds a checkout."""
    if not (folder / "rlver_jax" / "__init__.py").is_file():
        raise ConfigError(f"--against={folder}: holds no rlver_jax/__init__.py; name the folder of another checkout")
    return folder.resolve()


def measure(suite: str, module: str, checkout: Path, repeats: int, tell: Tell) -> dict[str, Any]:
    """Every time and rate of both, and how many times as fast this package is."""
    rounds: dict[str, list[dict[str, float]]] = {"here": [], "there": []}
    for repeat in range(repeats):
        for name, root in (("here", None), ("there", checkout)):
            tell(f"{name}, {repeat + 1} of {repeats}")
            rounds[name].append(_figures(suite, module, root))
    here, there = rounds["here"], rounds["there"]
    names = [name for name in here[0] if name in there[0]]
    return {"against": str(checkout), "figures": {name: _compared(name, here, there) for name in names}}


def lines(results: dict[str, Any]) -> list[str]:
    """The results as text."""
    figures = results["figures"]
    width = max(map(len, figures), default=0)
    text = [f"{'':{width}} {'here':>10} {'there':>10}  here is … x as fast (worst and best round)"]
    for name, f in figures.items():
        r = f["ratio"]
        span = f"({r['least']:.2f} to {r['most']:.2f})"
        text.append(f"{name:{width}} {f['here']:10.3f} {f['there']:10.3f}  {r['median']:.2f} {span}")
    return text


def _compared(name: str, here: list[dict[str, float]], there: list[dict[str, float]]) -> dict[str, Any]:
    mine, theirs = ([one[name] for one in rounds] for rounds in (here, there))
    fast = ratios(mine, theirs) if name.endswith("_per_s") else ratios(theirs, mine)
    return {"here": statistics.median(mine), "there": statistics.median(theirs), "ratio": fast}


def _figures(suite: str, module: str, checkout: Path | None) -> dict[str, float]:
    """Times and rates of one run of a suite. `step` also measures checkouts that are older than the suite itself."""
    bench = importlib.import_module(f"rlver_jax.perf.{module}")
    if hasattr(bench, "figures"):
        return bench.figures(checkout)
    with tempfile.TemporaryDirectory(prefix="rlver_jax_bench_") as folder:
        file = Path(folder) / "results.json"
        run_in(checkout, ["rlver_jax.bench", suite, "--repeats=1", f"--json={file}"])
        return dict(_times(json.loads(file.read_text(encoding="utf-8"))))


def _times(tree: Any, path: str = "") -> Iterator[tuple[str, float]]:
    """(path, value) of each number whose name says that it is one of seconds, or of something a second."""
    if isinstance(tree, dict):
        for name, value in tree.items():
            yield from _times(value, f"{path}/{name}" if path else name)
    elif isinstance(tree, int | float) and path.rsplit("/", 1)[-1].endswith(("seconds", "_s")) and tree > 0:
        yield path, float(tree)
