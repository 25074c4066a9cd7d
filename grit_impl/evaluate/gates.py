"""Thresholds that an evaluation must keep, decided so that luck neither passes nor fails a session.

`decide` is the one rule, for `grit evaluate` and for the claims of a verification. A gate is decided on an interval of
confidence 1 - `GATE_ALPHA`: `supported` if the lower bound keeps the threshold, `refuted` if the upper bound breaks it,
`inconclusive` otherwise. A session with more than ten gates divides its error (one in a thousand) among them
(Bonferroni).
"""

from __future__ import annotations

from collections.abc import Collection
from dataclasses import replace
from functools import lru_cache
from typing import NamedTuple

from grit_impl.evaluate.metrics import GATE_ALPHA, Comparison, paired
from grit_impl.evaluate.options import Thresholds
from grit_impl.evaluate.results import Evaluation
from grit_impl.evaluate.speed import CLONE
from grit_impl.statistics.decision import Judgement, Metric, decide_at_least
from grit_impl.statistics.intervals import Interval, clopper_pearson
from grit_impl.statistics.power import detectable_difference

SESSION_ALPHA = 1e-3
"""Probability that any gate of a session decides wrongly, in whichever direction."""
ACCURACIES = ("delta_aqi", "delta_over_baseline")


class Gate(NamedTuple):
    """One decided threshold: `delta_aqi`, `delta_over_baseline`, `delta_speed` or `retention` of a model."""

    name: str
    label: str
    judgement: Judgement


def judge(evaluation: Evaluation, thresholds: Thresholds | None = None, *, without: Collection[str] = ()) -> list[Gate]:
    """Decide every threshold for every model but the base.

    Args:
        evaluation: The answers and speeds.
        thresholds: What is asked.
        without: Names of gates that are not asked for.
    """
    limits = thresholds or Thresholds()
    bounds = {
        "delta_aqi": limits.min_delta_aqi,
        "delta_over_baseline": limits.min_delta_over_baseline,
        "delta_speed": -limits.max_speed_loss,
        "retention": limits.min_retention,
    }
    asked: list[tuple[str, str, float]] = []
    for label in evaluation.models:
        compared = label != evaluation.baseline and evaluation.baseline in evaluation.models
        for name, bound in bounds.items():
            if label == evaluation.base or name in without or bound is None:
                continue
            if name != "delta_over_baseline" or compared:
                asked.append((name, label, bound))
    each = min(GATE_ALPHA, SESSION_ALPHA / max(len(asked), 1))
    return [
        Gate(name, label, decide(evaluation, name, label, bound, alpha=each, strictly=name in ACCURACIES))
        for name, label, bound in asked
    ]


def decide(
    evaluation: Evaluation,
    name: str,
    label: str,
    bound: float,
    *,
    alpha: float = GATE_ALPHA,
    strictly: bool = False,
) -> Judgement:
    """Whether a model keeps a threshold.

    Args:
        evaluation: The answers and speeds.
        name: `delta_aqi`, `delta_over_baseline`, `delta_speed` or `retention`.
        label: The model.
        bound: The least value, in points or percent.
        alpha: Error of the decision, both directions together.
        strictly: The bound itself does not suffice.

    Returns:
        The judgement; for accuracies its summary says which difference so many items find with 80% power; for speed,
        what the server made of a copy of the base.
    """
    what = f"{name} of {label}"
    reference = evaluation.baseline if name == "delta_over_baseline" else evaluation.base
    suite = {"retention": "knowledge", "delta_speed": ""}.get(name, "aqi")
    missing = [
        f"{each}: {item}"
        for each in (reference, label)
        for item in evaluation.unanswered(each)
        if suite and item.startswith(f"{suite}/")
    ]
    interval, comparison = _measure(evaluation, name, label, reference, alpha)
    if interval is None and not missing:
        return Judgement("not exercised", f"{what} was not measured")
    metrics: tuple[Metric, ...] = ()
    if interval is not None:
        unit = "points" if comparison else "%"
        metrics = (
            Metric(
                name,
                interval.estimate,
                interval.low,
                interval.high,
                unit,
                interval.n,
                interval.method,
                label,
                interval.fixed,
            ),
        )
    if missing:
        text = f"{what}: {len(missing)} items have no trustworthy answer, e.g. {missing[0]}"
        return Judgement("inconclusive", text, metrics, {"unanswered": missing})
    judged = decide_at_least(metrics[0], bound, what, strictly=strictly)
    if name == "delta_speed":
        return _beside_a_copy(evaluation, judged, label, bound, alpha)
    judged = _with_noise(evaluation, judged, reference, label)
    if comparison is None:
        return judged
    # Against zero McNemar's exact test is valid at any alpha; the score interval is only nearly so, far in the tail.
    if judged.verdict != "inconclusive" and bound == 0 and comparison.p > alpha:
        judged = replace(judged, verdict="inconclusive", summary=f"{judged.summary}; McNemar p = {comparison.p:.2g}")
    items = len(paired(evaluation.correct(label), evaluation.correct(reference))[0])
    found = 100 * detectable_difference(items, (comparison.gained + comparison.lost) / items, alpha)
    found += 2 * evaluation.noise().allowance
    return replace(judged, summary=f"{judged.summary}; {found:.1f} points can be found")


