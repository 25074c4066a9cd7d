"""Evaluations with known truth: do the intervals cover, do the gates keep their error, is the promised power real?

The answers are drawn, everything after them is the real code.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from functools import lru_cache

import numpy as np
import pytest
from scipy import stats

from grit_impl.evaluate.gates import ACCURACIES, SESSION_ALPHA, decide, judge
from grit_impl.evaluate.metrics import GATE_ALPHA
from grit_impl.evaluate.options import Thresholds
from grit_impl.evaluate.results import Evaluation
from grit_impl.evaluate.speed import CLONE
from grit_impl.statistics.paired import mcnemar_exact, paired_difference_interval
from grit_impl.statistics.power import detectable_difference, mcnemar_power

GATES = 11
"""Three models: three gates each, and two over the baseline."""
ALPHA = SESSION_ALPHA / 2 / GATES
LABELS = ("base", "baseline", "hybrid", "pure")
AQI = {right: {"category_right": right, "unparsable": False} for right in (True, False)}
KNOWLEDGE = {right: {"correct": right, "unparsable": False} for right in (True, False)}


def _rows(label: str, suite: str, rights: Sequence[bool]) -> list[dict]:
    table = AQI if suite == "aqi" else KNOWLEDGE
    return [
        {"label": label, "suite": suite, "item": str(i), "scores": table[bool(right)]} for i, right in enumerate(rights)
    ]


def _pair(rng: np.random.Generator, n: int, base: float, gained: float, lost: float):
    """Right or wrong for the base, and for a model that gains and loses these shares of all items."""
    first = rng.random(n) < base
    chance = np.where(first, lost / base, gained / (1 - base))
    return first, first ^ (rng.random(n) < chance)


@pytest.mark.parametrize(
    ("base", "gained", "lost"),
    [(0.25, 0.30, 0.05), (0.26, 0.10, 0.10), (0.6, 0.05, 0.02), (0.5, 0.25, 0.25)],
    ids=["fine-tuning", "no effect", "small gain", "noise"],
)
def test_intervals_cover_the_truth(base: float, gained: float, lost: float) -> None:
    """Oracle: the truth of the simulation; 95% intervals must hold it in 93-97% of 1,000 evaluations."""
    rng = np.random.default_rng(7)
    runs, covered = 1000, np.zeros(2)
    for _ in range(runs):
        first, second = _pair(rng, 400, base, gained, lost)
        evaluation = Evaluation({"base": "b", "pure": "p"}, _rows("base", "aqi", first) + _rows("pure", "aqi", second))
        delta, accuracy = evaluation.compare("pure", "base").difference, evaluation.accuracy("pure")
        covered += (
            delta.low <= 100 * (gained - lost) <= delta.high,
            accuracy.low <= 100 * (base + gained - lost) <= accuracy.high,
        )
    assert (covered / runs >= 0.93).all(), covered / runs
    assert (covered / runs <= 0.97).all(), covered / runs


def _session(rng: np.random.Generator, gain: float, ratio: float, kept: float) -> Evaluation:
    """Four models; every fine-tuned one has exactly this gain, speed ratio and retention."""
    n, facts = 300, 150
    base = rng.random(n) < 0.25
    knows = rng.random(facts) < 0.85
    rows = _rows("base", "aqi", base) + _rows("base", "knowledge", knows)
    speed = []
    drift = np.cumsum(rng.normal(0, 0.02, 30))
    (copies,) = rng.spawn(1)
    for label in LABELS[1:]:
        lost, gained = 0.10, 0.10 + gain
        chance = np.where(base, lost / 0.25, gained / 0.75)
        rows += _rows(label, "aqi", base ^ (rng.random(n) < chance))
        rows += _rows(label, "knowledge", np.where(knows, rng.random(facts) < kept, rng.random(facts) < 0.1))
    for label in (*LABELS, CLONE):
        level = 1.0 if label in ("base", CLONE) else ratio
        # The copy draws its own numbers: those of the models are the same with it and without.
        drawn = copies if label == CLONE else rng
        noise = np.exp(drift + 0.03 * drawn.standard_t(3, 30)) if label != "base" else np.exp(drift)
        speed += [{"round": k, "label": label, "tokens_per_second": 100 * level * noise[k]} for k in range(30)]
    return Evaluation({label: label for label in LABELS}, rows, speed)


@pytest.mark.slow
def test_null_sessions_raise_no_false_alarms() -> None:
    """Oracle: nothing happened: no gain, no loss. A gain that is found, or a loss, is a false alarm: 1 in 1,000."""
    rng = np.random.default_rng(11)
    limits = Thresholds(min_delta_aqi=0.0, min_delta_over_baseline=0.0, max_speed_loss=10.0, min_retention=70.0)
    alarms = 0
    for _ in range(1000):
        gates = judge(_session(rng, 0.0, 1.0, 0.97), limits)
        assert len(gates) == GATES
        gained = any(g.judgement.verdict == "supported" for g in gates if g.name in ACCURACIES)
        alarms += gained or any(g.judgement.verdict == "refuted" for g in gates if g.name not in ACCURACIES)
    assert alarms <= 1


def _errors(decide, n: int, share: float) -> tuple[float, float]:
    """Exact probabilities of `supported` and of `refuted` when k of n successes have probability `share` each."""
    verdicts = [decide(k) for k in range(n + 1)]
    weights = stats.binom.pmf(np.arange(n + 1), n, share)
    return tuple(float(weights[[v == kind for v in verdicts]].sum()) for kind in ("supported", "refuted"))


def _one_gate(name: str, rows, speed=()) -> str:
    """The verdict of one gate at the error that it has in a session of eleven."""
    evaluation = Evaluation({"base": "b", "pure": "p"}, rows, speed)
    bound = {"delta_speed": -10.0, "retention": 70.0}[name]
    return decide(evaluation, name, "pure", bound, alpha=2 * ALPHA).verdict


@pytest.mark.parametrize("n", [40, 124])
def test_the_error_of_the_retention_gate_is_exact(n: int) -> None:
    """Oracle: the binomial sum with a true retention of 70%, the threshold itself."""

    def decide(kept: int) -> str:
        knows = _rows("base", "knowledge", [True] * n)
        return _one_gate("retention", knows + _rows("pure", "knowledge", [True] * kept + [False] * (n - kept)))

    assert max(_errors(decide, n, 0.7)) <= ALPHA


def test_the_error_of_the_speed_gate_is_exact() -> None:
    """Oracle: with the true median on the threshold each of 30 rounds lies above it with probability one half."""

    def decide(above: int) -> str:
        rates = [92.0 + k / 100 for k in range(above)] + [88.0 - k / 100 for k in range(30 - above)]
        speed = [{"round": k, "label": each, "tokens_per_second": 100.0} for k in range(30) for each in ("base", CLONE)]
        speed += [{"round": k, "label": "pure", "tokens_per_second": rate} for k, rate in enumerate(rates)]
        return _one_gate("delta_speed", [], speed)

    assert 0 < max(_errors(decide, 30, 0.5)) <= ALPHA


def test_gates_find_what_is_there() -> None:
    """Oracle: gains of 40 points, 95% retention and equal speed are far from the thresholds: nothing is undecided."""
    rng = np.random.default_rng(12)
    limits = Thresholds(min_delta_aqi=0.0)
    for _ in range(10):
        assert {g.judgement.verdict for g in judge(_session(rng, 0.40, 1.0, 0.95), limits)} == {"supported"}
        bad = {
            (g.name, g.judgement.verdict)
            for g in judge(_session(rng, -0.08, 0.6, 0.3), limits)
            if g.name != "delta_aqi"
        }
        assert bad == {("delta_speed", "refuted"), ("retention", "refuted")}


@pytest.mark.parametrize("threshold", [0.0, 0.2])
@pytest.mark.parametrize("discordance", [0.25, 0.4])
def test_the_error_of_the_accuracy_gate_is_exact(threshold: float, discordance: float) -> None:
    """Oracle: the multinomial sum over every outcome of 200 items, with the truth on the threshold (no sampling)."""
    n, alpha = 200, ALPHA
    up, down = (discordance + threshold) / 2, (discordance - threshold) / 2
    error = 0.0
    for lost in range(n + 1):
        weight = stats.binom.pmf(lost, n, down)
        if weight < 1e-12:
            continue
        low, high = 0, n - lost + 1
        while low < high:
            gained = (low + high) // 2
            a = [True] * gained + [False] * lost + [True] * (n - gained - lost)
            b = [False] * gained + [True] * lost + [True] * (n - gained - lost)
            beyond = paired_difference_interval(a, b, 1 - 2 * alpha).low > threshold
            if beyond and (threshold or mcnemar_exact(gained, lost) <= 2 * alpha):
                high = gained
            else:
                low = gained + 1
        error += weight * stats.binom.sf(low - 1, n - lost, up / (1 - down))
    # The score interval is asymptotic: a factor of two in the tail is its known price, and is what the session's
    # margin (eleven correlated gates counted as independent) pays for.
    assert error <= alpha * (2 if threshold else 1), error


@pytest.mark.parametrize(("n", "discordance"), [(420, 0.3), (420, 0.1), (200, 0.5), (1000, 0.2)])
def test_power_at_the_printed_difference(n: int, discordance: float) -> None:
    """Oracle: 4,000 simulated evaluations with the printed detectable difference as truth; McNemar finds 78-82%.

    Both where it is printed: beside a metric at alpha .05, and beside a gate's verdict at the gate's alpha.
    """
    swapped = round(n * discordance / 2)
    right = np.array([True] * swapped + [False] * (n - swapped))
    rows = _rows("base", "aqi", right) + _rows("pure", "aqi", right[::-1])
    evaluation = Evaluation({"base": "b", "pure": "p"}, rows)
    verdict = decide(evaluation, "delta_aqi", "pure", 0.0).summary
    stated = re.search(r"([\d.]+) points can be found", verdict)
    truth = 2 * swapped / n
    rng = np.random.default_rng(3)
    cached = lru_cache(maxsize=None)(mcnemar_exact)
    for printed, alpha in ((evaluation.metrics["pure"].delta_aqi.detectable, 0.05), (float(stated[1]), GATE_ALPHA)):
        if (gap := printed / 100) > truth:
            continue  # so many items find it only where the models disagree more than here
        shares = [(truth + gap) / 2, (truth - gap) / 2, 1 - truth]
        found = sum(cached(int(b), int(c)) <= alpha for b, c, _ in rng.multinomial(n, shares, size=4000))
        assert 0.78 <= found / 4000 <= 0.82, (alpha, found)


def test_power_by_hand() -> None:
    """Oracle: 6 items that all disagree in one direction are significant (2 / 2**6), 5 are not (2 / 2**5)."""
    assert mcnemar_power(1.0, 6, 1.0) == pytest.approx(1.0)
    assert mcnemar_power(1.0, 5, 1.0) == 0.0
    assert mcnemar_power(0.0, 6, 1.0) == pytest.approx(2 / 2**6)
    assert detectable_difference(5, 0.5) == float("inf")
    assert 0 < detectable_difference(400, 0.0) < 0.05, "no discordant item yet: 6 or more are needed"
