"""What GRIT sends in data-parallel training does not grow with the number of processes."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]


@pytest.mark.slow
def test_what_each_process_sends_is_flat(tmp_path: Path) -> None:
    """Oracle: torch's profiler, with GRIT minus without. L = 14 layers of rank 16 take one all-reduce of 2 L r^2 + 3 L
    floats per inversion in each of 2 or 3 processes, and no other collective; one process takes none."""
    out = tmp_path / "processes.json"
    command = [sys.executable, str(ROOT / "suites" / "benchmarks" / "processes.py"), str(out), "1", "2", "3"]
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join([str(ROOT), *sys.path])}
    ended = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=200)
    assert ended.returncode == 0, ended.stderr[-2000:]
    found = json.loads(out.read_text())
    assert {n: len(processes) for n, processes in found.items()} == {"1": 1, "2": 2, "3": 3}
    assert found["1"][0]["sent"] == {}
    one = {"gloo:all_reduce": [1, 4 * (2 * 14 * 16**2 + 3 * 14)]}
    assert [each["sent"] for n in "23" for each in found[n]] == [one] * 5
    # Every merge was timed, so that the benchmark has what it tells.
    assert {len(each["merge"]) for n in "23" for each in found[n]} == {9}
