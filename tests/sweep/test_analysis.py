"""What is concluded from results: against simulated truth, and against curves worked out by hand."""

from __future__ import annotations

import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from scipy import stats  # type: ignore[import-untyped]

from grit_impl.errors import GRITError
from grit_impl.sweep.analysis import SMALLEST_EFFECT, PairedEffect, candidate, compare, family, percent, verdicts
from grit_impl.sweep.plan import load_plan
from grit_impl.sweep.report import markdown, marks, plots, replace_block
from grit_impl.sweep.scheduler import Sweep
from grit_impl.sweep.store import Store

SIMULATIONS, SEEDS = 300, 8
# Two-sided tail of a count of simulations at which a test fails by accident.
ACCIDENT = 1e-6


def row(arm: str, seed: int, loss: float, **rest: Any) -> dict[str, Any]:
    """One finished run."""
    return {
        "task": "convert",
        "arm": arm,
        "seed": seed,
        "status": "done",
        "loss": loss,
        "accuracy": 0.5,
        "retention": 0.1,
        "step_seconds": 0.01,
        "curve": [[100, 2 * loss, 0.0, 1.0], [200, loss, 0.0, 2.0]],
        **rest,
    }


def simulated(rng: np.random.Generator, true_ratio: float) -> PairedEffect:
    """Eight pairs: seeds differ by 20%, the arms' ratio by 2% around the truth."""
    rows = []
    for seed in range(SEEDS):
        reference = math.exp(rng.normal(0, 0.2))
        ratio = math.exp(math.log(true_ratio) + rng.normal(0, 0.02))
        rows += [row("adamw", seed, reference), row("grit", seed, reference * ratio)]
    found = compare(rows, "convert", "grit", "adamw")
    assert found is not None
    return found


def test_intervals_cover_the_truth_as_often_as_they_say() -> None:
    """Oracle: the simulated ratio, 5% better. The count of misses is binomial."""
    rng = np.random.default_rng(1)
    results = [simulated(rng, 0.95) for _ in range(SIMULATIONS)]
    covered = sum(r.effect.low <= -5 <= r.effect.high for r in results)
    assert stats.binomtest(covered, SIMULATIONS, 0.95).pvalue > ACCIDENT


