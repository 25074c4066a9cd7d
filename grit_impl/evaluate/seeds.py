"""What holds over training seeds, as opposed to over test items.

One evaluation's interval says how the accuracy would vary with other questions. How it would vary with another training
run is a different question, answered only by other training runs: arms paired by seed, one difference per seed.
"""

from __future__ import annotations

import math
import statistics
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from grit_impl.errors import GRITError
from grit_impl.evaluate.results import Evaluation, paired
from grit_impl.statistics.intervals import Interval, t_interval
from grit_impl.statistics.paired import minimum_detectable_effect, sign_flip_test

ALPHA = 0.05
FEWEST = 6
"""Seeds below which a two-sided sign-flip test cannot reach p < .05 (2 / 2**5 = .063, 2 / 2**6 = .031)."""


@dataclass(frozen=True, slots=True)
class SeedEffect:
    """The difference between two arms over seeds.

    Attributes:
        differences: Of the arm minus the reference, one per seed.
        interval: Their mean with Student's t interval; unbounded for one seed.
        p: Exact sign-flip test that their mean is `bound`.
        bound: What the mean is tested against.
        detectable: Distance from `bound` that so many seeds find with 80% power; inf for one seed.
        statement: What this many seeds support, in one sentence.
    """

    differences: tuple[float, ...]
    interval: Interval
    p: float
    bound: float
    detectable: float
    statement: str

    @property
    def decided(self) -> bool:
        """Whether the interval and the exact test agree that the mean is not `bound`."""
        return self.p <= ALPHA and self.interval.excludes(self.bound)


def effect_over_seeds(
    evaluations: Sequence[Evaluation], label: str, reference: str, *, suite: str = "aqi", bound: float = 0.0
) -> SeedEffect:
    """Compare two arms over evaluations that differ by the seed of the training.

    Args:
        evaluations: One per seed; in each, both arms were trained with that seed.
        label: The arm, e.g. `pure`.
        reference: The arm it is compared with, e.g. `baseline`.
        suite: Accuracy on `aqi` (by the primary metric) or on `knowledge`.
        bound: Points that the difference is tested against.

    Raises:
        GRITError: no evaluation, or one without answers of both arms.
    """
    differences = []
    for number, evaluation in enumerate(evaluations, 1):
        ours, theirs = paired(*(accuracy_of(evaluation, each, suite) for each in (label, reference)))
        if not ours:
            raise GRITError(f"evaluation {number} has no items that both {label!r} and {reference!r} answered")
        differences.append(100 * (sum(ours) - sum(theirs)) / len(ours))
    # What the server does to one seed's difference, it may do to all of them alike.
    server = 2 * max((evaluation.noise().allowance for evaluation in evaluations), default=0.0)
    return effect(differences, f"{label} against {reference}", "points", bound, server)


def accuracy_of(evaluation: Evaluation, label: str, suite: str) -> Mapping[str, bool]:
    """Right or wrong by item, on `aqi` by the primary metric, or on `knowledge`."""
    return evaluation.correct(label) if suite == "aqi" else evaluation.scores(label, suite, "correct")


def effect(
    differences: Sequence[float], what: str, unit: str = "", bound: float = 0.0, server: float = 0.0
) -> SeedEffect:
    """What differences between two arms, one per seed, support; each may be the server's doing by so much.

    Raises:
        GRITError: there is none.
    """
    n = len(differences)
    if not n:
        raise GRITError("an effect over seeds needs at least one seed")
    interval, p = t_interval(differences), sign_flip_test([each - bound for each in differences])
    interval = interval.widened(server, "for the server", -math.inf, math.inf)
    spread = statistics.stdev(differences) if n > 1 else 0.0
    detectable = minimum_detectable_effect(spread, n) + server
    mean = f"{what}: {interval.estimate:+.3g}{f' {unit}' if unit else ''}"
    if n == 1:
        statement = f"{mean} with one seed, which supports no statement about the training method"
    elif n < FEWEST:
        statement = f"{mean} over {n} seeds, which cannot reach p < .05 (at best {2 / 2**n:.3f}); run {FEWEST}"
    else:
        statement = f"{mean} [{interval.low:.3g}, {interval.high:.3g}] over {n} seeds, p = {p:.3f}"
        found = SeedEffect(tuple(differences), interval, p, bound, detectable, statement)
        if not found.decided:
            statement += f", decides nothing; {detectable:.3g} could be found"
    return SeedEffect(tuple(differences), interval, p, bound, detectable, statement)
