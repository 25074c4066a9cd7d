"""The shared statistics to the last digit: second implementations, closed forms, and each edge of each domain."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import pytest
from scipy import special, stats

from grit_impl.errors import GRITError
from grit_impl.statistics import intervals, paired, series

Z = 1.959963984540054
"""97.5% point of the normal distribution."""


def walk(seed: int, n: int, *phi: float) -> Any:
    """An autoregressive series."""
    rng, x = np.random.default_rng(seed), np.zeros(n)
    for t in range(n):
        x[t] = sum(p * x[t - k] for k, p in enumerate(phi, 1) if t >= k) + rng.normal()
    return x


class TestInterval:
    def test_ends_belong_to_it(self) -> None:
        """Oracle: a closed interval excludes neither of its ends."""
        interval = intervals.Interval(0.0, -1.0, 2.0, 5, "m")
        assert [interval.excludes(v) for v in (-1.001, -1.0, 0.0, 2.0, 2.001)] == [True, False, False, False, True]
        assert intervals.Interval(1.0, 1.0, 2.0, 5, "m").excludes()

    def test_unit_changes(self) -> None:
        """Oracle: all three numbers times the factor, the ends in order."""
        interval = intervals.Interval(0.1, -0.2, 0.4, 10, "m")
        assert interval.scaled(100) == intervals.Interval(10.0, -20.0, 40.0, 10, "m")
        assert interval.scaled(-10) == intervals.Interval(-1.0, -4.0, 2.0, 10, "m")

    def test_json(self) -> None:
        """Oracle: infinite ends are null, everything else as it is."""
        found = intervals.Interval(1.0, -np.inf, 2.0, 3, "m").to_dict()
        assert found == {"estimate": 1.0, "low": None, "high": 2.0, "n": 3, "method": "m"}


class TestInput:
    @pytest.mark.parametrize(
        ("values", "minimum", "message"),
        [
            ([], 1, "x: needs a sequence of at least 1 numbers, got shape (0,)"),
            ([1.0], 2, "x: needs a sequence of at least 2 numbers, got shape (1,)"),
            ([[1.0, 2.0]], 1, "x: needs a sequence of at least 1 numbers, got shape (1, 2)"),
            (3.0, 1, "x: needs a sequence of at least 1 numbers, got shape ()"),
            ([1.0, 2.0, np.inf], 1, "x: entry 2 is not finite; drop or repair it first"),
        ],
    )
    def test_refused(self, values: Any, minimum: int, message: str) -> None:
        """Oracle: one line that names the argument, what it takes and what it got."""
        with pytest.raises(GRITError) as error:
            intervals.as_floats(values, "x", minimum)
        assert str(error.value) == message

    def test_accepted_at_the_minimum(self) -> None:
        """Oracle: exactly as many as asked for."""
        assert intervals.as_floats([1, 2], "x", 2).tolist() == [1.0, 2.0]
        assert intervals.as_floats([7], "x").tolist() == [7.0]

    @pytest.mark.parametrize("confidence", [0.0, 1.0, -0.5, 1.5])
    def test_confidence_is_open(self, confidence: float) -> None:
        """Oracle: no interval has a confidence of 0 or 1."""
        calls = (
            lambda: intervals.wilson(1, 2, confidence),
            lambda: intervals.t_interval([1.0, 2.0], confidence),
            lambda: intervals.probability_of_improvement([1.0], [2.0], confidence),
            lambda: series.correlation_interval(range(9), range(9), confidence),
            lambda: paired.paired_difference_interval([1], [0], confidence),
        )
        for call in calls:
            with pytest.raises(GRITError, match="confidence must lie between 0 and 1"):
                call()

    def test_each_pair_has_two(self) -> None:
        """Oracle: the two lengths, by name."""
        with pytest.raises(GRITError, match="equally many values, got 2 and 3"):
            series.effective_sample_size([1, 2], [1, 2, 3])


class TestProportions:
    @pytest.mark.parametrize(("k", "n", "confidence"), [(0, 1, 0.95), (1, 1, 0.95), (3, 7, 0.9), (7, 7, 0.99)])
    def test_closed_forms(self, k: int, n: int, confidence: float) -> None:
        """Oracle: Wilson's formula, and the beta quantiles of Clopper and Pearson."""
        z, p = float(stats.norm.isf((1 - confidence) / 2)), k / n
        centre, half = p + z * z / (2 * n), z * math.sqrt(p * (1 - p) / n + z * z / (4 * n * n))
        wilson, exact = intervals.wilson(k, n, confidence), intervals.clopper_pearson(k, n, confidence)
        ends = [(centre - half) / (1 + z * z / n), (centre + half) / (1 + z * z / n)]
        assert [wilson.low, wilson.high] == pytest.approx(ends, abs=1e-12)
        tail = (1 - confidence) / 2
        low = special.betaincinv(k, n - k + 1, tail) if k else 0.0
        high = special.betaincinv(k + 1, n - k, 1 - tail) if k < n else 1.0
        assert [exact.low, exact.high] == pytest.approx([low, high], abs=1e-9)
        assert (wilson.estimate, wilson.n, exact.estimate, exact.n) == (p, n, p, n)
        assert wilson.method == f"Wilson {100 * confidence:.6g}%"
        assert exact.method == f"Clopper-Pearson {100 * confidence:.6g}%"

    @pytest.mark.parametrize(("k", "n"), [(-1, 2), (3, 2), (0, 0), (0, -1)])
    def test_impossible_counts(self, k: int, n: int) -> None:
        """Oracle: the counts, in one line."""
        with pytest.raises(GRITError, match=f"got k={k}, n={n}"):
            intervals.wilson(k, n)

    @pytest.mark.parametrize(("b", "c", "p"), [(0, 0, 1.0), (1, 0, 1.0), (0, 5, 0.0625), (6, 0, 0.03125), (3, 3, 1.0)])
    def test_mcnemar(self, b: int, c: int, p: float) -> None:
        """Oracle: 2 / 2**n where all discordant items agree."""
        assert paired.mcnemar_exact(b, c) == pytest.approx(p)
        assert paired.mcnemar_exact(c, b) == pytest.approx(p)

    @pytest.mark.parametrize(("b", "c"), [(-1, 0), (0, -1)])
    def test_mcnemar_refuses(self, b: int, c: int) -> None:
        """Oracle: both counts, as given."""
        with pytest.raises(GRITError, match=f"cannot be negative, got {b} and {c}"):
            paired.mcnemar_exact(b, c)

    @pytest.mark.parametrize(("b", "c", "n"), [(5, 0, 5), (3, 1, 9), (0, 0, 4), (7, 2, 300), (1, 0, 1)])
    @pytest.mark.parametrize("confidence", [0.8, 0.95])
    def test_tango(self, b: int, c: int, n: int, confidence: float) -> None:
        """Oracle: Tango's ends solve (b - c - n d)^2 = z^2 n (2 p21 + d (1 - d)); swapping models mirrors them."""
        x, y = [1] * b + [0] * (n - b), [0] * b + [1] * c + [0] * (n - b - c)
        interval, mirrored = (paired.paired_difference_interval(u, v, confidence) for u, v in ((x, y), (y, x)))
        assert interval.estimate == (b - c) / n
        assert (interval.n, interval.method) == (n, f"Tango paired score {100 * confidence:.6g}%")
        assert (mirrored.low, mirrored.high) == pytest.approx((-interval.high, -interval.low), abs=1e-9)
        z2 = float(stats.norm.isf((1 - confidence) / 2)) ** 2
        for d in (interval.low, interval.high):
            if abs(d) == 1.0:
                continue
            # p21 is the larger root of 2 n p^2 + B p + C (Tango's equations 5 to 7).
            p21 = max(np.roots([2 * n, -b - c + (2 * n - b + c) * d, -c * d * (1 - d)]).real)
            assert (b - c - n * d) ** 2 == pytest.approx(z2 * n * (2 * p21 + d * (1 - d)), abs=1e-6)
        assert (interval.high == 1.0) == (b == n)
        assert interval.low < interval.estimate <= interval.high

    def test_holm(self) -> None:
        """Oracle: R's p.adjust; never above 1; the order is the caller's."""
        assert paired.holm([0.02]) == [0.02]
        assert paired.holm([0.9, 0.8]) == [1.0, 1.0]
        assert paired.holm([0.5, 0.01, 0.02]) == pytest.approx([0.5, 0.03, 0.04])
        assert paired.holm([0.01, 0.0101, 0.5]) == pytest.approx([0.03, 0.03, 0.5])


