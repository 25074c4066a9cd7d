"""How claims and reports read an evaluation: the one place that knows its shape."""

from __future__ import annotations

import math
from typing import Any

from grit_impl.errors import GRITError
from grit_impl.verify.claims.base import Evidence, Metric

UNITS = {
    "aqi_accuracy": "%",
    "delta_aqi": "points",
    "knowledge": "%",
    "retention": "%",
    "tokens_per_second": "tokens/s",
    "delta_speed": "%",
}
"""What an evaluation measures of every model, and the unit it is kept in."""


GATE_CONFIDENCE = 1 - 1e-4
"""Of the intervals that gates are decided on: ten gates in a session are then wrong, together, in one session of a
thousand. Twenty gates at 95% would raise a false alarm in two sessions of three."""


def measured(evidence: Evidence, model: str, name: str, confidence: float | None = None) -> Metric:
    """One number of the evaluation; NaN where it was not measured (the base has no difference to itself).

    Args:
        evidence: With an evaluation.
        model: `base` or an arm.
        name: One of `UNITS`.
        confidence: Of the interval; None: the evaluation's own, 95%.

    Raises:
        GRITError: the evaluation has no such model.
    """
    if evidence.evaluation is None or model not in evidence.evaluation.metrics:
        raise GRITError(f"the evaluation has no model {model!r}; evaluate it first")
    metrics = evidence.evaluation.metrics if confidence is None else evidence.evaluation.metrics_at(confidence)
    value = getattr(metrics[model], name)
    return as_metric(name, value, unit=UNITS[name], subject=model)


def as_metric(name: str, value: Any, *, unit: str, subject: str) -> Metric:
    """A metric from an interval, from a comparison of two models, or from None."""
    if value is None:
        return Metric(name, math.nan, unit=unit, subject=subject)
    interval = getattr(value, "difference", value)
    return Metric(name, interval.estimate, interval.low, interval.high, unit, interval.n, interval.method, subject)


def paired_difference(evidence: Evidence, first: str, second: str, suite: str = "aqi") -> Metric:
    """Accuracy of `first` minus `second` in points, on the items that both answered, with Tango's paired interval.

    Raises:
        GRITError: the two have no answered item in common.
    """
    from grit_impl.evaluate.results import paired
    from grit_impl.verify.statistics import paired_difference_interval

    evaluation = evidence.evaluation
    a, b = (
        evaluation.correct(model) if suite == "aqi" else evaluation.scores(model, suite, "correct")
        for model in (first, second)
    )
    ours, theirs = paired(a, b)
    if not ours:
        raise GRITError(f"{first} and {second} have no {suite} item in common; evaluate both on the same items")
    interval = paired_difference_interval(ours, theirs).scaled(100)
    return as_metric(f"{suite}_difference", interval, unit="points", subject=f"{first} - {second}")


def unanswered(evidence: Evidence, *models: str) -> list[str]:
    """Items that have no trustworthy answer from one of these models: nothing can be concluded from the rest."""
    return [f"{model}: {item}" for model in models for item in evidence.evaluation.metrics[model].unanswered]
