"""Series whose values depend on those before: how many independent ones they are worth, and how two correlate."""

from __future__ import annotations

import numpy as np
from numpy.typing import ArrayLike
from scipy import stats  # type: ignore[import-untyped]

from grit_impl.statistics.intervals import Floats, Interval, as_floats, check_confidence, same_length


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
        same_length(x, y, 2)
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
    check_confidence(confidence)
    u, v = same_length(x, y, 5)
    size = max(effective_sample_size(u, v), 4.0)
    r = float(np.corrcoef(u, v)[0, 1]) if np.ptp(u) > 0 and np.ptp(v) > 0 else 0.0
    half = float(stats.norm.ppf(0.5 + confidence / 2)) / np.sqrt(max(size - 3, 1.0))
    z = np.arctanh(np.clip(r, -1 + 1e-12, 1 - 1e-12))
    method = f"Fisher z {100 * confidence:.6g}%, effective n {size:.0f}"
    return Interval(r, float(np.tanh(z - half)), float(np.tanh(z + half)), int(u.size), method)
