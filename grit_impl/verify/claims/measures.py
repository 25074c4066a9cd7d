"""How claims and reports read an evaluation: the one place that knows its shape."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING, Any

from grit_impl.errors import GRITError
from grit_impl.statistics.decision import Metric
from grit_impl.verify.claims.base import Evidence

if TYPE_CHECKING:
    from grit_impl.evaluate.seeds import SeedEffect

UNITS = {
    "aqi_accuracy": "%",
    "category": "%",
    "exact": "%",
    "within5": "%",
    "mae": "index points",
    "delta_aqi": "points",
    "knowledge": "%",
    "retention": "%",
    "tokens_per_second": "tokens/s",
    "delta_speed": "%",
    "delta_speed_absolute": "tokens/s",
}
"""What an evaluation measures of every model, and the unit it is kept in."""


def measured(evidence: Evidence, model: str, name: str) -> Metric:
    """One number of the evaluation; NaN where it was not measured (the base has no difference to itself).

    Args:
        evidence: With an evaluation.
        model: `base` or an arm.
        name: One of `UNITS`.

    Raises:
        GRITError: the evaluation has no such model.
    """
    if evidence.evaluation is None or model not in evidence.evaluation.metrics:
        raise GRITError(f"the evaluation has no model {model!r}; evaluate it first")
    value = getattr(evidence.evaluation.metrics[model], name)
    return as_metric(name, value, unit=UNITS[name], subject=model)


def as_metric(name: str, value: Any, *, unit: str, subject: str) -> Metric:
    """A metric from an interval, from a comparison of two models, or from None."""
    if value is None:
        return Metric(name, math.nan, unit=unit, subject=subject)
    interval = getattr(value, "difference", value)
    ends = interval.low, interval.high
    return Metric(name, interval.estimate, *ends, unit, interval.n, interval.method, subject, interval.fixed)


def over_seeds(evidence: Evidence, first: str, second: str, suite: str = "aqi", bound: float = 0.0) -> SeedEffect:
    """Accuracy of `first` minus `second` in points, one difference per training seed, tested against `bound`."""
    from grit_impl.evaluate.seeds import effect_over_seeds

    evaluations = [each.evaluation for each in evidence.seeds.values()]
    return effect_over_seeds(evaluations, first, second, suite=suite, bound=bound)


def seed_metrics(found: SeedEffect, name: str, unit: str, subject: str) -> tuple[Metric, ...]:
    """An effect over seeds with its interval, and what so many seeds can find."""
    return (
        as_metric(name, found.interval, unit=unit, subject=subject),
        Metric("detectable", found.detectable, unit=unit, n=len(found.differences), subject=subject),
    )


def paired_difference(evidence: Evidence, first: str, second: str, suite: str = "aqi") -> Metric:
    """Accuracy of `first` minus `second` in points, on the items that both answered, with Tango's paired interval,
    widened for what the server changes (see `noise.Noise`).

    Raises:
        GRITError: the two have no answered item in common.
    """
    ours, theirs = _common(evidence, first, second, suite)
    from grit_impl.evaluate.metrics import widened_difference
    from grit_impl.statistics.paired import paired_difference_interval

    allowance = evidence.evaluation.noise().allowance
    interval = widened_difference(paired_difference_interval(ours, theirs).scaled(100), allowance)
    return as_metric(f"{suite}_difference", interval, unit="points", subject=f"{first} - {second}")


def detectable(evidence: Evidence, first: str, second: str, suite: str = "aqi") -> float:
    """Smallest difference in points that the common items find with 80% power at alpha .05."""
    from grit_impl.evaluate.metrics import discordant
    from grit_impl.statistics.power import detectable_difference

    ours, theirs = _common(evidence, first, second, suite)
    return 100 * detectable_difference(len(ours), sum(discordant(ours, theirs)) / len(ours))


def _common(evidence: Evidence, first: str, second: str, suite: str) -> tuple[list[bool], list[bool]]:
    from grit_impl.evaluate.metrics import paired
    from grit_impl.evaluate.seeds import accuracy_of

    ours, theirs = paired(*(accuracy_of(evidence.evaluation, model, suite) for model in (first, second)))
    if not ours:
        raise GRITError(f"{first} and {second} have no {suite} item in common; evaluate both on the same items")
    return ours, theirs


def unanswered(evidence: Evidence, suite: str, *models: str) -> list[str]:
    """Items of a suite without a trustworthy answer from one of these models: nothing follows from the rest."""
    evaluations = [each.evaluation for each in evidence.seeds.values()] or [evidence.evaluation]
    return [
        f"{model}: {item}"
        for evaluation in evaluations
        for model in models
        for item in evaluation.unanswered(model)
        if item.startswith(f"{suite}/")
    ]