class TestPairs:
    def test_t(self) -> None:
        """Oracle: tables of Student's t; by hand for 1, 2, 3: mean 2, standard error 1 / sqrt(3)."""
        assert intervals.t_critical(9) == pytest.approx(2.262157, abs=1e-6)
        assert intervals.t_critical(1, 0.9) == pytest.approx(6.313752, abs=1e-6)
        interval = intervals.t_interval([1, 2, 3])
        half = 4.302653 / math.sqrt(3)
        assert (interval.low, interval.high) == pytest.approx((2 - half, 2 + half), abs=1e-5)
        assert (interval.estimate, interval.n, interval.method) == (2.0, 3, "paired t 95%")
        assert intervals.t_interval([5.0], 0.9) == intervals.Interval(5.0, -math.inf, math.inf, 1, "paired t 90%")

    def test_sign_flips(self) -> None:
        """Oracle: counts of 2**13 flips are exact; above, 9,999 draws and the observed one: never below 1e-4."""
        assert paired.sign_flip_test(np.ones(13)) == 2 / 2**13
        assert paired.sign_flip_test(np.ones(30)) == 1e-4
        assert paired.sign_flip_test([0.1, 0.2, -0.3]) == 1.0  # sums that are zero but for rounding
        assert paired.sign_flip_test([0.1, 0.2, 0.3]) == 0.25
        assert paired.sign_flip_test([0.3, 0.3, -0.3]) == 1.0
        d = np.random.default_rng(1).normal(0.3, 1, 20)
        signs = np.random.default_rng(5).choice((-1.0, 1.0), size=(9_999, 20))
        hits = sum(abs(float(row @ d)) >= abs(float(d.sum())) - 1e-9 for row in signs)
        assert paired.sign_flip_test(d, seed=5) == (hits + 1) / 10_000
        assert paired.sign_flip_test(d) == paired.sign_flip_test(d, 0)
        ties = np.tile([0.1, 0.2, -0.3], 5)
        assert paired.sign_flip_test(ties) == 1.0
        assert paired.sign_flip_test([2.0]) == 1.0

    @pytest.mark.parametrize("n", [2, 3, 10, 200])
    @pytest.mark.parametrize("effect", [-0.7, 0.0, 0.05, 0.5, 3.0])
    def test_power(self, n: int, effect: float) -> None:
        """Oracle: the noncentral F distribution with 1 and n - 1 degrees of freedom, which a squared t has."""
        for alpha in (0.05, 0.01):
            expected = stats.ncf.sf(stats.f.isf(alpha, 1, n - 1), 1, n - 1, n * effect**2) if effect else alpha
            assert paired.t_power(effect, n, alpha) == pytest.approx(float(expected), abs=1e-8)
        assert paired.t_power(effect, n) == paired.t_power(effect, n, 0.05)

    def test_power_of_one_pair(self) -> None:
        """Oracle: one pair has no standard deviation; a power is at most 1."""
        assert paired.t_power(5.0, 1) == 0.0
        assert 0 < paired.t_power(5.0, 2) < 1
        assert paired.t_power(1e4, 50) == 1.0

    def test_detectable_effect(self) -> None:
        """Oracle: the effect at which the power is the wanted one, in the unit of the standard deviation."""
        for n, alpha, power in ((2, 0.05, 0.8), (10, 0.01, 0.9), (50, 0.2, 0.6)):
            found = paired.minimum_detectable_effect(3.0, n, alpha, power)
            assert paired.t_power(found / 3.0, n, alpha) == pytest.approx(power, abs=1e-8)
        assert paired.minimum_detectable_effect(1.0, 20) == paired.minimum_detectable_effect(1.0, 20, 0.05, 0.8)
        assert paired.minimum_detectable_effect(0.0, 20) == 0.0
        assert paired.minimum_detectable_effect(0.0, 1) == math.inf
        with pytest.raises(GRITError, match=r"cannot be negative, got -0\.1"):
            paired.minimum_detectable_effect(-0.1, 20)

    @pytest.mark.parametrize("effect", [0.05, 0.3, 1.0, 4.0])
    def test_pairs_needed_is_the_least(self, effect: float) -> None:
        """Oracle: enough power with it, not enough with one less."""
        for alpha, power in ((0.05, 0.8), (0.01, 0.95)):
            n = paired.pairs_needed(effect, alpha, power)
            assert paired.t_power(effect, n, alpha) >= power > paired.t_power(effect, n - 1, alpha)
        assert paired.pairs_needed(effect) == paired.pairs_needed(effect, 0.05, 0.8, 100_000)

    def test_pairs_needed_at_its_limits(self) -> None:
        """Oracle: two pairs at least; the limit where nothing would do."""
        assert paired.pairs_needed(100.0) == 2
        assert paired.pairs_needed(0.0) == 100_000
        assert [paired.pairs_needed(0.5, limit=limit) for limit in (33, 34, 35)] == [33, 34, 34]


