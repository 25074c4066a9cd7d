"""How small a difference an evaluation can find: the power of McNemar's exact test, without approximation.

The usual formula (Connor, Biometrics 43, 1987) is asymptotic, and the exact test is conservative: at 400 items a
difference that the formula promises to find in 80% of evaluations is found in 77%. Here the binomial sums are done.
"""

from __future__ import annotations

from functools import lru_cache

import numpy as np
from numpy.typing import NDArray
from scipy import optimize, stats  # type: ignore[import-untyped]


@lru_cache(maxsize=32)
def _largest_rejected(n: int, alpha: float) -> NDArray[np.int64]:
    """For m = 0..n discordant items: the largest smaller count that is significant, -1 if none is."""
    m = np.arange(n + 1)
    k = np.asarray(stats.binom.ppf(alpha / 2, m, 0.5)).astype(np.int64)
    return np.where(2 * stats.binom.cdf(k, m, 0.5) <= alpha, k, k - 1)


def mcnemar_power(difference: float, n: int, discordance: float, alpha: float = 0.05) -> float:
    """Probability that McNemar's exact two-sided test finds `difference`.

    Args:
        difference: True difference of the two accuracies, as a fraction, at most `discordance`.
        n: Items answered by both models.
        discordance: Probability that exactly one of them answers an item correctly.
        alpha: Significance level.
    """
    m = np.arange(n + 1)
    limit = _largest_rejected(n, alpha)
    share = (1 + difference / discordance) / 2
    rejected = stats.binom.cdf(limit, m, share) + stats.binom.sf(m - limit - 1, m, share)
    return float(np.sum(stats.binom.pmf(m, n, discordance) * np.where(limit >= 0, rejected, 0.0)))


@lru_cache(maxsize=4096)
def detectable_difference(n: int, discordance: float, alpha: float = 0.05, power: float = 0.8) -> float:
    """Smallest true difference (a fraction) that is found with this power.

    If not even a difference as large as the discordance is found, the models are assumed to disagree more, all in one
    direction; inf if n items cannot find anything.
    """

    def missing(difference: float, disagreement: float) -> float:
        return mcnemar_power(difference, n, disagreement, alpha) - power

    discordance = min(discordance, 1.0)
    if discordance > 0 and missing(discordance, discordance) >= 0:
        return float(optimize.brentq(lambda d: missing(d, discordance), 0.0, discordance, xtol=1e-5))
    if missing(1.0, 1.0) < 0:
        return float("inf")
    return float(optimize.brentq(lambda d: missing(d, d), max(discordance, 1e-9), 1.0, xtol=1e-5))
