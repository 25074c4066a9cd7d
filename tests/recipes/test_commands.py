"""`grit train` from a user's side: every public layout, every kind of arm, and one clear line for bad input."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from click.testing import CliRunner

from grit_impl.config import GRITConfig
from grit_impl.errors import GRITError
from grit_impl.record import RunRecord

LAYOUTS = {
    "alpaca": {"instruction": "Add.", "input": "1 and 2", "output": "3"},
    "dolly": {"instruction": "Who?", "context": "Ann sings.", "response": "Ann", "category": "closed_qa"},
    "boolq": {"question": "is ice cold", "answer": True, "passage": "Ice is cold."},
    "qnli": {"question": "Who sang?", "sentence": "Bob slept.", "label": 1, "idx": 0},
    "gsm8k": {"question": "2 cats and 1 cat?", "answer": "2+1=3\n#### 3"},
}
ARM = {"alpaca": "pure", "dolly": "hybrid", "boolq": "baseline", "qnli": "pure", "gsm8k": "hybrid"}


def grit(*arguments, timeout=120):
    """Run the command as a user does."""
    command = [sys.executable, "-m", "grit_impl.cli", *map(str, arguments)]
    return subprocess.run(command, capture_output=True, text=True, timeout=timeout, check=False)


@pytest.mark.slow
@pytest.mark.parametrize("layout", LAYOUTS)
def test_layouts_train(tmp_path, layout):
    """Oracle: a local file of each public recipe's schema trains and leaves a complete record with finite losses."""
    data = tmp_path / f"{layout}.jsonl"
    data.write_text("".join(json.dumps(LAYOUTS[layout]) + "\n" for _ in range(16)))
    out = tmp_path / "run"
    done = grit(
        "train", "--arm", ARM[layout], "--dataset", data, "--steps", 2, "--set", "kfac_update_freq=1", "--out", out
    )
    assert done.returncode == 0, done.stderr
    record = RunRecord(out)
    assert record.complete
    assert [row["step"] for row in record.steps] == [1, 2]
    assert all(0 < row["loss"] < 20 for row in record.steps)
    again = grit(
        "train", "--arm", ARM[layout], "--dataset", data, "--steps", 2, "--set", "kfac_update_freq=1", "--out", out
    )
    assert "is complete" in again.stdout


@pytest.mark.parametrize(
    ("arguments", "named"),
    [
        (("--set", "kfac_update_freq=0"), "kfac_update_freq = 0"),
        (("--set", "kfac_dampling=1"), "did you mean kfac_damping?"),
        (("--set", "learning_rate=1"), "it belongs to the training arguments"),
        (("--dataset", "no/such/file.jsonl"), "no/such/file.jsonl"),
        (("--base-model", "./no-such-model"), "./no-such-model"),
        (("--arm", "purest"), "purest"),
    ],
)
def test_bad_input_is_one_line_and_status_2(tmp_path, arguments, named):
    """Oracle: the project's rule for bad input: status 2, one line that names the thing, no traceback, no record."""
    done = grit("train", "--steps", 2, "--out", tmp_path / "run", *arguments)
    assert done.returncode == 2
    assert named in done.stderr
    assert "Traceback" not in done.stderr + done.stdout
    assert not (tmp_path / "run" / "COMPLETE").exists()


def test_the_default_preset_fits_the_arm(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """Oracle: the evidence's rule where GRIT is the optimizer, one that leaves the loop's alone in a callback."""
    from grit_impl.runs import execute
    from grit_impl.runs.commands import train

    seen: dict[str, Any] = {}

    def run_arms(specs: Any, *_: Any, **__: Any) -> None:
        seen.update({spec.arm: spec.grit for spec in specs})
        raise GRITError("enough")

    monkeypatch.setattr(execute, "run_arms", run_arms)
    for arm in ("pure", "hybrid", "baseline"):
        CliRunner().invoke(train, ["--arm", arm, "--out", str(tmp_path / arm)])
    assert seen["pure"] == GRITConfig.preset("recommended").to_dict()
    assert seen["hybrid"] == GRITConfig.preset("precondition").to_dict()
    assert seen["baseline"] is None
