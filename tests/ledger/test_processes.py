"""The ledger under accelerate: two processes see what one sees; shards are refused at the start."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from launch import launch
from torch import nn

from grit_impl.errors import GRITError
from grit_impl.ledger.findings import facts
from grit_impl.ledger.recorder import gradient_ledger
from grit_impl.ledger.verdict import judge_ledger

SCRIPT = Path(__file__).parent / "two_processes.py"
# The same sums over tokens, split over two processes, in float32.
SAME = 1e-4


def run(folder: Path, world: int) -> list[Path]:
    """The ledger of every process."""
    paths = [folder / f"{world}-{rank}.jsonl.gz" for rank in range(world)]
    launch(SCRIPT, [[str(path)] for path in paths])
    return paths


def test_two_processes_see_what_one_sees(tmp_path: Path) -> None:
    """Oracle: one process with the same global batches; and each other, to the bit of every parameter."""
    (one,), (first, second) = run(tmp_path, 1), run(tmp_path, 2)
    alone, left, right = (facts(path).tensors for path in (one, first, second))
    assert len(alone) == len(left) == 28 * 5
    for column in ("raw", "entry", "turn", "update"):
        scale = alone[column].abs().clip(lower=1e-3)
        assert ((left[column] - alone[column]).abs() / scale).max() < SAME, column
    assert list(left.hash_after) == list(right.hash_after)
    assert list(left.hash_entry) == list(right.hash_entry)
    verdicts = [judge_ledger(path) for path in (one, first, second)]
    assert [verdict.cause for verdict in verdicts] == ["effective"] * 3
    assert len({verdict.summary for verdict in verdicts}) == 1


def test_shards_are_refused_in_one_line() -> None:
    """Oracle: before anything is trained."""
    model: Any = nn.Linear(2, 2)
    model.weight.ds_id = 7
    with pytest.raises(GRITError, match=r"sharded \(DeepSpeed ZeRO-3\)"), gradient_ledger(model):
        pass
