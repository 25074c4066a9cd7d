"""How often `grit compare` errs: pairs whose truth is known, simulated and real, and null distributions of correlation.

`python -m grit_impl.curves.calibration` judges them again and writes `fixtures/curves_calibration.json`; with `--runs`
it first trains the real curves again (`fixtures/curves_runs.npz`, about five minutes). Window, margin and alpha are
those of `curves`, fixed beforehand. Tuning seeds exist to look at while changing the rules; the report is on the
evaluation seeds, which were never looked at for that.
"""

from __future__ import annotations

import itertools
import json
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import click
import numpy as np
from numpy.typing import NDArray
from scipy import signal  # type: ignore[import-untyped]

from grit_impl.curves import noise as curves
from grit_impl.curves.calibration_runs import EVALUATION_SEEDS, OPTIMIZERS, REPLICATES, TUNING_SEEDS
from grit_impl.curves.compare import compare_logs
from grit_impl.curves.logs import RunLog
from grit_impl.errors import GRITError
from grit_impl.files import FIXTURES
from grit_impl.record import write_atomic
from grit_impl.statistics.intervals import clopper_pearson

Floats = NDArray[np.float64]
RUNS, RESULT = FIXTURES / "curves_runs.npz", FIXTURES / "curves_calibration.json"
PAIRS_PER_CASE = 100
AR_PAIRS = 2_000
AR_LENGTH = 200
PHIS = (0.0, 0.3, 0.6, 0.8, 0.9)
TUNING, EVALUATION = 10, 20
"""Seeds of the simulations."""


def _log(name: str, loss: Floats, grad_norm: Floats | None = None) -> RunLog:
    return RunLog(name, Path(name), "array", np.arange(1, loss.size + 1), loss, grad_norm)


# -- the null: the same training, plus noise


def _ar1(rng: np.random.Generator, n: int, phi: float) -> Floats:
    """A stationary AR(1) series of unit variance."""
    innovations = rng.normal(size=n + 200) * np.sqrt(1 - phi**2)
    return np.asarray(signal.lfilter([1.0], [1.0, -phi], innovations)[200:], dtype=np.float64)


NOISES: dict[str, Callable[[np.random.Generator, int], Floats]] = {
    "white": lambda rng, n: rng.normal(size=n),
    "AR(1) 0.5": lambda rng, n: _ar1(rng, n, 0.5),
    "AR(1) 0.9": lambda rng, n: _ar1(rng, n, 0.9),
    "heavy tails (t3)": lambda rng, n: rng.standard_t(3, size=n),
    "growing with the step": lambda rng, n: rng.normal(size=n) * np.linspace(0, 2, n),
    "random walk": lambda rng, n: np.cumsum(rng.normal(size=n)) / np.sqrt(n),
    "white plus random walk": lambda rng, n: rng.normal(size=n) + 3 * np.cumsum(rng.normal(size=n)) / np.sqrt(n),
    "white, rounded to 4 decimals": lambda rng, n: rng.normal(size=n),
}
"""Ways in which two runs of one and the same training differ."""


def null_pairs(noise: str, reruns: int, count: int, seed: int) -> Iterator[tuple[RunLog, RunLog, list[RunLog]]]:
    """Simulated pairs of the same training: a batch-dominated falling curve, and independent noise on each copy."""
    rng = np.random.default_rng([seed, list(NOISES).index(noise), reruns])
    for _ in range(count):
        n = int(rng.choice([60, 100, 200, 400]))
        curve = rng.uniform(0.5, 3) + np.exp(-np.arange(n) / rng.uniform(10, 80)) + rng.normal(0, 0.1, n)
        # From twice the floor of float32 to a noisy forward pass (2%), the first step included.
        scale = 10.0 ** rng.uniform(-3.5, -1.7)
        copies = [curve + scale * NOISES[noise](rng, n) for _ in range(2 + reruns)]
        if noise.endswith("decimals"):
            copies = [np.round(c, 4) for c in copies]
        a, b, *again = (_log(name, c) for name, c in zip("abcdefgh", copies, strict=False))
        yield a, b, again


