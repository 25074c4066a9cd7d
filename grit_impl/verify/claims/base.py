"""Evidence, and claims that are judged on it. What a claim needs and does not find leaves it "not exercised"."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, Protocol

from grit_impl.errors import GRITError
from grit_impl.statistics.decision import Judgement
from grit_impl.verify.options import Options

if TYPE_CHECKING:
    from grit_impl.record import RunRecord


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
        costs: By stack (`unsloth`, `peft`): what GRIT costs there, by steps that took turns; see cost/measure.py.
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
