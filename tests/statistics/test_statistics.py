"""The shared statistics against published examples, closed forms and brute force."""

from __future__ import annotations

import itertools

import numpy as np
import pytest
from scipy import optimize, stats
from scipy.special import xlogy

from grit_impl.errors import GRITError
from grit_impl.statistics import intervals, paired, series


def test_mcnemar_is_the_binomial_tail() -> None:
    """Oracle: the binomial sum written out."""
    tail = sum(float(stats.binom.pmf(k, 12, 0.5)) for k in (0, 1, 2))
    assert paired.mcnemar_exact(10, 2) == pytest.approx(2 * tail)
    assert paired.mcnemar_exact(0, 0) == 1.0
    with pytest.raises(GRITError, match="negative"):
        paired.mcnemar_exact(-1, 2)


def test_wilson_and_clopper_pearson_published() -> None:
    """Oracle: Newcombe (Statistics in Medicine 17, 1998, p. 857), table I: 81 of 263 and 0 of 20."""
    wilson, exact = intervals.wilson(81, 263), intervals.clopper_pearson(81, 263)
    assert (round(wilson.low, 4), round(wilson.high, 4)) == (0.2553, 0.3662)
    assert (round(exact.low, 4), round(exact.high, 4)) == (0.2527, 0.3676)
    assert round(intervals.wilson(0, 20).high, 4) == 0.1611
    assert round(intervals.clopper_pearson(0, 20).high, 4) == 0.1684
    with pytest.raises(GRITError, match="proportion"):
        intervals.wilson(3, 2)


@pytest.mark.parametrize(("both", "only_a", "only_b", "neither"), [(43, 0, 1, 0), (36, 12, 2, 0), (5, 9, 1, 30)])
def test_paired_interval_inverts_the_score_test(both: int, only_a: int, only_b: int, neither: int) -> None:
    """Oracle: at each end the score statistic, its nuisance maximised numerically, is exactly +-1.96."""
    a = [1] * both + [1] * only_a + [0] * only_b + [0] * neither
    b = [1] * both + [0] * only_a + [1] * only_b + [0] * neither
    interval, n = paired.paired_difference_interval(a, b), len(a)
    assert interval.estimate == pytest.approx((only_a - only_b) / n)
    for end in (interval.low, interval.high):

        def negative(p: float, delta: float = end) -> float:
            counts = ((only_a, p + delta), (only_b, p), (n - only_a - only_b, 1 - 2 * p - delta))
            return -sum(float(xlogy(k, max(share, 1e-300))) for k, share in counts)

        bounds = (max(0.0, -end) + 1e-12, (1 - end) / 2 - 1e-12)
        p = optimize.minimize_scalar(negative, bounds=bounds, method="bounded", options={"xatol": 1e-12}).x
        z = (only_a - only_b - n * end) / np.sqrt(n * (2 * p + end * (1 - end)))
        assert abs(z) == pytest.approx(1.96, abs=2e-3)


def test_paired_interval_covers() -> None:
    """Oracle: by simulation, 95% intervals at n = 60 cover the truth in 93-98%."""
    rng, hits = np.random.default_rng(0), 0
    for _ in range(1000):
        cell = rng.choice(4, size=60, p=[0.5, 0.2, 0.1, 0.2])
        interval = paired.paired_difference_interval((cell == 0) | (cell == 1), (cell == 0) | (cell == 2))
        hits += interval.low <= 0.1 <= interval.high
    assert 930 <= hits <= 980


def test_no_discordant_item_still_leaves_doubt() -> None:
    """Oracle: by the score test ten agreements cannot exclude z^2 / (n + z^2)."""
    interval = paired.paired_difference_interval([1] * 10, [1] * 10)
    z2 = 1.959964**2
    assert interval.high == pytest.approx(z2 / (10 + z2), abs=1e-6)
    assert interval.low == pytest.approx(-interval.high)


def test_holm_published() -> None:
    """Oracle: R's p.adjust(c(.01, .04, .03, .005), "holm") = .03 .06 .06 .02."""
    assert paired.holm([0.01, 0.04, 0.03, 0.005]) == pytest.approx([0.03, 0.06, 0.06, 0.02])


def test_sign_flips_by_brute_force_and_their_floor() -> None:
    """Oracle: all sign patterns; five pairs end at .0625, six at .03125; Monte Carlo agrees above 13."""
    d = np.array([0.3, -0.1, 0.4, 0.2, 0.25, 0.05, -0.02])
    sums = [abs(np.dot(signs, d)) for signs in itertools.product((-1, 1), repeat=d.size)]
    assert paired.sign_flip_test(d) == pytest.approx(np.mean(np.array(sums) >= abs(d.sum()) - 1e-12))
    assert paired.sign_flip_test(np.arange(1.0, 6)) == 0.0625
    assert paired.sign_flip_test(np.ones(6)) == 0.03125
    x = np.random.default_rng(1).normal(0.4, 1, 30)
    assert paired.sign_flip_test(x) == pytest.approx(float(stats.ttest_1samp(x, 0).pvalue), abs=0.02)


