"""A run that was killed and resumed keeps what its ledger saw: evidence does not depend on an undisturbed night."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

from grit_impl.config import GRITConfig
from grit_impl.errors import GRITError
from grit_impl.ledger.findings import facts
from grit_impl.ledger.recorder import GradientLedger, gradient_ledger
from grit_impl.ledger.rows import RowWriter, partial, read_rows, salvage
from grit_impl.ledger.verdict import judge_ledger
from grit_impl.recipes.arms import RunSpec, TrainingSettings
from grit_impl.record import RunRecord
from grit_impl.zoo.bench import Bench, Moments, Whitening

STEPS, SAVED, KILLED = 6, 3, 5
GRIT = GRITConfig(kfac_update_freq=1).to_dict()
# One arm in a process of its own, which dies without a word at the end of a step, or does not.
ARM = """
import json, os, sys
from pathlib import Path
from grit_impl.recipes import train
from grit_impl.config import GRITConfig
from grit_impl.recipes.arms import RunSpec
from grit_impl.runs.execute import run_here

path, dies = Path(sys.argv[1]), int(sys.argv[2])
after = train.StepLog.on_step_end
if dies < 0:  # when the ledger is closed, and nothing else is
    import grit_impl.method.reprojection
    grit_impl.method.reprojection.save_adapter = lambda *_: os._exit(9)

def on_step_end(self, args, state, control, **kw):
    after(self, args, state, control, **kw)
    if state.global_step == dies:
        os._exit(9)

train.StepLog.on_step_end = on_step_end
run_here(path, RunSpec.from_dict(json.loads((path / "spec.json").read_text())))
"""


def arm(path: Path, dies: int) -> int:
    """Exit status of the arm's process."""
    training = TrainingSettings(steps=STEPS, accumulation=1, save_every=SAVED, max_length=64)
    path.mkdir(exist_ok=True)
    (path / "spec.json").write_text(json.dumps(RunSpec("pure", training=training, grit=GRIT).to_dict()))
    return subprocess.run([sys.executable, "-c", ARM, str(path), str(dies)], capture_output=True).returncode


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The run undisturbed."""
    path = tmp_path_factory.mktemp("arms") / "whole"
    assert arm(path, 0) == 0
    return path


@pytest.mark.slow
@pytest.mark.parametrize("dies", [KILLED, -1], ids=["in step 5", "after the ledger was closed"])
def test_a_killed_run_is_judged_on_all_its_steps(whole: Path, tmp_path: Path, dies: int) -> None:
    """Oracle: the same run undisturbed. Killed in step 5 and resumed from the checkpoint of step 3, or killed between
    the last step and the end: the ledger has every step once, with the same gradients and parameters to the bit, and
    nothing is left beside it."""
    broken = tmp_path / "broken"
    assert arm(broken, dies) == 9
    assert partial(RunRecord(broken).ledger).is_file() == (dies > 0)
    assert arm(broken, 0) == 0
    assert [p.name for p in broken.iterdir() if "ledger" in p.name] == ["ledger.jsonl.gz"]
    keys = ("step", "name", "raw", "hash_raw", "hash_entry", "turn", "hash_before", "hash_after")
    seen = [
        [tuple(row.get(key) for key in keys) for row in read_rows(RunRecord(path).ledger) if row["kind"] == "tensor"]
        for path in (whole, broken)
    ]
    assert seen[0] == seen[1]
    resumed = facts(RunRecord(broken))
    assert [step["step"] for step in resumed.steps] == list(range(1, STEPS + 1))
    assert resumed.unseen == 0
    verdicts = [judge_ledger(RunRecord(path)) for path in (whole, broken)]
    assert verdicts[0].cause == verdicts[1].cause == "effective"
    assert "resumed" not in verdicts[1].summary


@pytest.fixture
def interrupted(tmp_path: Path) -> Path:
    """A ledger whose process ended by an exception in its fourth step, after a checkpoint at the end of the third."""
    bench = Bench("loop", "adamw", seed=3, steps=6)
    path, whiten, steps = tmp_path / "ledger.jsonl.gz", Whitening(bench.lora), iter(range(1, 7))
    watched = gradient_ledger(bench.model, path)

    def train() -> None:
        with watched as ledger:

            def before_step() -> None:
                if next(steps) == 4:  # the third step's gradients were cleared
                    ledger.flush()
                    raise KeyboardInterrupt
                whiten.apply()

            bench.train(Moments(before_step=before_step))

    with pytest.raises(KeyboardInterrupt):
        train()
    return path


def test_an_exception_after_a_checkpoint_keeps_the_partial_file(interrupted: Path) -> None:
    """Oracle: counting. The three finished steps can be salvaged, and no file claims to be a whole ledger."""
    assert not interrupted.exists()
    assert [row["step"] for row in salvage(interrupted) if row["kind"] == "step"] == [1, 2, 3]


def test_steps_that_were_lost_are_counted(interrupted: Path) -> None:
    """Oracle: a partial file cut short by a byte lacks its last rows; the verdict says which steps were seen."""
    whole = partial(interrupted).read_bytes()
    partial(interrupted).write_bytes(whole[: len(whole) // 2])
    kept = {row["step"] for row in salvage(interrupted) if row["kind"] == "step"}
    assert kept < {1, 2, 3}
    bench = Bench("loop", "adamw", seed=3, steps=3)
    with gradient_ledger(bench.model, interrupted, resume_from=3) as ledger:
        bench.train(Moments(before_step=Whitening(bench.lora).apply))
    found = facts(ledger)
    assert [step["step"] for step in found.steps] == [*sorted(kept), 4, 5, 6]
    assert found.unseen == 3 - len(kept)
    summary = judge_ledger(ledger).summary
    assert f"{'1 to ' + str(max(kept)) + ' and ' if kept else ''}4 to 6 seen" in summary
    assert "resumed after step 3" in summary


def test_nothing_to_salvage(tmp_path: Path) -> None:
    """Oracle: no file, an empty one, and one that is no gzip file: all of them give no rows, and a fresh ledger."""
    path = tmp_path / "ledger.jsonl.gz"
    assert not list(salvage(path))
    for content in (b"", b"no gzip file", b"\x1f\x8b"):
        partial(path).write_bytes(content)
        assert not list(salvage(path))
    bench = Bench("loop", "adamw", seed=3, steps=2)
    with gradient_ledger(bench.model, path, resume_from=7) as ledger:
        bench.train(Moments(before_step=Whitening(bench.lora).apply))
    assert [step["step"] for step in facts(ledger).steps] == [8, 9]
    assert facts(ledger).unseen == 7


def test_steps_lost_at_the_end_are_counted_too(interrupted: Path) -> None:
    """Oracle: resumed at the last of eight steps, with three in the file: five are missing."""
    bench = Bench("loop", "adamw", seed=3, steps=1)
    with gradient_ledger(bench.model, interrupted, resume_from=8) as ledger:
        pass
    assert facts(ledger).unseen == 5
    assert "steps 1 to 3 seen" in judge_ledger(ledger).summary


def test_what_was_salvageable_stays_until_it_is_written_again(
    interrupted: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Oracle: the rows before. A disk that is full while they are copied, or at the end, takes none of them."""
    before = list(salvage(interrupted))
    bench = Bench("loop", "adamw", seed=3, steps=1)
    with monkeypatch.context() as full:
        full.setattr(RowWriter, "write", lambda *_: (_ for _ in ()).throw(OSError(28, "No space left on device")))
        with pytest.raises(OSError, match="No space"), gradient_ledger(bench.model, interrupted, resume_from=3):
            pass
    assert list(salvage(interrupted)) == before
    writer = RowWriter(interrupted)
    writer.open(resume_from=3)
    with monkeypatch.context() as full:
        full.setattr(Path, "replace", lambda *_: (_ for _ in ()).throw(OSError(28, "No space left on device")))
        with pytest.raises(GRITError, match="No space"):
            writer.close()
    assert list(salvage(interrupted)) == before


