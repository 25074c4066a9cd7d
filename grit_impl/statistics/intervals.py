"""An estimate with its confidence interval: of shares, of means, and of runs that are not paired.

Everything in this folder takes plain sequences or arrays of finite numbers and returns plain floats or an `Interval`;
a method's source stands beside it. Differences are always `a - b`. Proportions are fractions between 0 and 1; whoever
wants percentage points multiplies by 100.
"""

from __future__ import annotations

from dataclasses import asdict, dataclass
from typing import Any

import numpy as np
from numpy.typing import ArrayLike, NDArray
from scipy import stats  # type: ignore[import-untyped]

from grit_impl.errors import GRITError

Floats = NDArray[np.float64]
RESAMPLES = 9_999
"""Bootstrap and Monte Carlo resamples: a p-value then has a resolution of 1e-4."""


@dataclass(frozen=True, slots=True)
class Interval:
    """An estimate with its confidence interval.

    Attributes:
        estimate: The point estimate, in the unit of the data.
        low: Lower end; -inf when the data cannot bound it (a single run, say).
        high: Upper end; inf when the data cannot bound it.
        n: How many independent units (items, pairs, runs) it rests on.
        method: The method's name and confidence, for the report.
        fixed: How much of its half-width more units do not narrow.
    """

    estimate: float
    low: float
    high: float
    n: int
    method: str
    fixed: float = 0.0

    def excludes(self, value: float = 0.0) -> bool:
        """Whether `value` lies outside the interval."""
        return value < self.low or value > self.high

    def scaled(self, factor: float) -> Interval:
        """The same interval in another unit, e.g. `scaled(100)` for percentage points."""
        low, high = sorted((self.low * factor, self.high * factor))
        return Interval(self.estimate * factor, low, high, self.n, self.method, self.fixed * abs(factor))

    def widened(self, by: float, why: str, least: float, most: float) -> Interval:
        """The same estimate, known `by` less in both directions, within [least, most]; in the unit of the data."""
        if not by:
            return self
        low, high = max(least, self.low - by), min(most, self.high + by)
        return Interval(self.estimate, low, high, self.n, f"{self.method}, {by:.3g} {why}", self.fixed + by)

    def to_dict(self) -> dict[str, Any]:
        """The fields; infinite ends become None, as JSON knows no infinity. Nothing `fixed` is left out."""
        values = {k: v for k, v in asdict(self).items() if k != "fixed" or v}
        return {k: None if isinstance(v, float) and not np.isfinite(v) else v for k, v in values.items()}


def as_floats(values: ArrayLike, name: str = "values", minimum: int = 1) -> Floats:
    """A one-dimensional float array.

    Raises:
        GRITError: fewer than `minimum` values, more than one dimension, or a value that is not finite.
    """
    array = np.asarray(values, dtype=np.float64)
    if array.ndim != 1 or array.size < minimum:
        raise GRITError(f"{name}: needs a sequence of at least {minimum} numbers, got shape {array.shape}")
    if not np.isfinite(array).all():
        raise GRITError(f"{name}: entry {int(np.argmin(np.isfinite(array)))} is not finite; drop or repair it first")
    return array


def same_length(a: ArrayLike, b: ArrayLike, minimum: int = 1) -> tuple[Floats, Floats]:
    x, y = as_floats(a, "a", minimum), as_floats(b, "b", minimum)
    if x.size != y.size:
        raise GRITError(f"paired statistics need equally many values, got {x.size} and {y.size}")
    return x, y


def check_confidence(confidence: float) -> None:
    if not 0 < confidence < 1:
        raise GRITError(f"confidence must lie between 0 and 1, got {confidence}")


def _proportion(k: int, n: int, confidence: float, method: str, name: str) -> Interval:
    check_confidence(confidence)
    if n < 1 or not 0 <= k <= n:
        raise GRITError(f"a proportion needs 0 <= k <= n and n >= 1, got k={k}, n={n}")
    ci = stats.binomtest(int(k), int(n)).proportion_ci(confidence, method=method)
    return Interval(k / n, float(ci.low), float(ci.high), int(n), f"{name} {100 * confidence:.6g}%")


def wilson(k: int, n: int, confidence: float = 0.95) -> Interval:
    """Score interval of k successes in n trials (Wilson, JASA 22, 1927; recommended by Brown, Cai & DasGupta 2001)."""
    return _proportion(k, n, confidence, "wilson", "Wilson")


def clopper_pearson(k: int, n: int, confidence: float = 0.95) -> Interval:
    """Exact interval of k successes in n trials, never below its confidence (Clopper & Pearson, 1934)."""
    return _proportion(k, n, confidence, "exact", "Clopper-Pearson")


def t_critical(freedom: float, confidence: float = 0.95) -> float:
    """Two-sided critical value of Student's t."""
    return float(stats.t.ppf(0.5 + confidence / 2, freedom))


def t_interval(differences: ArrayLike, confidence: float = 0.95) -> Interval:
    """Student's t interval of the mean (Student, Biometrika 6, 1908); unbounded for a single value."""
    check_confidence(confidence)
    d = as_floats(differences, "differences")
    mean, method = float(d.mean()), f"paired t {100 * confidence:.6g}%"
    if d.size == 1:
        return Interval(mean, -np.inf, np.inf, 1, method)
    half = t_critical(d.size - 1, confidence) * float(d.std(ddof=1)) / np.sqrt(d.size)
    return Interval(mean, mean - half, mean + half, int(d.size), method)


def iqm(values: ArrayLike, axis: int | None = None) -> Any:
    """Interquartile mean: the mean of the middle half (Agarwal et al., NeurIPS 2021)."""
    return stats.trim_mean(np.asarray(values, dtype=np.float64), 0.25, axis=-1 if axis is None else axis)


def probability_of_improvement(a: ArrayLike, b: ArrayLike, confidence: float = 0.95, seed: int = 0) -> Interval:
    """P(a run of `a` exceeds a run of `b`), ties half (Agarwal et al., NeurIPS 2021; Mann & Whitney 1947).

    The interval is a percentile bootstrap over runs, each arm resampled separately.
    """
    check_confidence(confidence)
    x, y = as_floats(a, "a"), as_floats(b, "b")

    def share(u: Floats, v: Floats) -> Any:
        wins = u[..., :, None] - v[..., None, :]
        return ((wins > 0) + 0.5 * (wins == 0)).mean(axis=(-2, -1))

    rng = np.random.default_rng(seed)
    draws = share(x[rng.integers(x.size, size=(RESAMPLES, x.size))], y[rng.integers(y.size, size=(RESAMPLES, y.size))])
    low, high = np.quantile(draws, ((1 - confidence) / 2, (1 + confidence) / 2))
    return Interval(
        float(share(x, y)), float(low), float(high), int(min(x.size, y.size)), f"bootstrap {100 * confidence:.6g}%"
    )
