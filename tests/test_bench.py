"""`bench` as a user runs it, and how it compares."""

import dataclasses
import importlib
import json
from pathlib import Path

import jax
import pytest

from rlver_jax import bench
from rlver_jax.bench import SUITES, main
from rlver_jax.models.families import Qwen2Config
from rlver_jax.models.qwen import Qwen2, init_params
from rlver_jax.perf import (
    bench_against,
    bench_compile,
    bench_dialogue,
    bench_load,
    bench_logprob,
    bench_rollout,
    bench_step,
    bench_timing,
    bench_update,
)
from rlver_jax.perf.bench_timing import alternate, ratios

TINY = Qwen2Config(64, 16, 24, num_layers=2, num_heads=2, num_kv_heads=2, head_dim=8, tie_embeddings=True)


def test_ways_are_run_in_turn():
    order, told = [], []
    seconds = alternate({name: lambda name=name: order.append(name) for name in "ab"}, 3, told.append)
    assert order == ["a", "b"] * 3
    assert told[-1] == "b, 3 of 3"
    assert {name: len(values) for name, values in seconds.items()} == {"a": 3, "b": 3}


def test_ratios_are_of_one_round():
    assert ratios([2.0, 9.0, 8.0], [1.0, 3.0, 8.0]) == {"median": 2.0, "least": 1.0, "most": 3.0}


@pytest.mark.parametrize(
    ("arguments", "parts"),
    [
        ([], ["no suite", *SUITES]),
        (["dialog"], ["found dialog", *SUITES]),
        (["dialogue", "--json=/no/such/file.json"], ["/no/such/file.json", "its folder does not exist"]),
        (["dialogue", "--repeats=0"], ["repeats"]),
        (["step", "--against=/no/such"], ["--against=/no/such: holds no rlver_jax/__init__.py"]),
    ],
)
def test_bad_usage_is_refused(arguments, parts, capsys):
    assert main(arguments) == 2
    message = capsys.readouterr().err
    for part in parts:
        assert part in message, message


@pytest.mark.parametrize("suite", SUITES)
def test_every_suite_has_its_module_and_is_in_the_help(suite):
    module = importlib.import_module(f"rlver_jax.perf.{SUITES[suite]}")
    assert callable(module.measure)
    assert callable(module.lines)
    assert f"\n    {suite} " in bench.__doc__


def write_checkout(folder: Path, bench: str) -> Path:
    """A checkout whose `bench` writes given results into the file of its `--json`."""
    package = folder / "rlver_jax"
    package.mkdir(parents=True)
    (package / "__init__.py").write_text("")
    (package / "bench.py").write_text(f"import sys\nopen(sys.argv[-1].split('=')[1], 'w').write({bench!r})\n")
    return folder


def test_against_another_checkout(tmp_path, capsys, monkeypatch):
    """Here 2 s and 10 tokens a second, there 3 s and 4: 1.5 and 2.5 times as fast; what one lacks is left out."""
    results = {"here": {"ways": {"a": {"seconds": 2.0}}, "tokens_per_s": 10, "new_s": 1.0, "same": 5}}
    results["there"] = {"ways": {"a": {"seconds": 3.0}}, "tokens_per_s": 4, "same": 5, "all": [1.0]}
    here, there = (write_checkout(tmp_path / name, json.dumps(result)) for name, result in results.items())
    run = bench_against.run_in
    monkeypatch.setattr(bench_against, "run_in", lambda root, module: run(root or here, module))
    assert main(["load", f"--against={there}", "--repeats=2", f"--json={tmp_path / 'f.json'}"]) == 0
    result = json.loads((tmp_path / "f.json").read_text())
    assert result["against"] == str(there)
    assert {name: f["ratio"]["median"] for name, f in result["figures"].items()} == {
        "ways/a/seconds": 1.5,
        "tokens_per_s": 2.5,
    }
    assert "ways/a/seconds      2.000      3.000  1.50 (1.50 to 1.50)" in capsys.readouterr().out


def test_a_checkout_that_fails_says_why(tmp_path, capsys):
    there = write_checkout(tmp_path / "there", "")
    (there / "rlver_jax" / "bench.py").write_text("raise SystemExit('no such suite')")
    with pytest.raises(ValueError, match="ended with exit status 1: no such suite"):
        bench_against.run_in(there, ["rlver_jax.bench", "load"])


@pytest.mark.long
def test_a_step_of_the_miniature_is_measured(tmp_path, monkeypatch):
    monkeypatch.setattr(bench_step, "STEPS", 2)
    result = run_bench("step", tmp_path, repeats=1)
    assert result["step_s"] == pytest.approx(result["rollout_s"] + result["update_s"]), "one step counts"
    assert min(result["rollout_s"], result["update_s"]) > 0


def run_bench(suite: str, tmp_path, repeats: int = 2) -> dict:
    assert main([suite, f"--json={tmp_path / 'f.json'}", f"--repeats={repeats}"]) == 0
    return json.loads((tmp_path / "f.json").read_text())


