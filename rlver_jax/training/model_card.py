"""The model card of an export: which run and step it is of, how the policy was told to speak, how to serve it."""

import sys
from pathlib import Path

from rlver_jax.config.hub import is_name
from rlver_jax.models.peft_files import CONFIG_FILE
from rlver_jax.models.safetensors_files import give_usual_mode
from rlver_jax.training.metrics_file import read_metrics
from rlver_jax.training.trained_policy import TrainedPolicy
from rlver_jax.user.prompts import load_prompts

CARD = "README.md"
_THOUGHTS = """A reply is a thought and, after `</think>`, what is said. In training every reply began with `<think>`
and a line end, which are no part of what the model writes: give them to a server as the beginning of the assistant's
message. Leave thoughts out of earlier replies."""
_DIRECT = "A reply is what is said, without a thought before it."


def write_card(folder: str | Path, policy: TrainedPolicy) -> None:
    """Writes the card into an export's folder, and gives its weights the modes of other files."""
    folder = Path(folder)
    for file in folder.glob("*.safetensors"):
        give_usual_mode(file)
    (folder / CARD).write_text(model_card(policy, (folder / CONFIG_FILE).exists()), encoding="utf-8")


def model_card(policy: TrainedPolicy, is_adapter: bool) -> str:
    """The card, Markdown with the hub's front matter."""
    c, name = policy.config, policy.folder.path.absolute().name
    base = policy.base or policy.folder.config()["policy.path"]
    library = "peft" if is_adapter else "transformers"
    known = [f"base_model: {base}"] if is_name(base) else []
    head = ["---", f"library_name: {library}", *known, "tags:", "- rlver", "- rlver_jax", "---"]
    what = "A LoRA adapter" if is_adapter else "A model"
    told = (
        f"supervised fine-tuning ({c.sft.role})" if c.sft.data else f"{c.algorithm.estimator}, mode `{c.policy.mode}`"
    )
    version = getattr(sys.modules["rlver_jax"], "__version__", "")
    lines = [
        *head,
        f"# {name}, step {policy.step}",
        f"{what} trained with rlver_jax {version}: {told}, on {Path(base).name or 'a model'}; run `{name}`, "
        f"step {policy.step} of {c.train.steps}{_score(policy)}.",
        "## How it speaks",
        _THOUGHTS if c.policy.mode == "think" else _DIRECT,
        "It was trained with this system prompt, and is itself only with it:",
        f"````\n{_system(policy)}\n````",
        "## Serve it",
        _serving(is_adapter, c.policy.mode),
    ]
    front, rest = lines[: len(head)], lines[len(head) :]
    return "\n".join(front) + "\n\n" + "\n\n".join(rest) + "\n"


def _score(policy: TrainedPolicy) -> str:
    """The held-out score of the step, where it has been evaluated."""
    try:
        rows = read_metrics(policy.folder.metrics)
    except (OSError, ValueError):  # a card is no reason to fail
        return ""
    scores = [row["eval/score"] for row in rows if row["step"] == policy.step and "eval/score" in row]
    return f", held-out score {scores[0]:.2f} of 100 by its simulated user" if scores and scores[0] is not None else ""


def _system(policy: TrainedPolicy) -> str:
    c = policy.config
    try:
        return load_prompts(c.data.language, c.user.prompts or None).policy_system(c.policy.mode, c.policy.prompt)
    except (OSError, ValueError):
        return f"(the run's prompts, {c.user.prompts}, are not at hand)"


def _serving(is_adapter: bool, mode: str) -> str:
    """Commands that serve this folder."""
    if is_adapter:
        other = "vllm serve BASE --enable-lora --lora-modules tuned=THIS_FOLDER"
        flags = "--config.policy.path=BASE --config.policy.adapter=THIS_FOLDER"
    else:
        other, flags = "vllm serve THIS_FOLDER", "--config.policy.path=THIS_FOLDER"
    own = f"python -m rlver_jax.serve --config=configs/base.py {flags} --config.policy.mode={mode}"
    return f"    {own}\n    {other}\n\nBoth speak OpenAI's protocol; send the system prompt above with every request."