def test_no_difference_is_supported_no_more_often_than_alpha() -> None:
    """Oracle: a true ratio of 1. Four tasks as one family, each a simulation of its own: at most 5% of families err."""
    rng = np.random.default_rng(2)
    families = [verdicts([simulated(rng, 1.0) for _ in range(4)]) for _ in range(SIMULATIONS // 4)]
    wrong = sum(any(c.verdict == "supported" for c in judged) for judged in families)
    assert stats.binom.sf(wrong - 1, len(families), 0.05) > ACCIDENT


def test_a_real_difference_is_found_and_a_small_one_refuted() -> None:
    """Oracle: 8% better with 2% noise is supported, and 1% worse refuted, in nearly every simulation."""
    rng = np.random.default_rng(3)
    found = [verdicts([simulated(rng, 0.92)])[0].verdict for _ in range(100)]
    refuted = [verdicts([simulated(rng, 1.01)])[0].verdict for _ in range(100)]
    assert found.count("supported") >= 95
    assert refuted.count("refuted") >= 85
    assert "supported" not in refuted


def judged(*ratios: float, **rest: Any) -> PairedEffect:
    """The verdict on these ratios."""
    pairs = ((row("adamw", i, 1.0), row("grit", i, ratio, **rest)) for i, ratio in enumerate(ratios))
    found = compare([one for pair in pairs for one in pair], "convert", "grit", "adamw")
    assert found is not None
    return verdicts([found])[0]


def test_the_three_verdicts() -> None:
    """A certain gain that is too small to matter is refuted, a wide interval is inconclusive."""
    tiny = 1 - SMALLEST_EFFECT / 400
    assert judged(0.90, 0.91, 0.90, 0.92, 0.91, 0.89).verdict == "supported"
    assert judged(tiny, tiny + 1e-4, tiny - 1e-4, tiny, tiny, tiny + 1e-5).verdict == "refuted"
    assert judged(0.5, 1.2, 0.9, 1.0, 1.1, 0.7).verdict == "inconclusive"
    assert judged(0.90, 0.91, 0.90, 0.92, 0.91).verdict == "inconclusive"  # five pairs


def test_a_run_that_diverged_forbids_a_claim() -> None:
    """The pair is not simply left out."""
    rows = [row("adamw", seed, 1.0) for seed in range(8)]
    rows += [row("grit", seed, 0.9 + seed / 1000) for seed in range(7)]
    rows.append({**row("grit", 7, 1.0), "status": "diverged", "loss": None})
    (c,) = family(rows, "adamw", ["grit"], ["convert"])
    assert (c.effect.n, c.diverged, c.verdict) == (7, 1, "inconclusive")


def test_steps_and_seconds_follow_the_curves() -> None:
    """Oracle by hand: the arm's loss is 2 at 100 and 1 at 200 steps; the reference ends at 1.5, twice as fast."""
    ours = row("grit", 0, 1.0, step_seconds=0.02)
    theirs = row("adamw", 0, 1.5)
    c = compare([ours, theirs], "convert", "grit", "adamw")
    assert c is not None
    assert (c.steps, c.step_time) == (0.75, 2.0)
    # After 100 of its own steps the arm has loss 2: a third more than 1.5.
    assert c.equal_seconds.estimate == pytest.approx(100 / 3)
    assert c.effect.estimate == pytest.approx(-100 / 3)
    never = compare([row("grit", 0, 1.0), row("adamw", 0, 0.5)], "convert", "grit", "adamw")
    assert never is not None
    assert never.steps is None


def test_percent_is_the_relative_change() -> None:
    """Oracle: exp(log(x)) - 1."""
    assert percent(math.log(0.9)) == pytest.approx(-10)
    one = judged(0.9).effect
    assert (one.low, one.high) == (-math.inf, math.inf)


def test_the_candidate_is_chosen_on_tuning_runs_alone() -> None:
    """Lowest mean log validation loss over the tasks, among GRIT's arms; an arm that lacks a task is no candidate."""

    def tuning(task: str, arm: str, loss: float, method: str = "grit") -> dict[str, Any]:
        return row(arm, 0, loss, task=task, method=method, trial=0, phase="tuning")

    rows = [tuning("a", "x", 1.0), tuning("b", "x", 1.0), tuning("a", "y", 0.1), tuning("b", "y", 5.0)]
    rows += [tuning("a", "z", 0.01), tuning("a", "adamw", 0.001, "adamw"), tuning("b", "adamw", 0.001, "adamw")]
    assert candidate(rows) == "y"
    with pytest.raises(GRITError, match="tuning phase"):
        candidate(rows[-2:])


def test_the_report_fills_its_block_and_nothing_else(
    plan_file: Path, fake_work: Callable[..., dict[str, Any]], tmp_path: Path
) -> None:
    """Twice is the same as once; figures are there; a document without the marks is refused."""
    document = tmp_path / "doc.md"
    begin, end = marks()
    document.write_text(f"before\n{begin}\nold\n{end}\nafter\n")
    with Store(tmp_path / "sweep.db") as store:
        from dataclasses import asdict

        plan = load_plan(plan_file)
        store.set_meta(plan=asdict(plan), versions={"torch": "0"}, git_commit="abc")
        Sweep(plan, store, jobs=2, device="cpu", work=fake_work).run()
        for _ in range(2):
            replace_block(document, markdown([store]))
        assert [path.name for path in plots([store], tmp_path / "figures")] == [
            "tiny-loss-steps.svg",
            "tiny-loss-seconds.svg",
        ]
        # The same results make the same files, so that a new figure in the repository is a new result.
        for path, again in zip(plots([store], tmp_path / "figures"), plots([store], tmp_path / "again"), strict=True):
            assert path.read_bytes() == again.read_bytes()
    text = document.read_text()
    assert text.startswith("before\n")
    assert text.endswith("\nafter\n")
    assert "old" not in text
    assert "| tiny | convert | 3 |" in text
    assert text.count("tuning 8 runs") == 1
    (tmp_path / "plain.md").write_text("nothing")
    with pytest.raises(GRITError, match="exactly one"):
        replace_block(tmp_path / "plain.md", "x")


def test_a_sweep_without_runs_is_one_line(plan_file: Path, tmp_path: Path) -> None:
    """Oracle: ended before its first run, it has a plan and no rows."""
    from dataclasses import asdict

    with Store(tmp_path / "sweep.db") as store:
        store.set_meta(plan=asdict(load_plan(plan_file)), versions={"torch": "0"}, git_commit="abc")
        with pytest.raises(GRITError, match="holds no runs"):
            markdown([store])
