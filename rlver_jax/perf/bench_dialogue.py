"""Whole dialogues of the miniature, of one to eight turns: rows that are refilled against rows that wait.

Three ways to play the same dialogues: on a few rows that take the next dialogue when theirs has ended (`refill`), in
batches of that size, each played to its end (`waiting`), and all at once on as many rows as there are dialogues
(`wide`), which needs the memory for that.
"""

import dataclasses
import statistics
import time
from collections.abc import Callable
from typing import Any

import jax
import numpy as np

from rlver_jax.evaluation.play import Evaluation, chosen_profiles, load
from rlver_jax.miniature import assets
from rlver_jax.miniature.settings import miniature_config
from rlver_jax.perf.bench_timing import Tell, alternate, ratios
from rlver_jax.rollout.rollout_metrics import generated_count
from rlver_jax.rollout.sampler import Dialogues

DIALOGUES, ROWS, TURNS = 128, 8, 8
FLOOR, CEILING = 36, 52  # near enough to the beginning, 40, that emotions end dialogues at every turn


def measure(repeats: int, tell: Tell) -> dict[str, Any]:
    """Results of the three ways, and how many times as fast `refill` is as the others."""
    dialogues, rows = DIALOGUES, ROWS
    tell("loading the models")
    refill = _evaluation(dialogues, rows)
    waiting, wide_batch = (
        dataclasses.replace(refill, batch=batch, agents=_on_all_rows(refill)) for batch in (rows, dialogues)
    )
    evaluations = {"refill": refill, "waiting": waiting, "wide": wide_batch}
    ways = {name: _player(evaluation, dialogues) for name, evaluation in evaluations.items()}
    compiled, played = {}, {}
    for name, play in ways.items():
        tell(f"compiling and playing {name}")
        began = time.perf_counter()
        played[name] = jax.device_get(play())
        compiled[name] = time.perf_counter() - began
    seconds = alternate(ways, repeats, tell)
    results = {name: _results(e, played[name], seconds[name], compiled[name]) for name, e in evaluations.items()}
    turns = np.concatenate([d.turns for d in played["refill"]])
    return {
        "dialogues": dialogues,
        "rows": rows,
        "turns": {str(n): int((turns == n).sum()) for n in range(1, TURNS + 1)},
        "same": {name: _same(played[name], played["refill"]) for name in ways},
        "ways": results,
        "refill_over_waiting": ratios(seconds["waiting"], seconds["refill"]),
        "refill_over_wide": ratios(seconds["wide"], seconds["refill"]),
    }


def lines(results: dict[str, Any]) -> list[str]:
    """The results as text."""
    lengths = ", ".join(f"{count} of {n}" for n, count in results["turns"].items())
    text = [
        f"{results['dialogues']} dialogues, {min(results['same'].values())} the same token for token; turns: {lengths}",
        f"{'':8} rows  dialogues/s  tokens/s  occupancy  of steps  compile s",
    ]
    for name, way in results["ways"].items():
        speed = f"{way['dialogues_per_s']:11.2f}  {way['generated_tokens_per_s']:8.0f}"
        shares = f"{way['occupancy']:9.1%}  {way['step_occupancy']:8.1%}"
        text.append(f"{name:8} {way['rows']:4}  {speed}  {shares}  {way['compile_s']:9.1f}")
    for other in ("waiting", "wide"):
        r = results[f"refill_over_{other}"]
        text.append(f"refill is {r['median']:.2f} x as fast as {other} ({r['least']:.2f} to {r['most']:.2f})")
    return text


def _evaluation(dialogues: int, rows: int) -> Evaluation:
    config = miniature_config("", assets.shipped())
    config.eval.num_profiles = config.eval.batch = dialogues
    config.eval.rows, config.eval.max_turns = rows, TURNS
    config.emotion.floor, config.emotion.ceiling = FLOOR, CEILING
    config.rollout.context = 1024
    return load(config, chosen_profiles(config))


def _on_all_rows(evaluation: Evaluation) -> Any:
    spec = dataclasses.replace(evaluation.agents.spec, rows=0)
    return dataclasses.replace(evaluation.agents, spec=spec)


def _player(evaluation: Evaluation, dialogues: int) -> Callable[[], list[Dialogues]]:
    """Plays all dialogues, batch by batch; each batch is dispatched without waiting for the one before."""
    key, size = jax.random.key(0), evaluation.batch
    numbers = [list(range(i, i + size)) for i in range(0, dialogues, size)]
    batches = [evaluation.tokens.batch(ids, ids, size, evaluation.agents.mesh) for ids in numbers]
    return lambda: [evaluation.agents.play(profiles, key, evaluation.limits) for profiles in batches]


def _same(first: list[Dialogues], second: list[Dialogues]) -> int:
    """Dialogues with the same tokens of the policy: all, unless two tokens are as likely as float32 can tell."""
    a, b = (np.concatenate([d.policy.completion.tokens for d in played], axis=1) for played in (first, second))
    return int((a == b).all(axis=(0, 2)).sum())


def _results(evaluation: Evaluation, played: list[Dialogues], seconds: list[float], first: float) -> dict[str, Any]:
    median = statistics.median(seconds)
    generated, turns = sum(map(generated_count, played)), sum(int(d.turns.sum()) for d in played)
    return {
        "rows": evaluation.agents.spec.rows_of(evaluation.batch),
        "dialogues_per_s": sum(len(d.turns) for d in played) / median,
        "generated_tokens_per_s": generated / median,
        "occupancy": turns / sum(int(d.row_turns) for d in played),
        "step_occupancy": generated / sum(int(d.row_steps) for d in played),
        "compile_s": first - median,
        "seconds": seconds,
    }
