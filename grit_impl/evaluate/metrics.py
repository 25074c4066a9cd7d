"""The numbers of an evaluation, and how each is made from right and wrong answers."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, fields
from functools import lru_cache
from typing import Any

import numpy as np
from scipy import stats  # type: ignore[import-untyped]

from grit_impl.statistics.intervals import Interval, wilson
from grit_impl.statistics.paired import paired_difference_interval
from grit_impl.statistics.power import detectable_difference

GATE_ALPHA = 1e-4
"""Error of one gate, in both directions together: ten of them are then wrong in one session of a thousand. Twenty gates
at .05 would raise a false alarm in two sessions of three."""


@dataclass(frozen=True, slots=True)
class Comparison:
    """One model against another on the same items.

    Attributes:
        difference: Accuracy of the model minus that of the reference, in points, with its paired interval.
        p: McNemar's exact two-sided p-value.
        p_holm: The same, corrected for the number of models that are compared with this reference.
        gained: Items that only the model got right.
        lost: Items that only the reference got right.
        detectable: Smallest difference in points that this many items find with 80% power at alpha .05, beyond what the
            server may have done.
        reference: Label of the reference.
    """

    difference: Interval
    p: float
    p_holm: float
    gained: int
    lost: int
    detectable: float
    reference: str

    @property
    def estimate(self) -> float:
        """Points."""
        return self.difference.estimate

    @property
    def low(self) -> float:
        """Points."""
        return self.difference.low

    @property
    def high(self) -> float:
        """Points."""
        return self.difference.high


@dataclass(frozen=True, slots=True)
class ModelMetrics:
    """What one model reached. None means not measured (or, for a comparison, that it is the reference itself).

    Attributes:
        label: The model's role: `base`, `baseline`, `hybrid`, `pure`, or any name.
        model: Name on the server.
        aqi_accuracy: Percent, by the primary metric (`Evaluation.aqi_metric`).
        category: Percent of items with the right category.
        exact: Percent with the exact index.
        within5: Percent with an index at most 5 points off.
        mae: Mean absolute error in index points, over the answers that name an index.
        delta_aqi: Against the base.
        delta_over_baseline: Against the fine-tuned baseline.
        knowledge: Percent of general knowledge questions answered.
        delta_knowledge: Against the base.
        retention: Percent of the questions that the base answered which this model answers too.
        tokens_per_second: Median over the rounds.
        delta_speed: Percent of the base's tokens per second gained, median of the rounds' ratios.
        delta_speed_absolute: Tokens per second gained, median of the rounds' differences.
        unanswered: Ids of items without a trustworthy answer: everything about this model is then inconclusive.
        unparsable: Answers that name neither index nor category, or are empty, by reason.
        cut: Answers that reached the token limit.
        faults: Failed attempts by kind, before an answer came.
    """

    label: str
    model: str
    aqi_accuracy: Interval | None
    category: Interval | None
    exact: Interval | None
    within5: Interval | None
    mae: Interval | None
    delta_aqi: Comparison | None
    delta_over_baseline: Comparison | None
    knowledge: Interval | None
    delta_knowledge: Comparison | None
    retention: Interval | None
    tokens_per_second: Interval | None
    delta_speed: Interval | None
    delta_speed_absolute: Interval | None
    unanswered: tuple[str, ...]
    unparsable: dict[str, int]
    cut: int
    faults: dict[str, int]

    def to_dict(self) -> dict[str, Any]:
        """JSON values."""
        return {each.name: _plain(getattr(self, each.name)) for each in fields(self)}


def _plain(value: Any) -> Any:
    if isinstance(value, Interval):
        return value.to_dict()
    if isinstance(value, Comparison):
        detectable = value.detectable if np.isfinite(value.detectable) else None
        return {**asdict(value), "difference": value.difference.to_dict(), "detectable": detectable}
    return list(value) if isinstance(value, tuple) else value


def paired(ours: Mapping[str, bool], theirs: Mapping[str, bool]) -> tuple[list[bool], list[bool]]:
    """Both models' results on the items that both answered, in one order."""
    common = [item for item in ours if item in theirs]
    return [ours[item] for item in common], [theirs[item] for item in common]


