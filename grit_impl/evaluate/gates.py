"""Thresholds that an evaluation must keep, decided so that luck neither passes nor fails a session.

A session has a dozen gates. At alpha = .05 each, nearly every second session of a perfect model would raise a false
alarm, so the session's error (one in a thousand) is divided among its gates and directions (Bonferroni), and each is
decided on the bounds of an interval of that confidence: `supported` if the lower bound keeps the threshold, `refuted`
if the upper bound breaks it, `inconclusive` otherwise, with the difference that this many items can find.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from functools import lru_cache
from typing import Any

from grit_impl.errors import GRITError
from grit_impl.evaluate.metrics import Comparison, paired
from grit_impl.evaluate.power import detectable_difference
from grit_impl.evaluate.results import Evaluation
from grit_impl.verify.statistics import Interval, clopper_pearson

SESSION_ALPHA = 1e-3
"""Probability that any gate of a session decides wrongly, in whichever direction."""


@dataclass(frozen=True, slots=True)
class Thresholds:
    """What is asked of every fine-tuned model. None: not asked.

    Attributes:
        min_delta_aqi: Points of AQI accuracy above the base (exclusive).
        min_delta_over_baseline: Points above the fine-tuned baseline (exclusive).
        max_speed_loss: Percent of the base's tokens per second.
        min_retention: Percent of what the base knew.
        alpha: Of the whole session.
    """

    min_delta_aqi: float | None = 0.0
    min_delta_over_baseline: float | None = None
    max_speed_loss: float | None = 10.0
    min_retention: float | None = 70.0
    alpha: float = SESSION_ALPHA

    def __post_init__(self) -> None:
        for name in ("min_delta_aqi", "min_delta_over_baseline", "max_speed_loss", "min_retention"):
            value = getattr(self, name)
            if value is not None and not (math.isfinite(value) and -100 <= value <= 100):
                raise GRITError(f"--{name.replace('_', '-')} must be a number between -100 and 100, got {value}")
        if not 0 < self.alpha < 0.5:
            raise GRITError(f"alpha must lie between 0 and 0.5, got {self.alpha}")


@dataclass(frozen=True, slots=True)
class Gate:
    """One decided threshold.

    Attributes:
        name: `delta_aqi`, `delta_over_baseline`, `delta_speed` or `retention`.
        label: The model.
        verdict: `supported`, `refuted`, `inconclusive` or `not exercised`.
        interval: The measured value at the gate's confidence; None if there is none.
        threshold: What it is compared with.
        unit: Of both.
        detectable: For accuracies: the difference that this many items find with 80% power at this gate's alpha.
        reason: One line.
    """

    name: str
    label: str
    verdict: str
    interval: Interval | None
    threshold: float
    unit: str
    detectable: float | None
    reason: str


def judge(evaluation: Evaluation, thresholds: Thresholds | None = None) -> list[Gate]:
    """Decide every threshold for every model but the base."""
    limits = thresholds or Thresholds()
    labels = [label for label in evaluation.models if label != evaluation.base]
    asked: list[tuple[str, str, float]] = []
    for label in labels:
        if limits.min_delta_aqi is not None:
            asked.append(("delta_aqi", label, limits.min_delta_aqi))
        over = limits.min_delta_over_baseline
        if over is not None and label != evaluation.baseline and evaluation.baseline in evaluation.models:
            asked.append(("delta_over_baseline", label, over))
        if limits.max_speed_loss is not None:
            asked.append(("delta_speed", label, -limits.max_speed_loss))
        if limits.min_retention is not None:
            asked.append(("retention", label, limits.min_retention))
    each = limits.alpha / 2 / max(len(asked), 1)
    return [_decide(evaluation, name, label, threshold, each) for name, label, threshold in asked]


def _decide(evaluation: Evaluation, name: str, label: str, threshold: float, alpha: float) -> Gate:
    unit = "points" if name.startswith("delta_a") or name.startswith("delta_o") else "%"
    interval, detectable, p = _MEASURE[name](evaluation, label, alpha)

    def gate(verdict: str, reason: str) -> Gate:
        return Gate(name, label, verdict, interval, threshold, unit, detectable, reason)

    if interval is None:
        return gate("not exercised", f"{name} of {label} was not measured")
    reference = evaluation.baseline if name == "delta_over_baseline" else evaluation.base
    if name != "delta_speed" and (missing := _unanswered(evaluation, name, label, reference)):
        return gate(
            "inconclusive", f"{name} of {label}: {len(missing)} items have no trustworthy answer ({missing[0]}, ...)"
        )
    value = f"{name} of {label} is {interval.estimate:.1f} {unit} [{interval.low:.1f}, {interval.high:.1f}]"
    strict = name.startswith("delta_a") or name.startswith("delta_o")
    # Against zero McNemar's exact test is valid at any alpha; the score interval is only nearly so, far in the tail.
    significant = p is None or threshold != 0 or p <= 2 * alpha
    if (interval.low > threshold or (interval.low == threshold and not strict)) and significant:
        return gate("supported", f"{value}, required {'more than ' if strict else ''}{threshold:g}")
    if (interval.high < threshold or (interval.high == threshold and strict)) and significant:
        return gate("refuted", f"{value}, required {'more than ' if strict else ''}{threshold:g}")
    found = f"; differences from {detectable:.1f} points on can be found" if detectable is not None else ""
    return gate("inconclusive", f"{value} does not decide about {threshold:g}{found}")


def _unanswered(evaluation: Evaluation, name: str, label: str, reference: str) -> list[str]:
    suite = "knowledge/" if name == "retention" else "aqi/"
    return [item for each in (label, reference) for item in evaluation.unanswered(each) if item.startswith(suite)]


Measured = tuple[Interval | None, float | None, float | None]


def _accuracy(reference: str) -> Callable[[Evaluation, str, float], Measured]:
    def measure(evaluation: Evaluation, label: str, alpha: float) -> Measured:
        other = getattr(evaluation, reference)
        items = len(paired(evaluation.correct(label), evaluation.correct(other))[0])
        if not items:
            return None, None, None
        comparison: Comparison = evaluation.compare(label, other, 1 - 2 * alpha)
        discordance = (comparison.gained + comparison.lost) / items
        detectable = 100 * detectable_difference(items, discordance, 2 * alpha)
        return comparison.difference, detectable, comparison.p

    return measure


def _retention(evaluation: Evaluation, label: str, alpha: float) -> Measured:
    kept = evaluation.retained(label)
    return (_exact_share(sum(kept), len(kept), 1 - 2 * alpha) if kept else None), None, None


@lru_cache(maxsize=1024)
def _exact_share(right: int, n: int, confidence: float) -> Interval:
    return clopper_pearson(right, n, confidence).scaled(100)


def _speed(evaluation: Evaluation, label: str, alpha: float) -> Measured:
    return evaluation.delta_speed(label, 1 - 2 * alpha), None, None


_MEASURE: dict[str, Any] = {
    "delta_aqi": _accuracy("base"),
    "delta_over_baseline": _accuracy("baseline"),
    "delta_speed": _speed,
    "retention": _retention,
}
