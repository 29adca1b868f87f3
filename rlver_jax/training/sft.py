"""From a config to a run of supervised fine-tuning, and through it (docs/fitting.md)."""

import hashlib
from collections.abc import Collection
from pathlib import Path

import numpy as np
from jax.sharding import Mesh
from ml_collections import ConfigDict
from rich.console import Console

from rlver_jax.config.datasets import profile_files
from rlver_jax.config.hub import local_folder
from rlver_jax.config.lora_fields import rounding_faults
from rlver_jax.config.sections import keywords
from rlver_jax.config.validate import ConfigError, flatten
from rlver_jax.decoding.cache import LM
from rlver_jax.learning.optimizer import Optimizers, make_optimizer
from rlver_jax.learning.sft_loss import FieldLoss
from rlver_jax.learning.train_step import TrainState
from rlver_jax.parallel import distributed
from rlver_jax.rollout.agents import Agents, load_model, make_model
from rlver_jax.rollout.spec import check_context
from rlver_jax.runs.fingerprints import described, run_fingerprints
from rlver_jax.runs.lock import hold
from rlver_jax.text.tokenizer import load_tokenizer
from rlver_jax.training.learners import as_trained, lora_of, new_adapter
from rlver_jax.training.setup import check_attention, first_state, rollout_spec
from rlver_jax.training.sft_data import (
    USER,
    Dialogues,
    Source,
    examples_of,
    field_weights,
    fitting_prompts,
    open_dialogues,
    read_dialogues,
)
from rlver_jax.training.sft_examples import Examples
from rlver_jax.training.sft_loop import Fit, Fitter
from rlver_jax.training.workdir import Contents, RunFolder
from rlver_jax.user.prompts import load_prompts
from rlver_jax.user.prompts.shorten import free_fields, write_prompts

DATA, PROMPTS = "sft.data", "prompts"


def settle_role(config: ConfigDict) -> None:
    """Makes `config.policy` the model that learns: with the role user its folder and weights are the user's.

    Everything of a run's folder that serves a trained policy (checkpoints, export) so serves a fitted user, too.
    """
    if config.sft.role == USER:
        for name in ("path", "adapter", "init"):
            config.policy[name] = config.user[name]


def check_fitting(config: ConfigDict) -> None:
    """What only supervised fine-tuning needs, of a valid config.

    Raises:
        ConfigError: with one line for every fault.
    """
    faults = []
    if not config.sft.data:
        faults.append("sft.data is empty; name dialogues with --data=FILE[,FILE…]")
    if not config.policy.path:
        faults.append(f"{config.sft.role}.path is empty; set --config.{config.sft.role}.path to the folder of a model")
    if config.sft.role == USER and config.remote.user.url:
        faults.append("remote.user.url is set; a user at an endpoint learns nothing here: leave it out")
    faults += (fault for fault in rounding_faults(flatten(config)) if fault.startswith("policy."))
    if faults:
        raise ConfigError("the config cannot be fitted with:\n" + "\n".join(f"  - {fault}" for fault in faults))


def fit(config: ConfigDict, workdir: str | Path, mesh: Mesh, console: Console) -> int:
    """Learns in `workdir`, or resumes there; returns the number of steps done.

    Args:
        config: valid, its role settled.

    Raises:
        ValueError, OSError: bad input, before anything is compiled.
        CollapseError: a loss or a gradient is no number.
    """
    notify = lambda text: console.print(text, markup=False, highlight=False, soft_wrap=True)  # noqa: E731
    check_attention(config, mesh)
    to_load = RunFolder(Path(workdir)).to_load(config)
    check_context(to_load, "policy")
    with console.status("reading dialogues"):
        source = open_dialogues(config)
        agents, shortened = without_weights(to_load, source)
        make = examples_of(config, agents)
        weights = field_weights(config.sft.weights, make.fields)
        dialogues = read_dialogues(config, source, make)
    with hold(workdir, "--workdir", notify) as lock:
        contents = Contents(lambda gone: fingerprints_of(config, gone), lambda name: _described(name, config))
        folder = RunFolder.open(workdir, config, contents=contents, check=lock.check, report=notify)
        notify(dialogues.summary)
        if shortened:
            if distributed.is_main():
                write_prompts(agents.prompts, config.user.prompts, folder.path / PROMPTS)
            notify(f"{shortened}: play it with --config.user.prompts={folder.path / PROMPTS}")
        with console.status("loading the model"):
            fitting, state = build(to_load, mesh, dialogues, make, weights)
        return Fitter(config, folder, fitting, state, console).train(state)


def without_weights(config: ConfigDict, source: Source) -> tuple[Agents, str]:
    """Tokenizer, prompts and tables of the model that learns: all that dialogues are laid out by.

    Returns:
        them, and what the user's scripts lack of those that the config names, in words; empty: nothing.
    """
    model, tokenizer = make_model(config.policy, config.sft.role), load_tokenizer(config.policy.path)
    whole = load_prompts(config.data.language, config.user.prompts or None)
    prompts = fitting_prompts(config, whole, source)
    gone = [
        f"{', '.join(names)} of the {kind}"
        for kind in ("appraisal", "reply")
        if (names := [x for x in free_fields(getattr(whole, kind)) if x not in free_fields(getattr(prompts, kind))])
    ]
    told = {"style": config.user.style, "scenario": config.user.scenario}
    agents = Agents.build(LM({}, model), LM({}, model), tokenizer, prompts, rollout_spec(config), **told)
    return agents, f"the user learns scripts without {' and '.join(gone)}" if gone else ""


def build(
    config: ConfigDict, mesh: Mesh, dialogues: Dialogues, make: Examples, weights: list[float]
) -> tuple[Fit, TrainState]:
    """Loads the model onto the mesh; returns the run and its state before the first step."""
    lm, _ = load_model(config.policy, config.sft.role, mesh)
    optimizers = Optimizers(make_optimizer(**keywords(make_optimizer, config.train)))
    lora, base = lora_of(config), None
    sizes = len(make.fields), config.loss.vocab_chunk, mesh.shape["tensor"]
    of, params = FieldLoss(as_trained(lm.model, config.policy), *sizes, lora), lm.params
    if lora is not None:
        params, base = new_adapter(lm.model, lora, config.train.seed, "policy", mesh), lm.params
    state = first_state({"policy": params}, optimizers, mesh)
    options = None if make.options is None else distributed.replicate(make.options, mesh)
    rest = make.fields, np.array(weights), options, make.teaches_appraisal, base
    return Fit(mesh, of, optimizers, dialogues, *rest), state


def fingerprints_of(config: ConfigDict, gone: Collection[str] = ()) -> dict[str, str]:
    """Of all that a run reads: dialogues, prompts and the model; see `runs.fingerprints.run_fingerprints`."""
    weights = config.policy.init == "path"
    models = {} if "policy" in gone else {"policy": (local_folder(config.policy.path, weights=weights), weights)}
    digest = hashlib.sha256()
    for file in profile_files(config.sft.data):
        with Path(file).open("rb") as stream:  # logs may be larger than memory
            digest.update(hashlib.file_digest(stream, "sha256").digest())
    return run_fingerprints(config, {}, models) | {DATA: digest.hexdigest()[:16]}


def _described(name: str, config: ConfigDict) -> str:
    return f"the dialogues ({DATA}={config.sft.data!r})" if name == DATA else described(name, config)
