"""Curves to the last digit: floors, F ratios, growth, onset and lags, computed a second way or by hand."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import pytest
from scipy import stats

from grit_impl.curves import noise as curves
from grit_impl.curves.noise import NoiseFloor
from grit_impl.errors import GRITError
from grit_impl.statistics.series import autocorrelation, prewhiten

N = 100
STEPS = np.arange(11, 11 + N)
BASE = 2.0 + np.linspace(1, 0, N)
FLAT = NoiseFloor(0.01, 30.0, 12.0, 1.0, "by hand", True)
ASSUMED = NoiseFloor(0.01, curves.EXACT, 20.0, 1.0, "by hand", False)


def noise(seed: int, n: int = N, phi: float = 0.0) -> Any:
    """Unit noise, autoregressive of first order."""
    x = np.random.default_rng(seed).normal(size=n)
    for t in range(1, n):
        x[t] += phi * x[t - 1]
    return x


class TestFreedom:
    @pytest.mark.parametrize(("seed", "phi", "n"), [(0, 0.0, 20), (1, 0.5, 20), (2, 0.8, 7), (3, 0.3, 50)])
    def test_formula(self, seed: int, phi: float, n: int) -> None:
        """Oracle: Bartlett's n (1 - p^2) / (1 + p^2), p by Kendall's correction of the first autocorrelation."""
        x = noise(seed, phi=phi)
        first = float(autocorrelation(x, 1)[1])
        p = min(max(first + (1 + 3 * first) / x.size, 0.0), 0.99)
        assert curves._freedom(x, n) == pytest.approx(n * (1 - p * p) / (1 + p * p), rel=1e-12)

    def test_limits(self) -> None:
        """Oracle: a constant counts fully, alternation is worth no more than n, a random walk no less than 1."""
        assert curves._freedom(np.ones(9), 20) == 20.0
        assert curves._freedom(np.tile([1.0, -1.0], 50), 20) == 20.0
        assert curves._freedom(np.cumsum(np.ones(400)), 20) == 1.0
        ratio = (1 - 0.99**2) / (1 + 0.99**2)
        assert curves._freedom(np.cumsum(np.ones(400)), 1000) == pytest.approx(1000 * ratio)


class TestNoiseFloor:
    def test_assumed(self) -> None:
        """Oracle: bfloat16's 2**-9 of the mean, the log's rounding where that is coarser."""
        floor = curves.noise_floor(BASE, [], 1e-9)
        assert floor.rms == pytest.approx(2.5 / 512)
        assert (floor.freedom, floor.per_run, floor.growth, floor.measured) == (1e9, 20.0, 1.0, False)
        assert floor.source == "0.0049, assumed from bfloat16 rounding: no rerun was given"
        assert curves.noise_floor(BASE, [], 0.1).rms == pytest.approx(0.1 / math.sqrt(6))
        assert curves.noise_floor(BASE, [], 1e-9, scale=1.0, window=7).rms == 1 / 512
        assert curves.noise_floor(BASE, [], 1e-9, window=7).per_run == 7.0
        assert curves.noise_floor(-BASE, [], 1e-9).rms == pytest.approx(2.5 / 512)

    def test_known(self) -> None:
        """Oracle: float32's 1e-4 of the mean; what is within it is said to be so."""
        same = curves.noise_floor(BASE, [BASE], 1e-9)
        assert same == NoiseFloor(same.rms, 1e9, 20.0, 1.0, "0.00025, rounding: one rerun bit-identical", True)
        assert same.rms == pytest.approx(2.5e-4)
        near = curves.noise_floor(BASE, [BASE, BASE + 1e-4], 1e-9)
        assert near.source == "0.00025, rounding: 2 reruns within 0.0001"
        assert curves.noise_floor(BASE, [BASE], 1e-9, numeric=1e-3).rms == pytest.approx(2.5e-3)
        assert curves.noise_floor(BASE, [BASE + 0.5], 1e-9, scale=1e4).rms == 1.0

    def test_measured(self) -> None:
        """Oracle: the largest RMS of 20 consecutive values of any rerun, from the first update on; freedoms add up."""
        reruns = [BASE + 0.01 * noise(1), BASE + 0.02 * noise(2, phi=0.5)]
        reruns[0][0] += 9.0  # before the first update
        for start, window in ((1, 20), (5, 13)):
            differences = [r - BASE for r in reruns]
            largest = max(
                math.sqrt(float(np.mean(d[i : i + window] ** 2)))
                for d in differences
                for i in range(start, N - window + 1)
            )
            floor = curves.noise_floor(BASE, reruns, 1e-9, start=start, window=window)
            assert floor.rms == pytest.approx(largest, rel=1e-9)
            freedoms = [curves._freedom(d, window) for d in differences]
            assert floor.freedom == pytest.approx(sum(freedoms))
            assert floor.per_run == pytest.approx(min(freedoms))
            quarters = [curves.rms(d[-25:]) / curves.rms(d[:25]) for d in differences]
            assert floor.growth == pytest.approx(float(np.median(quarters)))
            assert floor.source == f"{largest:.2g}, measured: 2 reruns"
            assert floor.measured
        assert curves.noise_floor(BASE, reruns[:1], 1e-9).source.endswith(", measured: one rerun")

    def test_short_runs(self) -> None:
        """Oracle: fewer values than a window: all of them, and as many degrees of freedom."""
        short = BASE[:9]
        rerun = short + np.tile([0.1, -0.1, 0.1], 3)
        floor = curves.noise_floor(short, [rerun], 1e-9)
        assert floor.rms == pytest.approx(0.1)
        assert floor.freedom == 8.0

    def test_growth_of_a_rerun(self) -> None:
        """Oracle: last quarter over first; two values at least; from nothing to something is infinite."""
        assert curves._quarter_ratio(np.array([1.0] * 25 + [7.0] * 50 + [3.0] * 25)) == pytest.approx(3.0)
        assert curves._quarter_ratio(np.array([1.0, 1, 9, 2, 2])) == pytest.approx(2.0)
        assert curves._quarter_ratio(np.zeros(8)) == 1.0
        assert curves._quarter_ratio(np.array([0.0] * 6 + [1.0] * 2)) == math.inf
        assert curves._quarter_ratio(np.array([1.0] * 6 + [0.0] * 2)) == 0.0