def null_verdicts(seed: int, count: int = PAIRS_PER_CASE) -> dict[str, dict[str, int]]:
    """Verdicts on simulated null pairs, by noise and number of reruns."""
    return {
        f"{noise}; {reruns} rerun{'s' * (reruns > 1)}": dict(
            Counter(compare_logs(a, b, again).verdict for a, b, again in null_pairs(noise, reruns, count, seed))
        )
        for noise in NOISES
        for reruns in (1, 3)
    }


# -- real runs


@dataclass(frozen=True)
class Runs:
    """The recorded curves of `calibration_runs`."""

    loss: Floats
    grad_norm: Floats
    kind: NDArray[np.str_]
    optimizer: NDArray[np.str_]
    seed: NDArray[np.int64]
    replicate: NDArray[np.int64]

    @classmethod
    def load(cls, path: Path = RUNS) -> Runs:
        """Read them.

        Raises:
            GRITError: the file is missing or damaged.
        """
        try:
            with np.load(path) as file:
                data = {key: file[key] for key in file.files}
            return cls(data.pop("loss").astype(np.float64), data.pop("grad_norm").astype(np.float64), **data)
        except (OSError, ValueError, KeyError, TypeError) as error:
            raise GRITError(f"{path}: cannot be read ({error}); `--runs` records it again") from error

    def get(self, optimizer: str, seed: int, replicate: int = 0, kind: str = "run") -> RunLog:
        """One run as a log."""
        match = (self.kind == kind) & (self.optimizer == optimizer) & (self.seed == seed)
        (index,) = np.flatnonzero(match & (self.replicate == replicate))
        return _log(f"{optimizer}-{seed}-{replicate}", self.loss[index], self.grad_norm[index])


def different_verdicts(runs: Runs, seeds: Sequence[int], reruns: int) -> dict[str, dict[str, int]]:
    """Verdicts on pairs of different optimizers, by pair; `reruns` 0 means exact runs with a bit-identical rerun."""
    found: dict[str, dict[str, int]] = {}
    for first, second in itertools.combinations(OPTIMIZERS, 2):
        verdicts: Counter[str] = Counter()
        for seed in seeds:
            noisy = min(reruns, 1)
            a, b = runs.get(first, seed, noisy), runs.get(second, seed, noisy)
            again = [runs.get(first, seed, 1 + k) for k in range(1, reruns + 1)] if reruns else [a]
            verdicts[compare_logs(a, b, again).verdict] += 1
        found[f"{first} / {second}"] = dict(verdicts)
    return found


def rerun_verdicts(runs: Runs, seeds: Sequence[int], reruns: int) -> dict[str, dict[str, int]]:
    """Verdicts on real reruns, the same optimizer on the same batches with noise: all roles of the four replicates."""
    roles = [
        (a, b, again)
        for a, b in itertools.permutations(range(1, REPLICATES + 1), 2)
        for again in itertools.combinations([k for k in range(1, REPLICATES + 1) if k not in (a, b)], reruns)
    ]
    return {
        optimizer: dict(
            Counter(
                compare_logs(
                    runs.get(optimizer, seed, a),
                    runs.get(optimizer, seed, b),
                    [runs.get(optimizer, seed, k) for k in again],
                ).verdict
                for seed in seeds
                for a, b, again in roles
            )
        )
        for optimizer in OPTIMIZERS
    }


# -- correlation


def coverage(phi: float, count: int, seed: int) -> int:
    """How many of `count` pairs of independent AR(1) series have zero inside the decorrelation interval."""
    rng = np.random.default_rng([seed, round(1000 * phi)])
    pairs = ((_ar1(rng, AR_LENGTH, phi), _ar1(rng, AR_LENGTH, phi)) for _ in range(count))
    return sum(not curves.lag_correlation(a, b).zero.excludes(0.0) for a, b in pairs)


