"""Checkpoints of a run's state (Orbax): written while training continues, checked whenever they are read.

A state is stored flat, {"params/policy/…": array}, without the containers it came in (optax's may be empty): `like`
gives those back, and a part can be read alone. Beside it stands a record: each leaf's shape, dtype and checksum, the
score, and what the caller adds.

Orbax notices most damage to its files, but not a changed byte in an array's data. So every leaf's checksum is computed
on the device before the state is handed over, and again of what is read back: a restored state is the saved one to the
bit, or it is not used. The write itself holds references to the arrays' buffers. The runtime never hands such buffers
over when they are donated, so the next training step cannot write into what is still being saved.
"""

import contextlib
import dataclasses
import functools
import gc
import json
import logging
import math
import os
import re
import sys
import zlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, Literal, NamedTuple, TypeVar

import jax
import numpy as np
import orbax.checkpoint as ocp
from etils import epath
from jax.sharding import SingleDeviceSharding
from jaxtyping import Array
from orbax.checkpoint.checkpoint_managers import PreservationPolicy

from rlver_jax.parallel import distributed
from rlver_jax.training.leaves import check_leaf, describe, flatten

_T = TypeVar("_T")
_DIGITS = 6  # of a step in the name of its folder
_log = logging.getLogger(__name__)


class CheckpointError(ValueError):
    """A checkpoint that cannot be used; the message names it, why, and what to do."""


class MismatchError(CheckpointError):
    """A whole checkpoint, but of another model or optimizer; the message names the leaf and both shapes."""


class Restored(NamedTuple):
    """What a checkpoint held."""

    step: int
    state: Any  # in the containers of `like`
    extra: dict[str, Any]


@dataclasses.dataclass
class _Keep(PreservationPolicy):
    """The newest steps and the best of those with a score stay. (Orbax's BestN would keep some that have none.)"""

    last: int
    best: int
    scores: dict[int, float]

    def should_preserve(self, checkpoints: Sequence[Any], *, context: Any) -> Sequence[bool]:
        """Whether each checkpoint stays."""
        steps = sorted(checkpoint.step for checkpoint in checkpoints)
        preserved = {*steps[-self.last :], *self.ranked(steps)[: self.best]}
        return [checkpoint.step in preserved for checkpoint in checkpoints]

    def ranked(self, steps: Sequence[int]) -> list[int]:
        """Steps with a score, the best one first; of equals the newer one."""
        return sorted((s for s in steps if s in self.scores), key=lambda s: (self.scores[s], s), reverse=True)