@pytest.mark.slow
def test_rollouts_are_measured(tmp_path, capsys, monkeypatch):
    """By hand: 3 dialogues of 10 + 2 x 5 tokens of the user, 3 x 4 generated."""
    monkeypatch.setattr(bench_rollout, "SMALL", TINY)
    monkeypatch.setattr(bench_rollout, "SHAPE", bench_rollout.Shape(batch=3, prefix=10, turns=3, reply=4, user=5))
    monkeypatch.setattr(bench_timing, "COPIED", 1024)
    result = run_bench("rollout", tmp_path)
    assert (result["generated"], result["prefilled"]) == (36, 60)
    assert result["generated_tokens_per_s"] == pytest.approx(36 / result["seconds"])
    weights = sum(x.nbytes for x in jax.tree.leaves(init_params(Qwen2(TINY), jax.random.key(0))))
    half = (10 + 37) // 2 + 2  # slots that are filled on average while four more are said
    assert result["step_bytes"] == weights + 2 * 2 * 3 * 2 * half * 8 * 4  # keys and values, layers, rows, heads
    assert result["of_limit"] == pytest.approx(result["copy_ms"] / result["step_ms"])
    assert "of the limit" in capsys.readouterr().out


@pytest.mark.slow
def test_updates_are_measured_at_equal_gradients(tmp_path, capsys, monkeypatch):
    sizes = {
        "MODEL": dataclasses.replace(TINY, num_layers=1),
        "DIALOGUES": 2,
        "TURNS": 3,
        "SYSTEM": 5,
        "USER": 4,
        "THOUGHT": 6,
        "REPLY": 3,
    }
    for name, value in sizes.items():
        monkeypatch.setattr(bench_update, name, value)
    result = run_bench("update", tmp_path)
    for mode, thought in (("think", 6), ("direct", 0)):
        positions = {name: way["positions"] for name, way in result[mode]["ways"].items()}
        turns = [5 + t * 7 + 4 + thought + 2 for t in range(3)]  # of each row: what is predicted last is not read
        assert positions["turns"] == 2 * sum(turns)
        assert positions["padded"] == 2 * 3 * turns[-1]
        assert positions["packed"] == 2 * (5 + 3 * 4 + 2 * 3 + (3 * (thought + 2) if thought else 2))
        assert result[mode]["largest_difference"] < 1e-5
    assert "x as fast as turns" in capsys.readouterr().out


@pytest.mark.slow
def test_logprobs_are_measured(tmp_path, capsys, monkeypatch):
    for name, value in {"LENGTH": 64, "VOCABULARY": 40_000, "HIDDEN": 16}.items():
        monkeypatch.setattr(bench_logprob, name, value)
    result = run_bench("logprob", tmp_path)
    assert result["largest_difference"] < 1e-4
    assert result["ways"]["full"]["extra_bytes"] > 2 * 64 * 40_000 * 4, "all logits are held"
    assert result["full_over_chunked_memory"] > 2
    assert "of the memory" in capsys.readouterr().out


@pytest.mark.long
def test_dialogues_are_measured(tmp_path, capsys, monkeypatch):
    """Few of them (a row for each of the eight devices); the figures follow from one another."""
    monkeypatch.setattr(bench_dialogue, "DIALOGUES", 16)
    monkeypatch.setattr(bench_dialogue, "ROWS", 8)
    result = run_bench("dialogue", tmp_path)
    assert result["suite"] == "dialogue"
    assert sum(result["turns"].values()) == result["dialogues"] == 16
    turns = sum(int(n) * count for n, count in result["turns"].items())
    assert [way["rows"] for way in result["ways"].values()] == [8, 8, 16]
    for way in result["ways"].values():
        row_turns = turns / way["occupancy"]
        assert row_turns == pytest.approx(round(row_turns))
        assert round(row_turns) % way["rows"] == 0
        assert len(way["seconds"]) == 2
        assert way["dialogues_per_s"] == pytest.approx(16 / (sum(way["seconds"]) / 2))
    assert result["ways"]["refill"]["occupancy"] >= result["ways"]["waiting"]["occupancy"]
    assert "x as fast as waiting" in capsys.readouterr().out


@pytest.mark.slow
def test_loading_is_measured(tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(bench_load, "MODEL", TINY)
    monkeypatch.setattr(bench_timing, "COPIED", 1024)
    result = run_bench("load", tmp_path)
    weights = sum(x.size for x in jax.tree.leaves(init_params(Qwen2(TINY), jax.random.key(0))))
    assert 0 < result["bytes"] - 2 * weights < 8192, "bfloat16, and the file's head"
    for way in result["ways"].values():
        assert way["bytes_per_s"] == pytest.approx(result["bytes"] / way["seconds"])
    assert "x as long as safetensors" in capsys.readouterr().out


@pytest.mark.long
def test_starts_are_measured(tmp_path, capsys, monkeypatch):
    """Of short dialogues: with the programs kept, less is compiled; what a run can't do is said."""
    monkeypatch.delenv("XLA_FLAGS", raising=False)  # as on a user's machine: one device
    short = ("--config.rollout.batch=8", "--config.rollout.max_turns=3")
    # Rows of one length: another one would be compiled in the second step, whose time stands for a step's without that.
    even = ("--config.train.share_rows=False", "--config.train.length_buckets=1")
    monkeypatch.setattr(bench_compile, "FLAGS", (*bench_compile.FLAGS, *short, *even))
    result = run_bench("compile", tmp_path)
    cold, warm = result["ways"]["cold"], result["ways"]["warm"]
    assert len(cold["all"]) == len(warm["all"]) == 2
    assert 0 < warm["compile_s"] < cold["compile_s"] < cold["start_s"]
    assert 0 < warm["begins_s"] < cold["begins_s"] < cold["start_s"], "the update is compiled after the first dialogues"
    assert "compiling s" in capsys.readouterr().out
    monkeypatch.setattr(bench_compile, "FLAGS", ("--config.train.steps=0",))
    assert main(["compile"]) == 2
    assert "train.steps" in capsys.readouterr().err
