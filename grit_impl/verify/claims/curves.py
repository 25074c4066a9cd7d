"""What loss curves can show: that runs are comparable, that a rerun repeats, and that a curve's shape proves little."""

from __future__ import annotations

import math

from grit_impl.runs.first import ROUNDING
from grit_impl.statistics.decision import Judgement, Metric, Outcome, decide_at_least, supported_if
from grit_impl.verify.claims.base import Evidence
from grit_impl.verify.claims.registry import claim

SAME_FIRST_LOSS = 1e-3
"""Relative difference of the losses of step 1, before any update, in records that do not say what they computed in."""
FEWEST_STEPS = 20
"""Losses that a correlation needs."""


def losses(evidence: Evidence, arm: str) -> list[float]:
    """The arm's loss of every optimizer step."""
    return [float(row["loss"]) for row in evidence.records[arm].steps]


def identical(evidence: Evidence, arm: str, other: str) -> Judgement:
    """Supported if both runs have as many steps and bit-equal losses and gradient norms."""
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


def _equal(a: dict[str, float], b: dict[str, float]) -> bool:
    # repr tells NaN from numbers and is equal for equal bits.
    return all(repr(a.get(key)) == repr(b.get(key)) for key in ("loss", "grad_norm"))


@claim("curves.rerun-identical", needs=["record:baseline", "record:rerun"])
def rerun_identical(evidence: Evidence) -> Judgement:
    """Training the baseline again gives the same losses and gradient norms, bit for bit.

    The noise floor: without it no difference between arms can be read.
    """
    return identical(evidence, "rerun", "baseline")


@claim("curves.labels-comparable", needs=["record:baseline", "record:hybrid", "record:pure"])
def comparable(evidence: Evidence) -> Judgement:
    """All arms see the same tokens and start from the same loss, so that their losses can be compared.

    A loss of 0.09 against 1.04 was padding in the labels, not learning. Before the first update only labels, data or
    the base can make losses differ by more than rounding does, and no run is begun where it would be more.
    """
    arms = ("baseline", "hybrid", "pure")
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
    precision = _precision(evidence, arms)
    allowed = ROUNDING[precision][0] if precision else SAME_FIRST_LOSS
    if not spread <= allowed:
        listed = ", ".join(f"{arm} {loss:.4f}" for arm, loss in starts.items())
        return Judgement("refuted", f"the first losses differ, so labels or data do: {listed}", metrics)
    text = f"same tokens at every step; first losses within {spread:.1e} of {starts[reference]:.4f}"
    if precision:
        text += f" ({precision} explains {allowed:g})"
    return Judgement("supported", text, metrics)


def _precision(evidence: Evidence, arms: tuple[str, ...]) -> str | None:
    """What all of them computed in, if they say so and it is the same."""
    said = {evidence.records[arm].run.get("config", {}).get("training", {}).get("precision") for arm in arms}
    only = said.pop() if len(said) == 1 else None
    return only if only in ROUNDING else None


@claim("curves.late-identical", needs=["record:baseline", "record:hybrid_late"], gates=False)
def late_identical(evidence: Evidence) -> Judgement:
    """Preconditioning after the step leaves the losses of the baseline, bit for bit.

    Why two identical curves say nothing about frameworks that 'restore' gradients: this mistake explains them.
    """
    return identical(evidence, "hybrid_late", "baseline")


@claim(
    "curves.{arm}-beyond-noise",
    needs=["record:baseline", "record:rerun", "record:{arm}"],
    arm=["pure", "hybrid"],
)
def beyond_noise(evidence: Evidence, arm: str) -> Judgement:
    """{arm} GRIT's losses differ from the baseline's by more than reruns do.

    RMS of the paired loss difference over the first steps after an update, against three times the rerun's: the one
    curve statistic with neither misses nor false alarms in our calibration.
    """
    from grit_impl.curves.compare import compare_records
    from grit_impl.curves.names import FEWEST_LOSSES

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


@claim("curves.shape-proves-nothing", needs=["record:baseline", "record:pure"], gates=False)
def curves_agree(evidence: Evidence) -> Judgement:
    """The loss curves of pure GRIT and the baseline correlate above 0.95 although every update differs.

    A step's loss is mostly its batch. If this is supported, a high correlation must never be read as 'the gradients
    were not used'.
    """
    from grit_impl.statistics.series import correlation_interval

    if len(evidence.records["pure"].steps) < FEWEST_STEPS:
        return Judgement("inconclusive", f"fewer than {FEWEST_STEPS} steps", needed=FEWEST_STEPS)
    interval = correlation_interval(losses(evidence, "pure"), losses(evidence, "baseline"))
    metric = Metric(
        "loss_correlation",
        interval.estimate,
        interval.low,
        interval.high,
        n=interval.n,
        method=interval.method,
        subject="pure, baseline",
    )
    return decide_at_least(metric, 0.95, "raw correlation of the loss curves of pure and baseline")
