"""Fits a model of the miniature to logs of the grammar, with `sft`, and keeps it as a Hugging Face folder."""

import json
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import NamedTuple

from ml_collections import ConfigDict
from rich.console import Console

from rlver_jax.decoding.cache import LM
from rlver_jax.dialogues.log import Record, write_dialogues
from rlver_jax.miniature import assets
from rlver_jax.miniature.settings import miniature_config
from rlver_jax.models.families import Qwen2Config
from rlver_jax.models.hf_weights import save_params
from rlver_jax.parallel.mesh import make_mesh
from rlver_jax.rollout.agents import make_model
from rlver_jax.text.padding import round_up
from rlver_jax.text.tokenizer import Tokenizer, load_tokenizer
from rlver_jax.training.sft import check_fitting, fit, settle_role
from rlver_jax.training.trained_policy import TrainedPolicy

WEIGHTS = "model.safetensors"
BATCH = 16  # dialogues of an update


class Lesson(NamedTuple):
    """What a model learns, and how."""

    role: str  # user | policy
    start: Path  # folder of the model that it begins as
    logs: Callable[[], Iterator[Record]]
    steps: int
    learning_rate: float = 2e-3
    weights: str = ""  # of fields in the loss, as `sft.weights`


def learn(out: Path, lesson: Lesson, result: Path, console: Console) -> None:
    """Writes the model that has learned a lesson to `result`, unless it is there; what was interrupted is resumed.

    Args:
        out: folder of the miniature; logs and the run lie beside those of other lessons in `out/runs`.

    Raises:
        SystemExit: SIGTERM came before the last step.
    """
    if result.exists():
        return
    name = "_".join(result.relative_to(out).parts)
    data, run = out / assets.RUNS / f"{name}.jsonl", out / assets.RUNS / f"learn_{name}"
    if not data.exists():
        write_dialogues(data, lesson.logs())
    config = lesson_config(out, lesson, data)
    console.print(f"{result.name}: {lesson.steps} steps", markup=False, highlight=False)
    check_finished(fit(config, run, make_mesh(**config.mesh), console), lesson.steps)
    trained = TrainedPolicy.open(run, "last")
    model = make_model(trained.config.policy, "policy")
    save(result, LM(trained.weights(model), model), load_tokenizer(lesson.start))


def check_finished(done: int, steps: int) -> None:
    """Ends a build whose run SIGTERM has stopped."""
    if done < steps:
        raise SystemExit("build: interrupted; the same command resumes")


def lesson_config(out: Path, lesson: Lesson, data: Path) -> ConfigDict:
    """The config of `sft` for a lesson."""
    c = miniature_config("", out)
    learner = c[lesson.role]
    learner.path, learner.init = str(lesson.start), "path" if (lesson.start / WEIGHTS).exists() else "random"
    # Chunks of queries: scores that stay in the cores' caches cost a fifth less a step.
    c.policy.attention_chunk = 112
    c.data.train = c.data.eval = ",".join(str(folder / assets.TRAIN) for folder in (out, out / assets.RUNS))
    c.sft.role, c.sft.data, c.sft.batch, c.sft.held_out = lesson.role, str(data), BATCH, 0.0
    c.sft.logged_mode, c.sft.weights = lesson.role == "policy", lesson.weights
    c.train.steps, c.train.learning_rate = lesson.steps, lesson.learning_rate
    c.train.warmup_steps = min(100, lesson.steps // 10)
    c.train.decay_steps = lesson.steps - c.train.warmup_steps
    c.train.beta2, c.train.adam_eps, c.train.weight_decay = 0.98, 1e-8, 0.01
    c.checkpoint.every, c.log.tensorboard = 200, False
    settle_role(c)
    check_fitting(c)
    return c


def write_untrained(folder: Path, tokenizer: Tokenizer) -> None:
    """The models' architecture and tokenizer: 4 layers, 4 query and 2 key heads, a vocabulary that 8 divides."""
    config = Qwen2Config(
        round_up(tokenizer.vocab_size, 8), 128, 384, num_layers=4, num_heads=4, num_kv_heads=2, head_dim=32,
        rope_theta=1e4, tie_embeddings=True,
    )  # fmt: skip
    folder.mkdir(parents=True, exist_ok=True)
    tokenizer.save(folder)
    (folder / "config.json").write_text(json.dumps(config.to_hf("float32"), indent=2) + "\n", encoding="utf-8")


def save(folder: Path, lm: LM, tokenizer: Tokenizer) -> None:
    """A Hugging Face folder; it is there whole or not at all."""
    new = folder.with_name(folder.name + ".new")
    shutil.rmtree(new, ignore_errors=True)
    save_params(new, lm.params, lm.model.config)
    tokenizer.save(new)
    new.rename(folder)
