"""RLVER in JAX: reinforcement learning of empathetic language models against a simulated user.

For scripts and notebooks; each name is imported when it is first used, and so is JAX:

    import jax, rich.console
    import rlver_jax

    config = rlver_jax.load_config("configs/debug.py:ppo", {"train.steps": 2})
    mesh = rlver_jax.make_mesh(**config.mesh, devices=jax.devices()[:1])
    rlver_jax.train_policy(config, "runs/first", mesh, rich.console.Console())
    for row in rlver_jax.read_metrics("runs/first/metrics.jsonl"):
        print(row["step"], row.get("emotion/final_mean"))

Names that are not listed in `__all__` may change from one version to the next.
"""

import importlib
from typing import TYPE_CHECKING, Any

__version__ = "0.1.0"

if TYPE_CHECKING:  # for type checkers and editors; `_PUBLIC` says the same to Python
    from rlver_jax.config.fields import get_config
    from rlver_jax.config.flags import load_config
    from rlver_jax.config.validate import ConfigError, reward_settings, validate
    from rlver_jax.dialogues.faults import recomputed_rewards
    from rlver_jax.dialogues.log import read_dialogues
    from rlver_jax.evaluation.play import Evaluation
    from rlver_jax.evaluation.play import load as load_evaluation
    from rlver_jax.models.hf_weights import save_params
    from rlver_jax.parallel.mesh import make_mesh
    from rlver_jax.profiles.schema import Profile, read_profiles
    from rlver_jax.rollout.agents import Agents, load_model
    from rlver_jax.rollout.sampler import sample_dialogues
    from rlver_jax.training.loop import Trainer
    from rlver_jax.training.loop import train as train_policy
    from rlver_jax.training.metrics_file import read_metrics
    from rlver_jax.training.trained_policy import TrainedPolicy
    from rlver_jax.verify import verify_logs

__all__ = [
    "Agents",
    "ConfigError",
    "Evaluation",
    "Profile",
    "TrainedPolicy",
    "Trainer",
    "__version__",
    "get_config",
    "load_config",
    "load_evaluation",
    "load_model",
    "make_mesh",
    "read_dialogues",
    "read_metrics",
    "read_profiles",
    "recomputed_rewards",
    "reward_settings",
    "sample_dialogues",
    "save_params",
    "train_policy",
    "validate",
    "verify_logs",
]

# Public name -> where it is defined. `train` and `evaluate` are modules already, the commands.
_PUBLIC = {
    "Agents": "rollout.agents:Agents",
    "ConfigError": "config.validate:ConfigError",
    "Evaluation": "evaluation.play:Evaluation",
    "Profile": "profiles.schema:Profile",
    "TrainedPolicy": "training.trained_policy:TrainedPolicy",
    "Trainer": "training.loop:Trainer",
    "get_config": "config.fields:get_config",
    "load_config": "config.flags:load_config",
    "load_evaluation": "evaluation.play:load",
    "load_model": "rollout.agents:load_model",
    "make_mesh": "parallel.mesh:make_mesh",
    "read_dialogues": "dialogues.log:read_dialogues",
    "read_metrics": "training.metrics_file:read_metrics",
    "read_profiles": "profiles.schema:read_profiles",
    "recomputed_rewards": "dialogues.faults:recomputed_rewards",
    "reward_settings": "config.validate:reward_settings",
    "sample_dialogues": "rollout.sampler:sample_dialogues",
    "save_params": "models.hf_weights:save_params",
    "train_policy": "training.loop:train",
    "validate": "config.validate:validate",
    "verify_logs": "verify:verify_logs",
}


def __getattr__(name: str) -> Any:
    """A public name, imported now (PEP 562)."""
    if name not in _PUBLIC:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    module, _, defined = _PUBLIC[name].partition(":")
    globals()[name] = value = getattr(importlib.import_module(f"{__name__}.{module}"), defined)
    return value


def __dir__() -> list[str]:
    """The public names."""
    return sorted(__all__)