class Checkpoints:
    """The checkpoints in a folder. All processes of a run make the same calls."""

    def __init__(self, folder: str | os.PathLike[str], *, keep_last: int, keep_best: int, read_only: bool = False):
        """Opens the folder, or makes it, and removes what an interrupted save left.

        Args:
            keep_last: newest checkpoints that stay, at least 1.
            keep_best: checkpoints that stay beside them, by score.
            read_only: for a folder that another process may be writing to; see `reader`.
        """
        if keep_last < 1 or keep_best < 0:
            raise ValueError(f"keep_last={keep_last}, keep_best={keep_best}: expected at least 1 and at least 0")
        self.folder = Path(folder).absolute()
        self._read_only = read_only
        self._keep = _Keep(keep_last, keep_best, {})
        options = ocp.CheckpointManagerOptions(
            step_format_fixed_length=_DIGITS,
            preservation_policy=self._keep,
            cleanup_tmp_directories=not read_only,
            create=not read_only,
        )
        self._manager = ocp.CheckpointManager(self.folder, options=options)
        # Reads without the manager's barriers, at which the others would wait for a process that cannot read.
        self._handler = ocp.PyTreeCheckpointHandler()
        for step in self.steps():
            try:
                score = _on_all(functools.partial(self._record, step))["score"]
            except Exception:  # a broken one has no score; `restore` tells why
                continue
            if score is not None:
                self._keep.scores[step] = score

    @classmethod
    def reader(cls, folder: str | os.PathLike[str]) -> "Checkpoints":
        """Checkpoints to be read only; nothing in the folder is changed.

        Raises:
            CheckpointError: no such folder.
        """
        if not Path(folder).is_dir():
            raise CheckpointError(f"{folder}: no such folder; expected the checkpoints of a training run")
        return cls(folder, keep_last=1, keep_best=0, read_only=True)

    def steps(self) -> list[int]:
        """Steps that were saved and are kept, rising; one that is still being written is among them."""
        return sorted(self._manager.all_steps())

    def best_step(self) -> int | None:
        """The step with the best score, None without any score."""
        return next(iter(self._keep.ranked(self.steps())), None)

    def save(self, step: int, state: Any, extra: Mapping[str, Any], score: float | None = None) -> None:
        """Starts to save a state; returns as soon as its arrays may be donated.

        Args:
            state: pytree of arrays, without typed keys.
            extra: whatever else is needed to resume; of JSON types.
            score: of an evaluation; without one (or with NaN) the step is no candidate for the best.

        Raises:
            ValueError: the step has been saved before, or a leaf cannot be saved.
        """
        if self._read_only:
            raise ValueError(f"{self.folder} was opened to be read only; open it with Checkpoints(…) to save in it")
        if step in self.steps():
            raise ValueError(f"{self.folder}: step {step} has been saved before; restore a state before saving it")
        flat = flatten(state)
        for name, leaf in flat.items():
            check_leaf(name, leaf)
        score = None if score is None or math.isnan(score) else float(score)
        record = {"extra": dict(extra), "score": score, "leaves": describe(flat)}
        record = json.loads(json.dumps(record))  # as it will be read
        if score is not None:
            self._keep.scores[step] = score
        sealed = {"record": record, "crc32": _crc32(record)}
        args = ocp.args.Composite(state=ocp.args.PyTreeSave(flat), record=ocp.args.JsonSave(sealed))
        self._manager.save(step, args=args, force=True)

    def restore(self, like: Any, *, report: Callable[[str], None] = _log.warning) -> Restored | None:
        """The newest checkpoint that is whole; newer ones that are not are moved aside, and reported.

        Args:
            like: pytree of `jax.ShapeDtypeStruct` with shardings, or of arrays; gives the sharding of each leaf.
            report: is told which checkpoints cannot be used, why, and which one is used.

        Returns:
            None if there is no checkpoint.

        Raises:
            MismatchError: the newest whole one holds another state than `like`.
            CheckpointError: there are checkpoints, but none is whole.
        """
        self.wait()
        broken: dict[int, str] = {}
        for step in reversed(self.steps()):
            loaded = self._try(step, flatten(like))
            if isinstance(loaded, str):
                broken[step] = loaded
                continue
            for other, why in broken.items():
                report(f"checkpoint of step {other} cannot be used ({why}){self._set_aside(other)}")
            if broken:
                report(f"using the checkpoint of step {step} instead")
                self._manager.reload()
            flat, record = loaded
            return Restored(step, jax.tree.unflatten(jax.tree.structure(like), flat.values()), record["extra"])
        if broken:
            faults = "\n".join(f"  - step {step}: {why}" for step, why in broken.items())
            raise CheckpointError(
                f"{self.folder}: no checkpoint can be used; restore one, or begin anew in another folder:\n{faults}"
            )
        return None

    def restore_part(self, step: int | Literal["last", "best"] | None, like_part: Any, key: str) -> Any:
        """One part of a state, such as "params/policy"; nothing else is read.

        Args:
            step: a step's number, the "best" one by score, or the "last" one (also None).
            like_part: as `restore`'s `like`, of the part alone.
            key: names of fields, keys and indices that lead to the part, with slashes.

        Raises:
            CheckpointError: no such checkpoint, or it is broken; with the steps that there are.
            MismatchError: the part has other leaves or shapes.
        """
        self.wait()
        number = self._number(step)
        like = {f"{key}/{name}" if name else key: leaf for name, leaf in flatten(like_part).items()}
        loaded = self._try(number, like, key)
        if isinstance(loaded, str):
            raise CheckpointError(
                f"{self.folder}: the checkpoint of step {number} cannot be used ({loaded}); {self._there()}"
            )
        return jax.tree.unflatten(jax.tree.structure(like_part), loaded[0].values())

    def fingerprint(self, step: int) -> str:
        """Of a checkpoint's contents: of every leaf's checksum."""
        return f"{_crc32(self._record(step)['leaves']):08x}"

    def wait(self) -> None:
        """Returns when everything is on disk.

        Raises:
            Exception: whatever kept the last save from being finished.
        """
        self._manager.wait_until_finished()
        self._manager.check_for_errors()

    def close(self) -> None:
        """Waits, then ends the threads that write. A process that ends without it may lose its last save."""
        self.wait()
        self._manager.close()

    def _number(self, step: int | Literal["last", "best"] | None) -> int:
        if step == "best":
            number = self.best_step()
        else:
            number = max(self.steps(), default=None) if step in ("last", None) else int(step)
        if number not in self.steps():
            why = "has a score" if step == "best" else "is there" if number is None else f"is of step {number}"
            raise CheckpointError(f"{self.folder}: no checkpoint {why}; {self._there()}")
        return number

    def _there(self) -> str:
        return f"there are steps {', '.join(map(str, self.steps())) or '(none)'}"

    def _record(self, step: int) -> dict[str, Any]:
        sealed = json.loads((self.folder / _name(step) / "record" / "metadata").read_text(encoding="utf-8"))
        if _crc32(sealed["record"]) != sealed["crc32"]:
            raise CheckpointError("its record was changed after it was saved")
        return sealed["record"]

    def _try(self, step: int, like: dict[str, Any], key: str = "") -> tuple[dict[str, Array], dict[str, Any]] | str:
        """What `_read` returns, or why it cannot."""
        with _quiet():
            try:
                return self._read(step, like, key)
            except MismatchError:
                raise
            except Exception as error:
                why = _reason(error)
            gc.collect()  # ends reads that are still under way
        return why

    def _read(self, step: int, like: dict[str, Any], key: str = "") -> tuple[dict[str, Array], dict[str, Any]]:
        """Leaves under `key`, checked, in the order of `like`; and the record."""
        record = _on_all(lambda: self._record(step))
        saved = {name: leaf for name, leaf in record["leaves"].items() if not key or f"{name}/".startswith(f"{key}/")}
        _check_same(self.folder / _name(step), saved, like)
        narrow = {name: saved[name]["dtype"] for name, leaf in like.items() if _was_narrow(name, saved[name], leaf)}
        arrays = _on_all(lambda: self._arrays(step, like, narrow))
        restored = describe(arrays)
        wrong = [name for name in like if restored[name] != saved[name]]
        if wrong:
            raise CheckpointError(f"{len(wrong)} of {len(like)} leaves are not what was saved, such as {wrong[0]}")
        return {name: x.astype(like[name].dtype) if name in narrow else x for name, x in arrays.items()}, record

    def _arrays(self, step: int, like: dict[str, Any], dtypes: dict[str, str]) -> dict[str, Array]:
        """`dtypes` of leaves that were saved in others than `like` has."""
        here, shape = SingleDeviceSharding(jax.local_devices()[0]), jax.ShapeDtypeStruct
        wanted = {
            name: shape(x.shape, dtypes.get(name, x.dtype), sharding=getattr(x, "sharding", None) or here)
            for name, x in like.items()
        }
        restore_args = ocp.checkpoint_utils.construct_restore_args(wanted)
        args = ocp.args.PyTreeRestore(wanted, restore_args=restore_args, partial_restore=True)
        leaves = self._handler.restore(epath.Path(self.folder / _name(step) / "state"), args=args)
        return {name: leaves[name] for name in like}

    def _set_aside(self, step: int) -> str:
        """Makes room for a new checkpoint of a step; what to add to the report."""
        if self._read_only:
            return ""
        self._keep.scores.pop(step, None)
        old = self.folder / _name(step)
        names = (old.with_suffix(f".broken{suffix}") for suffix in ("", *(f"-{number}" for number in range(2, 1000))))
        new = _on_all(lambda: next(name for name in names if not name.exists()))
        _on_all(lambda: old.rename(new) if distributed.is_main() else None)
        return f"; it is now {new.name}"


