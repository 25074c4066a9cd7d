"""From a number and its interval to one of four verdicts.

Two values are not enough: an underpowered measurement must not look like a pass, nor a missing GPU like a success.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from typing import Any, Literal, get_args

Outcome = Literal["supported", "refuted", "inconclusive", "not exercised"]
OUTCOMES: tuple[Outcome, ...] = get_args(Outcome)


@dataclass(frozen=True, slots=True)
class Metric:
    """A number with its uncertainty.

    Attributes:
        name: What was measured, e.g. `delta_aqi`.
        estimate: The value, in `unit`.
        low: Lower end of its interval; None if it has none.
        high: Upper end of its interval; None if it has none.
        unit: `points`, `%`, `tokens/s`, `s`, ...
        n: Independent units behind it (items, steps, rounds); None if it is not a sample.
        method: How the interval was made, e.g. `Tango paired score 95%`.
        subject: The arm or model that it describes; empty for a comparison of all.
        fixed: How much of its half-width a larger n does not narrow (see `Interval.widened`).
    """

    name: str
    estimate: float
    low: float | None = None
    high: float | None = None
    unit: str = ""
    n: int | None = None
    method: str = ""
    subject: str = ""
    fixed: float = 0.0

    def __post_init__(self) -> None:
        # NumPy's numbers pass for Python's until something (xdist, SQLite) has to send them elsewhere.
        object.__setattr__(self, "estimate", float(self.estimate))
        for name in ("low", "high"):
            value = getattr(self, name)
            object.__setattr__(self, name, None if value is None else float(value))
        object.__setattr__(self, "n", None if self.n is None else int(self.n))

    def __str__(self) -> str:
        text = f"{_short(self.estimate)}{_suffix(self.unit)}"
        if self.low is not None and self.high is not None:
            text += f" [{_short(self.low)}, {_short(self.high)}]"
        return f"{text} (n = {self.n})" if self.n is not None else text


def _short(value: float) -> str:
    return f"{value:.4g}" if math.isfinite(value) and (abs(value) < 0.1 or abs(value) >= 1e4) else f"{value:.2f}"


def _suffix(unit: str) -> str:
    return unit if unit in ("", "%") else f" {unit}"


@dataclass(frozen=True, slots=True)
class Judgement:
    """What the evidence says about a claim.

    Attributes:
        verdict: One of `OUTCOMES`.
        summary: One line that a person can read without the rest.
        metrics: The numbers it rests on, the decisive one first.
        evidence: JSON values that the report shows when the claim is opened.
        needed: For `inconclusive`: the sample size that would decide it, where that can be said.
    """

    verdict: Outcome
    summary: str
    metrics: tuple[Metric, ...] = ()
    evidence: Mapping[str, Any] = field(default_factory=dict)
    needed: int | None = None

    def to_dict(self) -> dict[str, Any]:
        """JSON values; `from_dict` reads them back."""
        return {**asdict(self), "metrics": [asdict(metric) for metric in self.metrics]}

    @classmethod
    def from_dict(cls, value: Mapping[str, Any]) -> Judgement:
        """The judgement that `to_dict` wrote."""
        return cls(**{**value, "metrics": tuple(Metric(**metric) for metric in value["metrics"])})


def supported_if(holds: bool) -> Outcome:
    """`supported` or `refuted`."""
    return "supported" if holds else "refuted"


def decide_at_least(metric: Metric, bound: float, what: str, *, strictly: bool = False) -> Judgement:
    """Supported if the whole interval lies at or above `bound`, refuted if it lies below, else inconclusive.

    Args:
        metric: The measured number; without an interval its estimate alone decides.
        bound: In the metric's unit.
        what: Subject of the summary, e.g. `delta_AQI of pure`.
        strictly: `bound` itself does not suffice.
    """
    low = metric.estimate if metric.low is None else metric.low
    high = metric.estimate if metric.high is None else metric.high
    if any(math.isnan(value) for value in (metric.estimate, low, high)):
        return Judgement("not exercised", f"{what} was not measured (not a number)", (metric,))
    wanted = f"{'more than' if strictly else 'at least'} {bound:g}{_suffix(metric.unit)}"
    if low > bound or (low == bound and not strictly):
        return Judgement("supported", f"{what} is {metric}; asked for {wanted}", (metric,))
    if high < bound or (high == bound and strictly):
        return Judgement("refuted", f"{what} is {metric}; asked for {wanted}", (metric,))
    needed = items_to_decide(metric, bound)
    hint = f"about {needed} would decide" if needed else "no sample size can be named: the estimate is at the bound"
    if not needed and metric.fixed:
        hint = f"no sample size decides it: the server may have moved it by {metric.fixed:.2g}; ask more answers again"
    return Judgement("inconclusive", f"{what} is {metric}; asked for {wanted}; {hint}", (metric,), needed=needed)


def items_to_decide(metric: Metric, bound: float) -> int | None:
    """Sample size at which the interval would exclude `bound`, if the estimate stays: its width falls as 1/sqrt(n),
    but for what is fixed."""
    if metric.n is None or metric.low is None or metric.high is None or metric.estimate == bound:
        return None
    reach = metric.estimate - metric.low if metric.estimate > bound else metric.high - metric.estimate
    reach, distance = reach - metric.fixed, abs(metric.estimate - bound) - metric.fixed
    # A million times the width: no sample that anybody would take.
    if distance <= 0 or not reach < 1e6 * distance:
        return None
    return max(metric.n + 1, math.ceil(metric.n * (reach / distance) ** 2))
