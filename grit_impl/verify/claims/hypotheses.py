"""What one would like to know of GRIT: reported with intervals, gated only on request."""

from __future__ import annotations

from grit_impl.verify.claims.base import Claim, Evidence, Judgement, Metric, decide_at_least
from grit_impl.verify.claims.measures import paired_difference

EQUIVALENT = 5.0
"""Points of AQI accuracy within which two ways of applying GRIT count as the same."""
ONE_SEED = "One seed: the interval covers test items, not training runs. "


def pure_beats_lora(evidence: Evidence) -> Judgement:
    """Paired difference of AQI accuracy, pure minus baseline, above `--min-delta-over-baseline`."""
    gain = paired_difference(evidence, "pure", "baseline")
    bound = evidence.options.min_delta_over_baseline
    return decide_at_least(gain, bound, "AQI accuracy of pure GRIT over plain LoRA", strictly=True)


def hybrid_agrees(evidence: Evidence) -> Judgement:
    """Equivalence by interval inclusion: the whole interval within plus or minus `EQUIVALENT` points."""
    gap = paired_difference(evidence, "hybrid", "pure")
    if gap.low is None or gap.high is None:
        return Judgement("inconclusive", f"hybrid minus pure is {gap}, without an interval", (gap,))
    low, high = gap.low, gap.high
    text = f"hybrid minus pure is {gap}; equivalent means within {EQUIVALENT:g} points"
    if low > -EQUIVALENT and high < EQUIVALENT:
        return Judgement("supported", text, (gap,))
    if low > EQUIVALENT or high < -EQUIVALENT:
        return Judgement("refuted", text, (gap,))
    room = EQUIVALENT - abs(gap.estimate)
    needed = round((gap.n or 0) * ((high - low) / 2 / room) ** 2) if room > 0 else None
    hint = f"; about {needed} items would decide" if needed else ""
    return Judgement("inconclusive", text + hint, (gap,), needed=needed)


def pure_retains_more(evidence: Evidence) -> Judgement:
    """Paired difference of knowledge accuracy, pure minus baseline, above zero."""
    gain = paired_difference(evidence, "pure", "baseline", "knowledge")
    return decide_at_least(gain, 0.0, "knowledge kept by pure GRIT over plain LoRA", strictly=True)


def pure_learns_faster(evidence: Evidence) -> Judgement:
    """Mean paired loss difference over the last quarter of the run, baseline minus pure, above zero."""
    from grit_impl.verify.claims.curves import losses
    from grit_impl.verify.statistics import effective_sample_size, t_interval

    pairs = list(zip(losses(evidence, "baseline"), losses(evidence, "pure"), strict=False))
    last = [a - b for a, b in pairs[-max(8, len(pairs) // 4) :]]
    if len(last) < 8:
        return Judgement("inconclusive", "fewer than 8 steps to compare", needed=8)
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
    return decide_at_least(metric, 0.0, "training loss that pure GRIT saves over the last quarter", strictly=True)


CLAIMS = (
    Claim(
        "hypotheses.pure-beats-lora",
        "Pure GRIT answers more AQI items correctly than plain LoRA.",
        ("evaluation:baseline", "evaluation:pure"),
        ONE_SEED + "Published K-FAC and Riemannian LoRA results go both ways; this is reported, not assumed.",
        pure_beats_lora,
        gates=False,
    ),
    Claim(
        "hypotheses.hybrid-agrees-with-pure",
        f"Hybrid and pure GRIT reach the same AQI accuracy within {EQUIVALENT:g} points.",
        ("evaluation:hybrid", "evaluation:pure"),
        ONE_SEED + "A missing significance is no sameness: the whole interval must lie within the margin.",
        hybrid_agrees,
        gates=False,
    ),
    Claim(
        "hypotheses.pure-retains-more",
        "Pure GRIT keeps more general knowledge than plain LoRA.",
        ("evaluation:baseline", "evaluation:pure"),
        ONE_SEED + "GRIT's reprojection is said to forget less.",
        pure_retains_more,
        gates=False,
    ),
    Claim(
        "hypotheses.pure-lower-loss",
        "Pure GRIT ends at a lower training loss than plain LoRA on the same batches.",
        ("record:baseline", "record:pure"),
        ONE_SEED + "Paired by step, so that a step's batch cancels.",
        pure_learns_faster,
        gates=False,
    ),
)
