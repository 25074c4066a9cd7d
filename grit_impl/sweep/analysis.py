"""What a sweep's results say: paired differences with intervals, and a verdict per task.

The effect is the ratio of two held-out losses from the same seed (same base, adapters and batches), in percent: losses
of different tasks differ by a factor of ten. docs/measurements/grit-vs-lora.md fixed the rules before any evaluation
seed was run.
"""

from __future__ import annotations

import math
import statistics
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import Any

from scipy import stats  # type: ignore[import-untyped]

from grit_impl.errors import GRITError
from grit_impl.statistics.intervals import Interval, t_interval
from grit_impl.statistics.paired import holm, minimum_detectable_effect, pairs_needed, sign_flip_test
from grit_impl.sweep.plan import BASE_ARM
from grit_impl.sweep.store import choose_trial

ALPHA = 0.05
SMALLEST_EFFECT = 2.0
"""Percent of the reference's held-out loss: the smallest effect of interest."""
FEWEST = 6
"""Pairs below which nothing is decided: fewer cannot reach p < .05 in a sign-flip test."""
Row = Mapping[str, Any]


@dataclass(frozen=True)
class PairedEffect:
    """An arm against the reference on one task, paired by seed.

    Attributes:
        task, arm: What is compared.
        effect: Change of the held-out loss in percent of the reference's (negative: the arm is better).
        p: Paired t-test of the log ratio; NaN with fewer than two pairs.
        p_flip: Exact sign-flip test of the same.
        adjusted: p after Holm over the family; set by `verdicts`.
        verdict: `supported`, `refuted` or `inconclusive`; set by `verdicts`.
        diverged: Runs of the arm that diverged on seeds where the reference did not.
        accuracy: Difference of greedy exact match in points.
        retention: Difference in nats per token of the base's own facts (positive: more is forgotten).
        steps: Median share of the reference's steps after which the arm has the reference's final loss; None: more
            than half of the runs never have it.
        equal_seconds: Change of the loss in percent at the time when the reference ends, as `effect`.
        step_time: The arm's median seconds per step over the reference's.
        detectable: Smallest change in percent that this spread and n find with 80% power.
        needed: Seeds that would find the smallest effect of interest with 80% power.
    """

    task: str
    arm: str
    effect: Interval
    p: float
    p_flip: float
    diverged: int
    accuracy: Interval
    retention: Interval
    steps: float | None
    equal_seconds: Interval
    step_time: float
    detectable: float
    needed: int
    adjusted: float = math.nan
    verdict: str = ""


def percent(log_ratio: float) -> float:
    """A log ratio as a change in percent."""
    return 100 * math.expm1(log_ratio) if log_ratio < 700 else math.inf


def _percent(interval: Interval) -> Interval:
    low = percent(interval.low) if math.isfinite(interval.low) else -math.inf
    return Interval(percent(interval.estimate), low, percent(interval.high), interval.n, interval.method)


def compare(rows: Sequence[Row], task: str, arm: str, reference: str) -> PairedEffect | None:
    """Compare an arm with the reference on one task.

    Args:
        rows: Finished runs of one base and one variant in the evaluation (or ablation) phase.
        task, arm, reference: Names.

    Returns:
        None without a seed that both finished.
    """

    def by_seed(name: str) -> dict[int, Row]:
        return {row["seed"]: row for row in rows if row["task"] == task and row["arm"] == name}

    ours, theirs = by_seed(arm), {seed: row for seed, row in by_seed(reference).items() if row["status"] == "done"}
    diverged = sum(ours[seed]["status"] == "diverged" for seed in ours if seed in theirs)
    pairs = [(ours[s], theirs[s]) for s in sorted(ours) if s in theirs and ours[s]["status"] == "done"]
    if not pairs:
        return None
    ratios = [math.log(a["loss"] / b["loss"]) for a, b in pairs]
    n, spread = len(ratios), statistics.stdev(ratios) if len(ratios) > 1 else math.inf
    step_time = _median([a["step_seconds"] for a, _ in pairs]) / _median([b["step_seconds"] for _, b in pairs])
    timed = [math.log(_at(a["curve"], b["curve"][-1][0] / step_time) / b["loss"]) for a, b in pairs]
    shares = [_reached(a["curve"], b["loss"]) / b["curve"][-1][0] for a, b in pairs]
    share = _median(shares)
    smallest = math.log1p(SMALLEST_EFFECT / 100)
    return PairedEffect(
        task=task,
        arm=arm,
        effect=_percent(t_interval(ratios, 1 - ALPHA)),
        p=float(stats.ttest_1samp(ratios, 0.0).pvalue) if n > 1 and spread > 0 else math.nan,
        p_flip=sign_flip_test(ratios),
        diverged=diverged,
        accuracy=t_interval([100 * (a["accuracy"] - b["accuracy"]) for a, b in pairs], 1 - ALPHA),
        retention=t_interval([a["retention"] - b["retention"] for a, b in pairs], 1 - ALPHA),
        steps=share if math.isfinite(share) else None,
        equal_seconds=_percent(t_interval(timed, 1 - ALPHA)),
        step_time=step_time,
        detectable=percent(minimum_detectable_effect(spread, n)) if n > 1 else math.inf,
        needed=max(FEWEST, pairs_needed(smallest / spread)) if 0 < spread < math.inf else FEWEST,
    )