class TestPairedDifference:
    @pytest.mark.parametrize(("freedom", "per_run"), [(30.0, 12.0), (4.0, 3.0), (1e9, 20.0), (50.0, 90.0)])
    def test_interval_and_pvalue(self, freedom: float, per_run: float) -> None:
        """Oracle: the ratio of two mean squares is F distributed; the freedom of a part is at most its size."""
        floor = NoiseFloor(0.01, freedom, per_run, 1.0, "", True)
        b = BASE - 0.015 * noise(4)
        found = curves.paired_difference(BASE, b, STEPS, floor)
        part = (BASE - b)[1:21]
        ratio, df = math.sqrt(float(np.mean(part**2))) / 0.01, min(per_run, 20.0)
        assert found.rms == pytest.approx(0.01 * ratio)
        assert found.mean == pytest.approx(float(part.mean()))
        assert found.window == (12, 31)
        ends = [ratio / math.sqrt(stats.f.ppf(q, df, freedom)) for q in (0.975, 0.025)]
        assert [found.ratio.estimate, found.ratio.low, found.ratio.high] == pytest.approx([ratio, *ends])
        assert (found.ratio.n, found.ratio.method) == (20, "F ratio 95%")
        assert found.pvalue == pytest.approx(float(stats.f.sf(ratio**2, df, freedom)))
        assert found.growth.method == "F ratio 95%"
        back = curves.paired_difference(b, BASE, STEPS, floor)
        assert (back.mean, back.rms) == pytest.approx((-found.mean, found.rms))

    def test_window(self) -> None:
        """Oracle: the values counted from the first after an update, cut at the end of the curve."""
        b = BASE + np.where(np.arange(N) < 90, 0.0, 0.5)
        late = curves.paired_difference(BASE, b, STEPS, FLAT, start=85, window=40)
        assert (late.ratio.n, late.window) == (15, (96, 110))
        assert late.rms == pytest.approx(0.5 * math.sqrt(10 / 15))
        narrow = curves.paired_difference(BASE, b, STEPS, FLAT, start=90, window=3)
        assert (narrow.ratio.n, narrow.window, narrow.mean) == (3, (101, 103), pytest.approx(-0.5))

    @pytest.mark.parametrize("left", [5, 4, 0])
    def test_at_least_five(self, left: int) -> None:
        """Oracle: five losses after the first update; the message says how many there are."""
        if left == 5:
            assert curves.paired_difference(BASE, BASE, STEPS, FLAT, start=N - left).verdict == "same"
            return
        for start in (N - left, N - left + (3 if left == 0 else 0)):
            with pytest.raises(GRITError, match=f"^{left} losses after the first update: at least 5 are needed"):
                curves.paired_difference(BASE, BASE, STEPS, FLAT, start=start)

    @pytest.mark.parametrize(
        ("size", "floor", "verdict", "reason"),
        [
            (0.0, FLAT, "same", "every logged value is bit-identical"),
            (
                0.029,
                FLAT,
                "inconclusive",
                "the difference (RMS 0.029) is 2.9 times the noise floor [1.9, 4.9]: more reruns",
            ),
            (0.06, FLAT, "different", "the difference (RMS 0.06) is 6 times the noise floor"),
            (0.012, FLAT, "same", "the difference (RMS 0.012) is 1.2 times the noise floor, surely below 3"),
            (0.012, ASSUMED, "same", "the difference (RMS 0.012) is 1.2 times the noise floor, surely below 3"),
            (
                0.06,
                ASSUMED,
                "inconclusive",
                "the difference (RMS 0.06) is 6 times the noise floor and does not grow; without a rerun, noise and a "
                "small effect look alike: run one arm again",
            ),
        ],
    )
    def test_verdicts(self, size: float, floor: NoiseFloor, verdict: str, reason: str) -> None:
        """Oracle: an alternating difference of known size against a floor of 0.01."""
        found = curves.paired_difference(BASE, BASE + size * np.tile([1.0, -1.0], N // 2), STEPS, floor)
        assert (found.verdict, found.shape) == (verdict, "flat")
        assert found.reason.split("[")[0] == reason.split("[")[0]

    def test_margin_and_alpha(self) -> None:
        """Oracle: the ratio is 6: no difference with a margin of 6, none at a significance it does not reach."""
        other = BASE + 0.0625 * np.tile([1.0, -1.0], N // 2)
        floor = NoiseFloor(0.0078125, 30.0, 12.0, 1.0, "", True)  # the ratio is 8
        pvalue = curves.paired_difference(BASE, other, STEPS, floor).pvalue
        for margin, alpha, verdict in ((7.9, 1e-3, "different"), (8.1, 1e-3, "inconclusive"), (20.0, 1e-3, "same")):
            assert curves.paired_difference(BASE, other, STEPS, floor, margin=margin, alpha=alpha).verdict == verdict
        assert curves.paired_difference(BASE, other, STEPS, floor, alpha=pvalue * 1.01).verdict == "different"
        assert curves.paired_difference(BASE, other, STEPS, floor, alpha=pvalue * 0.99).verdict == "inconclusive"

    def test_assumed_floor_needs_the_shape(self) -> None:
        """Oracle: growth tells drift from noise, as far as its interval does."""
        drift = BASE + np.concatenate([[0.0], np.geomspace(0.05, 5.0, N - 1)])
        found = curves.paired_difference(BASE, drift, STEPS, ASSUMED)
        assert (found.verdict, found.shape) == ("different", "growing")
        step = BASE + np.where(np.arange(N) < 50, 0.005, 0.0125) * np.tile([1.0, -1.0], N // 2)
        weak = NoiseFloor(0.01, curves.EXACT, 4.0, 1.0, "by hand", False)
        unclear = curves.paired_difference(BASE, step, STEPS, weak)
        assert (unclear.verdict, unclear.shape) == ("inconclusive", "unclear")


class TestGrowth:
    @pytest.mark.parametrize(
        ("last", "usual", "shape"),
        [
            (1.9, 1.0, "flat"),
            (2.0, 1.0, "unclear"),
            (2.1, 1.0, "unclear"),
            (9.0, 1.0, "growing"),
            (3.5, 2.0, "flat"),
            (4.5, 2.0, "unclear"),
            (9.0, 8.0, "flat"),
            (1.9, 0.1, "flat"),
        ],
    )
    def test_shape(self, last: float, usual: float, shape: str) -> None:
        """Oracle: below twice the usual growth is flat; growing only if the whole interval lies above it."""
        d = np.ones(N)
        d[75:] = last
        floor = NoiseFloor(0.01, 30.0, 4.0, usual, "", True)
        interval, found = curves._growth(d, floor)
        freedom = 4.0 * 25 / 20
        ends = [last / math.sqrt(stats.f.ppf(q, freedom, freedom)) for q in (0.975, 0.025)]
        assert [interval.estimate, interval.low, interval.high] == pytest.approx([last, *ends])
        assert (interval.n, found) == (25, shape)

    def test_few_values(self) -> None:
        """Oracle: one degree of freedom and two values at least; identical curves do not grow."""
        interval, _ = curves._growth(np.array([1.0, 1, 1, 1, 2, 2]), NoiseFloor(0.01, 3.0, 1.0, 1.0, "", True))
        assert (interval.n, interval.estimate) == (2, 2.0)
        assert interval.low == pytest.approx(2.0 / math.sqrt(stats.f.ppf(0.975, 1, 1)))
        odd, _ = curves._growth(np.ones(103), FLAT)
        assert (odd.n, type(odd.n)) == (25, int)
        nothing, shape = curves._growth(np.zeros(N), FLAT)
        assert (nothing.estimate, nothing.low, nothing.high, nothing.n, nothing.method, shape) == (
            1.0,
            1.0,
            1.0,
            25,
            "identical",
            "flat",
        )


class TestOnset:
    def test_half_of_the_next_window(self) -> None:
        """Oracle: a single outlier is no onset; the first of ten among twenty is; the end of the curve counts alone."""
        outside = np.zeros(N, dtype=bool)
        assert curves._onset(outside, STEPS) is None
        outside[3] = True
        outside[40:49] = True
        assert curves._onset(outside, STEPS) is None
        outside[59] = True
        assert curves._onset(outside, STEPS) == 11 + 40
        tail = np.zeros(N, dtype=bool)
        tail[-1] = True
        assert curves._onset(tail, STEPS) == 11 + N - 1

    def test_band_is_open(self) -> None:
        """Oracle: a difference of exactly three floors is inside the noise band."""
        floor = NoiseFloor(0.25, 30.0, 12.0, 1.0, "", True)
        flat = np.full(N, 2.0)
        assert curves.paired_difference(flat, flat + 0.75, STEPS, floor).onset is None
        assert curves.paired_difference(flat, flat + 0.76, STEPS, floor).onset == 11
        assert curves.paired_difference(flat, flat + 0.76, STEPS, floor, margin=4.0).onset is None

    def test_ratio(self) -> None:
        """Oracle: RMS of the window after over the window before, by hand; three before and five after at least."""
        d = np.concatenate([np.full(10, 5.0), np.full(20, 1.0), np.full(20, 2.5), np.full(50, 9.0)])
        assert curves.onset_ratio(d, np.zeros(N), 30) == pytest.approx(2.5)
        assert curves.onset_ratio(d, np.zeros(N), 30, 25) == pytest.approx(
            math.sqrt((20 * 2.5**2 + 5 * 81) / 25) / math.sqrt((20 + 5 * 25) / 25)
        )
        assert curves.onset_ratio(d, np.zeros(N), 3) == pytest.approx(math.sqrt((7 * 25 + 13) / 20) / 5)
        assert curves.onset_ratio(d, np.zeros(N), 2) is None
        assert curves.onset_ratio(d, np.zeros(N), N - 5) == pytest.approx(1.0)
        assert curves.onset_ratio(d, np.zeros(N), N - 4) is None
        sudden = np.where(np.arange(N) < 30, 0.0, 1.0)
        assert curves.onset_ratio(sudden, np.zeros(N), 30) == math.inf
        assert curves.onset_ratio(np.zeros(N), np.zeros(N), 30) == 1.0
        assert curves.onset_ratio(1 - sudden, np.zeros(N), 30) == 0.0


class TestCorrelation:
    def test_detrending(self) -> None:
        """Oracle: least squares on the first discrete cosines; rounding is no signal; enough values for the terms."""
        x = noise(1, 60) + np.linspace(3, 0, 60)
        for terms in (0, 2, 4):
            basis = np.array([[math.cos(math.pi * k * (t + 0.5) / 60) for k in range(terms + 1)] for t in range(60)])
            rest = x - basis @ np.linalg.lstsq(basis, x, rcond=None)[0]
            np.testing.assert_allclose(curves.detrend(x, terms), rest, atol=1e-10)
        assert curves.detrend(np.full(40, 7.0)).tolist() == [0.0] * 40
        tiny = np.full(40, 7.0) + 1e-9 * noise(2, 40)
        assert np.any(curves.detrend(tiny))
        assert curves.detrend(noise(0, 20)).size == 20
        with pytest.raises(GRITError, match="19 losses are too few to remove a trend; at least 20 are needed"):
            curves.detrend(noise(0, 19))

    def test_difficulty(self) -> None:
        """Oracle: the residual of a straight-line fit on the mean of the references."""
        x, references = noise(0), [noise(1), noise(2)]
        slope, intercept = np.polyfit((references[0] + references[1]) / 2, x, 1)
        expected = x - slope * (references[0] + references[1]) / 2 - intercept
        np.testing.assert_allclose(curves.remove_difficulty(x, references), expected, atol=1e-10)

    @pytest.mark.parametrize(("n", "max_lag", "confidence"), [(100, 20, 0.95), (64, 5, 0.9), (41, 20, 0.95)])
    def test_lags(self, n: int, max_lag: int, confidence: float) -> None:
        """Oracle: sums of products, lag by lag; Fisher's z with the degrees of freedom that are left; shifts."""
        a = noise(3, n, 0.6)
        b = 0.5 * np.roll(a, 2) + noise(4, n, 0.3)
        x, y = (prewhiten(curves.detrend(v), 4) for v in (a, b))
        x, y = x - x.mean(), y - y.mean()
        m, norm = x.size, math.sqrt(float(x @ x) * float(y @ y))
        limit = min(max_lag, m // 4)
        values = {k: sum(x[t] * y[t + k] for t in range(m) if 0 <= t + k < m) / norm for k in range(-limit, limit + 1)}
        found = curves.lag_correlation(a, b, max_lag=max_lag, confidence=confidence)
        assert found.lags.tolist() == list(values)
        assert found.values.tolist() == pytest.approx(list(values.values()), abs=1e-9)
        assert found.peak == max(values, key=lambda k: abs(values[k]))
        z = float(stats.norm.isf((1 - confidence) / 2)) / math.sqrt(m - 8)
        assert found.band == pytest.approx(math.tanh(z))
        ends = [math.tanh(math.atanh(values[0]) + side * z) for side in (-1, 1)]
        assert [found.zero.estimate, found.zero.low, found.zero.high] == pytest.approx([values[0], *ends], abs=1e-9)
        assert (found.zero.n, found.zero.method) == (m, f"Fisher z {confidence:.0%}")
        shifts = [abs(float(x @ np.roll(y, -k))) / norm for k in range(limit + 1, m - limit)]
        assert found.shift_null == pytest.approx(float(np.quantile(shifts, 0.975)), abs=1e-9)
        assert found.removed == "slow trend and autocorrelation"

    def test_references(self) -> None:
        """Oracle: the same correlation, after the straight-line fits."""
        a, b, references = noise(3), noise(4), [noise(5), noise(6), noise(7)]
        free = [curves.remove_difficulty(v, references) for v in (a, b)]
        found, expected = curves.lag_correlation(a, b, references), curves.lag_correlation(*free)
        assert found.values.tolist() == pytest.approx(expected.values.tolist())
        assert found.removed == "batch difficulty (3 reference runs), slow trend and autocorrelation"

    def test_units_and_extremes(self) -> None:
        """Oracle: correlations have no unit; a curve with itself, and with its negative."""
        a, b = noise(3), noise(4)
        small = curves.lag_correlation(1e-5 * a, 1e-5 * b)
        usual = curves.lag_correlation(a, b)
        assert small.values.tolist() == pytest.approx(usual.values.tolist(), abs=1e-9)
        assert small.shift_null == pytest.approx(usual.shift_null, abs=1e-9)
        same, opposite = curves.lag_correlation(a, a), curves.lag_correlation(a, -a)
        assert same.zero.estimate == pytest.approx(1.0)
        assert 0.999 < same.zero.low <= same.zero.high <= 1.0
        assert opposite.zero.estimate == pytest.approx(-1.0)
        assert -1.0 <= opposite.zero.low <= opposite.zero.high < -0.999
        constant = curves.lag_correlation(np.ones(N), b)
        assert not constant.values.any()
        assert constant.shift_null == 0.0
        assert curves.lag_correlation(noise(0, 30), noise(1, 30)).zero.n == 26

    @pytest.mark.parametrize(("n", "m"), [(29, 29), (40, 41), (41, 40)])
    def test_refused(self, n: int, m: int) -> None:
        """Oracle: both lengths, in one line."""
        with pytest.raises(GRITError, match=f"at least 30 losses, got {n} and {m}"):
            curves.lag_correlation(noise(0, n), noise(1, m))

    def test_extrema(self) -> None:
        """Oracle: peaks and troughs marked and shifted by hand; plateaus are neither."""
        a = np.array([0.0, 1, 0, 1, 2, 1, 1, 0])
        b = np.array([0.0, 1, 0, 0, 0, 1, 0, 0])
        # Marks of a: peak, trough, none, peak, none, none; of b: peak, none, none, none, peak, none.
        u, v = np.array([1, -1, 0, 1, 0, 0]), np.array([1, 0, 0, 0, 1, 0])
        by_hand = [sum(p == q != 0 for p, q in zip(u, np.roll(v, k), strict=True)) / 3 for k in range(6)]
        together, chance = curves.extrema_synchrony(a, b)
        assert together == pytest.approx(1 / 3)
        assert chance == pytest.approx(sum(by_hand[1:]) / 5)
        assert curves.extrema_synchrony(b, a)[0] == pytest.approx(1 / 2)
