"""What curves can say: floors, paired differences, growth, onset and correlation on series of known truth."""

from __future__ import annotations

from types import ModuleType

import numpy as np
import pytest
from scipy import signal

from grit_impl.curves import noise as curves
from grit_impl.curves.noise import Floats
from grit_impl.errors import GRITError

STEPS = np.arange(1, 201)
NOISE = 2e-3


def noisy(base: Floats, seed: int, scale: float = NOISE) -> Floats:
    """The same training again, with white noise on each logged loss."""
    return base + np.random.default_rng([99, seed]).normal(0, scale, base.size)


def judge(a: Floats, b: Floats, reruns: list[Floats], **options: int) -> curves.Difference:
    """Difference against the floor of these reruns, at float32 resolution."""
    return curves.paired_difference(a, b, STEPS, curves.noise_floor(a, reruns, 1e-7), **options)


def test_identical_curves_do_not_divide_by_zero(logs: ModuleType) -> None:
    """Oracle: a bit-identical rerun leaves the float32 floor; identical curves are the same."""
    base = logs.curve()
    floor = curves.noise_floor(base, [base], 1e-7)
    assert floor.rms == pytest.approx(curves.NUMERIC_FLOOR * base.mean())
    assert "bit-identical" in floor.source
    found = judge(base, base.copy(), [base])
    assert (found.verdict, found.rms, found.onset, found.shape) == ("same", 0.0, None, "flat")


def test_rounding_of_the_log_is_a_floor(logs: ModuleType) -> None:
    """Oracle: two roundings to 2 decimals differ by RMS 0.01 / sqrt(6)."""
    rng = np.random.default_rng(0)
    exact = rng.uniform(1, 2, (2, 100_000))
    spread = curves.rms(np.round(exact, 2)[0] - exact[0] - (np.round(exact, 2)[1] - exact[1]))
    assert curves.noise_floor(logs.curve(), [logs.curve()], 0.01).rms == pytest.approx(spread, rel=0.02)


def test_noise_is_same_and_a_shift_is_different(logs: ModuleType) -> None:
    """Oracle: three reruns of white noise; a shift of 10 noise SDs; one of 3.5 SDs is neither."""
    base = logs.curve()
    reruns = [noisy(base, k) for k in range(3)]
    assert judge(base, noisy(base, 7), reruns).verdict == "same"
    assert judge(base, noisy(base, 7) + 10 * NOISE, reruns).verdict == "different"
    assert judge(base, noisy(base, 7) + 3.5 * NOISE, reruns).verdict == "inconclusive"


def test_one_rerun_of_autocorrelated_noise_is_weak_evidence(logs: ModuleType) -> None:
    """Oracle: an AR(1) rerun with phi = .9 is worth about two values, so 5 times the floor is not yet significant."""
    base = logs.curve()
    rng = np.random.default_rng(3)
    rerun = base + NOISE * np.sqrt(1 - 0.81) * signal.lfilter([1], [1, -0.9], rng.normal(size=200))
    floor = curves.noise_floor(base, [rerun], 1e-7)
    assert floor.freedom < 5
    shifted = base + 5 * floor.rms
    assert curves.paired_difference(base, shifted, STEPS, floor).verdict == "inconclusive"
    white = curves.noise_floor(base, [noisy(base, 1)], 1e-7)
    assert white.freedom > 15
    assert curves.paired_difference(base, base + 5 * white.rms, STEPS, white).verdict == "different"


def test_a_burst_in_the_rerun_raises_the_floor(logs: ModuleType) -> None:
    """Oracle: a rerun with a burst late in training; the same burst early in the other run is still noise."""
    base = logs.curve()
    rerun, other = noisy(base, 1), noisy(base, 2)
    rerun[120:130] += 0.05
    other[8:18] += 0.05
    assert judge(base, other, [rerun]).verdict != "different"


def test_without_a_rerun_flat_noise_does_not_convict_but_drift_does(logs: ModuleType) -> None:
    """Oracle: dropout noise of 3% is flat; training that differs drifts apart."""
    base = logs.curve()
    flat = judge(base, noisy(base, 1, 0.04), [])
    assert (flat.verdict, flat.shape) == ("inconclusive", "flat")
    drifting = base + np.concatenate([[0.0], np.linspace(0.02, 0.4, 199)])
    assert judge(base, drifting, []).verdict == "different"
    assert judge(base, noisy(base, 1, 6e-4), []).verdict == "same"


