"""The folder of a training run (`--workdir`): which run it belongs to, and where everything in it lies.

config.json · fingerprints.json · model/ · metrics.jsonl · tensorboard/ · checkpoints/ · dialogues/step_000010.jsonl ·
finished.json, and while a process trains there lock/
"""

import dataclasses
import json
import logging
import os
import warnings
from collections.abc import Callable, Collection, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import jax
from ml_collections import ConfigDict

from rlver_jax.config.datasets import profile_files
from rlver_jax.config.fields import FIELDS, FREE_FIELDS, PATHS
from rlver_jax.config.paths import check_folder_to_write, nearest
from rlver_jax.config.validate import ConfigError, flatten, unflatten
from rlver_jax.parallel import distributed
from rlver_jax.runs.files import write_json
from rlver_jax.runs.lock import LOCK
from rlver_jax.runs.settings import SHOWN, check_same, listed, without_secrets
from rlver_jax.training.checkpoints import saved_steps
from rlver_jax.training.kept_model import base_folder, check_same_model, keep_model, kept_model
from rlver_jax.training.metrics_file import iter_metrics

CONFIG, FINGERPRINTS, FINISHED = "config.json", "fingerprints.json", "finished.json"
_VERSION = 1  # of fingerprints.json
_log = logging.getLogger(__name__)


class Contents(NamedTuple):
    """How a run's folder learns what the run reads."""

    read: Callable[[Collection[str]], dict[str, str]]  # fingerprints, without those of models that are named as gone
    described: Callable[[str], str]  # what a fingerprint is of, in words


