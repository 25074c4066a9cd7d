"""Several runs per arm, paired by seed: the only comparison that can say which optimizer is better."""

from __future__ import annotations

import math
import re
from collections import Counter
from collections.abc import Mapping, Sequence

import numpy as np

from grit_impl.curves.compare import CAVEAT, compare_logs, outcome
from grit_impl.curves.logs import RunLog
from grit_impl.curves.numbers import show, span
from grit_impl.curves.result import CurveComparison
from grit_impl.errors import GRITError
from grit_impl.statistics.intervals import iqm, probability_of_improvement, t_interval
from grit_impl.statistics.paired import holm, minimum_detectable_effect, pairs_needed, sign_flip_test

ALPHA = 0.05
"""Family-wise level of the better/worse verdict, after Holm over metrics and arms."""
Pair = tuple[str, RunLog, RunLog, list[RunLog]]
"""Label, run of the first arm, run of the second, reruns of the first."""


def fewest_pairs(tests: int, alpha: float = ALPHA) -> int:
    """Pairs below which no sign-flip test can reach `alpha` among so many: one test needs 6 (2 / 2**6 = .031)."""
    return math.ceil(math.log2(2 * tests / alpha))


def compare_arms(
    arms: Mapping[str, Sequence[RunLog]], *, first_update: int = 1, anyway: bool = False
) -> list[CurveComparison]:
    """Compare every further arm with the first, run by run of the same seed.

    Args:
        arms: Runs by arm, the reference first. A run's seed comes from its log or from `seed<N>` in its path; where
            seeds are missing, runs are paired in the order given. Further runs of a seed in the reference arm are
            its reruns: the noise floor.
        first_update: Step of the first update that can differ.
        anyway: Go on where a pair is not comparable.

    Raises:
        GRITError: fewer than two arms, an empty arm, or no pair with the same seed.
    """
    if len(arms) < 2:
        raise GRITError(f"comparing arms needs two of them, got {len(arms)}; give `--arm NAME=DIR` at least twice")
    for name, runs in arms.items():
        if not runs:
            raise GRITError(f"arm {name} has no runs")
    reference, *others = arms
    results = [
        _compare(reference, other, arms[reference], arms[other], first_update=first_update, anyway=anyway)
        for other in others
    ]
    _decide(results)
    return results


def _seed(log: RunLog) -> int | None:
    if log.seed is not None:
        return log.seed
    found = re.findall(r"seed[-_=]?(\d+)", str(log.path))
    return int(found[-1]) if found else None


def _by_seed(seeds: Sequence[int | None], logs: Sequence[RunLog]) -> dict[int | None, list[RunLog]]:
    groups: dict[int | None, list[RunLog]] = {}
    for seed, log in zip(seeds, logs, strict=True):
        groups.setdefault(seed, []).append(log)
    return groups


def _pairs(x: Sequence[RunLog], y: Sequence[RunLog], result: CurveComparison) -> list[Pair]:
    seeds = [[_seed(log) for log in side] for side in (x, y)]
    if all(None not in side for side in seeds):
        first, second = (_by_seed(side, logs) for side, logs in zip(seeds, (x, y), strict=True))
        shared = [seed for seed in first if seed in second]
        lonely = sorted({str(s) for s in (*first, *second)} - {str(s) for s in shared})
        if not shared:
            raise GRITError(f"{result.a} and {result.b} share no seed; train both arms with the same seeds")
        if lonely:
            result.notes.append(f"Left out, for want of a partner: seed {', '.join(lonely)}.")
        if any(len(runs) > 1 for runs in second.values()):
            result.notes.append(f"{result.b} has several runs of one seed: the first of each was taken.")
        return [(f"seed {seed}", first[seed][0], second[seed][0], first[seed][1:]) for seed in shared]
    if len(x) != len(y):
        raise GRITError(
            f"{result.a} has {len(x)} runs and {result.b} {len(y)}, and their seeds are unknown: pair them by hand"
        )
    result.notes.append("Seeds are unknown: runs were paired in the order given.")
    return [(f"pair {i}", u, v, []) for i, (u, v) in enumerate(zip(x, y, strict=True), 1)]


