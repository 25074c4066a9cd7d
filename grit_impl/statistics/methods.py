"""Small-sample statistics that every claim shares: one well-known method for each question, its source beside it.

Everything takes plain sequences or arrays of finite numbers and returns plain floats or an `Interval`. Differences are
always `a - b`. Proportions are fractions between 0 and 1; a caller who wants percentage points multiplies by 100.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np
from numpy.typing import ArrayLike, NDArray
from scipy import optimize, stats  # type: ignore[import-untyped]

from grit_impl.errors import GRITError

Floats = NDArray[np.float64]
RESAMPLES = 9_999
"""Bootstrap and Monte Carlo resamples: a p-value then has a resolution of 1e-4."""
EXACT_FLIPS = 13
"""Up to this many pairs, all 2**n sign flips (8,192) are enumerated."""


@dataclass(frozen=True, slots=True)
class Interval:
    """An estimate with its confidence interval.

    Attributes:
        estimate: The point estimate, in the unit of the data.
        low: Lower end; -inf when the data cannot bound it (a single run, say).
        high: Upper end; inf when the data cannot bound it.
        n: How many independent units (items, pairs, runs) it rests on.
        method: The method's name and confidence, for the report.
    """

    estimate: float
    low: float
    high: float
    n: int
    method: str

    def excludes(self, value: float = 0.0) -> bool:
        """Whether `value` lies outside the interval."""
        return value < self.low or value > self.high

    def within(self, margin: float) -> bool:
        """Whether the whole interval lies strictly inside (-margin, margin): equivalence by interval inclusion."""
        return -margin < self.low and self.high < margin

    def scaled(self, factor: float) -> Interval:
        """The same interval in another unit, e.g. `scaled(100)` for percentage points."""
        low, high = sorted((self.low * factor, self.high * factor))
        return Interval(self.estimate * factor, low, high, self.n, self.method)

    def to_dict(self) -> dict[str, Any]:
        """The fields; infinite ends become None, as JSON knows no infinity."""
        return {k: None if isinstance(v, float) and not np.isfinite(v) else v for k, v in asdict(self).items()}


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


def _pair(a: ArrayLike, b: ArrayLike, minimum: int = 1) -> tuple[Floats, Floats]:
    x, y = as_floats(a, "a", minimum), as_floats(b, "b", minimum)
    if x.size != y.size:
        raise GRITError(f"paired statistics need equally many values, got {x.size} and {y.size}")
    return x, y


def _check(confidence: float) -> None:
    if not 0 < confidence < 1:
        raise GRITError(f"confidence must lie between 0 and 1, got {confidence}")


# -- proportions ---------------------------------------------------------------------------------------------------


def _proportion(k: int, n: int, confidence: float, method: str, name: str) -> Interval:
    _check(confidence)
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
    x, y = _pair(correct_a, correct_b)
    if not np.isin(np.concatenate([x, y]), (0.0, 1.0)).all():
        raise GRITError("paired_difference_interval takes right/wrong per item (0 or 1)")
    only_a, only_b = int(np.sum((x == 1) & (y == 0))), int(np.sum((x == 0) & (y == 1)))
    low, high = _tango(only_a, only_b, x.size, confidence)
    return Interval((only_a - only_b) / x.size, low, high, x.size, f"Tango paired score {100 * confidence:.6g}%")


def _tango(b: int, c: int, n: int, confidence: float) -> tuple[float, float]:
    _check(confidence)
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


def minimum_detectable_difference(n: int, discordance: float = 0.3, alpha: float = 0.05, power: float = 0.8) -> float:
    """Smallest accuracy difference that McNemar's test finds on n paired items (Connor, Biometrics 43, 1987).

    Args:
        n: Items answered by both models.
        discordance: Expected share of items that exactly one model gets right.
        alpha: Two-sided significance level.
        power: Probability of finding it.

    Returns:
        A fraction; `inf` if even a difference as large as the discordance would be missed.
    """
    if n < 1 or not 0 < discordance <= 1:
        raise GRITError(f"needs n >= 1 and 0 < discordance <= 1, got n={n}, discordance={discordance}")

    def excess(difference: float) -> float:
        return items_needed(difference, discordance, alpha, power) - n

    return float("inf") if excess(discordance) > 0 else float(optimize.brentq(excess, 1e-9, discordance))


def items_needed(difference: float, discordance: float = 0.3, alpha: float = 0.05, power: float = 0.8) -> float:
    """Paired items that McNemar's test needs to find `difference` (Connor 1987, eq. 3); not rounded up."""
    if not 0 < abs(difference) <= discordance <= 1:
        raise GRITError(f"needs 0 < |difference| <= discordance <= 1, got {difference} and {discordance}")
    z_alpha, z_power = stats.norm.isf(alpha / 2), stats.norm.ppf(power)
    spread = np.sqrt(max(discordance - difference**2, 0.0))
    return float((z_alpha * np.sqrt(discordance) + z_power * spread) ** 2 / difference**2)


