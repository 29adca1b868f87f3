"""What a first hour meets: corrected starts, the last line, an evaluation without a score, model cards."""

import json
import os
import stat
from types import SimpleNamespace

import pytest

from configs import base, debug, grpo_direct_7b, grpo_think_7b, ppo_direct_7b, ppo_think_7b, qwen25_0p5b_cpu
from rlver_jax import evaluate
from rlver_jax.config.validate import flatten, validate
from rlver_jax.dialogues.own_sample import sample_dialogues
from rlver_jax.evaluation.play import scores
from rlver_jax.models.safetensors_files import give_usual_mode
from rlver_jax.train import _summary
from rlver_jax.training.model_card import model_card
from rlver_jax.training.setup import check_learning
from rlver_jax.training.trained_policy import TrainedPolicy
from rlver_jax.training.workdir import RunFolder


def opened(path, told=None, **fields):
    config = debug.get_config()
    config.update_from_flattened_dict({name.replace("__", "."): value for name, value in fields.items()})
    return RunFolder.open(path, config, report=(told if told is not None else []).append)


def test_a_start_without_a_step_is_taken_over_with_another_config(tmp_path):
    told = []
    opened(tmp_path, rollout__context=10)
    (tmp_path / "metrics.jsonl").touch()
    folder = opened(tmp_path, told, rollout__context=768)
    assert folder.config()["rollout.context"] == 768
    assert told == [f"{tmp_path}: held a start that came to no step; it is taken over with this config"]
    told.clear()
    opened(tmp_path, told, rollout__context=768)
    assert told == [], "the same config again is no news"


def test_one_with_a_step_is_not(tmp_path):
    opened(tmp_path, rollout__context=10)
    (tmp_path / "metrics.jsonl").write_text('{"step": 0, "eval/score": 40.0}\n')
    with pytest.raises(ValueError, match="another config"):
        opened(tmp_path, rollout__context=768)


def test_the_last_line_names_the_steps_of_its_scores(tmp_path):
    config = debug.get_config()
    config.train.steps = 3
    rows = [
        {"step": 0, "eval/score": 40.0},
        *({"step": step, "emotion/final_mean": 30.0 + step} for step in (1, 2)),
        {"step": 3, "emotion/final_mean": 33.0, "eval/score": 45.5},
    ]
    (tmp_path / "metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    assert "eval/score 40.00 → 45.50 (steps 0 and 3)" in _summary(str(tmp_path), 3, config)
    (tmp_path / "metrics.jsonl").write_text(json.dumps(rows[0]) + "\n")
    assert "eval/score 40.00 (step 0)" in _summary(str(tmp_path), 0, config)


CONFIGS = (base, debug, ppo_think_7b, ppo_direct_7b, grpo_think_7b, grpo_direct_7b, qwen25_0p5b_cpu)


@pytest.mark.parametrize("made", CONFIGS, ids=lambda made: made.__name__)
def test_every_config_knows_ppo(made):
    config = made.get_config("ppo")
    validate(config)
    check_learning(config)
    assert config.algorithm.estimator == "gae"


def test_the_four_published_configs_say_both():
    pairs = {ppo_think_7b: grpo_think_7b, ppo_direct_7b: grpo_direct_7b}
    for ppo, grpo in pairs.items():
        assert flatten(grpo.get_config("ppo")) == flatten(ppo.get_config("ppo")) == flatten(ppo.get_config())
    assert flatten(ppo_think_7b.get_config("grpo")) == flatten(grpo_think_7b.get_config())


def evaluation(records, most):
    config = debug.get_config()
    config.alarms.unreadable_max = most
    return SimpleNamespace(config=config, profiles=["a"] * len(records), scores=scores)


@pytest.mark.parametrize(("most", "scored"), [(0.5, False), (0.75, True), (0.0, True)])
def test_too_many_unreadable_dialogues_have_no_score(most, scored, tmp_path):
    records = [sample_dialogues()[0][0] | {"dialogue": i} for i in range(4)]
    for record in records[:3]:
        record["end_reason"] = "unreadable"
    folder = SimpleNamespace(spent=lambda what: 1.0, settings={})
    summary = evaluate.summarize(evaluation(records, most), records, folder)
    assert (summary["score"] is not None) == scored
    line = evaluate.headline(summary, tmp_path)
    assert line.startswith("score 40.00 of 100" if scored else "no score: 75% of the dialogues, of 50% at most")


def test_a_card_says_which_run_how_it_speaks_and_how_to_serve_it(tmp_path):
    folder = opened(tmp_path / "first", policy__path="Qwen/Qwen2.5-0.5B", policy__init="random")
    folder.metrics.write_text('{"step": 2, "eval/score": 41.25}\n')
    policy = TrainedPolicy(folder, debug.get_config(), 2, "")
    card = model_card(policy, is_adapter=False)
    assert card.startswith("---\nlibrary_name: transformers\nbase_model: Qwen/Qwen2.5-0.5B\n")
    for text in ("# first, step 2\n", "step 2 of 6", "41.25 of 100", "grpo, mode `think`", "</think>", "vllm serve"):
        assert text in card
    assert "Listen and help. Think first, then say it." in card, "the debug world's system prompt"
    assert "--lora-modules" in model_card(policy, is_adapter=True)


def test_weights_are_as_readable_as_other_files(tmp_path):
    plain, secret = tmp_path / "plain", tmp_path / "secret"
    plain.touch()
    os.close(os.open(secret, os.O_CREAT, 0o600))
    give_usual_mode(secret)
    assert stat.S_IMODE(secret.stat().st_mode) == stat.S_IMODE(plain.stat().st_mode)
