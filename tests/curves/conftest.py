"""Hand-made training logs in every format that `grit compare` reads. TensorBoard's own record writer is the oracle."""

from __future__ import annotations

import csv
import json
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
import pytest
from numpy.typing import NDArray

from grit_impl.record import RunRecord

Floats = NDArray[np.float64]
Row = dict[str, float]


def curve(seed: int = 0, steps: int = 200) -> Floats:
    """A falling loss whose step-to-step variation is the batches' difficulty."""
    rng = np.random.default_rng(seed)
    return 1.2 + 0.5 * np.exp(-np.arange(steps) / 40) + rng.normal(0, 0.1, steps)


def rows(loss: Floats) -> list[Row]:
    """One row per optimizer step, as the Trainer logs them."""
    n = loss.size
    return [
        {"step": i + 1, "loss": float(v), "grad_norm": float(0.3 * v), "learning_rate": 2e-4 * (1 - i / n)}
        for i, v in enumerate(loss)
    ]


def write_events(
    folder: Path,
    log: Sequence[Row],
    *,
    tensors: bool,
    name: str = "events.out.tfevents.1.host",
    tags: Mapping[str, str] | None = None,
) -> Path:
    """An event file in the scalar (`tensors=False`) or the tensor encoding; tags are `train/KEY` unless given."""
    from tensorboard.compat.proto import event_pb2, summary_pb2
    from tensorboard.summary.writer.record_writer import RecordWriter
    from tensorboard.util import tensor_util

    folder.mkdir(parents=True, exist_ok=True)
    path = folder / name
    with open(path, "wb") as handle:
        writer = RecordWriter(handle)
        writer.write(event_pb2.Event(wall_time=1.0, file_version="brain.Event:2").SerializeToString())
        for row in log:
            for key, number in row.items():
                if key == "step":
                    continue
                tag = (tags or {}).get(key, f"train/{key}")
                if tensors:
                    metadata = summary_pb2.SummaryMetadata(data_class=summary_pb2.DATA_CLASS_SCALAR)
                    value = summary_pb2.Summary.Value(
                        tag=tag,
                        metadata=metadata,
                        tensor=tensor_util.make_tensor_proto(np.float32(number)),
                    )
                else:
                    value = summary_pb2.Summary.Value(tag=tag, simple_value=number)
                event = event_pb2.Event(step=int(row["step"]), summary=summary_pb2.Summary(value=[value]))
                writer.write(event.SerializeToString())
        writer.flush()
    return path


def write_state(folder: Path, log: Sequence[Row], *, version: int) -> Path:
    """A `trainer_state.json`: transformers 4 rounds the loss and logs the next step's rate; 5 does neither."""
    folder.mkdir(parents=True, exist_ok=True)
    history: list[dict[str, Any]] = []
    for index, row in enumerate(log):
        entry: dict[str, Any] = {"epoch": row["step"] / 100, **row}
        if version == 4:
            entry["loss"] = round(entry["loss"], 4)
            after = log[index + 1]["learning_rate"] if index + 1 < len(log) else 0.0
            entry["learning_rate"] = after
        history.append(entry)
        if index == len(log) // 2:
            history.append({"epoch": 0.5, "step": row["step"], "eval_loss": 1.0, "eval_runtime": 2.0})
    history.append({"epoch": 2.0, "step": log[-1]["step"], "train_loss": 1.3, "train_runtime": 60.0})
    path = folder / "trainer_state.json"
    path.write_text(json.dumps({"global_step": int(log[-1]["step"]), "log_history": history}))
    return path


def write_csv(path: Path, log: Sequence[Row]) -> Path:
    """A CSV with the columns' plain names."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with open(path, "w", newline="") as handle:
        writer = csv.DictWriter(handle, fieldnames=list(log[0]))
        writer.writeheader()
        writer.writerows(log)
    return path


def write_jsonl(path: Path, log: Sequence[Row]) -> Path:
    """JSON lines."""
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("".join(json.dumps(row) + "\n" for row in log))
    return path


def write_record(folder: Path, log: Sequence[Row], *, arm: str = "baseline", seed: int = 3407) -> RunRecord:
    """A run record."""
    record = RunRecord.create(folder, arm=arm, seed=seed, base_model="tiny", steps=len(log))
    for row in log:
        record.append_step({**row, "tokens": 100})
    record.finish()
    return record


WRITERS = {
    "tensorboard scalars": lambda folder, log: write_events(folder, log, tensors=False),
    "tensorboard tensors": lambda folder, log: write_events(folder, log, tensors=True),
    "trainer_state 4": lambda folder, log: write_state(folder, log, version=4),
    "trainer_state 5": lambda folder, log: write_state(folder, log, version=5),
    "csv": lambda folder, log: write_csv(folder / "log.csv", log),
    "jsonl": lambda folder, log: write_jsonl(folder / "log.jsonl", log),
    "record": lambda folder, log: write_record(folder, log),
}
"""Each writes a run into a folder, which is then read by looking."""


@pytest.fixture
def logs() -> ModuleType:
    """This module: test folders are no packages, so helpers reach the tests as a fixture."""
    return sys.modules[__name__]
