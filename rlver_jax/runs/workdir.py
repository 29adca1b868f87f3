"""The folder of a training run (`--workdir`): which run it belongs to, and where everything in it lies.

config.json · model/ · metrics.jsonl · tensorboard/ · checkpoints/ · dialogues/step_000010.jsonl · finished.json
"""

import dataclasses
import json
import os
import warnings
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import jax
from ml_collections import ConfigDict

from rlver_jax.config import ConfigError, flatten, unflatten
from rlver_jax.config_fields import PATHS
from rlver_jax.parallel import distributed
from rlver_jax.paths import check_folder_to_write
from rlver_jax.runs.checkpoint import saved_steps
from rlver_jax.runs.files import write_json
from rlver_jax.runs.kept_model import base_folder, check_same_model, keep_model, kept_model

CONFIG, FINISHED = "config.json", "finished.json"
_SHOWN = 5  # differences that a message names


@dataclasses.dataclass(frozen=True)
class RunFolder:
    """A run's folder; nothing is read or made before a method is called."""

    path: Path

    @property
    def metrics(self) -> Path:
        """A row a step."""
        return self.path / "metrics.jsonl"

    @property
    def checkpoints(self) -> Path:
        """Folder of `runs.checkpoint.Checkpoints`."""
        return self.path / "checkpoints"

    def dialogues(self, step: int) -> Path:
        """All dialogues of a step."""
        return self.path / "dialogues" / f"step_{step:06d}.jsonl"

    @classmethod
    def open(cls, path: str | os.PathLike[str], config: ConfigDict, *, free_fields: Sequence[str]) -> "RunFolder":
        """Makes the folder, or takes up the interrupted run that it holds. Processes that share a run all call it.

        Args:
            free_fields: fields of the config, or sections, that may differ from those that the run began with.

        Raises:
            ValueError: the folder holds another run, a finished one, or files of something else; or processes were
                given different configs or don't see one folder.
        """
        folder = cls(Path(path))
        new = json.loads(json.dumps(flatten(config)))  # tuples become lists, as in the file
        distributed.check_same("the config", {name: value for name, value in new.items() if name not in PATHS})
        distributed.from_main(lambda: folder._take(new, config.train.steps, free_fields))
        distributed.together(folder._check_shared)
        return folder

    def _take(self, new: dict[str, Any], steps: int, free_fields: Sequence[str]) -> None:
        check_folder_to_write(self.path)
        kept, source = kept_model(self.path), base_folder(new["policy.path"])
        if (self.path / CONFIG).exists():
            free = (*free_fields, "policy.path") if self.goes_on_without_base(new) else free_fields
            _check_same(self.path, self.config(), new, free)
            self._check_unfinished(steps)
            if kept and source:
                check_same_model(source, kept)
        elif self.path.exists() and any(self.path.iterdir()):
            names = ", ".join(sorted(item.name for item in self.path.iterdir())[:_SHOWN])
            raise ValueError(f"{self.path}: is not empty ({names}) and holds no {CONFIG}; name another --workdir")
        self.dialogues(0).parent.mkdir(parents=True, exist_ok=True)
        if not kept and source:
            keep_model(self.path, source)
        write_json(self.path / CONFIG, new)

    def goes_on_without_base(self, values: Mapping[str, Any]) -> bool:
        """Whether the run needs no weights from policy.path any more, so that this may have moved or be gone.

        Args:
            values: {"a.b": value} of the config that it shall go on with.
        """
        refers = values.get("loss.kl") and not values.get("reference.path")
        return bool(kept_model(self.path) and not refers and saved_steps(self.checkpoints))

    def to_load(self, config: ConfigDict) -> ConfigDict:
        """The config to load models by: without the folder of policy.path, the run's own and weights to be restored.

        The parameters that are made in the weights' place are those of no model; `Checkpoints.restore` replaces them.
        """
        gone = lambda: not base_folder(config.policy.path) and self.goes_on_without_base(flatten(config))  # noqa: E731
        if not distributed.from_main(gone):
            return config
        config = config.copy_and_resolve_references()
        config.policy.path, config.policy.init = str(kept_model(self.path)), "random"
        if not config.critic.path:
            config.critic.init = "random"
        return config

    def _check_shared(self) -> None:
        if not (self.path / CONFIG).exists():
            raise ValueError(
                f"{self.path}: process {jax.process_index()} doesn't see what process 0 wrote there; name a --workdir "
                f"that all hosts share (a network folder, or a bucket that is mounted on each)"
            )

    def config(self) -> dict[str, Any]:
        """{"a.b": value} of the config that the run was last started with.

        Raises:
            ValueError: there is none, or it is not one.
        """
        path = self.path / CONFIG
        try:
            return dict(json.loads(path.read_text(encoding="utf-8")))
        except OSError as error:
            raise ValueError(f"{self.path}: holds no {CONFIG}; expected the --workdir of a training run") from error
        except (ValueError, TypeError) as error:
            raise ValueError(f"{path}: is no config of a run ({error}); restore it, or name another folder") from error

    def typed_config(self, base: ConfigDict) -> ConfigDict:
        """`config`, with the fields of `configs/base.py:get_config()`.

        Warns (UserWarning) of fields that it lacks: they are as in base.

        Raises:
            ValueError: as `config`; or it is of another version of rlver_jax, or holds what no field can.
        """
        values, fields = self.config(), flatten(base)
        absent = [f"{name} ({fields[name]!r} is taken)" for name in fields if name not in values]
        if absent:
            more = f" and {len(absent) - _SHOWN} more fields" if len(absent) > _SHOWN else ""
            warnings.warn(
                f"{self.path / CONFIG}: of an older version of rlver_jax, has no {', '.join(absent[:_SHOWN])}{more}",
                stacklevel=2,
            )
        try:
            return unflatten(values, base)
        except ConfigError as error:
            raise ConfigError(f"{self.path / CONFIG}: {error}") from error

    def drop_after(self, step: int) -> None:
        """Removes the dialogues of later steps, which will be played again."""
        for file in self.dialogues(0).parent.glob("step_*.jsonl"):
            if file > self.dialogues(step):
                file.unlink()

    def mark_finished(self, step: int) -> None:
        """The run has done all its steps."""
        write_json(self.path / FINISHED, {"step": step})

    def _check_unfinished(self, steps: int) -> None:
        path = self.path / FINISHED
        if not path.exists():
            return
        done = json.loads(path.read_text(encoding="utf-8"))["step"]
        if done >= steps:
            raise ValueError(
                f"{self.path}: holds a finished run of {done} steps; name another --workdir, or raise train.steps "
                f"above {done} to go on with it"
            )


def _check_same(path: Path, found: dict[str, Any], new: dict[str, Any], free_fields: Sequence[str]) -> None:
    free = tuple(f"{name}." for name in free_fields)
    names = [
        name
        for name in {**found, **new}
        if not f"{name}.".startswith(free) and (name not in found or name not in new or found[name] != new[name])
    ]
    if names:
        was, now = ({n: repr(values[n]) if n in values else "no field" for n in names} for values in (found, new))
        shown = "; ".join(f"{name} was {was[name]}, is {now[name]}" for name in names[:_SHOWN])
        more = f"; and {len(names) - _SHOWN} more" if len(names) > _SHOWN else ""
        raise ValueError(
            f"{path}: holds a run with another config ({shown}{more}); name another --workdir, or give the same config "
            f"to go on with it (only {', '.join(free_fields)} may change)"
        )
