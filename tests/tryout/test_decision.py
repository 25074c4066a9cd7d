"""The decision: how often it is wrong, against losses that are drawn from what is known."""

from __future__ import annotations

import math

import numpy as np
import pytest

from grit_impl.tryout.decision import ALPHA, Decided, as_percent, decide, lower_loss, seeds_needed

TIMES = 500


def rates(mean: float, spread: float, n: int, smallest: float = 1.0) -> dict[str, float]:
    """How often each outcome comes, for gains that are normal with this mean (percent of log loss) and spread."""
    draws = np.random.default_rng(7).normal(mean, spread, (TIMES, n))
    found = [decide(row.tolist(), smallest).outcome for row in draws]
    return {outcome: found.count(outcome) / TIMES for outcome in ("yes", "no", "inconclusive")}


def above(rate: float) -> float:
    """What a share of `TIMES` draws at this rate stays below: four standard deviations."""
    return rate + 4 * math.sqrt(rate * (1 - rate) / TIMES)


@pytest.mark.parametrize("n", [3, 6])
@pytest.mark.parametrize("spread", [0.5, 8.0])
def test_a_rule_that_changes_nothing_is_seldom_said_to_help(n: int, spread: float) -> None:
    """Oracle: a two-sided test at alpha errs to one side with alpha / 2."""
    assert rates(0.0, spread, n)["yes"] < above(ALPHA / 2)


@pytest.mark.parametrize("n", [3, 6])
def test_a_gain_of_interest_is_seldom_denied(n: int) -> None:
    """At exactly the smallest effect of interest `no` is an error, with alpha / 2 at most."""
    assert rates(-100 * math.log1p(-0.01), 2.0, n)["no"] < above(ALPHA / 2)


def test_what_is_large_is_found_and_what_is_not_is_not() -> None:
    """Ten standard deviations of gain over six seeds, and of loss; a certain gain that is too small is `no`."""
    assert rates(20.0, 2.0, 6)["yes"] == 1.0
    assert rates(-20.0, 2.0, 6)["no"] == 1.0
    assert rates(0.3, 0.05, 6)["no"] == 1.0
    assert rates(0.3, 0.05, 6, smallest=0.2)["yes"] == 1.0


def test_the_seeds_that_are_asked_for_decide() -> None:
    """Of undecided draws, so many seeds in all decide about half: the next mean is as often nearer to the bound."""
    rng, decided, asked = np.random.default_rng(3), 0, 0
    for _ in range(200):
        first = decide(rng.normal(4.0, 6.0, 6).tolist(), 1.0)
        if first.outcome == "inconclusive" and first.more and first.more < 200:
            asked += 1
            again = rng.normal(first.gain.estimate, 6.0, 6 + first.more).tolist()
            decided += decide(again, 1.0).outcome != "inconclusive"
    assert asked > 50
    assert 0.3 < decided / asked < 0.8


def test_seeds_needed_are_the_fewest_whose_interval_is_short_enough() -> None:
    """Oracle: Student's table: t(0.975, 9) = 2.262 and t(0.975, 8) = 2.306."""
    reach = 2.262 * 1.0 / math.sqrt(10) + 1e-3
    assert seeds_needed(reach, 1.0, 0.5, 5) == 10
    assert seeds_needed(0.5, 1e9, 1.0, 5) is None


def test_percent_is_of_the_reference() -> None:
    """0.9 of the reference's loss is 10% lower, 1.1 of it 10% higher; the page shows percent, the test takes logs."""
    assert as_percent(lower_loss(0.9, 1.0)) == pytest.approx(10)
    assert as_percent(lower_loss(1.1, 1.0)) == pytest.approx(-10)
    answer = decide([lower_loss(0.9, 1.0)] * 3, 1.0)
    assert (answer.outcome, round(answer.gain.estimate, 6)) == ("yes", 10)


def test_divergence_and_floors_decide_first() -> None:
    """GRIT that diverges is not better, however good its other seeds are; zero against zero says nothing."""
    assert decide([20.0, 21.0, 22.0], 1.0, diverged=1).outcome == "no"
    assert decide([0.0, 0.0, 0.0], 1.0, log=False).outcome == "no"
    assert decide([0.0, 0.0, 0.0], 1.0, log=False, floor="nothing was learned").outcome == "inconclusive"
    assert decide([5.0], 1.0).outcome == decide([], 1.0).outcome == "inconclusive"


def test_points_are_taken_as_they_are() -> None:
    """Accuracies are no ratios."""
    found = decide([2.0, 3.0, 4.0, 3.0], 1.0, log=False)
    assert isinstance(found, Decided)
    assert (found.outcome, found.gain.estimate, found.gains) == ("yes", 3.0, (2.0, 3.0, 4.0, 3.0))
