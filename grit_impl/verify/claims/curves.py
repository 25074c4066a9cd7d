"""What loss curves can show: that runs are comparable, that a rerun repeats, and that a curve's shape proves little."""

from __future__ import annotations

import math
from collections.abc import Callable

from grit_impl.statistics.decision import Judgement, Metric, Outcome, decide_at_least, supported_if
from grit_impl.verify.claims.base import Claim, Evidence

SAME_FIRST_LOSS = 1e-3
"""Relative difference of the losses of step 1, before any update: only labels, data or the base can exceed it."""
FEWEST_STEPS = 20
"""Losses that a correlation needs."""
FLOOR_FACTOR = 3.0
"""Figures draw the noise band at this many times the rerun's difference."""


def losses(evidence: Evidence, arm: str) -> list[float]:
    """The arm's loss of every optimizer step."""
    return [float(row["loss"]) for row in evidence.records[arm].steps]


def rms(values: list[float]) -> float:
    """Root mean square; NaN for none."""
    return math.sqrt(sum(value * value for value in values) / len(values)) if values else math.nan


def identical(arm: str, other: str = "baseline") -> Callable[[Evidence], Judgement]:
    """Supported if both runs have as many steps and bit-equal losses and gradient norms."""

    def decide(evidence: Evidence) -> Judgement:
        first, second = evidence.records[arm].steps, evidence.records[other].steps
        if len(first) != len(second):
            return Judgement("refuted", f"{arm} has {len(first)} steps, {other} {len(second)}")
        gaps = {
            key: max(
                (
                    abs(a[key] - b[key])
                    for a, b in zip(first, second, strict=True)
                    if a.get(key) is not None and b.get(key) is not None
                ),
                default=math.nan,
            )
            for key in ("loss", "grad_norm")
        }
        metrics = tuple(
            Metric(f"max_{key}_difference", gap, n=len(first), subject=f"{arm} - {other}") for key, gap in gaps.items()
        )
        same = all(_equal(a, b) for a, b in zip(first, second, strict=True))
        text = "bit-identical" if same else f"not identical: largest loss difference {gaps['loss']:.3g}"
        return Judgement(supported_if(same), f"{len(first)} steps, {text}", metrics)

    return decide


def _equal(a: dict[str, float], b: dict[str, float]) -> bool:
    # repr tells NaN from numbers and is equal for equal bits.
    return all(repr(a.get(key)) == repr(b.get(key)) for key in ("loss", "grad_norm"))


def comparable(*arms: str) -> Callable[[Evidence], Judgement]:
    """Supported if the arms count the same tokens at every step and start from the same loss."""

    def decide(evidence: Evidence) -> Judgement:
        starts = {arm: losses(evidence, arm)[0] for arm in arms}
        # The checksum of a step's batch tells other tokens from as many tokens; foreign records may have none.
        tokens = {arm: [row.get("batch", row.get("tokens")) for row in evidence.records[arm].steps] for arm in arms}
        reference = arms[0]
        spread = max(abs(loss / starts[reference] - 1) for loss in starts.values())
        metrics = (
            Metric("first_loss_spread", spread, method="largest relative difference"),
            *(Metric("first_loss", loss, subject=arm) for arm, loss in starts.items()),
        )
        different = [arm for arm in arms if tokens[arm] != tokens[reference]]
        if different:
            return Judgement("refuted", f"{', '.join(different)} saw other tokens than {reference}", metrics)
        if not spread <= SAME_FIRST_LOSS:
            listed = ", ".join(f"{arm} {loss:.4f}" for arm, loss in starts.items())
            return Judgement("refuted", f"the first losses differ, so labels or data do: {listed}", metrics)
        text = f"same tokens at every step; first losses within {spread:.1e} of {starts[reference]:.4f}"
        return Judgement("supported", text, metrics)

    return decide


