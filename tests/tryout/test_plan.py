"""What is run: the same number of trials for all, seeds apart, and a size that fits the time."""

from __future__ import annotations

import pytest

from grit_impl.errors import GRITError
from grit_impl.sweep.plan import Plan
from grit_impl.tryout.plan import (
    GRIT,
    LADDER,
    METHODS,
    Costs,
    Size,
    at_an_end,
    choose_size,
    jobs_that_fit,
    make_plan,
    paired,
    probe,
    rates,
    widen,
)

COMMON = {"warmup": 5, "beta1": 0.8, "beta2": 0.95, "rank": 16, "alpha": 16, "batch_size": 8}
COSTS = Costs({"adamw": 0.05, GRIT: 0.06}, 2.0, 0.0)
NOTHING: dict[str, int | None] = {"steps": None, "trials": None, "seeds": None}


def plan() -> Plan:
    """Three trials of four arms."""
    return make_plan("tiny", "mine", COMMON, Size(20, 3, 4), centre=1e-3, spacing=2.0, seed=11)


def test_every_arm_has_as_many_trials_along_the_rate_alone() -> None:
    """And a centre of its own, as the plan of the tiny base has it."""
    found = plan()
    assert {arm: len(trials) for arm, trials in found.trials.items()} == dict.fromkeys(METHODS, 3)
    assert all(set(trial) == {"lr"} for trials in found.trials.values() for trial in trials)
    assert rates(1e-3, "adamw", 3, 2.0) == [5e-4, 1e-3, 2e-3]
    assert rates(1e-3, "loraplus", 1, 2.0) == [2.2e-4]


def test_pairs_are_of_other_seeds_and_two_arms() -> None:
    """The tuning's seed is in no pair; the jobs of the tuning keep their keys, so that nothing is run twice."""
    whole, pairs = plan(), paired(plan(), "rslora", 4)
    after = [job for job in pairs.jobs() if job.phase == "evaluation" and job.method != "none"]
    assert {job.arm for job in after} == {"rslora", GRIT}
    assert {job.seed for job in after} == {12, 13, 14, 15}
    tuned = {job.key for job in pairs.jobs() if job.phase == "tuning"}
    assert tuned < {job.key for job in whole.jobs()}
    assert {job.key for job in probe(whole).jobs() if job.phase == "tuning"} < {job.key for job in whole.jobs()}


def test_a_range_is_widened_where_its_best_lies() -> None:
    """One trial more for every arm; an arm that diverged everywhere goes lower."""
    before = plan()
    chosen = {arm: before.trials[arm][2]["lr"] for arm in ("adamw", "loraplus")} | {GRIT: before.trials[GRIT][0]["lr"]}
    after = widen(before, chosen, 2.0)
    new = {arm: trials[-1]["lr"] for arm, trials in after.trials.items()}
    assert new["adamw"] == 4e-3
    assert new[GRIT] == 2.5e-4
    assert new["rslora"] < min(trial["lr"] for trial in before.trials["rslora"])
    assert all(trials[:-1] == before.trials[arm] for arm, trials in after.trials.items())
    assert at_an_end([1, 4, 2], 4)
    assert not at_an_end([1, 4, 2], 2)


def test_the_largest_size_that_fits_is_chosen() -> None:
    """Oracle: seconds worked out by hand, ranges widened twice; the first of the ladder with ample time."""
    seconds = 4 * 7 * 2.0 + 7 * 200 * (3 * 0.05 + 0.06) + 6 * (2 * 2.0 + 200 * 0.11)
    assert COSTS.seconds(Size(200, 5, 6), 1) == pytest.approx(seconds)
    assert (Size(200, 5, 6).runs, Size(200, 2, 6).runs) == (4 * 7 + 12, 4 * 2 + 12)
    assert COSTS.seconds(Size(200, 5, 6), 4) == pytest.approx(seconds / 4)
    assert choose_size(COSTS, 60, 1, 10_000, NOTHING)[0] == Size(*LADDER[0])
    for minutes in (1.5, 2, 4):
        size, took = choose_size(COSTS, minutes, 1, 10_000, NOTHING)
        assert took <= 60 * minutes
        assert size != Size(*LADDER[0])
    assert choose_size(COSTS, 60, 1, 80, NOTHING)[0].steps == 80


def test_what_was_asked_for_is_kept_or_refused() -> None:
    """A number of steps that does not fit is refused with the time that it needs."""
    size, _ = choose_size(COSTS, 5, 1, 80, {**NOTHING, "steps": 150})
    assert size.steps == 150
    with pytest.raises(
        GRITError, match=r"--minutes 1 is too short: up to .* runs of 5000 steps take about \d+ minutes"
    ):
        choose_size(COSTS, 1, 1, 80, {**NOTHING, "steps": 5000})


def test_no_more_runs_at_a_time_than_memory_holds() -> None:
    """Two GiB of weights in 16 bits are four in float32, and a process takes half a GiB besides."""
    gib = 2**30
    assert [jobs_that_fit(8, 2 * gib, free * gib) for free in (100, 14, 1)] == [8, 3, 1]
    assert (jobs_that_fit(8, 0, gib), jobs_that_fit(8, gib, None)) == (8, 8)
