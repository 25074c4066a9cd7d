"""Did it help? One gain per seed, both arms trained from the same adapters on the same batches, and a fixed rule.

Fixed before any run: Student's paired t over seeds, two-sided, alpha 0.05; the smallest effect of interest, 1% of the
loss or one point of accuracy unless another is asked for. Imports no torch.
"""

from __future__ import annotations

import bisect
import math
import statistics
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any, Literal

from grit_impl.statistics.intervals import Interval, t_critical, t_interval

ALPHA = 0.05
FLOOR = 1.0
"""Percent right, below which an accuracy says nothing about training."""
MOST_SEEDS = 9_999

Outcome = Literal["yes", "no", "inconclusive"]


@dataclass(frozen=True)
class Decided:
    """The answer, with what it rests on.

    Attributes:
        outcome: `yes`: it helps; `no`: it does not, or by less than is of interest; or `inconclusive`.
        gain: Percent by which GRIT's held-out loss is lower, or points by which its accuracy is higher.
        smallest: The smallest gain of interest, in the same unit.
        gains: One per seed.
        more: Further seeds that would decide, if spread and mean stay; None where it is decided, or none would.
        why: In words.
    """

    outcome: Outcome
    gain: Interval
    smallest: float
    gains: tuple[float, ...]
    more: int | None
    why: str

    def to_dict(self) -> dict[str, Any]:
        """JSON values."""
        return {**asdict(self), "gain": self.gain.to_dict()}


def lower_loss(grit: float, reference: float) -> float:
    """A gain in units of -100 log(ratio): about percent, and symmetric, as the test wants it."""
    return -100 * math.log(grit / reference)


def as_percent(value: float) -> float:
    """A gain in log units as percent of the reference's loss."""
    return -100 * math.expm1(-value / 100) if value > -70_000 else -math.inf


def decide(gains: Sequence[float], smallest: float, *, diverged: int = 0, floor: str = "", log: bool = True) -> Decided:
    """The answer of some seeds.

    Yes: the interval lies above zero, and reaches the smallest effect of interest. No: the interval excludes such an
    effect, however certain a smaller one is, or a run of GRIT's diverged where the reference's did not. Else
    inconclusive, as with fewer than two seeds, or where neither arm has learned anything.

    Args:
        gains: From `lower_loss`, or differences of accuracy in points; positive is better.
        smallest: The smallest effect of interest, in percent or points.
        diverged: Seeds on which GRIT alone diverged.
        floor: Why the gains mean nothing, if they do not.
        log: The gains are from `lower_loss`.
    """
    worth = -100 * math.log1p(-smallest / 100) if log else smallest
    found = t_interval(gains, 1 - ALPHA) if gains else Interval(math.nan, -math.inf, math.inf, 0, "no seed")
    shown = found
    if log:
        ends = (as_percent(found.estimate), as_percent(found.low), as_percent(found.high))
        shown = Interval(*ends, found.n, found.method)
    each = tuple(as_percent(gain) if log else gain for gain in gains)
    if diverged:
        why = f"GRIT diverged on {diverged} seeds on which the reference did not"
        return Decided("no", shown, smallest, each, None, why)
    if floor or found.n < 2:
        return Decided(
            "inconclusive", shown, smallest, each, None, floor or "fewer than two pairs of runs were finished"
        )
    if found.high < worth:
        why = "the interval excludes an effect of interest" if found.high >= 0 else "it is worse"
        return Decided("no", shown, smallest, each, None, why)
    if found.low > 0:
        return Decided("yes", shown, smallest, each, None, "the interval lies above zero")
    needed = seeds_needed(found.estimate, statistics.stdev(gains), worth, found.n)
    why = "the interval holds zero and effects of interest"
    return Decided("inconclusive", shown, smallest, each, needed and needed - found.n, why)


def seeds_needed(mean: float, spread: float, worth: float, n: int) -> int | None:
    """Seeds at which `decide` would say yes or no, if mean and spread stay; None: more than anybody would run."""
    reach = max(mean, worth - mean)

    def too_few(seeds: int) -> bool:
        return t_critical(seeds - 1, 1 - ALPHA) * spread / math.sqrt(seeds) >= reach

    found = bisect.bisect_left(range(MOST_SEEDS), True, lo=n + 1, key=lambda seeds: not too_few(seeds))
    return found if found < MOST_SEEDS else None
