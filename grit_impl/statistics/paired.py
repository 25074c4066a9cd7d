"""Two models on the same items, or two arms with the same seeds: tests, intervals, and what so many pairs can find."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from numpy.typing import ArrayLike
from scipy import optimize, stats  # type: ignore[import-untyped]

from grit_impl.errors import GRITError
from grit_impl.statistics.intervals import RESAMPLES, Interval, as_floats, check_confidence, same_length

EXACT_FLIPS = 13
"""Up to this many pairs, all 2**n sign flips (8,192) are enumerated."""


def mcnemar_exact(b: int, c: int) -> float:
    """Two-sided p-value that two models are right equally often on the same items (McNemar, Psychometrika 12, 1947).

    Args:
        b: Items that only the first model got right.
        c: Items that only the second model got right. Without any discordant item the p-value is 1.
    """
    if b < 0 or c < 0:
        raise GRITError(f"McNemar counts cannot be negative, got {b} and {c}")
    return float(stats.binomtest(int(b), int(b + c), 0.5).pvalue) if b + c else 1.0


def paired_difference_interval(
    correct_a: Sequence[bool] | ArrayLike, correct_b: Sequence[bool] | ArrayLike, confidence: float = 0.95
) -> Interval:
    """Score interval of accuracy(a) - accuracy(b) on the same items (Tango, Statistics in Medicine 17, 1998).

    Args:
        correct_a: Per item, whether the first model was right (N,).
        correct_b: The same items for the second model (N,).
        confidence: Two-sided confidence.

    Returns:
        The difference as a fraction, from -1 to 1. It stays sensible with no discordant item (width > 0).
    """
    x, y = same_length(correct_a, correct_b)
    if not np.isin(np.concatenate([x, y]), (0.0, 1.0)).all():
        raise GRITError("paired_difference_interval takes right/wrong per item (0 or 1)")
    only_a, only_b = int(np.sum((x == 1) & (y == 0))), int(np.sum((x == 0) & (y == 1)))
    low, high = _tango(only_a, only_b, x.size, confidence)
    return Interval((only_a - only_b) / x.size, low, high, x.size, f"Tango paired score {100 * confidence:.6g}%")


def _tango(b: int, c: int, n: int, confidence: float) -> tuple[float, float]:
    check_confidence(confidence)
    z = float(stats.norm.ppf(0.5 + confidence / 2))

    def score(delta: float) -> float:
        """Tango's equation 7: the score statistic with p21 at its maximum likelihood under difference `delta`."""
        quadratic_b = -b - c + (2 * n - b + c) * delta
        quadratic_c = -c * delta * (1 - delta)
        p21 = (np.sqrt(max(quadratic_b**2 - 8 * n * quadratic_c, 0.0)) - quadratic_b) / (4 * n)
        variance = n * (2 * p21 + delta * (1 - delta))
        return float((b - c - n * delta) / np.sqrt(max(variance, 1e-300)))

    estimate, edge = (b - c) / n, 1 - 1e-12
    low = -1.0 if score(-edge) < z else float(optimize.brentq(lambda d: score(d) - z, -edge, estimate))
    high = 1.0 if score(edge) > -z else float(optimize.brentq(lambda d: score(d) + z, estimate, edge))
    return low, high


def sign_flip_test(differences: ArrayLike, seed: int = 0) -> float:
    """Two-sided p-value of a mean difference by flipping signs (Fisher 1935; Good, Permutation Tests, 2005).

    Exact (all 2**n flips) up to 13 pairs, by Monte Carlo above. Its smallest possible value is 2 / 2**n: five pairs
    cannot reach .05, six can.
    """
    d = as_floats(differences, "differences")
    if d.size <= EXACT_FLIPS:
        signs = 1.0 - 2.0 * ((np.arange(2**d.size)[:, None] >> np.arange(d.size)) & 1)
        null = np.abs(signs @ d)
        # The identity flip is among them, so the p-value is never zero; the slack keeps ties ties under rounding.
        return float(np.mean(null >= abs(d.sum()) - 1e-12 * np.abs(d).sum()))
    signs = np.random.default_rng(seed).choice((-1.0, 1.0), size=(RESAMPLES, d.size))
    hits = int(np.sum(np.abs(signs @ d) >= abs(d.sum()) - 1e-12 * np.abs(d).sum()))
    return (hits + 1) / (RESAMPLES + 1)


def holm(pvalues: Sequence[float] | ArrayLike) -> list[float]:
    """Adjusted p-values that keep the family-wise error rate (Holm, Scandinavian Journal of Statistics 6, 1979)."""
    p = as_floats(pvalues, "pvalues")
    order = np.argsort(p)
    stepped = np.maximum.accumulate(p[order] * (p.size - np.arange(p.size)))
    adjusted = np.empty_like(p)
    adjusted[order] = np.minimum(stepped, 1.0)
    return [float(v) for v in adjusted]


def t_power(effect: float, n: int, alpha: float = 0.05) -> float:
    """Power of the two-sided paired t-test for `effect` = mean / SD of the differences (Cohen 1988, ch. 2)."""
    if n < 2:
        return 0.0
    critical, shift = float(stats.t.isf(alpha / 2, n - 1)), abs(effect) * np.sqrt(n)
    # The far tail's contribution underflows to NaN for large shifts, where it is zero.
    far = float(np.nan_to_num(stats.nct.cdf(-critical, n - 1, shift)))
    near = float(np.nan_to_num(stats.nct.sf(critical, n - 1, shift), nan=1.0))
    return min(near + far, 1.0)


def minimum_detectable_effect(sd: float, n: int, alpha: float = 0.05, power: float = 0.8) -> float:
    """Smallest mean difference that n pairs find, in the unit of `sd`, the SD of the differences; inf for n < 2."""
    if sd < 0:
        raise GRITError(f"a standard deviation cannot be negative, got {sd}")
    if n < 2:
        return float("inf")
    return float(sd * optimize.brentq(lambda d: t_power(d, n, alpha) - power, 1e-6, 100.0)) if sd else 0.0


def pairs_needed(effect: float, alpha: float = 0.05, power: float = 0.8, limit: int = 100_000) -> int:
    """Fewest pairs for which the paired t-test finds `effect` = mean / SD of the differences; `limit` if more."""
    if t_power(effect, limit, alpha) < power:
        return limit
    low, high = 1, limit
    while high - low > 1:
        middle = (low + high) // 2
        low, high = (low, middle) if t_power(effect, middle, alpha) >= power else (middle, high)
    return high
