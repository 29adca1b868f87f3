"""docs/metrics.md lists every key of metrics.jsonl and no other, every alarm with its default, every field of `log`."""

import ast
import re
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest

from rlver_jax.config.alarm_fields import ALARMS
from rlver_jax.config.fields import LOG
from rlver_jax.evaluation.play import eval_metrics
from rlver_jax.learning.loss import TERMS
from rlver_jax.rollout.rollout_metrics import ROLLOUT_METRICS
from rlver_jax.training.alarms import _WATCHED, _WATCHED_ABOVE
from rlver_jax.training.remote_users import _TRAFFIC, RemoteUsers
from rlver_jax.training.sft_metrics import change_agreement

ROOT = Path(__file__).resolve().parents[2]
PAGE = (ROOT / "docs" / "metrics.md").read_text(encoding="utf-8")
ROWS = [line.strip("| ").split(" | ") for line in PAGE.splitlines() if line.startswith("| `")]
NAMES = {name for first, *_ in ROWS for name in re.findall(r"`([\w/.]+)`", first)}
KEYS = {name for name in NAMES if "/" in name}
WRITERS = ("learning/train_step.py", "learning/loss.py", "learning/loss_terms.py", "learning/sft_loss.py",
           "training/loop.py", "training/sft_loop.py", "training/text_rollout.py")  # fmt: skip
OF_A_NAME = {"own/NAME", "eval/own/NAME", "sft/loss_FIELD", "held_out/loss_FIELD"}


def spelt_out(file: Path) -> set[str]:
    """Keys that stand in a file as they are written; parts of f-strings are none."""
    tree = ast.parse(file.read_text(encoding="utf-8"))
    parts = {id(part) for node in ast.walk(tree) if isinstance(node, ast.JoinedStr) for part in node.values}
    texts = [node.value for node in ast.walk(tree) if isinstance(node, ast.Constant) and id(node) not in parts]
    return {text for text in texts if isinstance(text, str) and re.fullmatch(r"[a-z_]+/[a-z_]+", text)}


def composed_names() -> set[str]:
    """Keys that are made of parts."""
    told = dict.fromkeys(("score", "rule_score", "judge_score", "turns_mean", "reward_mean", "own/NAME"), 1.0)
    keys = {*eval_metrics(told | {"success": 1, "failure": 0, "n": 1}), "dialogue/end_unreadable"}
    keys |= {f"{model}/grad_norm" for model in ("policy", "critic")}
    keys |= {f"remote/{name}" for name in RemoteUsers.costs(SimpleNamespace(_prices=(0, 0)), [])}
    keys |= {f"traffic/{name}" for name in _TRAFFIC}
    agreement = change_agreement(*np.zeros((4, 3)))
    return keys | {f"held_out/change_{name}{suffix}" for name in agreement for suffix in ("", "_given_appraisal")}


def test_the_page_lists_every_key_and_no_other():
    literal_names = set().union(*(spelt_out(ROOT / "rlver_jax" / name) for name in WRITERS))
    assert {"policy/update_kl", "advantage/tied_groups", "time/rollout_s", "sft/loss"} <= literal_names
    known = {*ROLLOUT_METRICS, *TERMS, *literal_names, *composed_names(), *OF_A_NAME}
    assert known - KEYS == set(), "add them to a table of docs/metrics.md"
    assert KEYS - known == set(), "nothing writes them"


def test_no_key_is_listed_twice():
    keys = [name for first, *_ in ROWS for name in re.findall(r"`([\w/]+)`", first)]
    assert len(keys) == len(set(keys))


@pytest.mark.parametrize("name", ALARMS)
def test_alarms_have_their_default_and_their_metric(name):
    (row,) = [row for row in ROWS if row[0] == f"`alarms.{name}`"]
    watched = {**{v[0]: k for k, v in _WATCHED.items()}, **{v[0]: k for k, v in _WATCHED_ABOVE.items()}}
    assert float(row[1].split(":")[0]) == ALARMS[name].default
    assert row[2] == f"`{watched[name]}`"


def test_fields_of_log_are_told():
    assert {f"log.{name}" for name in LOG} <= NAMES