def test_growth_and_onset(logs: ModuleType) -> None:
    """Oracle: an effect that starts at step 101 and grows."""
    base = logs.curve()
    late = noisy(base, 5)
    late[100:] += np.linspace(0.05, 0.3, 100)
    found = judge(base, late, [noisy(base, k) for k in range(3)])
    assert found.verdict == "same"
    assert found.shape == "growing"
    assert found.onset is not None
    assert 92 <= found.onset <= 101
    assert judge(base, late, [noisy(base, 1)], start=100).verdict == "different"


def test_onset_ratio(logs: ModuleType) -> None:
    """Oracle: difference 0.001 before and 0.05 after the first update; too few values before are no evidence."""
    base = logs.curve()
    other = base + np.where(np.arange(200) < 30, 0.001, 0.05)
    assert curves.onset_ratio(base, other, 30) == pytest.approx(50)
    assert curves.onset_ratio(base, other, 2) is None
    assert curves.onset_ratio(base, base, 30) == 1.0


def test_detrending_removes_slow_and_keeps_fast() -> None:
    """Oracle: the slowest cosines vanish, a fast one stays, and the projection is idempotent."""
    t = np.arange(200) + 0.5
    fast = np.cos(np.pi * 40 * t / 200)
    slow = 3 + np.cos(np.pi * 2 * t / 200)
    np.testing.assert_allclose(curves.detrend(slow + fast), fast, atol=1e-12)
    with pytest.raises(GRITError, match="too few"):
        curves.detrend(np.ones(10))


@pytest.mark.parametrize("lag", [0, 3, -5])
def test_lag_is_found_with_its_sign(lag: int) -> None:
    """Oracle: b is a, shifted by a known number of steps (positive: b comes later)."""
    source = np.random.default_rng(1).normal(size=260)
    found = curves.lag_correlation(source[30:230], source[30 - lag : 230 - lag])
    assert found.peak == lag
    assert found.values[found.lags == lag][0] > 0.9


def test_independent_trending_curves_are_not_called_correlated(logs: ModuleType) -> None:
    """Oracle: 300 pairs of independent falling curves: raw Pearson is fooled, the interval errs in about 5%."""
    raw = excluded = 0
    for k in range(300):
        a, b = (logs.curve([k, j]) for j in (0, 1))
        raw += abs(np.corrcoef(a, b)[0, 1]) > 2 / np.sqrt(200)
        excluded += curves.lag_correlation(a, b).zero.excludes(0.0)
    assert raw > 280
    assert 3 <= excluded <= 30


def test_difficulty_is_removed_by_references(logs: ModuleType) -> None:
    """Oracle: two runs share only the batches' difficulty, which four other runs also show."""
    base = logs.curve()
    a, b, *others = (noisy(base, 20 + k, 0.02) for k in range(6))
    assert curves.lag_correlation(a, b).zero.low > 0.8
    cleaned = curves.lag_correlation(a, b, others)
    assert abs(cleaned.zero.estimate) < 0.45
    assert "4 reference runs" in cleaned.removed
    common = np.random.default_rng(8).normal(0, 0.05, 200)
    assert curves.lag_correlation(a + common, b + common, others).zero.low > 0.5


def test_constant_series_correlate_with_nothing() -> None:
    """Oracle: no variance, no correlation, and no division by zero."""
    found = curves.lag_correlation(np.ones(100), np.random.default_rng(0).normal(size=100))
    assert found.zero.estimate == 0.0
    with pytest.raises(GRITError, match="at least 30"):
        curves.lag_correlation(np.ones(10), np.ones(10))


def test_extrema_synchrony() -> None:
    """Oracle: a series with itself 1, with its negative 0, with an independent one about 1/3 as by chance."""
    x, y = np.random.default_rng(2).normal(size=(2, 2000))
    assert curves.extrema_synchrony(x, x)[0] == 1.0
    assert curves.extrema_synchrony(x, -x)[0] == 0.0
    together, chance = curves.extrema_synchrony(x, y)
    assert together == pytest.approx(chance, abs=0.05)
    assert curves.extrema_synchrony(np.arange(50.0), x[:50]) == (0.0, 0.0)


def test_too_few_losses_and_unequal_reruns(logs: ModuleType) -> None:
    """Oracle: five losses must follow the first update; a rerun has as many steps as its run."""
    base = logs.curve()
    floor = curves.noise_floor(base, [], 1e-7)
    with pytest.raises(GRITError, match="at least 5"):
        curves.paired_difference(base, base, STEPS, floor, start=197)
    with pytest.raises(GRITError, match="another number of steps"):
        curves.noise_floor(base, [base[:50]], 1e-7)