def beyond_noise(arm: str) -> Callable[[Evidence], Judgement]:
    """Supported if `grit compare` calls the arm and the baseline different, with the rerun as its noise floor."""

    def decide(evidence: Evidence) -> Judgement:
        from grit_impl.curves.compare import compare_records
        from grit_impl.curves.logs import FEWEST_LOSSES

        if len(evidence.records[arm].steps) < FEWEST_LOSSES:
            return Judgement("inconclusive", f"fewer than {FEWEST_LOSSES} steps to compare", needed=FEWEST_LOSSES)
        baseline, rerun = evidence.records["baseline"], evidence.records["rerun"]
        comparison = compare_records(baseline, evidence.records[arm], [rerun])
        outcomes: dict[str, Outcome] = {"different": "supported", "same": "refuted"}
        metrics = tuple(
            Metric(
                f"{name} difference over its noise floor",
                found["ratio"]["estimate"],
                found["ratio"]["low"],
                found["ratio"]["high"],
                unit="x",
                n=found["ratio"]["n"],
                method=found["ratio"]["method"],
                subject=f"{arm} - baseline",
            )
            for name, found in comparison.numbers.get("difference", {}).items()
        )
        return Judgement(
            outcomes.get(comparison.verdict, "inconclusive"),
            comparison.summary,
            metrics,
            {"reasons": list(comparison.reasons)},
        )

    return decide


def curves_agree(arm: str, threshold: float = 0.95) -> Callable[[Evidence], Judgement]:
    """Supported if the loss curves correlate above the threshold, whatever happened to the gradients."""

    def decide(evidence: Evidence) -> Judgement:
        from grit_impl.statistics.methods import correlation_interval

        if len(evidence.records[arm].steps) < FEWEST_STEPS:
            return Judgement("inconclusive", f"fewer than {FEWEST_STEPS} steps", needed=FEWEST_STEPS)
        interval = correlation_interval(losses(evidence, arm), losses(evidence, "baseline"))
        metric = Metric(
            "loss_correlation",
            interval.estimate,
            interval.low,
            interval.high,
            n=interval.n,
            method=interval.method,
            subject=f"{arm}, baseline",
        )
        return decide_at_least(metric, threshold, f"raw correlation of the loss curves of {arm} and baseline")

    return decide


CLAIMS = (
    Claim(
        "curves.rerun-identical",
        "Training the baseline again gives the same losses and gradient norms, bit for bit.",
        ("record:baseline", "record:rerun"),
        "The noise floor: without it no difference between arms can be read.",
        identical("rerun"),
    ),
    Claim(
        "curves.labels-comparable",
        "All arms see the same tokens and start from the same loss, so that their losses can be compared.",
        ("record:baseline", "record:hybrid", "record:pure"),
        "A loss of 0.09 against 1.04 was padding in the labels, not learning. Before the first update only labels, "
        "data or the base can make losses differ.",
        comparable("baseline", "hybrid", "pure"),
    ),
    Claim(
        "curves.late-identical",
        "Preconditioning after the step leaves the losses of the baseline, bit for bit.",
        ("record:baseline", "record:hybrid_late"),
        "Why two identical curves say nothing about frameworks that 'restore' gradients: this mistake explains them.",
        identical("hybrid_late"),
        gates=False,
    ),
    Claim(
        "curves.pure-beyond-noise",
        "Pure GRIT's losses differ from the baseline's by more than reruns do.",
        ("record:baseline", "record:rerun", "record:pure"),
        "RMS of the paired loss difference over the first steps after an update, against three times the rerun's: "
        "the one curve statistic with neither misses nor false alarms in our calibration.",
        beyond_noise("pure"),
    ),
    Claim(
        "curves.hybrid-beyond-noise",
        "Hybrid GRIT's losses differ from the baseline's by more than reruns do.",
        ("record:baseline", "record:rerun", "record:hybrid"),
        "As for pure GRIT.",
        beyond_noise("hybrid"),
    ),
    Claim(
        "curves.shape-proves-nothing",
        "The loss curves of pure GRIT and the baseline correlate above 0.95 although every update differs.",
        ("record:baseline", "record:pure"),
        "A step's loss is mostly its batch. If this is supported, a high correlation must never be read as 'the "
        "gradients were not used'.",
        curves_agree("pure"),
        gates=False,
    ),
)