def test_two_processes_with_one_path(tmp_path: Path) -> None:
    """Oracle: both files are whole, whoever flushes and closes first; the last to close is at the path."""
    path = tmp_path / "ledger.jsonl.gz"
    one, other = RowWriter(path), RowWriter(path)
    for number, writer in enumerate((one, other)):
        writer.open()
        writer.write([{"kind": "run", "who": number}])
        writer.flush()
    one.close()
    assert read_rows(path) == [{"kind": "run", "who": 0}]
    other.close()
    assert read_rows(path) == [{"kind": "run", "who": 1}]
    assert os.listdir(tmp_path) == [path.name]


def test_a_flush_hides_no_late_change(tmp_path: Path) -> None:
    """Oracle: the same fault without flushing. Gradients changed after the step and before they are cleared."""
    causes = []
    for flushing in (False, True):
        bench = Bench("loop", "adamw", seed=3, steps=4)
        ledger = gradient_ledger(bench.model, tmp_path / f"{flushing}.gz")
        whiten = Whitening(bench.lora)
        with ledger as open_ledger:

            def late(flushing: bool = flushing, open_ledger: Any = open_ledger, whiten: Any = whiten) -> None:
                if flushing:
                    open_ledger.flush()
                whiten.apply()

            bench.train(Moments(after_step=late))
        causes.append(judge_ledger(open_ledger).cause)
    assert causes == ["modified-too-late"] * 2


def test_a_gradient_that_changes_its_shape_stops_nothing() -> None:
    """Oracle: it trains to the end. A rank that is cut after the step leaves gradients of another shape, which are no
    multiple of the raw ones."""
    layer = torch.nn.Module()
    layer.lora_A = torch.nn.Parameter(torch.randn(4, 30))
    optimizer = torch.optim.AdamW([layer.lora_A], lr=1e-3)
    with gradient_ledger(layer) as ledger:
        for _ in range(4):
            layer.lora_A.square().sum().backward()
            layer.lora_A.grad.mul_(torch.rand(4, 1))
            optimizer.step()
            layer.lora_A.data, layer.lora_A.grad = layer.lora_A.data[:2].clone(), layer.lora_A.grad[:2].clone()
            optimizer.zero_grad()
            optimizer.state.clear()
            layer.lora_A.data = torch.randn(4, 30)
    assert len(facts(ledger).steps) == 4


def test_a_ledger_that_is_opened_twice_starts_over() -> None:
    """Oracle: the second run's steps are numbered from 1, and none is missing."""
    bench = Bench("loop", "adamw", seed=3, steps=3)
    ledger = GradientLedger(bench.model)
    for _ in range(2):
        with ledger:
            bench.train(Moments(before_step=Whitening(bench.lora).apply))
        assert [step["step"] for step in facts(ledger).steps] == [1, 2, 3]
        assert facts(ledger).unseen == 0
