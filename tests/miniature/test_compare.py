"""The table of what runs in the miniature came to: its figures are worked out here by hand."""

import json

import pytest

from rlver_jax.miniature import compare

CONFIG = {
    "algorithm.estimator": "grpo", "policy.mode": "think", "user.style": "vanilla", "train.steps": 4,
    "rollout.batch": 64, "reward.kind": "final", "lora.rank": 0,
}  # fmt: skip


def write_run(folder, seed, scores, **fields):
    """A run evaluated by user and rule at step 0 and at the end, `scores` = ((user, rule), (user, rule))."""
    folder.mkdir()
    (folder / "config.json").write_text(json.dumps(CONFIG | {"train.seed": seed} | fields))
    rows = [{"step": i, "time/rollout_s": 20.0, "time/update_s": 10.0} for i in range(1, 5)]
    rows.insert(0, {"step": 0})
    for row, (user, rule) in zip((rows[0], rows[-1]), scores, strict=True):
        row |= {"eval/score": user, "eval/rule_score": rule}
    (folder / "metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return str(folder)


def test_a_row_holds_mean_and_spread_of_a_kind_s_seeds(tmp_path, capsys, monkeypatch):
    monkeypatch.setenv("COLUMNS", "200")
    runs = [
        write_run(tmp_path / "a", 0, ((30.0, 28.0), (70.0, 60.0))),
        write_run(tmp_path / "b", 1, ((32.0, 30.0), (74.0, 68.0))),
        write_run(tmp_path / "c", 0, ((31.0, 29.0), (50.5, 45.25)), **{"algorithm.estimator": "gae"}),
    ]
    assert compare.main(runs) == 0
    lines = [[cell.strip() for cell in line.split("│")[1:-1]] for line in capsys.readouterr().out.splitlines()]
    grpo, ppo = (next(line for line in lines if line and line[0] == name) for name in ("GRPO", "PPO"))
    # 70 and 74: mean 72, deviation 2 * sqrt(2); 60 and 68: 64, 4 * sqrt(2); gaps 10 and 6; 4 steps of 30 s
    after = ["72.0 ± 2.8", "64.0 ± 5.7", "8.0 ± 2.8", "2.0 ± 0.0"]
    assert grpo == ["GRPO", "think", "final", "vanilla", "4 x 64", "2", "31.0 ± 1.4", "29.0 ± 1.4", *after]
    assert ppo == ["PPO", "think", "final", "vanilla", "4 x 64", "1", "31.0", "29.0", "50.5", "45.2", "5.2", "2.0"]


def test_a_folder_that_is_no_judged_run_is_refused(tmp_path, capsys):
    assert compare.main([]) == 2
    assert "expected folders of training runs" in capsys.readouterr().err
    run = write_run(tmp_path / "a", 0, ((30.0, 28.0), (70.0, 60.0)))
    rows = (tmp_path / "a" / "metrics.jsonl").read_text().splitlines()
    (tmp_path / "a" / "metrics.jsonl").write_text(rows[0] + "\n")
    assert compare.main([run]) == 2
    assert "found 1 evaluations" in capsys.readouterr().err
    assert compare.main([str(tmp_path / "none")]) == 2
    assert "none" in capsys.readouterr().err


@pytest.mark.parametrize(("values", "text"), [([3.0], "3.0"), ([1.0, 2.0, 3.0], "2.0 ± 1.0")])
def test_spread_needs_two_values(values, text):
    assert compare.spread(values) == text
