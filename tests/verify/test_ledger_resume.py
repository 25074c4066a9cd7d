"""A run that was killed and resumed keeps what its ledger saw: evidence does not depend on an undisturbed night."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest

from grit_impl.config import GRITConfig
from grit_impl.recipes.arms import RunSpec, TrainingSettings
from grit_impl.record import RunRecord
from grit_impl.verify.findings import facts
from grit_impl.verify.ledger import gradient_ledger
from grit_impl.verify.rows import partial, read_rows, salvage
from grit_impl.verify.verdict import judge_ledger
from grit_impl.verify.zoo import Bench, Moments, Whitening

STEPS, SAVED, KILLED = 6, 3, 5
GRIT = GRITConfig(kfac_update_freq=1).to_dict()
# One arm in a process of its own, which dies without a word at the end of a step, or does not.
ARM = """
import json, os, sys
from pathlib import Path
from grit_impl.recipes import train
from grit_impl.config import GRITConfig
from grit_impl.recipes.arms import RunSpec
from grit_impl.verify.execute import run_here

path, dies = Path(sys.argv[1]), int(sys.argv[2])
after = train.StepLog.on_step_end

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


@pytest.mark.slow
def test_a_killed_run_is_judged_on_all_its_steps(tmp_path: Path) -> None:
    """Oracle: the same run undisturbed. Killed in step 5, resumed from the checkpoint of step 3: the ledger has every
    step once, with the same gradients and parameters to the bit, and nothing is left beside it."""
    whole, broken = tmp_path / "whole", tmp_path / "broken"
    assert arm(whole, 0) == 0
    assert arm(broken, KILLED) == 9
    assert partial(RunRecord(broken).ledger).is_file()
    assert arm(broken, 0) == 0
    assert not partial(RunRecord(broken).ledger).exists()
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
                if next(steps) == 4:
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
