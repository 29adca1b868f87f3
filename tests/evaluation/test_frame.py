"""SAGE's frame: nine appraised replies; what was begun with ten goes on with ten, or is refused."""

import json

import pytest

from rlver_jax.config.fields import get_config
from rlver_jax.evaluation.folder import PROGRESS, EvaluationFolder


def settings(**change):
    c = get_config()
    return {"eval.num_profiles": 2} | {f"eval.{name}": c.eval[name] for name in ("max_turns", "seed")} | change


def test_an_evaluation_of_ten_turns_resumes_with_ten_alone(tmp_path):
    ten = settings(**{"eval.max_turns": 10})
    (tmp_path / PROGRESS).write_text(json.dumps({"settings": ten, "played": []}))
    assert EvaluationFolder.open(tmp_path, ten).settings == ten
    with pytest.raises(ValueError, match=r"eval\.max_turns was 10, is 9\); name another --out, or give the same"):
        EvaluationFolder.open(tmp_path, settings())