def _with_noise(evaluation: Evaluation, judged: Judgement, *labels: str) -> Judgement:
    """With the share of both models' answers that change when asked again, and what it did to the interval."""
    shares = [(label, share) for label in labels if (share := evaluation.noise(label).share) is not None]
    told = (Metric("answers_changed", s.estimate, s.low, s.high, "%", s.n, s.method, label) for label, s in shares)
    servers = {name or "the same server": each.told(name) for name, each in evaluation.noises().items()}
    return replace(judged, metrics=(*judged.metrics, *told), evidence={**judged.evidence, "asked again": servers})


def _beside_a_copy(evaluation: Evaluation, judged: Judgement, label: str, bound: float, alpha: float) -> Judgement:
    """A speed's verdict, if this server gives a copy of the base the base's speed.

    The copy's interval is the floor of the model's: what the server may have done to the copy, it may have done to the
    model, so the verdict must hold after that is taken from the estimate, too.
    """
    text = f"{judged.summary}; {_alike(evaluation, label)}"
    copy = evaluation.delta_speed(CLONE, 1 - alpha)
    if copy is None:
        if judged.verdict != "refuted":
            return replace(judged, summary=f"{text}; no copy of the base was measured")
        why = "no copy of the base was measured, so this may be the server's doing"
        return replace(judged, verdict="inconclusive", summary=f"{text}; {why}")
    told = Metric("delta_speed", copy.estimate, copy.low, copy.high, "%", copy.n, copy.method, CLONE)
    metrics = (*judged.metrics, told)
    room = abs(bound)
    if copy.low < -room or copy.high > room:
        why = f"but a copy of the base differs from it by {told}: this server cannot tell {room:g}%"
        return replace(judged, verdict="inconclusive", summary=f"{text}; {why}", metrics=metrics)
    estimate = judged.metrics[0].estimate
    holds = {"supported": estimate - max(copy.high, 0.0) >= bound, "refuted": estimate - min(copy.low, 0.0) < bound}
    verdict = judged.verdict if holds.get(judged.verdict, True) else "inconclusive"
    return replace(
        judged, verdict=verdict, summary=f"{text}; a copy of the base differs from it by {told}", metrics=metrics
    )


def _alike(evaluation: Evaluation, label: str) -> str:
    """Whether a difference in speed is to be expected."""
    known = evaluation.meta.get("details", {})
    ours, base = (known.get(each) or {} for each in (label, evaluation.base))
    if not ours or not base:
        return "the server does not say whether the models are of one kind"
    kind, other = (", ".join(str(value) for value in each.values()) for each in (ours, base))
    return f"same architecture, size and number type ({kind})" if ours == base else f"{kind}, the base is {other}"


def _measure(
    evaluation: Evaluation, name: str, label: str, reference: str, alpha: float
) -> tuple[Interval | None, Comparison | None]:
    """The value with its interval, and for accuracies the comparison that it comes from."""
    if name == "delta_speed":
        return evaluation.delta_speed(label, 1 - alpha), None
    if name == "retention":
        known = evaluation.retained(label)
        return (evaluation.retention(label, _exact_share, 1 - alpha) if known else None), None
    if not paired(evaluation.correct(label), evaluation.correct(reference))[0]:
        return None, None
    comparison = evaluation.compare(label, reference, 1 - alpha)
    return comparison.difference, comparison


@lru_cache(maxsize=1024)
def _exact_share(right: int, n: int, confidence: float) -> Interval:
    return clopper_pearson(right, n, confidence)
