"""What only a GPU can show: Unsloth's fused kernels instrumented, and what that costs in time and memory."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

from grit_impl.cost.bench import ENOUGH_RATIOS
from grit_impl.cost.measure import LENGTHS
from grit_impl.statistics.decision import Judgement, Metric, items_to_decide, supported_if
from grit_impl.verify.claims.base import Evidence
from grit_impl.verify.claims.registry import claim

STEP_TIME, PEAK_MEMORY = 1.05, 1.02
"""What the plan allows GRIT to cost, against steps that differ in GRIT alone."""
SHORT, PLANNED = LENGTHS
"""Tokens per sequence: a quarter of the plan's, where on a fast card the host sets the pace, and the plan's."""
STACKS: dict[str, Any] = {
    "arm": ("hybrid", "pure"),
    "stack": ("unsloth", "peft"),
    "against": ("Unsloth's LoRA", "plain peft's LoRA"),
}
COST = (
    "Statistics of r numbers per token are small beside a layer; steps with and without GRIT took turns in one process."
)


@claim("gpu.unsloth-where-it-belongs", needs=["record:baseline", "record:hybrid", "record:pure"])
def used_unsloth(evidence: Evidence) -> Judgement:
    """Baseline and hybrid run on Unsloth; pure runs without it in its process.

    Otherwise the comparison says nothing about Unsloth.
    """
    used = {arm: bool(evidence.records[arm].run["unsloth"]) for arm in ("baseline", "hybrid", "pure")}
    wanted = {"baseline": True, "hybrid": True, "pure": False}
    wrong = [arm for arm in wanted if used[arm] != wanted[arm]]
    return Judgement(supported_if(not wrong), f"on Unsloth: {', '.join(a for a, u in used.items() if u) or 'none'}")


@claim("gpu.{arm}-all-layers", needs=["record:{arm}"], arm=["hybrid", "pure"])
def all_layers(evidence: Evidence, arm: str) -> Judgement:
    """Every LoRA layer of {arm} GRIT has Fisher statistics that add up to its gradients.

    Fused kernels bypass the modules; a layer without statistics is silently not preconditioned.
    """
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


def _where(found: Mapping[str, Any], unsloth: bool) -> str:
    """Whether Unsloth compiled decoder layers, and how many, which nobody would see otherwise."""
    layers = found.get("compiled_layers")
    if layers is None or not unsloth:
        return ""
    return f", in {layers} compiled decoder layers" if layers else ", in decoder layers that Unsloth did not compile"


@claim("gpu.starved-caught", needs=["verdict:hybrid_starved"])
def starved_caught(evidence: Evidence) -> Judgement:
    """Statistics from module hooks starve under Unsloth's fused kernels, and the ledger says so.

    This is what the seed experiment ran, whose log said 'preconditioning applied'.
    """
    verdict = evidence.verdicts["hybrid_starved"]
    return Judgement(supported_if(verdict.cause == "starved"), f"{verdict.cause}: {verdict.summary}")


@claim("gpu.hybrid-run-memory", needs=["record:hybrid", "record:baseline"])
def run_memory(evidence: Evidence) -> Judgement:
    """A whole run of hybrid GRIT, checkpoints included, peaks at most at {PEAK_MEMORY:g} times the memory of its
    baseline's.

    What is done now and then, and in no step that is measured, may need more than any step.
    """
    records = [evidence.records[name] for name in ("hybrid", "baseline")]
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
    ratio = Metric("run_peak_memory_ratio", mine / theirs, unit="x", subject="hybrid")
    text = f"{mine / 2**30:.2f} GiB for {theirs / 2**30:.2f} ({ratio.estimate:.4f} x)"
    text = f"the peak of the whole run is {text}; at most {PEAK_MEMORY:g} x was asked for"
    return Judgement(supported_if(ratio.estimate <= PEAK_MEMORY), text, (ratio,))


@claim("gpu.{arm}-step-time", needs=["cost:{stack}"], **STACKS)
def step_time(evidence: Evidence, stack: str) -> Judgement:
    """A step of {arm} GRIT on {PLANNED} tokens per sequence takes at most {STEP_TIME:g} times a step of {against}.

    {COST}
    """
    return _step_time(evidence, stack, PLANNED)


@claim("gpu.{arm}-step-time-short", needs=["cost:{stack}"], **STACKS)
def short_step_time(evidence: Evidence, stack: str) -> Judgement:
    """A step of {arm} GRIT on {SHORT} tokens per sequence takes at most {STEP_TIME:g} times a step of {against}.

    {COST}
    """
    return _step_time(evidence, stack, SHORT)


def _step_time(evidence: Evidence, stack: str, length: int) -> Judgement:
    """Supported if a step with GRIT takes at most `STEP_TIME` times one without, at so many tokens per sequence."""
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


@claim("gpu.{arm}-memory", needs=["cost:{stack}"], **STACKS)
def memory(evidence: Evidence, stack: str) -> Judgement:
    """{arm} GRIT needs at most {PEAK_MEMORY:g} times the peak memory of {against}.

    {COST}
    """
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
        return Judgement("inconclusive", f"{tokens} tokens per sequence were not measured on {stack}", tuple(numbers))
    return Judgement("supported", text, tuple(numbers))