def saved_steps(folder: Path) -> list[int]:
    """Steps of which a folder holds a checkpoint, rising; nothing is opened."""
    names = [item.name for item in folder.iterdir()] if folder.is_dir() else []
    return sorted(int(name) for name in names if re.fullmatch(rf"\d{{{_DIGITS}}}", name))


def _name(step: int) -> str:
    return f"{step:0{_DIGITS}d}"


def _check_same(folder: Path, saved: dict[str, Any], like: dict[str, Any]) -> None:
    """That a checkpoint has the leaves of `like`, in their shapes and dtypes."""
    remedy = "it is of another model or optimizer: give the settings it was made with, or name another folder"
    for name in sorted(saved.keys() ^ like.keys()):
        holds, expected = ("no", "one") if name in like else ("a", "none")
        raise MismatchError(f"{folder}: holds {holds} leaf {name}, expected {expected}; {remedy}")
    for name, leaf in like.items():
        if _was_narrow(name, saved[name], leaf):
            continue
        actual = f"{saved[name]['dtype']}{saved[name]['shape']}"
        expected = f"{np.dtype(leaf.dtype).name}{list(leaf.shape)}"
        if actual != expected:
            raise MismatchError(f"{folder}: {name} is {actual}, expected {expected}; {remedy}")


def _was_narrow(name: str, saved: dict[str, Any], leaf: Any) -> bool:
    """Adam's second moment used to be kept in the parameters' dtype: every bfloat16 is a float32, too."""
    kinds = (saved["dtype"], np.dtype(leaf.dtype).name)
    return "/nu/" in name and kinds == ("bfloat16", "float32") and saved["shape"] == list(leaf.shape)


def _crc32(record: Any) -> int:
    return zlib.crc32(json.dumps(record, sort_keys=True).encode())


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    """Drops the pages that a failed read leaves on stderr beside its error: of reads that were still under way."""
    before = sys.unraisablehook

    def hook(unraisable: Any) -> None:
        if not re.search("Event loop is closed|TensorStore", str(unraisable.exc_value)):
            before(unraisable)

    sys.unraisablehook = hook
    try:
        yield
    finally:
        sys.unraisablehook = before


def _reason(error: Exception) -> str:
    """An error in one short line (TensorStore's have a page)."""
    text = (str(error).strip().splitlines() or [""])[0]
    kind = "" if isinstance(error, CheckpointError) else f"{type(error).__name__}: "
    return kind + (text if len(text) <= 200 else text[:200] + "…")


def _on_all(action: Callable[[], _T]) -> _T:
    """Returns what `action` does, or fails on every process."""
    return distributed.all_or_none(action, CheckpointError("another process could not read it"))
