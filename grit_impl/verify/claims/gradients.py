"""Did the optimizer consume the preconditioned gradient, and did it matter? The ledger's verdicts, arm by arm."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import asdict

from grit_impl.statistics.decision import Judgement, Metric, Outcome, supported_if
from grit_impl.verify.claims.base import Claim, Evidence

LATE = "modified-too-late"
UNTOUCHED = "no-modifier"
PARTLY_SEEN = "partly-seen"

_PROVENANCE = (
    "Identical loss curves show neither that gradients reached the optimizer nor that they did not; only their "
    "provenance does: the ledger keeps each LoRA gradient after backward, after preconditioning and at the entry of "
    "optimizer.step, and replays the update."
)


def effective(arm: str) -> Callable[[Evidence], Judgement]:
    """Supported if the ledger found that the modified gradient was consumed and changed the update."""

    def decide(evidence: Evidence) -> Judgement:
        verdict = evidence.verdicts[arm]
        outcome = "inconclusive" if verdict.effective is None else supported_if(verdict.effective)
        return _judgement(evidence, arm, outcome)

    return decide


def caused_by(arm: str, cause: str) -> Callable[[Evidence], Judgement]:
    """Supported if the ledger names exactly this cause."""

    def decide(evidence: Evidence) -> Judgement:
        found = evidence.verdicts[arm].cause
        return _judgement(evidence, arm, "inconclusive" if found == PARTLY_SEEN else supported_if(found == cause))

    return decide


def moment_reaches(arm: str) -> Callable[[Evidence], Judgement]:
    """Supported if the probe that the arm ran first found nothing that a preconditioning callback cannot rely on."""

    def decide(evidence: Evidence) -> Judgement:
        from grit_impl.probe.findings import FILE, Probe

        path = evidence.records[arm].path / FILE
        if not path.is_file():
            return Judgement("inconclusive", f"{path} is missing: the run is older than the probe")
        probe = Probe.read(path)
        wrong = [f"{check.name}: {check.found}" for check in probe.checks if not check.good]
        found = "; ".join(wrong) or "; ".join(check.found for check in probe.checks)
        text = f"{probe.stack} with {probe.optimizer}: {found}"
        return Judgement(supported_if(not wrong), text, evidence={"probe": [asdict(event) for event in probe.events]})

    return decide


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


CLAIMS = (
    Claim(
        "gradients.baseline-unmodified",
        "Plain LoRA's gradients reach the optimizer as backward left them.",
        ("verdict:baseline",),
        "The control: a ledger that sees a modifier where there is none proves nothing elsewhere.",
        caused_by("baseline", UNTOUCHED),
    ),
    Claim(
        "gradients.pure-effective",
        "GRITTrainer's preconditioned gradients are what the optimizer steps with, and they change its updates.",
        ("verdict:pure",),
        _PROVENANCE,
        effective("pure"),
    ),
    Claim(
        "gradients.moment-reaches-optimizer",
        "What a callback writes into the gradients in on_pre_optimizer_step enters the optimizer bit for bit.",
        ("record:hybrid",),
        "The seed experiment concluded that its trainer discarded modified gradients. The probe that every hybrid run "
        "starts with rewrites them on a small model, with the same libraries and the same optimizer.",
        moment_reaches("hybrid"),
    ),
    Claim(
        "gradients.hybrid-effective",
        "The callback, at the right moment, changes what the optimizer steps with.",
        ("verdict:hybrid",),
        _PROVENANCE,
        effective("hybrid"),
    ),
    Claim(
        "gradients.hybrid-late-caught",
        "A callback that preconditions after the step is caught as modified too late.",
        ("verdict:hybrid_late",),
        "The seed experiment's mistake, planted on purpose: transformers fires on_optimizer_step after the parameters "
        "have moved. A suite that does not catch it would have believed the experiment.",
        caused_by("hybrid_late", LATE),
    ),
    Claim(
        "gradients.trainer-effective",
        "This trainer's modified gradients are what its optimizer steps with, and they change its updates.",
        ("verdict:trainer",),
        "For trainers outside this project: give `judge` a gradient ledger. " + _PROVENANCE,
        effective("trainer"),
    ),
)
