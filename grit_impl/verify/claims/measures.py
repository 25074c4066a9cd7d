"""How claims and reports read an evaluation: the one place that knows its shape."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

from grit_impl.errors import GRITError
from grit_impl.verify.claims.base import Evidence, Metric

UNITS = {
    "aqi_accuracy": "%",
    "delta_aqi": "points",
    "retention": "%",
    "tokens_per_second": "tokens/s",
    "delta_speed": "%",
}
"""What an evaluation measures of every model, and the unit it is kept in."""


def measured(evidence: Evidence, model: str, name: str) -> Metric:
    """One number of the evaluation.

    Args:
        evidence: With an evaluation.
        model: `base` or an arm.
        name: One of `UNITS`.

    Raises:
        GRITError: the evaluation has no such model or number.
    """
    if evidence.evaluation is None or model not in evidence.evaluation.metrics:
        raise GRITError(f"the evaluation has no model {model!r}; evaluate it first")
    value = evidence.evaluation.metrics[model].get(name)
    if value is None:
        return Metric(name, math.nan, unit=UNITS[name], subject=model)
    return as_metric(name, value, unit=UNITS[name], subject=model)


def as_metric(name: str, value: Any, *, unit: str, subject: str, scale: float = 1.0) -> Metric:
    """A metric from anything with estimate, low, high, n and method (an object or a mapping)."""

    def get(key: str) -> Any:
        return value.get(key) if isinstance(value, Mapping) else getattr(value, key, None)

    def scaled(key: str) -> float | None:
        number = get(key)
        return None if number is None else float(number) * scale

    estimate = scaled("estimate")
    return Metric(
        name,
        math.nan if estimate is None else estimate,
        scaled("low"),
        scaled("high"),
        unit=unit,
        n=get("n"),
        method=get("method") or "",
        subject=subject,
    )


def correct(evidence: Evidence, model: str, suite: str = "aqi") -> dict[str, bool]:
    """Per item id, whether the model was right; suites are `aqi` and `knowledge`."""
    return {
        str(row["item"]): bool(row["correct"])
        for row in evidence.evaluation.answers
        if row["model"] == model and row["suite"] == suite
    }


def paired_difference(evidence: Evidence, first: str, second: str, suite: str = "aqi") -> Metric:
    """Accuracy of `first` minus `second` in points, on the items that both answered, with Tango's paired interval."""
    from grit_impl.verify.statistics import paired_difference_interval

    a, b = correct(evidence, first, suite), correct(evidence, second, suite)
    shared = sorted(a.keys() & b.keys())
    if not shared:
        raise GRITError(f"{first} and {second} have no {suite} item in common; evaluate both on the same items")
    interval = paired_difference_interval([a[i] for i in shared], [b[i] for i in shared]).scaled(100)
    return as_metric(f"{suite}_difference", interval, unit="points", subject=f"{first} - {second}")
