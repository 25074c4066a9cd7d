"""What one would like to know of GRIT: reported with intervals, gated only on request."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import replace
from typing import TYPE_CHECKING, Any

from grit_impl.statistics.decision import Judgement, Metric, decide_at_least
from grit_impl.verify.claims.base import Evidence
from grit_impl.verify.claims.measures import detectable, over_seeds, paired_difference, seed_metrics, unanswered
from grit_impl.verify.claims.registry import claim

if TYPE_CHECKING:
    from grit_impl.evaluate.seeds import SeedEffect

EQUIVALENT = 5.0
"""Points of AQI accuracy within which two ways of applying GRIT count as the same."""
SEEDS = "With one seed the interval covers test items, not training runs; with --seeds it covers training runs."
PURE_AND_LORA = ("evaluation:baseline", "evaluation:pure", "seeds:baseline", "seeds:pure")
ONE_SEED = "one seed: these models, not the method"


@claim("hypotheses.pure-beats-lora", needs=PURE_AND_LORA, gates=False)
def pure_beats_lora(evidence: Evidence) -> Judgement:
    """Pure GRIT answers more AQI items correctly than plain LoRA.

    {SEEDS} Published K-FAC and Riemannian LoRA results go both ways; this is reported, not assumed.
    """
    bound = evidence.options.min_delta_over_baseline or 0.0
    return _better(evidence, "aqi", bound, "AQI accuracy of pure GRIT over plain LoRA")


@claim("hypotheses.pure-retains-more", needs=PURE_AND_LORA, gates=False)
def pure_retains_more(evidence: Evidence) -> Judgement:
    """Pure GRIT keeps more general knowledge than plain LoRA.

    {SEEDS} GRIT's reprojection is said to forget less.
    """
    return _better(evidence, "knowledge", 0.0, "knowledge kept by pure GRIT over plain LoRA")


@claim("hypotheses.recommended-beats-lora", needs=["evaluation:baseline", "evaluation:recommended"], gates=False)
def recommended_beats_lora(evidence: Evidence) -> Judgement:
    """The preset recommended answers more AQI items correctly than plain LoRA as this verification trains it.

    The preset brings the learning rate and betas that it was tuned with on this base; plain LoRA has the base's own.
    Against plain LoRA tuned by as many trials: docs/measurements/grit-vs-lora.md. One seed: the interval covers test
    items.
    """
    if silent := unanswered(evidence, "aqi", "recommended", "baseline"):
        return _silent(silent)
    found = paired_difference(evidence, "recommended", "baseline", "aqi")
    what = "AQI accuracy of the preset recommended over plain LoRA"
    judged = decide_at_least(found, evidence.options.min_delta_over_baseline or 0.0, what, strictly=True)
    return replace(judged, summary=f"{judged.summary}; {ONE_SEED}")


def _better(evidence: Evidence, suite: str, bound: float, what: str) -> Judgement:
    """Pure above the baseline: over training seeds if there are several, else over test items."""
    if silent := unanswered(evidence, suite, "pure", "baseline"):
        return _silent(silent)
    if evidence.seeds:
        found = over_seeds(evidence, "pure", "baseline", suite, bound)
        return _by_seeds(evidence, found, seed_metrics(found, f"{suite}_difference", "points", "pure - baseline"), what)
    judged = decide_at_least(paired_difference(evidence, "pure", "baseline", suite), bound, what, strictly=True)
    power = f"{detectable(evidence, 'pure', 'baseline', suite):.1f} points can be found"
    return replace(judged, summary=f"{judged.summary}; {power}; {ONE_SEED}")


def _silent(items: Sequence[str]) -> Judgement:
    text = f"{len(items)} items have no trustworthy answer, e.g. {items[0]}"
    return Judgement("inconclusive", text, evidence={"unanswered": list(items)})


def _by_seeds(evidence: Evidence, found: SeedEffect, metrics: tuple[Metric, ...], what: str) -> Judgement:
    """Above its bound over seeds, by the interval and by the exact test."""
    from grit_impl.evaluate.seeds import FEWEST

    beside = {**_differences(evidence, found), "sign-flip p": found.p}
    judged = decide_at_least(metrics[0], found.bound, what, strictly=True)
    if judged.verdict != "inconclusive" and not found.decided:
        judged = replace(judged, verdict="inconclusive", needed=len(evidence.seeds) + 1)
    if judged.needed is not None:  # fewer decide nothing, however large the difference
        judged = replace(judged, needed=max(FEWEST, judged.needed))
    return replace(judged, summary=found.statement, metrics=metrics, evidence=beside)


@claim(
    "hypotheses.hybrid-agrees-with-pure",
    needs=["evaluation:hybrid", "evaluation:pure", "seeds:hybrid", "seeds:pure"],
    gates=False,
)
def hybrid_agrees(evidence: Evidence) -> Judgement:
    """Hybrid and pure GRIT reach the same AQI accuracy within {EQUIVALENT:g} points.

    {SEEDS} A missing significance is no sameness: the whole interval must lie within the margin.
    """
    from grit_impl.evaluate.seeds import FEWEST

    if silent := unanswered(evidence, "aqi", "hybrid", "pure"):
        return _silent(silent)
    beside: dict[str, Any] = {}
    if evidence.seeds:
        found = over_seeds(evidence, "hybrid", "pure")
        metrics, unit = seed_metrics(found, "aqi_difference", "points", "hybrid - pure"), "seeds"
        beside = _differences(evidence, found)
        # Two seeds with the same difference have an interval of no width, which is no evidence of sameness.
        if len(evidence.seeds) < FEWEST:
            text = f"hybrid minus pure is {metrics[0]}; fewer than {FEWEST} seeds decide nothing"
            return Judgement("inconclusive", text, metrics, beside, FEWEST)
    else:
        metrics, unit = (paired_difference(evidence, "hybrid", "pure"),), "items"
    gap = metrics[0]
    assert gap.low is not None
    assert gap.high is not None
    text = f"hybrid minus pure is {gap}; equivalent means within {EQUIVALENT:g} points"
    text += "" if evidence.seeds else f"; {ONE_SEED}"
    if gap.low > -EQUIVALENT and gap.high < EQUIVALENT:
        return Judgement("supported", text, metrics, beside)
    if gap.low > EQUIVALENT or gap.high < -EQUIVALENT:
        return Judgement("refuted", text, metrics, beside)
    room = EQUIVALENT - abs(gap.estimate)
    needed = math.ceil((gap.n or 0) * ((gap.high - gap.low) / 2 / room) ** 2) if room > 0 else None
    hint = f"; about {needed} {unit} would decide" if needed else ""
    return Judgement("inconclusive", text + hint, metrics, beside, needed)


def _differences(evidence: Evidence, found: SeedEffect) -> dict[str, Any]:
    return {"differences by seed": dict(zip(evidence.seeds, found.differences, strict=True))}


@claim(
    "hypotheses.pure-lower-loss",
    needs=["record:baseline", "record:pure", "seeds:baseline", "seeds:pure"],
    gates=False,
)
def pure_learns_faster(evidence: Evidence) -> Judgement:
    """Pure GRIT ends at a lower training loss than plain LoRA on the same batches.

    {SEEDS} Paired by step, so that a step's batch cancels.
    """
    # The mean paired difference over the last quarter of the run, baseline minus pure.
    from grit_impl.evaluate.seeds import effect
    from grit_impl.statistics.intervals import t_interval
    from grit_impl.statistics.series import effective_sample_size
    from grit_impl.verify.claims.curves import losses

    what = "training loss that pure GRIT saves over the last quarter"
    runs = [each.records for each in evidence.seeds.values()] or [evidence.records]
    tails = []
    for records in runs:
        one = Evidence(evidence.options, records=records)
        pairs = list(zip(losses(one, "baseline"), losses(one, "pure"), strict=False))
        tails.append([a - b for a, b in pairs[-max(8, len(pairs) // 4) :]])
    if min(map(len, tails)) < 8:
        return Judgement("inconclusive", "fewer than 8 steps to compare", needed=8)
    if evidence.seeds:
        found = effect([sum(tail) / len(tail) for tail in tails], what)
        return _by_seeds(evidence, found, seed_metrics(found, "late_loss_difference", "", "baseline - pure"), what)
    last = tails[0]
    interval = t_interval(last)
    # Consecutive steps are not independent: widen to the number of values that the series is worth.
    widen = (len(last) / effective_sample_size(last)) ** 0.5
    metric = Metric(
        "late_loss_difference",
        interval.estimate,
        interval.estimate - (interval.estimate - interval.low) * widen,
        interval.estimate + (interval.high - interval.estimate) * widen,
        n=len(last),
        method=f"{interval.method}, effective sample size",
        subject="baseline - pure",
    )
    judged = decide_at_least(metric, 0.0, what, strictly=True)
    return replace(judged, summary=f"{judged.summary}; {ONE_SEED}")
