"""`grit train` where a launcher has started it in several processes: one run, kept by the first of them."""

from __future__ import annotations

import json
import os
import socket
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from grit_impl import cli
from grit_impl.config import GRITConfig
from grit_impl.errors import GRITError, RunFailed
from grit_impl.ledger.verdict import judge_ledger
from grit_impl.processes import place
from grit_impl.recipes.arms import RunSpec, default_training, find_arm, grit_options
from grit_impl.record import RunRecord
from grit_impl.runs import execute
from grit_impl.runs.execute import request_for, run_arms, train_beside, with_tokens
from grit_impl.runs.restart import refusal

ROOT = Path(__file__).parents[2]
STEPS = 4


def launched(folder: Path) -> str:
    """What `accelerate launch` of two processes prints; with half of one process's batch, in each."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = str(free.getsockname()[1])
    # --multi_gpu means torchrun; the tiny base trains on the CPU wherever it is.
    command = [sys.executable, "-m", "accelerate.commands.launch", "--multi_gpu", "--num_processes", "2"]
    command += ["--main_process_port", port, "-m", "grit_impl.cli", "train", "--steps", str(STEPS)]
    command += ["--batch-size", "1", "--accumulation", "2", "--output-dir", str(folder)]
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join([str(ROOT), *sys.path]), "CUDA_VISIBLE_DEVICES": ""}
    ended = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=200)
    assert ended.returncode == 0, ended.stderr[-3000:]
    return ended.stdout


@pytest.mark.slow
def test_two_launched_processes_train_one_run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Oracle: one process with the same global batches; the record says how many there were, and is one."""
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "")
    out = tmp_path / "two"
    printed = launched(out)
    assert printed.count("steps, last loss") == printed.count("training pure") == 1
    config = GRITConfig.preset("recommended")
    settings = default_training("tiny", cuda=False, preset="recommended", steps=STEPS, batch_size=2, accumulation=2)
    spec = RunSpec("pure", training=settings, grit=grit_options(find_arm("pure"), config))
    one = run_arms([spec], tmp_path / "one", jobs=1, progress=lambda *_: None)["pure"]
    two = RunRecord(out)
    assert isinstance(one, RunRecord)
    assert two.complete
    assert not (out / "checkpoints").exists()
    assert (one.run["processes"], two.run["processes"]) == (1, 2)
    for name in ("step", "tokens"):
        assert [row[name] for row in two.steps] == [row[name] for row in one.steps]
    for name in ("loss", "grad_norm"):
        assert [row[name] for row in two.steps] == pytest.approx([row[name] for row in one.steps], rel=1e-3)
    assert json.loads((out / "first.json").read_text())["loss"] == pytest.approx(one.steps[0]["loss"], rel=1e-5)
    verdicts = [judge_ledger(record.ledger) for record in (one, two)]
    assert [verdict.cause for verdict in verdicts] == ["effective"] * 2
    # One process does not take the run of two for its own.
    asked = request_for(with_tokens(spec, tmp_path), ledger=True)
    assert "2 processes there, 1 now" in str(refusal(out, {**asked, "spec": request_of_two(out)}))


def request_of_two(out: Path) -> Any:
    """The options that the launched run was asked for."""
    return json.loads((out / "spec.json").read_text())["spec"]


def test_other_processes_say_how_theirs_ended(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Oracle: the last line that the training printed; of bad input, the first process tells already."""
    monkeypatch.setenv("RANK", "1")
    spec = with_tokens(RunSpec("pure", training=default_training("tiny", cuda=False, steps=1)), tmp_path)
    real = subprocess.Popen
    for status, error in ((1, RunFailed), (2, GRITError)):

        def popen(command: list[str], *, status: int = status, **options: Any) -> Any:
            assert Path(command[-1]) == tmp_path / "run"
            code = f"import sys; print('error: no room'); sys.exit({status})"
            return real([sys.executable, "-c", code], **options)

        monkeypatch.setattr(execute.subprocess, "Popen", popen)
        with pytest.raises(GRITError, match="process 1: no room") as raised:
            train_beside(spec, tmp_path / "run", {})
        assert raised.type is error
    assert not (tmp_path / "run").exists()  # the record is the first one's


@pytest.mark.parametrize(("rank", "told"), [("0", True), ("1", False)])
def test_bad_input_is_told_once(
    rank: str, told: bool, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """All processes find it, and end with status 2."""
    monkeypatch.setenv("RANK", rank)
    monkeypatch.setattr(sys, "argv", ["grit", "train", "--dataset", "nowhere.csv"])
    with pytest.raises(SystemExit) as ended:
        cli.main()
    assert ended.value.code == 2
    assert ("nowhere.csv" in capsys.readouterr().err) is told


@pytest.mark.parametrize("names", [("RANK", "WORLD_SIZE"), ("OMPI_COMM_WORLD_RANK", "OMPI_COMM_WORLD_SIZE")])
def test_place(names: tuple[str, str], monkeypatch: pytest.MonkeyPatch) -> None:
    """As torchrun says it, and mpirun."""
    assert place() == (0, 1)
    for name, value in zip(names, ("2", "3"), strict=True):
        monkeypatch.setenv(name, value)
    assert place() == (2, 3)