def holm(pvalues: Sequence[float] | ArrayLike) -> list[float]:
    """Adjusted p-values that keep the family-wise error rate (Holm, Scandinavian Journal of Statistics 6, 1979)."""
    p = as_floats(pvalues, "pvalues")
    order = np.argsort(p)
    stepped = np.maximum.accumulate(p[order] * (p.size - np.arange(p.size)))
    adjusted = np.empty_like(p)
    adjusted[order] = np.minimum(stepped, 1.0)
    return [float(v) for v in adjusted]


# -- paired measurements (one difference per seed, block or item) ----------------------------------------------------


def t_critical(freedom: float, confidence: float = 0.95) -> float:
    """Two-sided critical value of Student's t."""
    return float(stats.t.ppf(0.5 + confidence / 2, freedom))


def t_interval(differences: ArrayLike, confidence: float = 0.95) -> Interval:
    """Student's t interval of the mean (Student, Biometrika 6, 1908); unbounded for a single value."""
    _check(confidence)
    d = as_floats(differences, "differences")
    mean, method = float(d.mean()), f"paired t {100 * confidence:.6g}%"
    if d.size == 1:
        return Interval(mean, -np.inf, np.inf, 1, method)
    half = t_critical(d.size - 1, confidence) * float(d.std(ddof=1)) / np.sqrt(d.size)
    return Interval(mean, mean - half, mean + half, int(d.size), method)


def bootstrap_interval(
    values: ArrayLike,
    statistic: Callable[..., Any] = np.mean,
    confidence: float = 0.95,
    seed: int = 0,
    resamples: int = RESAMPLES,
) -> Interval:
    """Bias-corrected and accelerated bootstrap interval (Efron, JASA 82, 1987).

    Args:
        values: Independent units (N,), N >= 2; below about 10 it is too short, use `t_interval`.
        statistic: Vectorised over `axis`, like `numpy.mean`.
        confidence: Two-sided confidence.
        seed: Of the resampling, so that a report is reproducible.
        resamples: Bootstrap samples.
    """
    _check(confidence)
    x = as_floats(values, minimum=2)
    estimate = float(statistic(x))
    if np.ptp(x) == 0:
        return Interval(estimate, estimate, estimate, int(x.size), f"constant data {100 * confidence:.6g}%")
    ci = stats.bootstrap(
        (x,),
        statistic,
        confidence_level=confidence,
        n_resamples=resamples,
        method="BCa",
        rng=np.random.default_rng(seed),
    ).confidence_interval
    return Interval(estimate, float(ci.low), float(ci.high), int(x.size), f"BCa bootstrap {100 * confidence:.6g}%")


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


def tost(differences: ArrayLike, margin: float) -> float:
    """p-value that the mean difference lies outside (-margin, margin) (Schuirmann, J. Pharmacokin. Biopharm. 15, 1987).

    A small value supports "equivalent"; a large one supports nothing.
    """
    d = as_floats(differences, "differences", 2)
    if margin <= 0:
        raise GRITError(f"an equivalence margin must be positive, got {margin}")
    if np.ptp(d) == 0:
        return 0.0 if abs(float(d[0])) < margin else 1.0
    below = stats.ttest_1samp(d, -margin, alternative="greater").pvalue
    above = stats.ttest_1samp(d, margin, alternative="less").pvalue
    return float(max(below, above))


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


# -- several runs per arm ---------------------------------------------------------------------------------------------


def iqm(values: ArrayLike, axis: int | None = None) -> Any:
    """Interquartile mean: the mean of the middle half (Agarwal et al., NeurIPS 2021)."""
    return stats.trim_mean(np.asarray(values, dtype=np.float64), 0.25, axis=-1 if axis is None else axis)


