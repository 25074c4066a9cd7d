"""What only a GPU can show: Unsloth's fused kernels instrumented, and what that costs in time and memory."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from typing import Any

from grit_impl.cost.bench import ENOUGH_RATIOS
from grit_impl.cost.measure import LENGTHS
from grit_impl.statistics.decision import Judgement, Metric, items_to_decide, supported_if
from grit_impl.verify.claims.base import Claim, Evidence

STEP_TIME, PEAK_MEMORY = 1.05, 1.02
"""What the plan allows GRIT to cost, against steps that differ in GRIT alone."""
SHORT, PLANNED = LENGTHS
"""Tokens per sequence: a quarter of the plan's, where on a fast card the host sets the pace, and the plan's."""


def all_layers(arm: str) -> Callable[[Evidence], Judgement]:
    """Supported if every LoRA layer's factors were ready at the last inversion."""

    def decide(evidence: Evidence) -> Judgement:
        run = evidence.records[arm].run
        report = run["grit_report"]
        error = report["completeness_error"]
        ready, layers = report["statuses"].get("ready", 0), len(report["layers"])
        numbers = (
            Metric("layers_with_statistics", ready, n=layers, subject=arm),
            Metric("completeness_error", math.nan if error is None else error, subject=arm),
        )
        where = _where(run, bool(run.get("unsloth")))
        text = f"{ready} of {layers} layers have statistics{where}"
        if error is None:
            return Judgement("inconclusive", f"{text}; they were never compared with the gradients", numbers)
        # GRIT itself stops a run whose error exceeds its tolerance.
        return Judgement(supported_if(ready == layers), f"{text}; completeness error {error:.4f}", numbers)

    return decide


def _where(found: Mapping[str, Any], unsloth: bool) -> str:
    """Whether Unsloth compiled decoder layers, and how many, which nobody would see otherwise."""
    layers = found.get("compiled_layers")
    if layers is None or not unsloth:
        return ""
    return f", in {layers} compiled decoder layers" if layers else ", in decoder layers that Unsloth did not compile"


def used_unsloth(evidence: Evidence) -> Judgement:
    """Supported if the hybrid and its baseline ran on Unsloth, and pure in a process without it."""
    used = {arm: bool(evidence.records[arm].run["unsloth"]) for arm in ("baseline", "hybrid", "pure")}
    wanted = {"baseline": True, "hybrid": True, "pure": False}
    wrong = [arm for arm in wanted if used[arm] != wanted[arm]]
    return Judgement(supported_if(not wrong), f"on Unsloth: {', '.join(a for a, u in used.items() if u) or 'none'}")


def step_time(stack: str, length: int) -> Callable[[Evidence], Judgement]:
    """Supported if a step with GRIT takes at most `STEP_TIME` times one without, at so many tokens per sequence."""

    def decide(evidence: Evidence) -> Judgement:
        from grit_impl.cost.bench import spread

        cell = next((cell for cell in evidence.costs[stack]["cells"] if cell["length"] == length), None)
        if cell is None:
            return Judgement("inconclusive", f"{length} tokens per sequence were not measured on {stack}")
        found = spread(cell["step_ratios"])
        number = Metric(
            "step_time_ratio",
            found.median,
            found.low,
            found.high,
            unit="x",
            n=found.n,
            method="median of the ratios of steps in turn, order statistics",
            subject=f"{stack}, {length} tokens",
        )
        where = _where(cell, stack == "unsloth")
        text = f"a step with GRIT takes {number} of one without{where}; at most {STEP_TIME:g} x was asked for"
        if found.n < ENOUGH_RATIOS:
            return Judgement("inconclusive", text, (number,), needed=ENOUGH_RATIOS)
        if found.low <= STEP_TIME < found.high:
            # At the bound itself no number of ratios decides.
            return Judgement("inconclusive", text, (number,), needed=items_to_decide(number, STEP_TIME))
        return Judgement(supported_if(found.high <= STEP_TIME), text, (number,))

    return decide


