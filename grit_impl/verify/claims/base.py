"""A claim is a small declaration; judging it on evidence gives one of four verdicts.

Two values are not enough: an underpowered measurement must not look like a pass, nor a missing GPU like a success.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Mapping
from dataclasses import asdict, dataclass, field
from typing import TYPE_CHECKING, Any, Literal, Protocol, get_args

from grit_impl.errors import GRITError
from grit_impl.verify.options import Options

if TYPE_CHECKING:
    from grit_impl.record import RunRecord

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
    """

    name: str
    estimate: float
    low: float | None = None
    high: float | None = None
    unit: str = ""
    n: int | None = None
    method: str = ""
    subject: str = ""

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


class GradientVerdict(Protocol):
    """What a claim reads of the ledger's verdict."""

    @property
    def cause(self) -> str: ...
    @property
    def effective(self) -> bool | None: ...
    @property
    def summary(self) -> str: ...
    @property
    def numbers(self) -> Mapping[str, Any]: ...


@dataclass(frozen=True, slots=True)
class SeedEvidence:
    """What one training seed gave: run records by arm, and the evaluation of their models."""

    records: Mapping[str, RunRecord]
    evaluation: Any


@dataclass
class Evidence:
    """Everything that claims are judged on.

    Attributes:
        options: Thresholds and what was asked for.
        records: Run records by arm.
        verdicts: The ledger's verdict by arm.
        exports: Exported models by model name (`base` and the arms): `path`, `sha256` and what else the export noted.
        evaluation: The evaluation of all models, or None.
        costs: By stack (`unsloth`, `peft`): what GRIT costs there, by steps that took turns; see verify/cost_run.py.
        seeds: By training seed, the first one included, if more than one was asked for and all are there; else empty.
        missing: For a requirement (`verdict:pure`), an arm, or `evaluation`: why it is not here.
        failed: The same for what was tried and broke: a claim that needs it fails its test, whatever it gates.
    """

    options: Options = field(default_factory=Options)
    records: Mapping[str, RunRecord] = field(default_factory=dict)
    verdicts: Mapping[str, GradientVerdict] = field(default_factory=dict)
    exports: Mapping[str, Mapping[str, Any]] = field(default_factory=dict)
    evaluation: Any = None
    costs: Mapping[str, Mapping[str, Any]] = field(default_factory=dict)
    seeds: Mapping[int, SeedEvidence] = field(default_factory=dict)
    missing: Mapping[str, str] = field(default_factory=dict)
    failed: Mapping[str, str] = field(default_factory=dict)

    def gather(self, requires: Iterable[str]) -> Evidence:
        """The evidence for these requirements. Here: itself; a live source trains and evaluates first."""
        return self

    def lacks(self, requirement: str) -> str | None:
        """Why a requirement is not met, or None if it is.

        Args:
            requirement: `record:ARM`, `verdict:ARM`, `export:MODEL`, `evaluation:MODEL`, `cost:STACK`, or `seeds:ARM`,
                which asks for something only where more than one seed was asked for.
        """
        kind, _, name = requirement.partition(":")
        found: Iterable[str]
        match kind:
            case "record":
                found = self.records
            case "verdict":
                found = self.verdicts
            case "export":
                found = self.exports
            case "evaluation":
                found = () if self.evaluation is None else self.evaluation.models
            case "cost":
                found = self.costs
            case "seeds":
                found = (
                    {name} if self.options.seeds == 1 else {arm for each in self.seeds.values() for arm in each.records}
                )
            case _:
                kinds = ", ".join(_NAMES)
                raise GRITError(f"unknown requirement {requirement!r}: use one of {kinds}")
        if name in found:
            return None
        reason = self._reason(self.failed, requirement) or self._reason(self.missing, requirement)
        have = ", ".join(sorted(found)) or "none"
        return f"needs {_NAMES[kind]} of {name!r}: {reason or f'found {have}'}"

    def broke(self, requirement: str) -> bool:
        """Whether a requirement is not met because making it failed."""
        return self._reason(self.failed, requirement) is not None

    @staticmethod
    def _reason(reasons: Mapping[str, str], requirement: str) -> str | None:
        kind, _, name = requirement.partition(":")
        return next((reasons[key] for key in (requirement, name, kind) if key in reasons), None)


_NAMES = {
    "record": "the run",
    "verdict": "the gradient ledger",
    "export": "the GGUF export",
    "evaluation": "the evaluation",
    "cost": "the step times and memory",
    "seeds": "the runs with every seed",
}


@dataclass(frozen=True, slots=True)
class Claim:
    """A statement that evidence can support or refute.

    Attributes:
        id: `family.name`, lower case; the family is the suite's folder.
        statement: One sentence that is either true or false.
        requires: What must be there, e.g. `("verdict:pure",)`; without it the claim is not exercised.
        rationale: Why it is worth knowing, and why it is decided like this.
        decide: Judges the evidence, once the requirements are met.
        gates: Whether it must hold (correctness), or is a hypothesis that is only reported.
    """

    id: str
    statement: str
    requires: tuple[str, ...]
    rationale: str
    decide: Callable[[Evidence], Judgement]
    gates: bool = True

    @property
    def family(self) -> str:
        """The part of the id before the first point."""
        return self.id.partition(".")[0]

    def judge(self, evidence: Evidence) -> Judgement:
        """The verdict on this evidence; `not exercised`, with the reason, where a requirement is not met."""
        reasons = [reason for requirement in self.requires if (reason := evidence.lacks(requirement))]
        if reasons:
            broken = [requirement for requirement in self.requires if evidence.broke(requirement)]
            return Judgement("not exercised", "; ".join(dict.fromkeys(reasons)), evidence={"broken": broken})
        return self.decide(evidence)


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
    return Judgement("inconclusive", f"{what} is {metric}; asked for {wanted}; {hint}", (metric,), needed=needed)


def items_to_decide(metric: Metric, bound: float) -> int | None:
    """Sample size at which the interval would exclude `bound`, if the estimate stays: its width falls as 1/sqrt(n)."""
    if metric.n is None or metric.low is None or metric.high is None or metric.estimate == bound:
        return None
    reach = metric.estimate - metric.low if metric.estimate > bound else metric.high - metric.estimate
    distance = abs(metric.estimate - bound)
    # A million times the width: no sample that anybody would take.
    if not reach < 1e6 * distance:
        return None
    return max(metric.n + 1, math.ceil(metric.n * (reach / distance) ** 2))