def discordant(ours: Sequence[bool], theirs: Sequence[bool]) -> tuple[int, int]:
    """How many items only the first, and only the second, got right."""
    gained = sum(a and not b for a, b in zip(ours, theirs, strict=True))
    return gained, sum(b and not a for a, b in zip(ours, theirs, strict=True))


def compare(
    ours: Sequence[bool],
    theirs: Sequence[bool],
    confidence: float,
    reference: str,
    p: float,
    p_holm: float,
    allowance: float = 0.0,
) -> Comparison:
    """All that is reported about two models' results on the same items; `allowance` as `noise.Noise` has it."""
    gained, lost = discordant(ours, theirs)
    n = len(ours)
    detectable = 100 * detectable_difference(n, (gained + lost) / n) + 2 * allowance
    difference = widened_difference(_difference(gained, lost, n, confidence), allowance)
    return Comparison(difference, p, p_holm, gained, lost, detectable, reference)


def widened_difference(difference: Interval, allowance: float) -> Interval:
    """A difference between two accuracies in points, each of which the server may have moved by so many."""
    return difference.widened(2 * allowance, "for the server", -100, 100)


def widened_retention(kept: Interval, allowance: float, questions: int) -> Interval:
    """A share in percent of the questions that the base answered, where the server may have changed some results.

    Of all `questions`, `allowance` percent may be off for either model, and each of these moves the share of the n that
    the base answered by about 1 / n at most.
    """
    return kept.widened(2 * allowance * questions / kept.n, "for the server", 0, 100)


def share(right: Iterable[bool], confidence: float) -> Interval | None:
    """Percent right, with Wilson's interval; None without any item."""
    values = list(right)
    return wilson(sum(values), len(values), confidence).scaled(100) if values else None


def median(values: Iterable[float], confidence: float, looks: int = 1) -> Interval | None:
    """Median with the distribution-free interval between two order statistics (Conover 1999, section 3.2).

    Args:
        values: Independent samples; what is not finite is left out.
        confidence: Two-sided confidence.
        looks: Times at which sampling could have ended. The intervals of all of them hold at once (Bonferroni), so
            the one at which it did end keeps its confidence, whatever made it end.
    """
    x = np.sort([value for value in values if np.isfinite(value)])
    if not x.size:
        return None
    ends = _order(x.size, 1 - (1 - confidence) / looks)
    low, high = (x[i] if i is not None else s * np.inf for i, s in zip(ends, (-1, 1), strict=True))
    method = f"median, order statistics {100 * confidence:g}%" + (f", {looks} looks" if looks > 1 else "")
    return Interval(float(np.median(x)), float(low), float(high), int(x.size), method)


def speed_rates(rows: Iterable[Mapping[str, Any]], label: str) -> dict[int, float]:
    """Tokens per second of a model by round."""
    return {row["round"]: row["tokens_per_second"] for row in rows if row["label"] == label}


def speed_difference(
    rows: Sequence[Mapping[str, Any]],
    label: str,
    base: str,
    confidence: float,
    looks: int = 1,
    absolute: bool = False,
) -> Interval | None:
    """Speed gained over the base, round by round: in percent of the base's, or in tokens per second."""
    ours, theirs = speed_rates(rows, label), speed_rates(rows, base)
    pairs = [(ours[k], theirs[k]) for k in ours if k in theirs]
    return median([a - b if absolute else 100 * (a / b - 1) for a, b in pairs], confidence, looks)


# The intervals depend on counts alone, and the same counts come up again and again.


@lru_cache(maxsize=4096)
def _difference(gained: int, lost: int, n: int, confidence: float) -> Interval:
    same = [True] * (n - gained - lost)
    ours, theirs = [True] * gained + [False] * lost + same, [False] * gained + [True] * lost + same
    return paired_difference_interval(ours, theirs, confidence).scaled(100)


@lru_cache(maxsize=256)
def _order(n: int, confidence: float) -> tuple[int | None, int | None]:
    """Positions of the two order statistics among n sorted values; None where n is too small for one."""
    ends = stats.quantile_test(np.arange(n, dtype=float), q=(n - 1) / 2, p=0.5).confidence_interval(confidence)
    low, high = (int(end) if np.isfinite(end) else None for end in (ends.low, ends.high))
    return low, high