class TestRuns:
    def test_interquartile_mean(self) -> None:
        """Oracle: the mean of the middle half, along the asked axis."""
        table = np.array([[0, 1, 2, 9], [4, 5, 7, 8.0]])
        assert intervals.iqm(table).tolist() == [1.5, 6.0]
        assert intervals.iqm(table.T, axis=0).tolist() == [1.5, 6.0]

    def test_probability_of_improvement(self) -> None:
        """Oracle: counting pairs one by one, in the same resamples; ties count half."""
        a, b = [3.0, 4.0, 5.0, 4.0], [4.0, 3.5, 6.0]

        def count(u: Any, v: Any) -> float:
            return float(np.mean([(x > y) + 0.5 * (x == y) for x in u for y in v]))

        rng = np.random.default_rng(7)
        first, second = rng.integers(4, size=(9_999, 4)), rng.integers(3, size=(9_999, 3))
        draws = [count(np.take(a, i), np.take(b, j)) for i, j in zip(first[:500], second[:500], strict=True)]
        found = intervals.probability_of_improvement(a, b, 0.9, 7)
        assert found.estimate == pytest.approx(count(a, b))
        assert (found.n, found.method) == (3, "bootstrap 90%")
        wins = (np.array(a)[first][:, :, None] - np.array(b)[second][:, None, :] > 0).sum((1, 2))
        ties = (np.array(a)[first][:, :, None] == np.array(b)[second][:, None, :]).sum((1, 2))
        every = (wins + ties / 2) / 12
        assert draws == pytest.approx(every[:500].tolist())
        assert (found.low, found.high) == pytest.approx(tuple(np.quantile(every, (0.05, 0.95))))
        sure = intervals.probability_of_improvement([5, 6], [1, 2])
        assert (sure.estimate, sure.low, sure.high, sure.method) == (1.0, 1.0, 1.0, "bootstrap 95%")
        assert intervals.probability_of_improvement(a, b) == intervals.probability_of_improvement(a, b, 0.95, 0)


