"""metrics.jsonl: what survives a cut, a resumption, a figure that is no number; TensorBoard and W&B read back."""

import json
import os
import re
import subprocess
import sys

import pytest
from tensorboardX.proto.event_pb2 import Event
from tensorboardX.record_writer import RecordWriter  # noqa: F401  (the writer of what is read below)

from rlver_jax.training.metrics_file import MetricsWriter, read_metrics

CONFIG = {"train.steps": 3}


def write(folder, rows, resume_step=0, tensorboard=False, wandb=""):
    writer = MetricsWriter(folder, tensorboard=tensorboard, wandb=wandb, config=CONFIG, resume_step=resume_step)
    for step, metrics in rows:
        writer.write(step, metrics)
    writer.close()
    return [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]


def test_rows_are_flat_objects_in_order(tmp_path):
    rows = write(tmp_path, [(0, {"eval/score": 1.5}), (1, {"b": 2.0, "a": float("nan")}), (3, {"c": float("inf")})])
    assert rows == [{"step": 0, "eval/score": 1.5}, {"step": 1, "a": None, "b": 2.0}, {"step": 3, "c": None}]
    assert read_metrics(tmp_path / "metrics.jsonl") == rows


def test_a_row_is_in_the_file_before_write_returns(tmp_path):
    writer = MetricsWriter(tmp_path, tensorboard=False, wandb="", config=CONFIG, resume_step=0)
    writer.write(1, {"a": 0.25})
    assert (tmp_path / "metrics.jsonl").read_text() == '{"step": 1, "a": 0.25}\n'
    with pytest.raises(ValueError, match="step 1 after those of step 1; steps must rise"):
        writer.write(1, {"a": 0.5})
    writer.close()


@pytest.mark.parametrize(("resume", "retained"), [(2, [0, 1, 2]), (0, []), (9, [0, 1, 2, 3])])
def test_resuming_drops_what_will_be_computed_again(tmp_path, resume, retained):
    write(tmp_path, [(step, {"a": 1.0}) for step in range(4)])
    rows = write(tmp_path, [(resume + 1, {"a": 7.0})], resume_step=resume)
    assert [row["step"] for row in rows] == [*retained, resume + 1]


def test_an_unfinished_last_line_is_left_out_and_a_broken_one_named(tmp_path):
    path = tmp_path / "metrics.jsonl"
    path.write_text('{"step": 1, "a": 1}\n{"step": 2, "a"')
    assert read_metrics(path) == [{"step": 1, "a": 1}]
    path.write_text('{"step": 1}\n[1]\n{"step": 2}\n')
    with pytest.raises(ValueError, match=r"line 2 is no row of metrics"):
        read_metrics(path)


@pytest.mark.parametrize(
    ("lines", "says"),
    [
        (
            '{"step": 1}\n{"step": 1}\n',
            "line 2 is of step 1, after one of step 1, but steps rise and none",
        ),
        ('{"step": 2}\n{"step": 3}\n{"step": 1}\n', "line 3 is of step 1, after one of step 3"),
        ('{"step": 1.5}\n', "line 1 has step 1.5, expected a whole number"),
        ('{"step": true}\n', "line 1 has step True"),
        ('{"step": 1}\n{"x": 1}\n', "line 2 is no row of metrics"),
        ('{"step": 1}\n\0\0\0\n', "line 2 is no row of metrics"),
        ('{"step": 1}\n\udcff\n', "line 2 is no row of metrics"),
    ],
)
def test_rows_that_cannot_be_are_named(tmp_path, lines, says):
    (tmp_path / "metrics.jsonl").write_bytes(lines.encode("utf-8", "surrogateescape"))
    with pytest.raises(ValueError, match=re.escape(says)):
        read_metrics(tmp_path / "metrics.jsonl")
    with pytest.raises(ValueError, match="metrics.jsonl"):
        write(tmp_path, [], resume_step=1)


@pytest.mark.parametrize(
    ("retained", "every", "says"),
    [
        ([1, 2, 3, 4, 5, 6], 0, None),
        ([0, 1, 2, 3, 4, 5, 6], 3, None),
        ([1, 2, 3, 4, 5, 6], 3, "no row of step 0,"),
        ([1, 6], 0, "no row of steps 2–5,"),
        ([0, 2, 3, 5], 3, "no row of steps 1, 4, 6,"),
        ([], 0, "no row of steps 1–6,"),
        (None, 3, "no row of steps 0–6,"),
    ],
)
def test_rows_that_were_lost_are_said(tmp_path, retained, every, says):
    """Lines that were removed, an end that was cut off, a file that is gone: those of later steps come again anyway."""
    if retained is not None:
        write(tmp_path, [(step, {"a": 1.0}) for step in [*retained, 7, 8]])
    reports = []
    settings = {"tensorboard": False, "wandb": "", "config": CONFIG, "resume_step": 6, "evaluates_first": every > 0}
    MetricsWriter(tmp_path, **settings, report=reports.append).close()
    assert len(reports) == (says is not None)
    assert says is None or says in reports[0]
    assert [row["step"] for row in read_metrics(tmp_path / "metrics.jsonl")] == (retained or [])


def scalars(folder):
    """(step, name, value) of a TensorBoard file, read record by record: length, its crc, data, its crc."""
    scalar_events = []
    for file in sorted(folder.iterdir()):
        data = file.read_bytes()
        while data:
            size = int.from_bytes(data[:8], "little")
            event = Event.FromString(data[12 : 12 + size])
            scalar_events += [(event.step, value.tag, value.simple_value) for value in event.summary.value]
            data = data[16 + size :]
    return scalar_events


def test_tensorboard_gets_the_same_figures(tmp_path):
    """All but those that are no numbers, which it would complain about."""
    write(tmp_path, [(1, {"a": 0.5}), (2, {"a": 0.25, "b/c": 4.0, "d": float("nan")})], tensorboard=True)
    assert scalars(tmp_path / "tensorboard") == [(1, "a", 0.5), (2, "a", 0.25), (2, "b/c", 4.0)]


def test_without_wandb_the_message_says_what_to_install(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "wandb", None)
    with pytest.raises(ValueError, match=r"log.wandb='p' needs the package wandb: pip install -e '.\[wandb\]'"):
        write(tmp_path, [], wandb="p")


@pytest.mark.slow
def test_wandb_offline(tmp_path):
    """In a process of its own: wandb leaves threads behind."""
    pytest.importorskip("wandb")
    code = (
        "import sys, pathlib; from rlver_jax.training.metrics_file import MetricsWriter\n"
        "w = MetricsWriter(pathlib.Path(sys.argv[1]), tensorboard=False, wandb='p', config={'a.b': 7}, resume_step=0)\n"
        "w.write(1, {'emotion/final_mean': 31.25}); w.close()"
    )
    environ = os.environ | {"WANDB_MODE": "offline", "WANDB_SILENT": "true"}
    subprocess.run([sys.executable, "-c", code, str(tmp_path)], check=True, env=environ, timeout=120)
    (log,) = tmp_path.glob("wandb/offline-run-*/run-*.wandb")
    assert b"emotion/final_mean" in log.read_bytes()
    assert (tmp_path / "wandb_id").read_text().strip() in log.name
