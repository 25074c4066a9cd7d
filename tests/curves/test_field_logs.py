"""Logs as they stood in public reports (docs/field-cases.md). What is right was written before the first run."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from click.testing import CliRunner

from grit_impl.curves.commands import compare
from grit_impl.curves.logs import read_log
from grit_impl.errors import GRITError

LOSS = [round(2 - i / 50 + 0.05 * (i * 7 % 5), 4) for i in range(40)]


@pytest.mark.parametrize("kind", ["csv", "jsonl", "state"])
def test_steps_that_a_resumed_run_logged_again(tmp_path: Path, kind: str) -> None:
    """wandb/wandb#6728 and #1040: killed at step 250, resumed from 200: steps 210 to 250 stand there twice."""
    steps = [*range(10, 251, 10), *range(210, 361, 10)]
    rows = [{"step": s, "loss": LOSS[i % 40]} for i, s in enumerate(steps)]
    path = tmp_path / {"csv": "log.csv", "jsonl": "log.jsonl", "state": "trainer_state.json"}[kind]
    if kind == "csv":
        path.write_text("step,loss\n" + "".join(f"{r['step']},{r['loss']}\n" for r in rows))
    elif kind == "jsonl":
        path.write_text("".join(json.dumps(r) + "\n" for r in rows))
    else:
        path.write_text(json.dumps({"log_history": rows}))
    with pytest.raises(GRITError, match=r"restarted log: step 210 follows step 250.*--until 209"):
        read_log(path)
    assert read_log(path, until=200).steps[-1] == 200


def test_rows_that_a_tracker_dropped(tmp_path: Path) -> None:
    """allenai/tango#152: steps that do not increase are dropped by the tracker: there is a hole, which is named."""
    rows = [(s, LOSS[i]) for i, s in enumerate(range(1, 41)) if not 11 <= s <= 16]
    path = tmp_path / "log.csv"
    path.write_text("step,loss\n" + "".join(f"{s},{v}\n" for s, v in rows))
    with pytest.raises(GRITError, match=r"missing steps: 10 is followed by 17"):
        read_log(path)


def test_a_log_that_lost_its_beginning_is_not_compared_from_there(tmp_path: Path) -> None:
    """roboflow/rf-detr#1325: `metrics.csv` holds only what came after the resume: not comparable with a whole log."""
    for name, first in (("whole", 0), ("resumed", 20)):
        (tmp_path / name).mkdir()
        text = "".join(f"{s},{LOSS[s]}\n" for s in range(first, 40))
        (tmp_path / name / "metrics.csv").write_text(f"step,train_loss\n{text}")
    done = CliRunner().invoke(compare, [str(tmp_path / "whole"), str(tmp_path / "resumed")])
    assert done.exit_code == 1, done.output
    assert "step" in done.output