class TestSeries:
    @pytest.mark.parametrize("scale", [1.0, 1e-6])
    def test_autocorrelation(self, scale: float) -> None:
        """Oracle: by hand for 1, 2, 3, 4, whatever the unit; a constant correlates with nothing."""
        x = scale * np.array([1.0, 2, 3, 4])
        assert series.autocorrelation(x, 3).tolist() == pytest.approx([1, 0.25, -0.3, -0.45])
        assert series.autocorrelation(x, 9).size == 4
        assert series.autocorrelation(x).tolist() == pytest.approx([1, 0.25])
        assert series.autocorrelation(np.arange(40.0)).size == 11
        assert series.autocorrelation([scale, scale, scale], 2).tolist() == [1, 0, 0]
        assert series.autocorrelation([1.0, 2.0], 0).tolist() == [1.0]

    @pytest.mark.parametrize(
        "x", [walk(0, 200, 0.8), walk(1, 201, 0.5), walk(2, 57, 0.95), walk(3, 40, -0.6), walk(4, 30), np.arange(24.0)]
    )
    def test_effective_size_of_one_series(self, x: Any) -> None:
        """Oracle: Geyer's sum of pairs of autocorrelations, added one by one until a pair is not positive."""
        n = x.size
        c = x - x.mean()
        rho = [float(c[: n - k] @ c[k:]) / float(c @ c) for k in range(n // 4 + 1)]
        total, k = 0.0, 1
        while k + 1 <= n // 4 and rho[k] + rho[k + 1] > 0:
            total += rho[k] + rho[k + 1]
            k += 2
        assert series.effective_sample_size(x) == pytest.approx(min(max(n / (1 + 2 * total), 1.0), n), rel=1e-9)

    def test_effective_size_of_two_series(self) -> None:
        """Oracle: Bartlett's sum, term by term; between 1 and n."""
        for x, y in ((walk(0, 80, 0.9), walk(1, 80, 0.7)), (walk(2, 41, 0.3), walk(3, 41, 0.9))):
            n = x.size
            u, v = x - x.mean(), y - y.mean()
            total = 0.0
            for k in range(1, n // 4 + 1):
                rho = [float(c[: n - k] @ c[k:]) / float(c @ c) for c in (u, v)]
                total += (1 - k / n) * rho[0] * rho[1]
            assert series.effective_sample_size(x, y) == pytest.approx(min(max(n / (1 + 2 * total), 1.0), n), rel=1e-9)
        opposite = np.tile([1.0, -1.0], 20) + walk(4, 40) / 10
        assert series.effective_sample_size(opposite, walk(5, 40, 0.9)) == 40.0
        assert series.effective_sample_size([1.0, 2.0]) == 2.0
        with pytest.raises(GRITError, match="at least 2"):
            series.effective_sample_size([1.0], [1.0])

    @pytest.mark.parametrize(
        ("x", "order"),
        [
            (walk(0, 15), 4),
            (walk(1, 60, 0.9), 4),
            (walk(2, 200, 1.2, -0.6), 4),
            (walk(3, 24, 0.4), 2),
            (walk(5, 9, 0.9), 2),
        ],
    )
    @pytest.mark.parametrize("scale", [1.0, 1e-3])
    def test_prewhitening(self, x: Any, order: int, scale: float) -> None:
        """Oracle: the normal equations of each order, scored by AICc = n log(RSS / n) + 2 k n / (n - k - 1)."""
        c = scale * (x - x.mean())
        n, target = x.size - order, c[order:]
        fits = []
        for p in range(order + 1):
            past = np.array([[c[t - k] for k in range(1, p + 1)] for t in range(order, x.size)])
            fit = past @ np.linalg.solve(past.T @ past, past.T @ target) if p else np.zeros(n)
            rss, k = float(((target - fit) ** 2).sum()), p + 1
            fits.append((n * math.log(rss / n) + 2 * k * n / (n - k - 1), target - fit))
        best = min(fits, key=lambda pair: pair[0])[1]
        np.testing.assert_allclose(series.prewhiten(scale * x, order), best, atol=1e-9 * scale)

    def test_prewhitening_of_few_values(self) -> None:
        """Oracle: three values per order and three more; a constant leaves nothing."""
        assert series.prewhiten(walk(0, 15)).size == 11
        with pytest.raises(GRITError, match="at least 15"):
            series.prewhiten(walk(0, 14))
        assert series.prewhiten(np.full(20, 3.0)).tolist() == [0.0] * 16

    def test_correlation_interval(self) -> None:
        """Oracle: Fisher's z on the effective size, written out; not changed by units; nothing for a constant."""
        x, y = walk(0, 120, 0.6), walk(1, 120, 0.6)
        y = y + x
        for scale, confidence in ((1.0, 0.95), (1e-4, 0.9)):
            found = series.correlation_interval(scale * x, scale * y, confidence)
            size, r = series.effective_sample_size(x, y), float(np.corrcoef(x, y)[0, 1])
            half = float(stats.norm.isf((1 - confidence) / 2)) / math.sqrt(size - 3)
            ends = [math.tanh(math.atanh(r) + side * half) for side in (-1, 1)]
            assert [found.estimate, found.low, found.high] == pytest.approx([r, *ends], abs=1e-9)
            assert (found.n, found.method) == (120, f"Fisher z {100 * confidence:.6g}%, effective n {size:.0f}")
        same = series.correlation_interval(x, x)
        assert same.estimate == pytest.approx(1.0)
        assert 0.99 < same.low <= same.high <= 1.0
        assert series.correlation_interval(x, -x).high < -0.99
        for u, v in ((np.ones(30), x[:30]), (x[:30], np.ones(30))):
            assert series.correlation_interval(u, v).estimate == 0.0
        with pytest.raises(GRITError, match="at least 5"):
            series.correlation_interval(range(4), range(4))

    def test_correlation_of_hardly_anything(self) -> None:
        """Oracle: an effective size of 4 at least: five values give the widest interval, z / 1."""
        found = series.correlation_interval([1.0, 2.0, 3.0, 4.0, 5.0], [1.0, 2.0, 1.0, 2.0, 1.0])
        assert (found.low, found.high) == pytest.approx((-math.tanh(Z / math.sqrt(2)), math.tanh(Z / math.sqrt(2))))
        u, v = [-2.0, -2, 0, 2, 2], [-2.0, -2, 0, 1, 3]
        drift = series.correlation_interval(u, v)
        assert series.effective_sample_size(u, v) < 4
        z = math.atanh(drift.estimate)
        assert drift.low == pytest.approx(math.tanh(z - Z), abs=1e-6)
        assert drift.method.endswith("effective n 4")