def memory(stack: str) -> Callable[[Evidence], Judgement]:
    """Supported if the peak of allocated memory with GRIT is at most `PEAK_MEMORY` times the peak without."""

    def decide(evidence: Evidence) -> Judgement:
        numbers, said, cells = [], [], evidence.costs[stack]["cells"]
        for cell in cells:
            mine, theirs = cell["grit_peak_bytes"], cell["plain_peak_bytes"]
            if not theirs:
                return Judgement("inconclusive", f"no GPU memory was measured on {stack}")
            subject = f"{stack}, {cell['length']} tokens"
            numbers.append(Metric("peak_memory_ratio", mine / theirs, unit="x", subject=subject))
            said.append(f"{mine / 2**30:.2f} GiB for {theirs / 2**30:.2f} ({cell['length']} tokens)")
        text = f"with GRIT the peak is {', '.join(said)}; at most {PEAK_MEMORY:g} x was asked for"
        if any(number.estimate > PEAK_MEMORY for number in numbers):
            return Judgement("refuted", text, tuple(numbers))
        if lacking := sorted(set(LENGTHS) - {cell["length"] for cell in cells}):
            tokens = " and ".join(map(str, lacking))
            return Judgement(
                "inconclusive", f"{tokens} tokens per sequence were not measured on {stack}", tuple(numbers)
            )
        return Judgement("supported", text, tuple(numbers))

    return decide


def run_memory(arm: str, against: str) -> Callable[[Evidence], Judgement]:
    """Supported if the peak of a whole run, checkpoints included, is at most `PEAK_MEMORY` times that of another."""

    def decide(evidence: Evidence) -> Judgement:
        records = [evidence.records[name] for name in (arm, against)]
        for record in records:
            training = record.run["config"]["training"]
            if not record.run["machine"].get("gpu"):
                return Judgement("inconclusive", f"{record.arm} was trained without a GPU")
            if not 0 < training["save_every"] <= training["steps"]:
                return Judgement("inconclusive", f"{record.arm} took no checkpoint while it was trained")
            if not record.peak_memory_bytes:
                return Judgement("inconclusive", f"{record.arm}'s record has no peak memory")
        if len({record.run.get("compiled_layers") or 0 for record in records}) > 1:
            # Unsloth goes on with the stock forward where compiling fails: the runs differ in more than GRIT.
            counts = " and ".join(f"{record.run.get('compiled_layers') or 0} in {record.arm}" for record in records)
            return Judgement("inconclusive", f"Unsloth ran {counts} of the decoder layers compiled")
        mine, theirs = (float(record.peak_memory_bytes or 0) for record in records)
        ratio = Metric("run_peak_memory_ratio", mine / theirs, unit="x", subject=arm)
        text = f"{mine / 2**30:.2f} GiB for {theirs / 2**30:.2f} ({ratio.estimate:.4f} x)"
        text = f"the peak of the whole run is {text}; at most {PEAK_MEMORY:g} x was asked for"
        return Judgement(supported_if(ratio.estimate <= PEAK_MEMORY), text, (ratio,))

    return decide


def caught(arm: str, cause: str) -> Callable[[Evidence], Judgement]:
    """Supported if the ledger names this cause."""

    def decide(evidence: Evidence) -> Judgement:
        verdict = evidence.verdicts[arm]
        return Judgement(supported_if(verdict.cause == cause), f"{verdict.cause}: {verdict.summary}")

    return decide


_COST = (
    "Statistics of r numbers per token are small beside a layer; steps with and without GRIT took turns in one process."
)

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
    Claim(
        "gpu.hybrid-run-memory",
        f"A whole run of hybrid GRIT, checkpoints included, peaks at most at {PEAK_MEMORY:g} times the memory of its "
        "baseline's.",
        ("record:hybrid", "record:baseline"),
        "What is done now and then, and in no step that is measured, may need more than any step.",
        run_memory("hybrid", "baseline"),
    ),
    *(
        claim
        for arm, stack, against in (("hybrid", "unsloth", "Unsloth's LoRA"), ("pure", "peft", "plain peft's LoRA"))
        for claim in (
            *(
                Claim(
                    name,
                    f"A step of {arm} GRIT on {length} tokens per sequence takes at most {STEP_TIME:g} times a step of "
                    f"{against}.",
                    (f"cost:{stack}",),
                    _COST,
                    step_time(stack, length),
                )
                for name, length in ((f"gpu.{arm}-step-time", PLANNED), (f"gpu.{arm}-step-time-short", SHORT))
            ),
            Claim(
                f"gpu.{arm}-memory",
                f"{arm.capitalize()} GRIT needs at most {PEAK_MEMORY:g} times the peak memory of {against}.",
                (f"cost:{stack}",),
                _COST,
                memory(stack),
            ),
        )
    ),
)