def _compare(
    a: str, b: str, x: Sequence[RunLog], y: Sequence[RunLog], *, first_update: int, anyway: bool
) -> CurveComparison:
    result = CurveComparison(a, b)
    rows = _pairs(x, y, result)
    singles = {
        label: compare_logs(u, v, again, first_update=first_update, anyway=anyway) for label, u, v, again in rows
    }
    refused = {k: s.reasons["comparable"] for k, s in singles.items() if s.verdicts["training"] == "not exercised"}
    if refused:
        label, reason = next(iter(refused.items()))
        result.answer("comparable", "no", f"{len(refused)} of {len(rows)} pairs are not comparable; {label}: {reason}")
        return result
    fair = all(s.verdicts["comparable"] == "yes" for s in singles.values())
    result.answer("comparable", "yes" if fair else "no", f"{len(rows)} pairs, {rows[0][1].steps.size} losses each")
    counts = Counter(s.verdicts["training"] for s in singles.values())
    verdict = next(iter(counts)) if len(counts) == 1 else "inconclusive"
    tally = ", ".join(f"{n} {v}" for v, n in counts.most_common())
    result.answer("training", verdict, f"by seed: {tally}")
    if not any(again for *_, again in rows) and verdict != "different":
        result.notes.append(f"Train some seeds of {a} twice: further runs of a seed are its reruns, the noise floor.")
    correlations = [s.numbers["correlation"]["zero"].estimate for s in singles.values() if "correlation" in s.numbers]
    if correlations:
        kinds = Counter(s.verdicts["decorrelated"] for s in singles.values())
        low, high = min(correlations), max(correlations)
        result.answer(
            "decorrelated",
            kinds.most_common(1)[0][0],
            f"r at lag 0 from {show(low, '.3f')} to {show(high, '.3f')} over seeds",
        )
        result.notes.append(CAVEAT)
    result.curves = {
        "steps": rows[0][1].steps,
        "a": np.mean([u.loss for _, u, _, _ in rows], axis=0),
        "b": np.mean([v.loss for _, _, v, _ in rows], axis=0),
        "a_runs": np.stack([u.loss for _, u, _, _ in rows]),
        "b_runs": np.stack([v.loss for _, _, v, _ in rows]),
    }
    before, after = [outcome(u) for _, u, _, _ in rows], [outcome(v) for _, _, v, _ in rows]
    metrics = {}
    for metric in before[0]:
        first, second = (np.array([o[metric] for o in side]) for side in (before, after))
        difference = second - first
        sd = float(difference.std(ddof=1)) if difference.size > 1 else float("nan")
        effect = abs(float(difference.mean())) / sd if sd > 0 else float("inf")
        metrics[metric] = {
            "by_seed": {label: float(d) for (label, *_), d in zip(rows, difference, strict=True)},
            "difference": t_interval(difference),
            "p_sign_flip": sign_flip_test(difference),
            "iqm": {a: float(iqm(first)), b: float(iqm(second))},
            "probability_of_improvement": probability_of_improvement(-second, -first),
            "minimum_detectable_effect": minimum_detectable_effect(sd, difference.size)
            if difference.size > 1
            else float("inf"),
            "pairs_needed": pairs_needed(effect) if 0 < effect < np.inf else None,
        }
    result.numbers["metrics"] = metrics
    return result


def _decide(results: Sequence[CurveComparison]) -> None:
    """Holm over all metrics of all arms, then the verdict on the final loss."""
    tested = [(r, metric) for r in results for metric in r.numbers.get("metrics", {})]
    if not tested:
        return
    adjusted = holm([r.numbers["metrics"][metric]["p_sign_flip"] for r, metric in tested])
    for (result, metric), p in zip(tested, adjusted, strict=True):
        result.numbers["metrics"][metric]["p_holm"] = p
    fewest = fewest_pairs(len(tested))
    for result in {id(r): r for r, _ in tested}.values():
        row = result.numbers["metrics"]["final loss"]
        gap, p, needed = row["difference"], row["p_holm"], row["pairs_needed"]
        text = f"final loss {result.b} - {result.a} = {show(gap.estimate, '+.4g')} {span(gap.low, gap.high, '+.4g')}"
        text += f" over {gap.n} seeds"
        text += f", p = {show(p)} (sign flips, Holm over {len(tested)})"
        if gap.estimate == 0 and gap.low == gap.high:
            result.answer("better", "neither", f"{text}: identical")
        elif p < ALPHA and gap.excludes(0.0):
            result.answer("better", result.b if gap.estimate < 0 else result.a, text)
        else:
            more = f"; an effect of this size needs {max(needed, fewest)} seeds" if needed else ""
            least = f"; fewer than {fewest} seeds cannot reach {show(ALPHA, 'g')}" if gap.n < fewest else ""
            result.answer("better", "inconclusive", text + least + more)