def probability_of_improvement(a: ArrayLike, b: ArrayLike, confidence: float = 0.95, seed: int = 0) -> Interval:
    """P(a run of `a` exceeds a run of `b`), ties half (Agarwal et al., NeurIPS 2021; Mann & Whitney 1947).

    The interval is a percentile bootstrap over runs, each arm resampled separately.
    """
    _check(confidence)
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


# -- series -----------------------------------------------------------------------------------------------------------


def autocorrelation(series: ArrayLike, lags: int | None = None) -> Floats:
    """Autocorrelations at lags 0..`lags` (biased estimator: Box & Jenkins, ch. 2); zeros for a constant series."""
    x = as_floats(series, "series", 2)
    lags = min(x.size - 1, x.size // 4 if lags is None else lags)
    centred = x - x.mean()
    full = np.correlate(centred, centred, "full")[x.size - 1 : x.size + lags]
    return full / full[0] if full[0] > 0 else np.concatenate([[1.0], np.zeros(lags)])


def effective_sample_size(x: ArrayLike, y: ArrayLike | None = None) -> float:
    """How many independent values a series (or, for a correlation, a pair of series) is worth.

    One series: n / (1 + 2 sum rho_k), the sum cut by Geyer's initial positive sequence (Statistical Science 7, 1992).
    Two: Bartlett's formula, n / (1 + 2 sum (1 - k/n) rho_x,k rho_y,k), lags to n/4 (Pyper & Peterman, CJFAS 55, 1998).

    Returns:
        Between 1 and n.
    """
    first = autocorrelation(x)
    n = np.asarray(x).size
    if y is None:
        pairs = first[1 : 1 + 2 * ((first.size - 1) // 2)].reshape(-1, 2).sum(axis=1)
        negative = np.flatnonzero(pairs <= 0)
        inflation = 1 + 2 * float(pairs[: negative[0] if negative.size else pairs.size].sum())
    else:
        _pair(x, y, 2)
        products = first[1:] * autocorrelation(y)[1:]
        inflation = 1 + 2 * float(np.sum((1 - np.arange(1, products.size + 1) / n) * products))
    return float(np.clip(n / max(inflation, 1e-12), 1.0, n))


def prewhiten(series: ArrayLike, max_order: int = 4) -> Floats:
    """Residuals of an autoregression, its order chosen by AICc (Box & Jenkins, ch. 11; Hurvich & Tsai 1989).

    All orders are fitted by least squares to the same values, so the result always has n - max_order entries.
    """
    x = as_floats(series, "series", 3 * max_order + 3)
    centred, n = x - x.mean(), x.size - max_order
    if np.ptp(centred) == 0:
        return np.zeros(n)
    lagged = np.column_stack([centred[max_order - k : x.size - k] for k in range(1, max_order + 1)])
    target, best, chosen = centred[max_order:], np.inf, centred[max_order:]
    for order in range(max_order + 1):
        design = lagged[:, :order]
        residual = target - design @ np.linalg.lstsq(design, target, rcond=None)[0] if order else target
        parameters = order + 1
        score = n * np.log(max(float(residual @ residual) / n, 1e-300))
        score += 2 * parameters * n / (n - parameters - 1)
        if score < best:
            best, chosen = score, residual
    return np.asarray(chosen, dtype=np.float64)


def correlation_interval(x: ArrayLike, y: ArrayLike, confidence: float = 0.95) -> Interval:
    """Pearson correlation with Fisher's z interval on the effective sample size (Fisher 1921; Pyper & Peterman)."""
    _check(confidence)
    u, v = _pair(x, y, 5)
    size = max(effective_sample_size(u, v), 4.0)
    r = float(np.corrcoef(u, v)[0, 1]) if np.ptp(u) > 0 and np.ptp(v) > 0 else 0.0
    half = float(stats.norm.ppf(0.5 + confidence / 2)) / np.sqrt(max(size - 3, 1.0))
    z = np.arctanh(np.clip(r, -1 + 1e-12, 1 - 1e-12))
    method = f"Fisher z {100 * confidence:.6g}%, effective n {size:.0f}"
    return Interval(r, float(np.tanh(z - half)), float(np.tanh(z + half)), int(u.size), method)
