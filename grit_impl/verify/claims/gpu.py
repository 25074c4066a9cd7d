"""What only a GPU can show: Unsloth's fused kernels instrumented, and what that costs in time and memory."""

from __future__ import annotations

import math
from collections.abc import Callable

from grit_impl.verify.claims.base import Claim, Evidence, Judgement, Metric, supported_if
from grit_impl.verify.claims.training import overhead

STEP_TIME, PEAK_MEMORY = 1.05, 1.02
"""What the plan allows GRIT to cost, against the arm that differs from it in GRIT alone."""


def all_layers(arm: str) -> Callable[[Evidence], Judgement]:
    """Supported if every LoRA layer's factors were ready at the last inversion."""

    def decide(evidence: Evidence) -> Judgement:
        report = evidence.records[arm].run["grit_report"]
        error = report["completeness_error"]
        ready, layers = report["statuses"].get("ready", 0), len(report["layers"])
        numbers = (
            Metric("layers_with_statistics", ready, n=layers, subject=arm),
            Metric("completeness_error", math.nan if error is None else error, subject=arm),
        )
        text = f"{ready} of {layers} layers have statistics"
        if error is None:
            return Judgement("inconclusive", f"{text}; they were never compared with the gradients", numbers)
        # GRIT itself stops a run whose error exceeds its tolerance.
        return Judgement(supported_if(ready == layers), f"{text}; completeness error {error:.4f}", numbers)

    return decide


def used_unsloth(evidence: Evidence) -> Judgement:
    """Supported if the hybrid and its baseline ran on Unsloth, and pure in a process without it."""
    used = {arm: bool(evidence.records[arm].run["unsloth"]) for arm in ("baseline", "hybrid", "pure")}
    wanted = {"baseline": True, "hybrid": True, "pure": False}
    wrong = [arm for arm in wanted if used[arm] != wanted[arm]]
    return Judgement(supported_if(not wrong), f"on Unsloth: {', '.join(a for a, u in used.items() if u) or 'none'}")


def memory(arm: str, against: str) -> Callable[[Evidence], Judgement]:
    """Supported if the arm's peak of allocated memory is at most `PEAK_MEMORY` times the other's."""

    def decide(evidence: Evidence) -> Judgement:
        mine, theirs = (evidence.records[name].run["peak_memory_bytes"] for name in (arm, against))
        ratio = Metric("peak_memory_ratio", mine / theirs, unit="x", subject=f"{arm} / {against}")
        text = f"{arm} peaks at {mine / 2**30:.2f} GiB, {ratio} of {against}'s; at most {PEAK_MEMORY:g} x was asked for"
        return Judgement(supported_if(ratio.estimate <= PEAK_MEMORY), text, (ratio,))

    return decide


def caught(arm: str, cause: str) -> Callable[[Evidence], Judgement]:
    """Supported if the ledger names this cause."""

    def decide(evidence: Evidence) -> Judgement:
        verdict = evidence.verdicts[arm]
        return Judgement(supported_if(verdict.cause == cause), f"{verdict.cause}: {verdict.summary}")

    return decide


_COST = "Statistics of r numbers per token are small beside a layer; both arms ran one after the other on one card."

CLAIMS = (
    Claim(
        "gpu.unsloth-where-it-belongs",
        "Baseline and hybrid run on Unsloth; pure runs without it in its process.",
        ("record:baseline", "record:hybrid", "record:pure"),
        "Otherwise the comparison says nothing about Unsloth.",
        used_unsloth,
    ),
    *(
        Claim(
            f"gpu.{arm}-all-layers",
            f"Every LoRA layer of {arm} GRIT has Fisher statistics that add up to its gradients.",
            (f"record:{arm}",),
            "Fused kernels bypass the modules; a layer without statistics is silently not preconditioned.",
            all_layers(arm),
        )
        for arm in ("hybrid", "pure")
    ),
    Claim(
        "gpu.starved-caught",
        "Statistics from module hooks starve under Unsloth's fused kernels, and the ledger says so.",
        ("verdict:hybrid_starved",),
        "This is what the seed experiment ran, whose log said 'preconditioning applied'.",
        caught("hybrid_starved", "starved"),
    ),
    *(
        claim
        for arm, against in (("hybrid", "baseline"), ("pure", "baseline_peft"))
        for claim in (
            Claim(
                f"gpu.{arm}-step-time",
                f"A step of {arm} GRIT takes at most {STEP_TIME:g} times a step of {against}.",
                (f"record:{arm}", f"record:{against}"),
                _COST,
                overhead(arm, against, STEP_TIME),
            ),
            Claim(
                f"gpu.{arm}-memory",
                f"{arm.capitalize()} GRIT needs at most {PEAK_MEMORY:g} times the peak memory of {against}.",
                (f"record:{arm}", f"record:{against}"),
                _COST,
                memory(arm, against),
            ),
        )
    ),
)