def test_t_interval() -> None:
    """Oracle: scipy's one-sample t-test; inclusion of the 90% interval is TOST at .05."""
    x = np.random.default_rng(2).normal(0.1, 1, 25)
    ci = stats.ttest_1samp(x, 0).confidence_interval(0.95)
    interval = intervals.t_interval(x)
    assert (interval.low, interval.high) == pytest.approx((ci.low, ci.high))
    assert intervals.t_interval([1.0]).high == np.inf
    assert intervals.t_interval([1.0]).to_dict()["high"] is None


def test_t_power_by_simulation_and_its_inverses() -> None:
    """Oracle: 34 pairs for half a standard deviation (Cohen 1988); simulated power."""
    assert paired.pairs_needed(0.5) == 34
    assert paired.minimum_detectable_effect(2.0, 34) == pytest.approx(1.0, rel=0.02)
    draws = np.random.default_rng(3).normal(0.5, 1, (4000, 34))
    share = float(np.mean(stats.ttest_1samp(draws, 0, axis=1).pvalue < 0.05))
    assert paired.t_power(0.5, 34) == pytest.approx(share, abs=0.03)
    assert paired.t_power(50.0, 10) == pytest.approx(1.0)
    assert paired.minimum_detectable_effect(1.0, 1) == float("inf")


def test_iqm_and_probability_of_improvement() -> None:
    """Oracle: by hand; Mann and Whitney's U over nm."""
    assert intervals.iqm([0, 1, 2, 3, 4, 5, 6, 1000]) == pytest.approx(3.5)
    a, b = [3.0, 4.0, 5.0], [1.0, 4.0, 2.0]
    interval = intervals.probability_of_improvement(a, b)
    assert interval.estimate == pytest.approx(float(stats.mannwhitneyu(a, b).statistic) / 9)
    assert interval.low <= interval.estimate <= interval.high


def test_effective_sample_size_of_ar1() -> None:
    """Oracle: n (1 - phi) / (1 + phi), and for a correlation n (1 - phi^2) / (1 + phi^2)."""
    rng, phi, n = np.random.default_rng(5), 0.7, 20_000
    x, y = np.zeros(n), np.zeros(n)
    for t in range(1, n):
        x[t], y[t] = phi * x[t - 1] + rng.normal(), phi * y[t - 1] + rng.normal()
    assert series.effective_sample_size(x) == pytest.approx(n * (1 - phi) / (1 + phi), rel=0.15)
    assert series.effective_sample_size(x[:4000], y[:4000]) == pytest.approx(
        4000 * (1 - phi**2) / (1 + phi**2), rel=0.3
    )
    assert series.effective_sample_size(rng.normal(size=2000)) > 1500


def test_prewhitening_whitens() -> None:
    """Oracle: residuals of an AR(2) have no autocorrelation beyond 2 / sqrt(n); their count is n - 4."""
    rng, x = np.random.default_rng(6), np.zeros(1000)
    for t in range(2, 1000):
        x[t] = 1.2 * x[t - 1] - 0.5 * x[t - 2] + rng.normal()
    residual = series.prewhiten(x)
    assert residual.size == 996
    assert np.abs(series.autocorrelation(residual, 5)[1:]).max() < 2.5 / np.sqrt(996)
    assert abs(series.autocorrelation(x, 1)[1]) > 0.7
    assert not series.prewhiten(np.ones(50)).any()


def test_correlation_interval_is_wider_for_smooth_series() -> None:
    """Oracle: on independent random walks plain Fisher z is fooled, the effective sample size is not."""
    rng, plain, adjusted = np.random.default_rng(7), 0, 0
    for _ in range(200):
        x, y = np.cumsum(rng.normal(size=(2, 150)), axis=1)
        z = 1.96 / np.sqrt(147)
        plain += abs(np.arctanh(np.corrcoef(x, y)[0, 1])) > z
        adjusted += series.correlation_interval(x, y).excludes(0.0)
    assert plain > 120
    assert adjusted < 60


@pytest.mark.parametrize("bad", [[], [1.0, float("nan")], [[1.0, 2.0]]])
def test_unusable_values(bad: list[float]) -> None:
    """Oracle: empty, not finite, two-dimensional."""
    with pytest.raises(GRITError):
        intervals.t_interval(bad)


def test_interval_helpers() -> None:
    """Oracle: by hand."""
    interval = intervals.Interval(0.1, -0.2, 0.4, 10, "x")
    assert not interval.excludes(0.0)
    assert interval.scaled(-100).high == pytest.approx(20)
    with pytest.raises(GRITError, match="equally many"):
        paired.paired_difference_interval([1, 0], [1])
    with pytest.raises(GRITError, match="right/wrong"):
        paired.paired_difference_interval([0.5], [1])
    with pytest.raises(GRITError, match="confidence"):
        intervals.wilson(1, 2, confidence=95)
