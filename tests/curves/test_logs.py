"""Logs of every origin become one shape, or one clear error."""

from __future__ import annotations

import json
from pathlib import Path
from types import ModuleType

import numpy as np
import pytest

from grit_impl.curves.logs import RunLog, read_log
from grit_impl.errors import GRITError

FORMATS = [
    "tensorboard scalars",
    "tensorboard tensors",
    "trainer_state 4",
    "trainer_state 5",
    "csv",
    "jsonl",
    "record",
]


@pytest.mark.parametrize("kind", FORMATS)
def test_same_run_reads_alike_from_every_format(tmp_path: Path, logs: ModuleType, kind: str) -> None:
    """Oracle: the numbers that were written; float32 for event files, 4 decimals for transformers 4."""
    loss = logs.curve()
    logs.WRITERS[kind](tmp_path / "run", logs.rows(loss))
    log = read_log(tmp_path / "run")
    tolerance = 5.1e-5 if kind == "trainer_state 4" else 2e-7
    np.testing.assert_allclose(log.loss, loss, atol=tolerance)
    assert log.grad_norm is not None
    np.testing.assert_allclose(log.grad_norm, 0.3 * loss, atol=2e-7)
    assert log.steps.tolist() == list(range(1, 201))
    assert (log.tokens is not None) == (kind == "record")


@pytest.mark.parametrize(("kind", "expected"), [("trainer_state 4", 1e-4), ("trainer_state 5", 2e-7)])
def test_resolution_tells_a_rounded_log(tmp_path: Path, logs: ModuleType, kind: str, expected: float) -> None:
    """Oracle: transformers 4 rounds to 4 decimals, 5 logs what float32 holds."""
    logs.WRITERS[kind](tmp_path, logs.rows(logs.curve()))
    assert read_log(tmp_path).resolution() == pytest.approx(expected, rel=0.5)


def test_rounded_values_in_an_event_file_keep_their_resolution(tmp_path: Path, logs: ModuleType) -> None:
    """Oracle: 4 decimals stored as float32 are still 4 decimals."""
    logs.write_events(tmp_path, logs.rows(np.round(logs.curve(), 4)), tensors=True)
    assert read_log(tmp_path).resolution() == pytest.approx(1e-4)


def test_torch_summary_writer(tmp_path: Path) -> None:
    """Oracle: torch's own SummaryWriter, as transformers uses it, with the hyperparameters' extra folder."""
    writer = pytest.importorskip("torch.utils.tensorboard").SummaryWriter(str(tmp_path / "runs" / "a"))
    writer.add_text("args", json.dumps({"seed": 7}))
    for step in range(1, 21):
        writer.add_scalar("train/loss", 2.0 - step / 50, step)
    writer.add_scalar("train/train_loss", 99.0, 20)
    writer.add_hparams({"lr": 1e-3}, {"score": 1.0})
    writer.close()
    log = read_log(tmp_path)
    assert (log.kind, log.seed, log.loss.size) == ("tensorboard", 7, 20)
    assert log.loss[-1] == pytest.approx(1.6)


def test_logging_every_ten_steps_with_a_first_step(tmp_path: Path, logs: ModuleType) -> None:
    """Oracle: logging_first_step adds an entry that is no mean over ten; the rest has stride 10."""
    rows = logs.rows(logs.curve())
    log = read_log(logs.write_jsonl(tmp_path / "log.jsonl", [rows[0], *rows[9::10]]))
    assert (log.stride, log.steps[0], log.steps[-1]) == (10, 10, 200)


@pytest.mark.parametrize(
    "header", ["Step,Training Loss", "global_step;train/loss", "Wall time,Step,Value", "step\trun - train/loss"]
)
def test_columns_go_by_many_names(tmp_path: Path, header: str) -> None:
    """Oracle: exports of a notebook, a semicolon locale, TensorBoard and a tracking service."""
    delimiter = next(d for d in "\t;," if d in header)
    columns = header.split(delimiter)
    body = [delimiter.join(["0.0"] * (len(columns) - 2) + [str(i), str(2 - i / 100)]) for i in range(1, 21)]
    path = tmp_path / "x.csv"
    path.write_text("\n".join([header, *body]) + "\n")
    log = read_log(path)
    assert log.loss[4] == pytest.approx(1.95)
    assert log.steps[4] == 5


def test_full_log_wins_over_checkpoints(tmp_path: Path, logs: ModuleType) -> None:
    """Oracle: the checkpoint's state ends at step 100, the output folder's at 200."""
    rows = logs.rows(logs.curve())
    logs.write_state(tmp_path / "checkpoint-100", rows[:100], version=5)
    assert read_log(tmp_path).steps[-1] == 100
    logs.write_state(tmp_path, rows, version=5)
    assert read_log(tmp_path).steps[-1] == 200


