"""A policy out of a training run's folder: its config, and the parameters of one of its checkpoints."""

import dataclasses
from pathlib import Path

import jax
from jax.sharding import Mesh, SingleDeviceSharding
from ml_collections import ConfigDict

from rlver_jax.config.foreign_weights import is_run
from rlver_jax.config.hub import fault, local_folder
from rlver_jax.models.lora import LoRA, abstract_adapter, applied
from rlver_jax.models.qwen import Params, Qwen2, abstract_params
from rlver_jax.parallel import rules
from rlver_jax.rollout.agents import random_params, read_params
from rlver_jax.runs.fingerprints import model_parts
from rlver_jax.training.checkpoints import CheckpointError, Checkpoints, MismatchError
from rlver_jax.training.kept_model import base_folder, check_same_model, kept_model
from rlver_jax.training.learners import lora_of
from rlver_jax.training.workdir import RunFolder, without_weights

WEIGHTS = "policy.weights"  # in a run's fingerprints


@dataclasses.dataclass(frozen=True)
class TrainedPolicy:
    """The policy of a checkpoint, as `open` chose it."""

    folder: RunFolder
    config: ConfigDict  # of the run; its policy.path is where config and tokenizer lie now
    step: int
    fingerprint: str  # of the checkpoint, and with LoRA of the base's weights
    base: str = ""  # with LoRA: folder of the model that its adapter stands on

    @classmethod
    def open(cls, workdir: str | Path, step: str = "", path: str = "") -> "TrainedPolicy":
        """Chooses a checkpoint.

        Args:
            step: "best" (by eval/score), "last", or a number; empty: the best, or the last where none has a score.
            path: Hugging Face folder to take config and tokenizer from; empty: the run's own.

        Raises:
            ValueError: no run's folder, no such checkpoint in it, or no model's folder, or one of another model.
        """
        folder = RunFolder(Path(workdir))
        if folder.path.is_dir() and not is_run(folder.path):
            raise CheckpointError(
                f"{folder.checkpoints}: no such folder; expected the checkpoints of a training run, "
                f"but {workdir} holds {_held(folder.path)}"
            )
        config = folder.typed_config()
        base = (path or config.policy.path) if config.lora.rank else ""
        config.policy.path = _model_folder(folder, config.policy.path, path)
        checkpoints = Checkpoints.reader(folder.checkpoints)
        try:
            number = _number(checkpoints, step)
            fingerprint = checkpoints.fingerprint(number)
        finally:
            checkpoints.close()
        known = folder.fingerprints().get(WEIGHTS, "") if base else ""
        return cls(folder, config, number, f"{fingerprint}.{known}" if known else fingerprint, base)

    def weights(self, model: Qwen2, mesh: Mesh | None = None) -> Params:
        """The policy's parameters, each leaf sharded by `parallel.rules`; of a run with LoRA as `models.lora.applied`.

        Raises:
            CheckpointError: they are not those of such a model, or damaged.
            ValueError, OSError: the base that an adapter stands on is gone, or another one.
        """
        lora = lora_of(self.config)
        if lora is None:
            return self._read(*abstract_params(model), mesh)
        base = self._base(model, mesh)
        return applied(base, self._read(*abstract_adapter(model, lora), mesh), lora)

    def adapter(self, model: Qwen2, lora: LoRA, mesh: Mesh | None = None) -> Params:
        """The adapter alone, of a run with LoRA; raises as `weights`."""
        return self._read(*abstract_adapter(model, lora), mesh)

    @property
    def base_section(self) -> ConfigDict | None:
        """`config.policy` of the model that the adapter stands on; None: a run without LoRA."""
        if not self.base:
            return None
        section = self.config.policy.copy_and_resolve_references()
        section.path = self.base
        return section

    def _base(self, model: Qwen2, mesh: Mesh | None) -> Params:
        c = self.config.policy
        if c.init == "random":
            role = self.config.sft.role if self.config.sft.data else "policy"
            return random_params(model, role, mesh)
        remedy = "name it with --config.policy.path=FOLDER"
        if without_weights(self.base, c.init):
            raise ValueError(
                f"{self.folder.path}: holds an adapter on the model of policy.path={self.base!r}, whose weights are "
                f"gone; {remedy}"
            )
        known = self.folder.fingerprints().get(WEIGHTS)
        if known not in (None, model_parts(local_folder(self.base, weights=True), weights=True)["weights"]):
            raise ValueError(
                f"{self.base}: holds other weights than those that the adapter in {self.folder.path} was trained on; "
                f"{remedy}"
            )
        section = self.base_section
        assert section is not None
        return read_params(section, model, mesh)

    def _read(self, shapes: Params, axes: Params, mesh: Mesh | None) -> Params:
        one = SingleDeviceSharding(jax.local_devices()[0])
        shardings = jax.tree.map(lambda _: one, shapes) if mesh is None else rules.tree_shardings(axes, shapes, mesh)
        like = jax.tree.map(lambda x, s: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=s), shapes, shardings)
        checkpoints = Checkpoints.reader(self.folder.checkpoints)
        try:
            return checkpoints.restore_part(self.step, like, "params/policy")
        except MismatchError as error:
            raise MismatchError(f"{error} (the model is that of {self.config.policy.path})") from error
        finally:
            checkpoints.close()


