"""The metrics of a run: a JSON object a step in metrics.jsonl, and the same to TensorBoard and Weights & Biases.

Metrics are defined elsewhere: those of dialogues in `rollout/rollout_metrics.py`, those of updates in
`learning/train_step.py` and `learning/loss.py`. docs/metrics.md lists them all.
"""

import json
import logging
import math
import os
import re
import uuid
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from rlver_jax.config.extras import install_command
from rlver_jax.config.validate import shown
from rlver_jax.dialogues.lines import each_line

METRICS, TENSORBOARD, WANDB = "metrics.jsonl", "tensorboard", "wandb_id"
_log = logging.getLogger(__name__)


def read_metrics(path: str | os.PathLike[str]) -> list[dict[str, Any]]:
    """Rows of a metrics.jsonl; see `iter_metrics`."""
    return list(iter_metrics(path))


def iter_metrics(path: str | os.PathLike[str]) -> Iterator[dict[str, Any]]:
    """Rows of a metrics.jsonl, steps rising; a last line that was not finished is left out.

    Raises:
        ValueError: another line is no row, or of a step that doesn't come after the one before; with its number.
    """
    before = -1
    with Path(path).open("rb") as file:
        for number, (_, line) in enumerate(each_line(file, unfinished=True), 1):
            try:
                row = dict(json.loads(line.decode("utf-8")))
                step = row["step"]
            except (ValueError, TypeError, KeyError, RecursionError) as error:
                raise ValueError(
                    f"{path}: line {number} is no row of metrics ({error}); restore or remove the file"
                ) from error
            _check_step(path, number, step, before)
            before = step
            yield row


def _check_step(path: str | os.PathLike[str], number: int, step: object, before: int) -> None:
    if type(step) is not int or not 0 <= step < 2**63:
        raise ValueError(f"{path}: line {number} has step {shown(step)}, expected a whole number; restore the file")
    if step <= before:
        raise ValueError(
            f"{path}: line {number} is of step {step}, after one of step {before}, but steps rise and none stands "
            f"there twice; restore the file, or remove the line that is not the run's"
        )


def missing_steps(rows: Sequence[Mapping[str, Any]], last: int, zero: object) -> str:
    """Steps up to `last` that have no row, such as "steps 3–5, 9"; empty where none is missing.

    Args:
        zero: whether there is a row of step 0, of the untrained policy.
    """
    missing = set(range(0 if zero else 1, last + 1)) - {row["step"] for row in rows}
    starts = sorted(step for step in missing if step - 1 not in missing)
    ends = sorted(step for step in missing if step + 1 not in missing)
    spans = [str(a) if a == b else f"{a}–{b}" for a, b in zip(starts, ends, strict=True)]
    return f"step{'s' * (len(missing) > 1)} {', '.join(spans)}" if missing else ""


class MetricsWriter:
    """Appends rows; each is on disk before `write` returns."""

    def __init__(
        self,
        folder: Path,
        *,
        tensorboard: bool,
        wandb: str,
        config: Mapping[str, Any],
        resume_step: int,
        report: Callable[[str], None] = _log.warning,
        evaluates_first: bool = False,
    ) -> None:
        """Opens the run's metrics, and drops what will be computed again.

        Args:
            folder: of the run.
            wandb: project of Weights & Biases; empty: none.
            config: {"a.b": value}, for Weights & Biases.
            resume_step: last step of which the state was saved; 0: none, and every row goes.
            report: is told of rows that should be there and are not.
            evaluates_first: whether there is a row of step 0.

        Raises:
            ValueError: metrics.jsonl is broken, or Weights & Biases is asked for and not installed.
        """
        path = folder / METRICS
        rows = read_metrics(path) if path.exists() and resume_step else []
        rows = [row for row in rows if row["step"] <= resume_step]
        if missing := missing_steps(rows, resume_step, resume_step and evaluates_first):
            report(
                f"{path}: has no row of {missing}, though the run has done step {resume_step}: lines or the file were "
                f"lost. The run continues without these metrics; restore the file to have them"
            )
        new = path.with_name(METRICS + ".tmp")
        new.write_text("".join(map(_line, rows)), encoding="utf-8")
        new.replace(path)
        self._last = rows[-1]["step"] if rows else -1
        self._file = path.open("a", encoding="utf-8")
        self._board = _open_tensorboard(folder, resume_step) if tensorboard else None
        self._wandb = _open_wandb(folder, wandb, config) if wandb else None

    def write(self, step: int, metrics: Mapping[str, float]) -> None:
        """Appends a step's metrics; a value that is no number becomes null.

        Raises:
            ValueError: the step is not after the last one.
        """
        if step <= self._last:
            raise ValueError(f"metrics of step {step} after those of step {self._last}; steps must rise")
        self._last = step
        row = {name: value if math.isfinite(value) else None for name, value in sorted(metrics.items())}
        self._file.write(_line({"step": step, **row}))
        self._file.flush()
        os.fsync(self._file.fileno())
        if self._board:
            for name, value in row.items():
                if value is not None:
                    self._board.add_scalar(name, value, step)
            self._board.flush()
        if self._wandb:
            self._wandb.log(dict(metrics), step=step)

    def close(self) -> None:
        """Closes the files and ends Weights & Biases' run."""
        self._file.close()
        if self._board:
            self._board.close()
        if self._wandb:
            self._wandb.finish()


def _line(row: Mapping[str, Any]) -> str:
    return json.dumps(row, ensure_ascii=False, allow_nan=False) + "\n"


def _open_tensorboard(folder: Path, resume_step: int) -> Any:
    from tensorboardX import SummaryWriter  # slow to import

    return SummaryWriter(str(folder / TENSORBOARD), purge_step=resume_step + 1 if resume_step else 0)


def _open_wandb(folder: Path, project: str, config: Mapping[str, Any]) -> Any:
    try:
        import wandb
    except ImportError as error:
        raise ValueError(
            f"log.wandb={project!r} needs the package wandb: {install_command('wandb')}, or leave it empty"
        ) from error
    identity = folder / WANDB
    if not identity.exists():
        identity.write_text(uuid.uuid4().hex[:12] + "\n", encoding="utf-8")
    name = re.sub(r"[^\w.-]+", "-", folder.absolute().name)
    return wandb.init(
        project=project, id=identity.read_text(encoding="utf-8").strip(), name=name, dir=str(folder),
        config=dict(config), resume="allow",
    )  # fmt: skip