def broken(folder: Path, logs: ModuleType, what: str) -> Path:
    """One damaged log of each kind."""
    folder.mkdir(parents=True, exist_ok=True)
    rows = logs.rows(logs.curve())
    if what == "restarted events":
        logs.write_events(folder, rows[:120], tensors=False)
        logs.write_events(folder, rows[100:], tensors=False, name="events.out.tfevents.2.host")
    elif what == "restarted csv":
        logs.write_csv(folder / "log.csv", rows[:120] + rows[100:])
    elif what == "missing steps":
        logs.write_state(folder, rows[:50] + rows[53:], version=5)
    elif what == "nan":
        rows[60]["loss"] = float("nan")
        logs.write_events(folder, rows, tensors=True)
    elif what == "nan in a record":
        rows[60]["loss"] = float("nan")
        logs.write_record(folder, rows)
    elif what == "filtered nan":
        rows[60].update(loss=0.0, grad_norm=float("nan"))
        logs.write_state(folder, rows, version=5)
    elif what == "truncated events":
        path = logs.write_events(folder, rows, tensors=True)
        path.write_bytes(path.read_bytes()[:-300])
    elif what == "flipped bit":
        path = logs.write_events(folder, rows, tensors=False)
        data = bytearray(path.read_bytes())
        data[len(data) // 2] ^= 1
        path.write_bytes(bytes(data))
    elif what == "truncated state":
        path = logs.write_state(folder, rows, version=4)
        path.write_text(path.read_text()[:-100])
    elif what == "truncated jsonl":
        path = logs.write_jsonl(folder / "log.jsonl", rows)
        path.write_text(path.read_text()[:-20])
    elif what == "empty events":
        (folder / "events.out.tfevents.1.host").touch()
    elif what == "two runs":
        logs.write_events(folder / "a", rows, tensors=False)
        logs.write_events(folder / "b", rows, tensors=False)
    elif what == "too short":
        logs.write_csv(folder / "log.csv", rows[:5])
    elif what == "no loss":
        (folder / "log.csv").write_text("step,accuracy\n1,2\n")
    elif what == "empty csv":
        (folder / "log.csv").touch()
    elif what == "words":
        (folder / "log.csv").write_text("step,loss\n1,high\n")
    elif what == "other json":
        (folder / "trainer_state.json").write_text("{}")
    elif what == "other files":
        (folder / "notes.md").write_text("hello")
    return folder


@pytest.mark.parametrize(
    ("what", "message"),
    [
        ("restarted events", r"restarted log: step 101 follows step 120"),
        ("restarted csv", r"restarted log: step 101 follows step 120"),
        ("missing steps", r"missing steps: 50 is followed by 54.*--until 50"),
        ("nan", r"loss is nan at step 61.*diverged.*--until 60"),
        ("nan in a record", r"loss is nan at step 61.*diverged"),
        ("filtered nan", r"0\.0 with a NaN gradient norm.*step 61"),
        ("truncated events", r"truncated or corrupt event file, after step 19\d"),
        ("flipped bit", r"truncated or corrupt event file, after step \d+"),
        ("truncated state", r"it is not JSON \("),
        ("truncated jsonl", r"line 200 is not JSON"),
        ("empty events", r"event file is empty"),
        ("two runs", r"holds 2 TensorBoard runs \(a, b"),
        ("too short", r"5 training losses found; a comparison needs at least 8"),
        ("no loss", r"no loss column; found step, accuracy"),
        ("empty csv", r"log\.csv is empty"),
        ("words", r"line 2: loss is text \('high'\), not a number"),
        ("other json", r"list of objects named log_history"),
        ("other files", r"no training log found"),
        ("empty folder", r"the folder is empty"),
    ],
)
def test_damage_gets_one_clear_line(tmp_path: Path, logs: ModuleType, what: str, message: str) -> None:
    """Oracle: the damage that was done, named with its place, in one line."""
    with pytest.raises(GRITError, match=message) as caught:
        read_log(broken(tmp_path / "run", logs, what))
    assert "\n" not in str(caught.value)
    assert str(tmp_path) in str(caught.value)


def test_nothing_there(tmp_path: Path) -> None:
    """Oracle: a path that does not exist."""
    with pytest.raises(GRITError, match="no such file or folder"):
        read_log(tmp_path / "none")


@pytest.mark.parametrize("what", ["missing steps", "nan", "truncated events"])
def test_until_reads_the_sound_part(tmp_path: Path, logs: ModuleType, what: str) -> None:
    """Oracle: the first 40 steps, which each kind of damage left alone."""
    log = read_log(broken(tmp_path / "run", logs, what), until=40)
    np.testing.assert_allclose(log.loss, logs.curve()[:40], atol=2e-7)


def test_resolution_of_a_series_that_is_not_there() -> None:
    """Oracle: the log has no gradient norm."""
    log = RunLog("x", Path("x"), "csv", np.arange(1, 11), np.ones(10))
    with pytest.raises(GRITError, match="no grad_norm"):
        log.resolution("grad_norm")
