"""Did the optimizer consume the preconditioned gradient, and did it matter? The ledger's verdicts, arm by arm."""

from __future__ import annotations

import math
from dataclasses import asdict

from grit_impl.statistics.decision import Judgement, Metric, Outcome, supported_if
from grit_impl.verify.claims.base import Evidence
from grit_impl.verify.claims.registry import claim

LATE = "modified-too-late"
UNTOUCHED = "no-modifier"
PARTLY_SEEN = "partly-seen"

PROVENANCE = (
    "Identical loss curves show neither that gradients reached the optimizer nor that they did not; only their "
    "provenance does: the ledger keeps each LoRA gradient after backward, after preconditioning and at the entry of "
    "optimizer.step, and replays the update."
)


@claim("gradients.baseline-unmodified", needs=["verdict:baseline"])
def unmodified(evidence: Evidence) -> Judgement:
    """Plain LoRA's gradients reach the optimizer as backward left them.

    The control: a ledger that sees a modifier where there is none proves nothing elsewhere.
    """
    return _caused_by(evidence, "baseline", UNTOUCHED)


@claim("gradients.pure-effective", needs=["verdict:pure"])
def pure_effective(evidence: Evidence) -> Judgement:
    """GRITTrainer's preconditioned gradients are what the optimizer steps with, and they change its updates.

    {PROVENANCE}
    """
    return _effective(evidence, "pure")


@claim("gradients.moment-reaches-optimizer", needs=["record:hybrid"])
def moment_reaches(evidence: Evidence) -> Judgement:
    """What a callback writes into the gradients in on_pre_optimizer_step enters the optimizer bit for bit.

    The seed experiment concluded that its trainer discarded modified gradients. The probe that every hybrid run starts
    with rewrites them on a small model, with the same libraries and the same optimizer.
    """
    from grit_impl.probe.findings import FILE, ProbeReport

    path = evidence.records["hybrid"].path / FILE
    if not path.is_file():
        return Judgement("inconclusive", f"{path} is missing: the run is older than the probe")
    probe = ProbeReport.read(path)
    wrong = [f"{check.name}: {check.found}" for check in probe.checks if not check.good]
    found = "; ".join(wrong) or "; ".join(check.found for check in probe.checks)
    text = f"{probe.stack} with {probe.optimizer}: {found}"
    return Judgement(supported_if(not wrong), text, evidence={"probe": [asdict(event) for event in probe.events]})


@claim("gradients.hybrid-effective", needs=["verdict:hybrid"])
def hybrid_effective(evidence: Evidence) -> Judgement:
    """The callback, at the right moment, changes what the optimizer steps with.

    {PROVENANCE}
    """
    return _effective(evidence, "hybrid")


@claim("gradients.hybrid-late-caught", needs=["verdict:hybrid_late"])
def late_caught(evidence: Evidence) -> Judgement:
    """A callback that preconditions after the step is caught as modified too late.

    The seed experiment's mistake, planted on purpose: transformers fires on_optimizer_step after the parameters have
    moved. A suite that does not catch it would have believed the experiment.
    """
    return _caused_by(evidence, "hybrid_late", LATE)


@claim("gradients.recommended-effective", needs=["verdict:recommended"], gates=False)
def recommended_effective(evidence: Evidence) -> Judgement:
    """The preset recommended changes what the optimizer steps with.

    Its rule computes the whole step, in AdamW's place. Not gated: the arm is there where the preset was tuned on the
    base.
    """
    return _effective(evidence, "recommended")


@claim("gradients.trainer-effective", needs=["verdict:trainer"])
def trainer_effective(evidence: Evidence) -> Judgement:
    """This trainer's modified gradients are what its optimizer steps with, and they change its updates.

    For trainers outside this project: give `judge` a gradient ledger. {PROVENANCE}
    """
    return _effective(evidence, "trainer")


def _effective(evidence: Evidence, arm: str) -> Judgement:
    """Supported if the ledger found that the modified gradient was consumed and changed the update."""
    verdict = evidence.verdicts[arm]
    outcome = "inconclusive" if verdict.effective is None else supported_if(verdict.effective)
    return _judgement(evidence, arm, outcome)


def _caused_by(evidence: Evidence, arm: str, cause: str) -> Judgement:
    """Supported if the ledger names exactly this cause."""
    found = evidence.verdicts[arm].cause
    return _judgement(evidence, arm, "inconclusive" if found == PARTLY_SEEN else supported_if(found == cause))


def _judgement(evidence: Evidence, arm: str, outcome: Outcome) -> Judgement:
    verdict = evidence.verdicts[arm]
    metrics = tuple(
        Metric(name, float(value), subject=arm)
        for name, value in verdict.numbers.items()
        if isinstance(value, int | float) and not isinstance(value, bool) and not math.isnan(value)
    )
    numbers = {name: value for name, value in verdict.numbers.items() if isinstance(value, int | float | str)}
    shown = {"cause": verdict.cause, "effective": verdict.effective, "numbers": numbers}
    return Judgement(outcome, f"{verdict.cause}: {verdict.summary}", metrics, shown)
