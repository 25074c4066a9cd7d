"""The examples, run as they are, from top to bottom."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
EXAMPLES = sorted((ROOT / "examples").glob("*.py"))


@pytest.mark.slow
@pytest.mark.parametrize("path", EXAMPLES, ids=lambda path: path.stem)
def test_example(path: Path, tmp_path: Path) -> None:
    """Oracle: exit status 0 in an empty folder, a verdict that it mattered, both losses, and GRIT's numbers."""
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    command = [sys.executable, str(path)]
    done = subprocess.run(command, cwd=tmp_path, env=environment, capture_output=True, text=True, timeout=900)
    assert done.returncode == 0, done.stderr[-2000:]
    assert "effective: Yes: in 60 of 60 steps" in done.stdout
    lora, grit = re.findall(r"held-out loss: LoRA ([\d.]+), GRIT ([\d.]+)", done.stdout)[0]
    assert 0 < float(lora) < 5
    assert 0 < float(grit) < 5
    assert "turned_degrees" in done.stdout