def take_checkpoint(config: ConfigDict, checkpoint: str, step: str, path: str = "") -> TrainedPolicy | None:
    """Replaces the config's policy by `--checkpoint`; empty: leaves it.

    Args:
        config: its `policy.path` and `policy.init` are changed.
        checkpoint: a training run or a Hugging Face folder, of which everything is taken.
        step: as in `TrainedPolicy.open`.
        path: of a training run, where to take config and tokenizer from (`flags.path_override`); empty: its own.

    Returns:
        what to read the policy from, where it is a training run.

    Raises:
        ValueError: as `TrainedPolicy.open`.
    """
    if not checkpoint:
        return None
    if not is_run(checkpoint):
        config.policy.path, config.policy.init = checkpoint, "path"
        return None
    if config.policy.adapter:
        raise CheckpointError(
            f"policy.adapter={config.policy.adapter!r}: --checkpoint={checkpoint} is a training run, whose policy is "
            f"whole; leave the adapter out"
        )
    trained = TrainedPolicy.open(checkpoint, step, path)
    if trained.config.sft.data and trained.config.sft.role == "user":
        raise CheckpointError(
            f"--checkpoint={checkpoint}: a simulated user that sft has fitted, and no policy; export it, and give the "
            f"folder as --config.user.path"
        )
    config.policy.path, config.policy.init = trained.config.policy.path, trained.config.policy.init
    return trained


def _model_folder(run: RunFolder, trained_from: str, named: str) -> str:
    """Where config and tokenizer of a run's policy lie: in the folder named, in the run's, or in the base model's."""
    stored = kept_model(run.path)
    known = str(stored) if stored else trained_from if base_folder(trained_from) else ""
    if not (named or known):
        raise ValueError(
            f"{run.path}: keeps no config and tokenizer, since an older version began it, and its policy.path="
            f"{trained_from!r} is gone; give the base model's folder with --config.policy.path=FOLDER"
        )
    if named and (what := fault(named)):
        raise ValueError(f"policy.path={named!r}: {what}; leave it out to take the run's own ({known})")
    if named and known and Path(named).resolve() != Path(known).resolve():
        check_same_model(named, known)
    return named or known


def _held(folder: Path) -> str:
    """What a folder without checkpoints is, in a few words."""
    names = sorted(file.name for file in folder.iterdir())
    if "config.json" in names and any(name.endswith(".safetensors") for name in names):
        return "a model, which needs no export: name it as policy.path, or as --checkpoint"
    return ", ".join(names[:10]) or "nothing"


def _number(checkpoints: Checkpoints, step: str) -> int:
    steps, best = checkpoints.steps(), checkpoints.best_step()
    there = f"there are steps {', '.join(map(str, steps)) or '(none)'}; best by eval/score: {best or '(none)'}"
    if step in ("", "last", "best"):
        number = best if step == "best" or (not step and best is not None) else max(steps, default=None)
    else:
        number = int(step) if step.isdigit() else None
    if number not in steps:
        raise CheckpointError(f"{checkpoints.folder}: no checkpoint for step={step!r}; {there}")
    return number