def _median(values: Sequence[float]) -> float:
    return float(statistics.median(values))


def _at(curve: Sequence[Sequence[float]], step: float) -> float:
    """Held-out loss at a step, linear between evaluations, the first or last value outside them."""
    if step <= curve[0][0]:
        return float(curve[0][1])
    for before, after in pairwise(curve):
        if step <= after[0]:
            share = (step - before[0]) / (after[0] - before[0])
            return float(before[1] + share * (after[1] - before[1]))
    return float(curve[-1][1])


def _reached(curve: Sequence[Sequence[float]], loss: float) -> float:
    """The first step at which a curve is as low as `loss`, linear between evaluations; inf: never."""
    if curve[0][1] <= loss:
        return float(curve[0][0])
    for before, after in pairwise(curve):
        if after[1] <= loss:
            share = (before[1] - loss) / (before[1] - after[1])
            return float(before[0] + share * (after[0] - before[0]))
    return math.inf


def verdicts(comparisons: Sequence[PairedEffect]) -> list[PairedEffect]:
    """Holm over the comparisons given, and a verdict for each.

    Supported: the interval lies below zero, Holm's p is at most alpha, no run diverged, and an improvement of the
    smallest effect of interest is not excluded. Refuted: the interval excludes such an improvement (which includes
    differences that are certain but too small to matter). Inconclusive: anything else.
    """
    if not comparisons:
        return []
    adjusted = holm([1.0 if math.isnan(c.p) else c.p for c in comparisons])
    return [_decided(comparison, p) for comparison, p in zip(comparisons, adjusted, strict=True)]


def _decided(comparison: PairedEffect, adjusted: float) -> PairedEffect:
    effect, worthwhile = comparison.effect, -SMALLEST_EFFECT
    if comparison.diverged or effect.n < FEWEST:
        verdict = "inconclusive"
    elif effect.low > worthwhile:
        verdict = "refuted"
    elif effect.high < 0 and adjusted <= ALPHA:
        verdict = "supported"
    else:
        verdict = "inconclusive"
    return PairedEffect(**{**_fields(comparison), "adjusted": adjusted, "verdict": verdict})


def _fields(comparison: PairedEffect) -> dict[str, Any]:
    return {name: getattr(comparison, name) for name in PairedEffect.__dataclass_fields__}


def tuned(rows: Sequence[Row]) -> dict[tuple[str, str], Row]:
    """(task, arm) to the tuning run that the fixed rule chose, its `loss` the mean over the tuning seeds."""
    groups: dict[tuple[str, str], list[dict[str, Any]]] = {}
    for row in rows:
        groups.setdefault((row["task"], row["arm"]), []).append(dict(row))
    chosen: dict[tuple[str, str], Row] = {}
    for group, members in groups.items():
        trial = choose_trial(members)
        same = [row for row in members if row["trial"] == trial]
        if trial is not None:
            chosen[group] = {**same[0], "loss": statistics.fmean(row["loss"] for row in same)}
    return chosen


def candidate(rows: Sequence[Row]) -> str:
    """The GRIT arm that the confirmatory test is about: lowest mean log validation loss over the tasks in tuning.

    Args:
        rows: Tuning runs of the embedded base; evaluation seeds play no part in it.

    Raises:
        GRITError: no arm of the method `grit` was tuned on every task.
    """
    chosen = tuned(rows)
    tasks = {task for task, _ in chosen}
    scores: dict[str, float] = {}
    for arm in dict.fromkeys(row["arm"] for row in rows if row["method"] == "grit"):
        losses = [chosen[task, arm]["loss"] for task in tasks if (task, arm) in chosen]
        if len(losses) == len(tasks):
            scores[arm] = statistics.fmean(map(math.log, losses))
    if not scores:
        raise GRITError("no GRIT arm was tuned on every task: let the sweep finish its tuning phase")
    return min(scores, key=lambda arm: scores[arm])


def family(rows: Sequence[Row], reference: str, arms: Sequence[str], tasks: Sequence[str]) -> list[PairedEffect]:
    """Comparisons of the arms with the reference on the tasks, judged as one family."""
    found = (compare(rows, task, arm, reference) for task in tasks for arm in arms if arm not in (reference, BASE_ARM))
    return verdicts([comparison for comparison in found if comparison is not None])
