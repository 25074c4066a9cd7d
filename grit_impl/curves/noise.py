"""What two loss curves on the same batches can say about each other, and how strongly.

A step's loss is mostly its batch: two runs that share the batches correlate whether or not they share the optimizer, so
the evidence is the *paired difference*, judged against the difference between reruns of one and the same training (the
noise floor). Correlation describes; it never convicts, in either direction.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any, Literal

import numpy as np
from numpy.typing import NDArray
from scipy import signal, stats  # type: ignore[import-untyped]

from grit_impl.curves.numbers import show, span
from grit_impl.errors import GRITError
from grit_impl.statistics.intervals import Interval
from grit_impl.statistics.series import autocorrelation, prewhiten

Floats = NDArray[np.float64]
Sameness = Literal["same", "different", "inconclusive"]

WINDOW = 20
"""Losses after the first update that are compared: 15-20 told 48 different pairs from 46 reruns without an error."""
MARGIN = 3.0
"""Training counts as different only beyond three times the noise floor, and as the same only surely below it."""
ALPHA = 1e-3
"""Significance needed, besides the margin, to call two runs different."""
NUMERIC_FLOOR = 1e-4
"""Of the mean loss: how far float32 reordering and Adam's epsilon drift. A constant gradient scale, no real change of
AdamW, moved losses by at most 2.8e-4 and log gradient norms by 3.4e-3 (RMS of 20 steps); GRIT moves losses by 1e-2."""
NUMERIC_FLOOR_LOG_NORM = 1e-3
"""The same for logarithms of gradient norms."""
BF16_FLOOR = 2.0**-9
"""Of the mean loss: unit round-off of bfloat16, the floor assumed when no rerun was given."""
EXACT = 1e9
"""Degrees of freedom of a floor that is known, not estimated."""
TREND_TERMS = 4
"""Cosines (besides the mean) that remove the slow trend before curves are correlated."""
AR_ORDER = 4
"""Highest autoregressive order of the prewhitening."""


@dataclass(frozen=True, slots=True)
class NoiseFloor:
    """How far two runs of the same training lie apart.

    Attributes:
        rms: Root mean square of the paired difference, in the unit of the series.
        freedom: Effective degrees of freedom of that estimate; `EXACT` for a floor that is known.
        per_run: Those of a single run's difference over the same window.
        growth: RMS in the last over the first quarter of the curve; 1.0 where no rerun was given.
        source: For the report: where it comes from.
        measured: Whether reruns were given.
    """

    rms: float
    freedom: float
    per_run: float
    growth: float
    source: str
    measured: bool


@dataclass(frozen=True, slots=True)
class Difference:
    """The paired difference of one series (a - b) against its floor.

    Attributes:
        verdict: "same", "different" or "inconclusive".
        rms: Root mean square over the window.
        mean: Mean over the window.
        ratio: rms over the floor, with the interval that the verdict "same" uses.
        pvalue: That a ratio this large comes from noise.
        growth: RMS in the last over the first quarter of the curve, with interval.
        shape: "flat", "growing" or "unclear".
        onset: First step whose difference leaves the noise band for good, or None.
        window: First and last step compared.
        reason: One sentence.
    """

    verdict: Sameness
    rms: float
    mean: float
    ratio: Interval
    pvalue: float
    growth: Interval
    shape: Literal["flat", "growing", "unclear"]
    onset: int | None
    window: tuple[int, int]
    reason: str

    def to_dict(self) -> dict[str, Any]:
        """The fields by name, intervals too; infinities stay, for those who write JSON to replace."""
        return asdict(self)


def rms(values: Floats) -> float:
    """Root mean square."""
    return float(np.sqrt(np.mean(np.square(values))))


def _freedom(noise: Floats, n: int) -> float:
    """Degrees of freedom of the variance of n values of this noise (Bartlett 1946, for an AR(1) series)."""
    if np.ptp(noise) == 0:
        return float(n)
    phi = float(autocorrelation(noise, 1)[1])
    # Kendall (1954): the estimate is low by (1 + 3 phi) / n.
    phi = float(np.clip(phi + (1 + 3 * phi) / noise.size, 0.0, 0.99))
    return float(max(n * (1 - phi**2) / (1 + phi**2), 1.0))


def noise_floor(
    a: Floats,
    reruns: Sequence[Floats],
    resolution: float,
    *,
    start: int = 1,
    window: int = WINDOW,
    scale: float | None = None,
    numeric: float = NUMERIC_FLOOR,
) -> NoiseFloor:
    """The floor for differences from `a`: the noisiest window of the noisiest rerun.

    Not the same window: noise comes in bursts (a step near instability, one that flips many of Adam's signs), and a
    burst falls on another step in each rerun. Floors of the same window called 5 of 21 noisy reruns "different".

    Args:
        a: The series (N,) whose reruns are known.
        reruns: The same training again, any number of series (N,); with none, the floor is assumed, not measured.
        resolution: Step between two representable logged values.
        start: Index of the first value after an update.
        window: How many values are compared at a time.
        scale: What relative floors relate to; by default the mean of |a|.
        numeric: Relative floor of float32 arithmetic.

    Returns:
        The largest RMS of any window of any rerun, but never below the log's rounding (resolution / sqrt(6) for the
        difference of two rounded values) or float32 arithmetic; deterministic reruns differ by nothing at all.
    """
    scale = float(np.mean(np.abs(a))) if scale is None else scale
    known = max(resolution / np.sqrt(6), numeric * scale)
    if not reruns:
        floor = max(known, BF16_FLOOR * scale)
        source = f"{show(floor, '.2g')}, assumed from bfloat16 rounding: no rerun was given"
        return NoiseFloor(floor, EXACT, float(window), 1.0, source, False)
    if any(r.size != a.size for r in reruns):
        raise GRITError("a rerun has another number of steps than the run it repeats")
    differences = [r - a for r in reruns]
    measured = max(_noisiest(d[start:], window) for d in differences)
    if measured <= known:
        how = "bit-identical" if measured == 0 else f"within {show(measured, '.2g')}"
        return NoiseFloor(
            known,
            EXACT,
            float(window),
            1.0,
            f"{show(known, '.2g')}, rounding: {_times(reruns)} {how}",
            True,
        )
    freedoms = [_freedom(d, min(window, d.size - start)) for d in differences]
    growth = float(np.median([_quarter_ratio(d) for d in differences]))
    source = f"{show(measured, '.2g')}, measured: {_times(reruns)}"
    return NoiseFloor(measured, sum(freedoms), min(freedoms), growth, source, True)


def _noisiest(difference: Floats, window: int) -> float:
    """Largest RMS of any `window` consecutive values."""
    squares = np.convolve(np.square(difference), np.ones(min(window, difference.size)), "valid")
    return float(np.sqrt(squares.max() / min(window, difference.size)))


def _times(reruns: Sequence[Floats]) -> str:
    return "one rerun" if len(reruns) == 1 else f"{len(reruns)} reruns"


def _quarter_ratio(difference: Floats) -> float:
    quarter = max(difference.size // 4, 2)
    begin, end = rms(difference[:quarter]), rms(difference[-quarter:])
    if begin == 0:
        return 1.0 if end == 0 else float("inf")
    return end / begin


def paired_difference(
    a: Floats,
    b: Floats,
    steps: NDArray[np.int64],
    floor: NoiseFloor,
    *,
    start: int = 1,
    window: int = WINDOW,
    margin: float = MARGIN,
    alpha: float = ALPHA,
) -> Difference:
    """Same training, or different? The RMS of a - b after the first update, against the floor.

    The ratio of two mean squares is an F statistic whose degrees of freedom allow for the noise's autocorrelation.
    "different": ratio > margin and p < alpha. "same": the ratio's 95% interval lies below the margin. Neither:
    "inconclusive". Against an assumed floor the shape must agree too: different training drifts apart, while noise of
    unknown size (dropout, say) is as large at the beginning as at the end.

    Args:
        a: Series (N,).
        b: Series on the same batches (N,).
        steps: Their steps (N,).
        floor: From `noise_floor`.
        start: Index of the first value compared: the first after an update.
        window: How many values are compared.
        margin: Multiple of the floor that matters.
        alpha: Significance required for "different".
    """
    if a.size - start < 5:
        raise GRITError(f"{max(a.size - start, 0)} losses after the first update: at least 5 are needed")
    d = a - b
    part = d[start : start + window]
    # Under the null the difference is rerun noise: its degrees of freedom are those of the floor, per run.
    freedom = min(floor.per_run, float(part.size))
    size = rms(part)
    ratio = size / floor.rms
    reach = np.sqrt(stats.f.ppf((0.025, 0.975), freedom, floor.freedom))
    interval = Interval(ratio, ratio / float(reach[1]), ratio / float(reach[0]), part.size, "F ratio 95%")
    pvalue = float(stats.f.sf(ratio**2, freedom, floor.freedom))
    growth, shape = _growth(d, floor)
    outside = np.abs(d) > margin * floor.rms
    onset = _onset(outside, steps)
    verdict: Sameness
    found = f"the difference (RMS {show(size, '.2g')}) is {show(ratio)} times the noise floor"
    if not d.any():
        verdict, reason = "same", "every logged value is bit-identical"
    elif ratio > margin and pvalue < alpha and (floor.measured or shape == "growing"):
        verdict, reason = "different", found
    elif interval.high < margin and (floor.measured or shape == "flat"):
        verdict, reason = "same", f"{found}, surely below {show(margin, 'g')}"
    elif not floor.measured:
        how = {"flat": "does not grow", "growing": "grows", "unclear": "may grow"}[shape]
        verdict = "inconclusive"
        reason = f"{found} and {how}; without a rerun, noise and a small effect look alike: run one arm again"
    else:
        verdict = "inconclusive"
        reason = f"{found} {span(interval.low, interval.high, '.2g')}: more reruns would decide"
    window_steps = (int(steps[start]), int(steps[min(start + window, d.size) - 1]))
    return Difference(verdict, size, float(part.mean()), interval, pvalue, growth, shape, onset, window_steps, reason)


def _growth(difference: Floats, floor: NoiseFloor) -> tuple[Interval, Literal["flat", "growing", "unclear"]]:
    """Last over first quarter: training that differs drifts apart, rounding noise stays as it is."""
    quarter = max(difference.size // 4, 2)
    if not difference.any():
        return Interval(1.0, 1.0, 1.0, quarter, "identical"), "flat"
    ratio = _quarter_ratio(difference)
    # Judged as noise of the floor's own autocorrelation: a smooth drift must not hide behind its smoothness.
    freedom = max(floor.per_run * quarter / WINDOW, 1.0)
    reach = np.sqrt(stats.f.ppf((0.025, 0.975), freedom, freedom))
    interval = Interval(ratio, ratio / float(reach[1]), ratio / float(reach[0]), quarter, "F ratio 95%")
    usual = max(floor.growth, 1.0)
    if interval.low > usual:
        return interval, "growing"
    return interval, "flat" if ratio < 2 * usual else "unclear"


def _onset(outside: NDArray[np.bool_], steps: NDArray[np.int64]) -> int | None:
    """First step from which at least half of the following window stays outside the noise band."""
    for index in np.flatnonzero(outside):
        if outside[index : index + WINDOW].mean() >= 0.5:
            return int(steps[index])
    return None


def onset_ratio(a: Floats, b: Floats, first: int, window: int = WINDOW) -> float | None:
    """RMS of the difference after over before the first preconditioned update; None with fewer than 3 values before.

    GRIT gave 17-62 and reruns at most 2 in trials.
    """
    d = a - b
    if first < 3 or d.size - first < 5:
        return None
    before = rms(d[max(0, first - window) : first])
    after = rms(d[first : first + window])
    return (after / before) if before > 0 else (float("inf") if after > 0 else 1.0)


# -- correlation: descriptive only -----------------------------------------------------------------------------------


def detrend(series: Floats, terms: int = TREND_TERMS) -> Floats:
    """What is left of a series after its mean and slowest `terms` cosines (a high-pass of known degrees of freedom)."""
    n = series.size
    if n < 4 * (terms + 1):
        raise GRITError(f"{n} losses are too few to remove a trend; at least {4 * (terms + 1)} are needed")
    basis = np.cos(np.pi * np.outer(np.arange(n) + 0.5, np.arange(terms + 1)) / n)
    basis /= np.linalg.norm(basis, axis=0)
    rest = series - basis @ (basis.T @ series)
    # What rounding leaves of a constant must not pass for a signal.
    return np.asarray(np.where(np.abs(rest) > 1e-12 * np.max(np.abs(series)), rest, 0.0), dtype=np.float64)


def remove_difficulty(series: Floats, references: Sequence[Floats]) -> Floats:
    """What is left after regressing on the mean loss of reference runs (base, other optimizers) on the same batches.

    This is the batch's own difficulty. Other seeds of the same optimizers serve as well, if their batches are the same.
    """
    difficulty = np.mean(np.stack(references), axis=0)
    design = np.column_stack([np.ones_like(difficulty), difficulty])
    return np.asarray(series - design @ np.linalg.lstsq(design, series, rcond=None)[0], dtype=np.float64)


@dataclass(frozen=True, slots=True)
class LagCorrelation:
    """Correlation of two curves by lag, after removing trend, batch difficulty (where known) and autocorrelation.

    Attributes:
        lags: (2L + 1,) from -L to L; positive: b follows a.
        values: Correlations (2L + 1,).
        band: Half-width within which independent series stay at one lag with 95%.
        zero: The correlation at lag 0 with its interval.
        peak: Lag of the largest absolute correlation.
        shift_null: 97.5% quantile of |r| at lag 0 under circular shifts: the other-order null of this very pair.
        removed: What was removed, for the report.
    """

    lags: NDArray[np.int64]
    values: Floats
    band: float
    zero: Interval
    peak: int
    shift_null: float
    removed: str


def lag_correlation(
    a: Floats, b: Floats, references: Sequence[Floats] = (), *, max_lag: int = 20, confidence: float = 0.95
) -> LagCorrelation:
    """Lag-resolved correlation of prewhitened curves (Haugh, JASA 71, 1976).

    Both series are detrended (or, given references, freed of batch difficulty and then detrended), each is prewhitened
    with its own autoregression, and the residuals are correlated; only then does Fisher's interval hold (raw Pearson
    calls nearly all independent curves correlated).

    Args:
        a: Series (N,), N >= 30.
        b: Series (N,).
        references: Losses of other runs on the same batches (N,) each.
        max_lag: Largest lag.
        confidence: Of the interval at lag 0.
    """
    if a.size != b.size or a.size < 30:
        raise GRITError(f"correlation by lag needs two series of at least 30 losses, got {a.size} and {b.size}")
    removed = "slow trend and autocorrelation"
    if references:
        a, b = remove_difficulty(a, references), remove_difficulty(b, references)
        removed = f"batch difficulty ({len(references)} reference runs), {removed}"
    x, y = (prewhiten(detrend(s), AR_ORDER) for s in (a, b))
    x, y = x - x.mean(), y - y.mean()
    n, norm = x.size, float(np.sqrt((x @ x) * (y @ y)))
    max_lag = min(max_lag, n // 4)
    lags = signal.correlation_lags(n, n)
    full = signal.correlate(y, x) / norm if norm > 0 else np.zeros(lags.size)
    keep = np.abs(lags) <= max_lag
    # Trend, mean and autoregression each cost degrees of freedom.
    freedom = max(n - TREND_TERMS - 1 - 3, 1)
    z = float(stats.norm.ppf(0.5 + confidence / 2)) / np.sqrt(freedom)
    r = float(np.clip(full[lags == 0][0], -1, 1))
    centre = np.arctanh(np.clip(r, -1 + 1e-12, 1 - 1e-12))
    zero = Interval(r, float(np.tanh(centre - z)), float(np.tanh(centre + z)), n, f"Fisher z {confidence:.0%}")
    circular = np.fft.irfft(np.fft.rfft(x).conj() * np.fft.rfft(y), n) / norm if norm > 0 else np.zeros(n)
    null = float(np.quantile(np.abs(circular[max_lag + 1 : n - max_lag]), 0.975))
    values = np.asarray(full[keep], dtype=np.float64)
    peak = int(lags[keep][int(np.argmax(np.abs(values)))])
    return LagCorrelation(lags[keep].astype(np.int64), values, float(np.tanh(z)), zero, peak, null, removed)


def extrema_synchrony(a: Floats, b: Floats) -> tuple[float, float]:
    """Share of a's local extrema that b has at the same step, and the share expected under circular shifts of b."""

    def marks(series: Floats) -> NDArray[np.int64]:
        turn = np.sign(np.diff(series))
        return np.where(turn[:-1] * turn[1:] < 0, turn[:-1], 0).astype(np.int64)

    u, v = marks(a), marks(b)
    total = int(np.count_nonzero(u))
    if total == 0:
        return 0.0, 0.0
    hits = [float(np.count_nonzero((u == np.roll(v, k)) & (u != 0))) / total for k in range(v.size)]
    return hits[0], float(np.mean(hits[1:]))