@dataclasses.dataclass(frozen=True)
class RunFolder:
    """A run's folder; nothing is read or made before a method is called."""

    path: Path
    check: Callable[[], None] = lambda: None  # called before anything is written; `Lock.check` of who trains here

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
    def open(
        cls,
        path: str | os.PathLike[str],
        config: ConfigDict,
        *,
        free_fields: Sequence[str] = FREE_FIELDS,
        contents: Contents | None = None,
        check: Callable[[], None] = lambda: None,
        report: Callable[[str], None] = _log.warning,
    ) -> "RunFolder":
        """Makes the folder, or resumes the interrupted run that it holds. Processes that share a run all call it.

        Args:
            free_fields: fields of the config, or sections, that may differ from those that the run began with.
            contents: what tells whether files are the same, which may then lie elsewhere; None: their paths do.
            check: the folder's own.
            report: is told what an older version did not write down, and what is taken for it.

        Raises:
            ValueError: the folder holds another run, a finished one, or files of something else; or processes were
                given different configs or don't see one folder.
        """
        folder = cls(Path(path), check)
        new = json.loads(json.dumps(without_secrets(flatten(config))))  # tuples become lists, as in the file
        distributed.check_same("the config", {name: value for name, value in new.items() if name not in PATHS})
        distributed.from_main(lambda: folder._take(new, config.train.steps, free_fields, contents, report))
        distributed.all_or_none(folder._check_shared)
        return folder

    def _take(
        self,
        new: dict[str, Any],
        steps: int,
        free_fields: Sequence[str],
        contents: Contents | None,
        report: Callable[[str], None],
    ) -> None:
        check_folder_to_write(self.path)
        own_model, source = kept_model(self.path), base_folder(new["policy.path"])
        known = self.fingerprints()
        if (self.path / CONFIG).exists() and not (self._begun() or self._finished()):
            if self.config() != new:
                report(f"{self.path}: held a start that came to no step; it is taken over with this config")
            own_model = None  # kept anew: the correction may name another model
        elif (self.path / CONFIG).exists():
            free = (*free_fields, "policy.path") if self.resumes_without_base(new) else tuple(free_fields)
            self._check_same_config(new, (*free, *PATHS) if contents and known else free, free_fields, report)
            self._check_unfinished(steps)
            self._check_metrics()
            if own_model and source:
                check_same_model(source, own_model)
        elif self.path.exists() and (names := sorted(item.name for item in self.path.iterdir() if item.name != LOCK)):
            raise ValueError(
                f"{self.path}: is not empty ({', '.join(names[:SHOWN])}) and holds no {CONFIG}; name another --workdir"
            )
        now = self._same_contents(new, known, contents, report) if contents else known
        self.dialogues(0).parent.mkdir(parents=True, exist_ok=True)
        if not own_model and source:
            keep_model(self.path, source)
        if now:
            write_json(self.path / FINGERPRINTS, {"version": _VERSION, "contents": now})
        write_json(self.path / CONFIG, new)

    def _check_same_config(
        self, new: dict[str, Any], free: Sequence[str], named: Sequence[str], report: Callable[[str], None]
    ) -> None:
        sections = tuple(f"{name}." for name in free)
        old = without_secrets(self.config())
        old |= {name: new[name] for name in PATHS if _same_files(old.get(name), new[name])}
        check_same(
            self.path,
            old,
            new,
            lambda name: f"{name}.".startswith(sections),
            fault="holds a run with another config",
            remedy=f"name another --workdir, or give the same config to resume it (only {', '.join(named)} may "
            f"change{'' if self.fingerprints() else ', not even paths: no fingerprints tell what lay there'})",
            report=report,
        )

    def _same_contents(
        self, new: dict[str, Any], known: dict[str, str], contents: Contents, report: Callable[[str], None]
    ) -> dict[str, str]:
        """Fingerprints of what the run reads; those of files that it needs no more, and that are gone, stay."""
        gone = ["policy", *(name for name in ("critic", "reference") if not new.get(f"{name}.path"))]
        base_gone = self.resumes_without_base(new) and without_weights(new["policy.path"], new["policy.init"])
        now = contents.read(gone if base_gone else ())
        if not self._begun():
            return now
        changed = [contents.described(name) for name in now if known.get(name, now[name]) != now[name]]
        changed += [contents.described(name) for name in _adapters_changed(known, now)]
        if changed:
            raise ValueError(
                f"{self.path}: holds a run that began with others than these: {listed(changed, '; ')}; give what it "
                f"began with, at whatever path, to resume it, or name another --workdir"
            )
        unknown = [contents.described(name) for name in now if name not in known]
        if unknown:
            report(
                f"{self.path}: no fingerprint of {listed(unknown, ', ')} (begun by an older version, or removed): "
                f"taken as they are now"
            )
        return known | now

    def _begun(self) -> bool:
        """Whether anything has been computed that other contents would not go with."""
        return bool(saved_steps(self.checkpoints)) or self.has_rows()

    def has_rows(self) -> bool:
        """Whether there are metrics of any step."""
        return self.metrics.exists() and self.metrics.stat().st_size > 0

    def fingerprints(self) -> dict[str, str]:
        """Of all that the run reads (`fingerprints.run_fingerprints`); empty for a run of an older version.

        Raises:
            ValueError: the file is of a newer version, or broken.
        """
        path = self.path / FINGERPRINTS
        try:
            file = json.loads(path.read_text(encoding="utf-8"))
            if file["version"] == _VERSION:
                return {str(name): str(value) for name, value in file["contents"].items()}
            why = f"has version {file['version']!r}, expected {_VERSION}"
        except FileNotFoundError:
            return {}
        except (ValueError, TypeError, KeyError, AttributeError) as error:
            why = f"cannot be read ({error})"
        raise ValueError(f"{path}: {why}; restore it, or remove it to take the files as they are now")

    def resumes_without_base(self, values: Mapping[str, Any]) -> bool:
        """Whether the run needs no weights from policy.path any more, so that this may have moved or be gone.

        Args:
            values: {"a.b": value} of the config that it shall resume with.
        """
        refers = (values.get("loss.kl") and not values.get("reference.path")) or values.get("lora.rank")
        return bool(kept_model(self.path) and not refers and saved_steps(self.checkpoints))

    def to_load(self, config: ConfigDict) -> ConfigDict:
        """The config to load models by: without the folder of policy.path, the run's own and weights to be restored.

        The parameters that are made instead of the weights are those of no model; `Checkpoints.restore` replaces them.
        """
        gone = lambda: (  # noqa: E731
            self.resumes_without_base(flatten(config)) and without_weights(config.policy.path, config.policy.init)
        )
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
            close = nearest(self.path, lambda folder: (folder / CONFIG).is_file())
            hint = f"did you mean {close}?" if close else "expected the --workdir of a training run"
            raise ValueError(f"{self.path}: holds no {CONFIG}; {hint}") from error
        except (ValueError, TypeError) as error:
            raise ValueError(f"{path}: is no config of a run ({error}); restore it, or name another folder") from error

    def typed_config(self) -> ConfigDict:
        """`config` as a ConfigDict.

        Warns (UserWarning) of fields that it lacks: they have their defaults.

        Raises:
            ValueError: as `config`; or it is of another version of rlver_jax, or holds what no field can.
        """
        values = self.config()
        absent = [f"{name} ({field.default!r} is taken)" for name, field in FIELDS.items() if name not in values]
        if absent:
            warnings.warn(
                f"{self.path / CONFIG}: of an older version of rlver_jax, has no {listed(absent, ', ')}",
                stacklevel=2,
            )
        try:
            return unflatten(values)
        except ConfigError as error:
            raise ConfigError(f"{self.path / CONFIG}: {error}") from error

    def drop_after(self, step: int) -> None:
        """Removes the dialogues of later steps, which will be played again."""
        self.check()
        for file in self.dialogues(0).parent.glob("step_*.jsonl"):
            if file > self.dialogues(step):
                file.unlink()

    def mark_finished(self, step: int) -> None:
        """The run has done all its steps."""
        self.check()
        write_json(self.path / FINISHED, {"step": step})

    def done(self) -> int:
        """The last step that is known to be done, whatever the metrics say: of the newest checkpoint, or the finish."""
        return max([0, self._finished(), *saved_steps(self.checkpoints)])

    def _finished(self) -> int:
        """The step with which the run finished; 0: it has not."""
        path = self.path / FINISHED
        if not path.exists():
            return 0
        try:
            return int(json.loads(path.read_text(encoding="utf-8"))["step"])
        except (ValueError, TypeError, KeyError) as error:
            raise ValueError(f"{path}: says no step ({error}); remove it to resume the run") from error

    def _check_metrics(self) -> None:
        """That they can be resumed; checked now, not after minutes of compilation."""
        if saved_steps(self.checkpoints) and self.metrics.exists():
            for _ in iter_metrics(self.metrics):
                pass

    def _check_unfinished(self, steps: int) -> None:
        done = self._finished()
        if done and done >= steps:
            raise ValueError(
                f"{self.path}: holds a finished run of {done} steps; name another --workdir, or raise train.steps "
                f"above {done} to resume it"
            )


def _adapters_changed(known: Mapping[str, str], now: Mapping[str, str]) -> list[str]:
    """Adapters that models of a run had at its beginning and have no more, or the other way round."""
    models = [name.removesuffix(".weights") for name in now if name.endswith(".weights") and name in known]
    names = [f"{model}.adapter" for model in models]
    return [name for name in names if (name in known) != (name in now)]


def _same_files(old: object, new: str) -> bool:
    """Whether two fields name the same files, however they are spelt."""
    files = lambda field: [os.path.realpath(file) for file in profile_files(field)]  # noqa: E731
    return isinstance(old, str) and files(old) == files(new)


def without_weights(path: str, init: str) -> bool:
    """Whether what policy.path and policy.init ask for is not at hand: gone, only config and tokenizer, not fetched."""
    folder = base_folder(path)
    return folder is None or (init == "path" and not any(folder.glob("*.safetensors")))
