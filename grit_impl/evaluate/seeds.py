"""What holds over training seeds, as opposed to over test items.

One evaluation's interval says how the accuracy would vary with other questions. How it would vary with another training
run is a different question, answered only by other training runs: arms paired by seed, one difference per seed.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from grit_impl.errors import GRITError
from grit_impl.evaluate.results import Evaluation, paired
from grit_impl.verify.statistics import Interval, minimum_detectable_effect, sign_flip_test, t_interval

FEWEST = 6
"""Seeds below which a two-sided sign-flip test cannot reach p < .05 (2 / 2**5 = .063, 2 / 2**6 = .031)."""


@dataclass(frozen=True, slots=True)
class SeedEffect:
    """The difference between two arms over seeds.

    Attributes:
        differences: Accuracy of the arm minus that of the reference, in points, one per seed.
        interval: Their mean with Student's t interval; unbounded for one seed.
        p: Exact sign-flip test.
        detectable: Mean difference in points that so many seeds find with 80% power; inf for one seed.
        statement: What this many seeds support, in one sentence.
    """

    differences: tuple[float, ...]
    interval: Interval
    p: float
    detectable: float
    statement: str


def effect_over_seeds(
    evaluations: Sequence[Evaluation], label: str, reference: str, confidence: float = 0.95
) -> SeedEffect:
    """Compare two arms over evaluations that differ by the seed of the training.

    Args:
        evaluations: One per seed; in each, both arms were trained with that seed.
        label: The arm, e.g. `pure`.
        reference: The arm it is compared with, e.g. `baseline`.
        confidence: Of the interval.

    Raises:
        GRITError: no evaluation, or one without answers of both arms.
    """
    if not evaluations:
        raise GRITError("an effect over seeds needs at least one evaluation")
    differences = []
    for number, evaluation in enumerate(evaluations, 1):
        ours, theirs = paired(evaluation.correct(label), evaluation.correct(reference))
        if not ours:
            raise GRITError(f"evaluation {number} has no items that both {label!r} and {reference!r} answered")
        differences.append(100 * (sum(ours) - sum(theirs)) / len(ours))
    interval, p, n = t_interval(differences, confidence), sign_flip_test(differences), len(differences)
    spread = (sum((d - interval.estimate) ** 2 for d in differences) / (n - 1)) ** 0.5 if n > 1 else 0.0
    detectable = minimum_detectable_effect(spread, n)
    subject = f"{label} against {reference}: {interval.estimate:+.1f} points"
    if n == 1:
        statement = f"{subject} with one seed, which supports no statement about the training method"
    elif n < FEWEST:
        statement = f"{subject} over {n} seeds, which cannot reach p < .05 (at best {2 / 2**n:.3f}); run {FEWEST}"
    elif p <= 1 - confidence and interval.excludes(0):
        statement = f"{subject} [{interval.low:.1f}, {interval.high:.1f}] over {n} seeds, p = {p:.3f}"
    else:
        statement = (
            f"{subject} [{interval.low:.1f}, {interval.high:.1f}] over {n} seeds decides nothing; "
            f"{detectable:.1f} points could be found"
        )
    return SeedEffect(tuple(differences), interval, p, detectable, statement)