def correlation_nulls(runs: Runs, seeds: Sequence[int]) -> dict[str, dict[str, list[float]]]:
    """What correlations mean: minimum, median and maximum for pairs whose relation is known."""
    pairs: dict[str, list[tuple[RunLog, RunLog, list[RunLog]]]] = {
        "same order, other optimizer": [],
        "same order, other initialisation": [],
        "other order, same optimizer": [],
        "same order, other optimizer, batch difficulty removed": [],
        "rerun, batch difficulty removed": [],
    }
    for seed in seeds:
        logs = {name: runs.get(name, seed) for name in OPTIMIZERS}
        base = logs["adamw"]
        for first, second in itertools.combinations(OPTIMIZERS, 2):
            others = [log for name, log in logs.items() if name not in (first, second)]
            pairs["same order, other optimizer"].append((logs[first], logs[second], []))
            pairs["same order, other optimizer, batch difficulty removed"].append((logs[first], logs[second], others))
        pairs["same order, other initialisation"].append((base, runs.get("adamw", seed, kind="other init"), []))
        pairs["other order, same optimizer"].append((base, runs.get("adamw", seed, kind="other order"), []))
        for name in OPTIMIZERS:
            others = [log for other, log in logs.items() if other != name]
            pairs["rerun, batch difficulty removed"].append((runs.get(name, seed, 1), runs.get(name, seed, 2), others))
    found = {}
    for relation, rows in pairs.items():
        raw = [float(np.corrcoef(a.loss, b.loss)[0, 1]) for a, b, _ in rows]
        clean = [curves.lag_correlation(a.loss, b.loss, [r.loss for r in refs]).zero.estimate for a, b, refs in rows]
        found[relation] = {
            name: [round(float(np.quantile(values, q)), 4) for q in (0, 0.5, 1)]
            for name, values in (("raw", raw), ("cleaned", clean))
        }
    return found


# -- the report


def _share(cases: dict[str, dict[str, int]], verdict: str) -> dict[str, Any]:
    n, k = sum(sum(c.values()) for c in cases.values()), sum(c.get(verdict, 0) for c in cases.values())
    interval = clopper_pearson(k, n)
    return {
        "verdict": verdict,
        "k": k,
        "n": n,
        "share": round(k / n, 4),
        "interval": _rounded(interval.low, interval.high),
    }


def _rounded(*values: float) -> list[float]:
    return [round(v, 4) for v in values]


def calibrate(runs: Runs, *, tuning: bool = False) -> dict[str, Any]:
    """Judge everything; `tuning` uses the seeds that may be looked at while changing the rules."""
    seed, seeds = (TUNING, TUNING_SEEDS) if tuning else (EVALUATION, EVALUATION_SEEDS)
    null = null_verdicts(seed)
    real = {f"{n or 'bit-identical'} rerun{'s' * (n > 1)}": different_verdicts(runs, seeds, n) for n in (0, 1, 3)}
    again = {f"{n} rerun{'s' * (n > 1)}": rerun_verdicts(runs, seeds, n) for n in (1, 2)}
    covered = {phi: clopper_pearson(coverage(phi, AR_PAIRS, seed), AR_PAIRS) for phi in PHIS}
    return {
        "command": "python -m grit_impl.curves.calibration",
        "fixed beforehand": {"window": curves.WINDOW, "margin": curves.MARGIN, "alpha": curves.ALPHA},
        "seeds": {"simulation": seed, "runs": list(seeds)},
        "simulated null pairs": {"different": _share(null, "different"), "cases": null},
        "real reruns": {n: {"different": _share(v, "different"), "cases": v} for n, v in again.items()},
        "different optimizers": {n: {"different": _share(v, "different"), "cases": v} for n, v in real.items()},
        "independent AR(1), interval covers zero": {
            str(phi): {"share": round(i.estimate, 4), "n": i.n, "interval": _rounded(i.low, i.high)}
            for phi, i in covered.items()
        },
        "correlation nulls (minimum, median, maximum)": correlation_nulls(runs, seeds),
    }


@click.command()
@click.option("--runs", is_flag=True, help="Train the real curves again first (needs torch; about five minutes).")
@click.option("--tuning", is_flag=True, help="Show the tuning seeds' result instead, and write nothing.")
def main(runs: bool, tuning: bool) -> None:
    """Judge pairs of known truth and write fixtures/curves_calibration.json."""
    if runs:
        from grit_impl.curves.calibration_runs import record

        with click.progressbar(length=1, label="training", show_pos=True) as bar:

            def advance(done: int, total: int) -> None:
                bar.length = total
                bar.update(1)

            record(RUNS, advance)
    result = calibrate(Runs.load(), tuning=tuning)
    if not tuning:
        write_atomic(RESULT, json.dumps(result, indent=1) + "\n")
    click.echo(json.dumps({k: v for k, v in result.items() if k != "command"}, indent=1))


if __name__ == "__main__":
    main()
