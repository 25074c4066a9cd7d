"""Verdicts: the public functions, on ledgers of real small runs."""

from __future__ import annotations

import pytest

from grit_impl.ledger.chain import CAUSES, CHECKS, LINKS
from grit_impl.ledger.recorder import gradient_ledger
from grit_impl.ledger.verdict import assert_effective, judge_ledger, judge_pair
from grit_impl.zoo.bench import Bench, Moments, Whitening


def run(modify=True, seed=0, late=False, path=None, **setting):
    bench = Bench("loop", "adamw", seed, **setting)
    apply = Whitening(bench.lora).apply if modify else None
    with gradient_ledger(bench.model, path=path) as ledger:
        bench.train(Moments(**{"after_step" if late else "before_step": apply}))
    return ledger


@pytest.fixture(scope="module")
def baseline():
    return run(modify=False)


@pytest.fixture(scope="module")
def effective():
    return run()


def test_effective_says_what_it_saw(effective):
    """Oracle: the run. All 28 tensors preconditioned in all 8 steps, replayed exactly, A and B judged separately."""
    verdict = judge_ledger(effective)
    assert verdict.cause == "effective"
    assert verdict.effective is True
    assert not verdict.fault
    assert verdict.numbers["share_modified"] == 1.0
    assert verdict.numbers["active_steps"] == 8
    assert verdict.numbers["replay"] < 1e-5
    assert verdict.numbers["update_turn"] > 0.01
    assert set(verdict.per_group) == {"A", "B"}
    assert assert_effective(effective) == verdict


def test_plain_training_is_no_fault_and_not_effective(baseline):
    """Oracle: nothing was modified; clipping is no modifier."""
    verdict = judge_ledger(baseline)
    assert verdict.cause == "no-modifier"
    assert not verdict.fault
    with pytest.raises(AssertionError, match="no-modifier"):
        assert_effective(baseline)
    assert_effective(baseline, allow=["no-modifier"])


def test_pairs(baseline, effective):
    """Oracle: a rerun is bit-equal, a late run too, an effective one differs from step 1, other data too."""
    assert judge_pair(run(modify=False), baseline).cause == "identical-to-baseline"
    assert judge_pair(run(late=True), baseline).cause == "identical-to-baseline"
    differs = judge_pair(effective, baseline)
    assert (differs.cause, differs.numbers["onset"]) == ("differs", 1)
    assert judge_pair(run(modify=False, seed=1), baseline).cause == "different-data"


def test_late_names_the_moment():
    """Oracle: the run's only mistake."""
    verdict = judge_ledger(run(late=True))
    assert (verdict.cause, verdict.effective) == ("modified-too-late", False)
    assert "after the optimizer" in verdict.summary


def test_every_cause_is_explained():
    """Oracle: the catalogue has each check's cause, once, and each link of the chain has a check."""
    names = [check.cause for check in CHECKS]
    assert len(set(names)) == len(names)
    assert set(names) <= set(CAUSES)
    assert all(CAUSES.values())
    assert {check.link for check in CHECKS} == set(LINKS)


def test_grit_compare_reads_the_ledgers(tmp_path):
    """Oracle: the runs. A callback after the step leaves the baseline's curve and parameters: curves cannot say why."""
    import json

    from click.testing import CliRunner

    from grit_impl.curves.commands import compare
    from grit_impl.record import RunRecord

    for name, setting in (("baseline", {"modify": False}), ("late", {"late": True})):
        record = RunRecord.create(tmp_path / name, arm=name, seed=0)
        for step in range(1, 41):
            record.append_step({"step": step, "loss": 4.0 / step, "grad_norm": 1.0, "learning_rate": 1e-3})
        record.finish()
        run(path=record.ledger, **setting)
    done = CliRunner().invoke(compare, [str(tmp_path / "baseline"), str(tmp_path / "late")], catch_exceptions=False)
    assert "gradients: identical-to-baseline" in done.output
    written = CliRunner().invoke(compare, [*map(str, (tmp_path / "baseline", tmp_path / "late")), "--json"])
    assert json.loads(written.output)["gradients"]["cause"] == "identical-to-baseline"
    RunRecord(tmp_path / "late").ledger.unlink()
    done = CliRunner().invoke(compare, [str(tmp_path / "baseline"), str(tmp_path / "late")], catch_exceptions=False)
    assert "gradients:" not in done.output
