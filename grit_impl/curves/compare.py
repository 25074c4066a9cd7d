"""Two trainings compared by their logs: four questions in order, each answered only if the one before allows it.

1. Comparable?  2. The same training, or different?  3. Decorrelated (described, never convicting)?  4. Better?
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from typing import Any

import numpy as np

from grit_impl.curves import noise as curves
from grit_impl.curves.logs import FLOAT32_EPS, RunLog, from_record
from grit_impl.curves.noise import Difference, LagCorrelation, NoiseFloor
from grit_impl.errors import GRITError
from grit_impl.record import RunRecord
from grit_impl.statistics.intervals import Interval, t_critical, t_interval
from grit_impl.statistics.series import effective_sample_size

QUESTIONS = {
    "comparable": "Comparable?",
    "training": "Same training, or different?",
    "decorrelated": "Decorrelated?",
    "better": "Better?",
}
FIRST_LOSS_SURE = 0.002
"""Relative gap of the loss before any update that bfloat16 rounding explains: the same weights saw the same batch."""
FIRST_LOSS_REFUSED = 0.02
"""Relative gap that no rounding explains: other labels, other data or another base."""
FINAL_SHARE = 0.1
"""Share of the run, at its end, whose mean is called the final loss."""
CAVEAT = (
    "Decorrelation describes, it never convicts: a step's loss is mostly its batch. With GRIT fully applied and the "
    "weights 66% apart, the curves still correlated at 0.998; with another data order, the same optimizer gave 0.49."
)
FEW_RERUNS = (
    "Fewer than three noisy reruns underestimate bursts of noise: in calibration, 1.7% of real reruns were called "
    "different on one rerun and 0.7% on two, all with an optimizer that amplifies noise."
)
ONE_SEED = (
    "one seed supports no claim about optimizers: run each arm with at least 7 seeds (for p < .05 by sign flips), "
    "10 to find an effect as large as its seed-to-seed spread"
)


@dataclass
class Comparison:
    """What two runs (or two arms of several runs) say about each other.

    Attributes:
        a: Name of the first run, the reference.
        b: Name of the second.
        verdicts: Answer per question ("comparable": yes | no; "training": same | different | inconclusive;
            "decorrelated": shared batches | no shared batches | unclear; "better": a's name, b's name, neither or
            inconclusive), or "not exercised".
        reasons: One sentence per question.
        numbers: The evidence, plain values ready for JSON.
        notes: What a reader must know besides.
        curves: The series behind the plots, by name; not part of `to_dict`.
    """

    a: str
    b: str
    verdicts: dict[str, str] = field(default_factory=lambda: dict.fromkeys(QUESTIONS, "not exercised"))
    reasons: dict[str, str] = field(default_factory=lambda: dict.fromkeys(QUESTIONS, ""))
    numbers: dict[str, Any] = field(default_factory=dict)
    notes: list[str] = field(default_factory=list)
    curves: dict[str, Any] = field(default_factory=dict, repr=False)

    @property
    def verdict(self) -> str:
        """ "same", "different", "inconclusive", or "incomparable" where the comparison was refused."""
        return self.verdicts["training"] if self.verdicts["training"] != "not exercised" else "incomparable"

    @property
    def summary(self) -> str:
        """One line: the verdict on the training and why."""
        question = "training" if self.verdict != "incomparable" else "comparable"
        return f"{self.b} against {self.a}: {self.verdict} ({self.reasons[question]})"

    def answer(self, question: str, verdict: str, reason: str) -> None:
        """Set the answer to one question."""
        self.verdicts[question], self.reasons[question] = verdict, reason

    def to_dict(self) -> dict[str, Any]:
        """Everything but the raw curves, as JSON-ready values."""
        kept = ("a", "b", "verdicts", "reasons", "numbers", "notes")
        return {"verdict": self.verdict, **{key: _plain(getattr(self, key)) for key in kept}}


def _plain(value: Any) -> Any:
    if isinstance(value, Mapping):
        return {str(k): _plain(v) for k, v in value.items()}
    if isinstance(value, list | tuple | np.ndarray):
        return [_plain(v) for v in value]
    if isinstance(value, Interval):
        return _plain(value.to_dict())
    if isinstance(value, np.generic):
        value = value.item()
    return None if isinstance(value, float) and not np.isfinite(value) else value


def compare_records(
    a: RunRecord, b: RunRecord, reruns: Sequence[RunRecord] = (), *, first_update: int = 1
) -> Comparison:
    """Compare two run records, the noise floor taken from reruns of `a`.

    Args:
        a: The reference, e.g. the baseline.
        b: The run in question.
        reruns: The reference again. On a CPU they are often bit-identical; then the floor is the rounding of float32.
        first_update: Step of the first update that can differ (e.g. the first preconditioned one).

    Raises:
        GRITError: a record is corrupt or has fewer than 8 steps.
    """
    again = [from_record(r, name=f"{r.arm} {i}") for i, r in enumerate(reruns, 1)]
    return compare_logs(from_record(a), from_record(b), again, first_update=first_update)


def compare_logs(
    a: RunLog,
    b: RunLog,
    reruns: Sequence[RunLog] = (),
    references: Sequence[RunLog] = (),
    *,
    first_update: int = 1,
    anyway: bool = False,
) -> Comparison:
    """Answer the four questions for one run of each arm.

    Args:
        a: The reference.
        b: The run in question.
        reruns: `a` trained again: the noise floor. Three or more are best.
        references: Other runs on the same batches (base model, other optimizers): the batches' difficulty.
        first_update: Step of the first update that can differ; losses from the next step on can show it.
        anyway: Go on where the comparison is not fair; the reason stays in the result.
    """
    result = Comparison(a.name, b.name)
    result.curves = {"steps": a.steps, "a": a.loss, "b": b.loss, "reruns": [r.loss for r in reruns]}
    reasons = _obstacles(a, b, reruns, result)
    for other in (*reruns, *references):
        if other.steps.size != a.steps.size:
            raise GRITError(f"{other.path}: {other.steps.size} losses, but {a.path} has {a.steps.size}; use `--until`")
    if reasons:
        result.answer("comparable", "no", "; ".join(reasons))
        if not anyway:
            return result
        result.notes.append("Compared although the comparison is not fair: " + "; ".join(reasons))
    else:
        result.answer("comparable", "yes", "; ".join(result.numbers.pop("checked")))
    _training(a, b, reruns, first_update, result)
    _decorrelation(a, b, references, result)
    _better(a, b, result)
    return result


# -- 1. comparable? ---------------------------------------------------------------------------------------------------


def _obstacles(a: RunLog, b: RunLog, reruns: Sequence[RunLog], result: Comparison) -> list[str]:
    """Reasons why a comparison would not be fair; what was found in order goes into numbers["checked"]."""
    n, m = a.steps.size, b.steps.size
    if n != m or a.stride != b.stride:
        shortest = int(min(a.steps[-1], b.steps[-1]))
        every = f", logged every {a.stride} and {b.stride}" if a.stride != b.stride else ""
        return [f"{n} losses against {m} (to steps {a.steps[-1]} and {b.steps[-1]}{every}); try `--until {shortest}`"]
    found, checked = [], [f"{n} losses each"]
    if a.meta.get("base_model") != b.meta.get("base_model"):
        found.append(f"base models {a.meta.get('base_model')} and {b.meta.get('base_model')}")
    if a.seed is not None and b.seed is not None and a.seed != b.seed:
        result.notes.append(f"Seeds differ ({a.seed} and {b.seed}): so may batches and initialisation.")
    _check_rates(a, b, found, checked, result)
    if a.tokens is not None and b.tokens is not None:
        unequal = np.flatnonzero(a.tokens != b.tokens)
        if unequal.size:
            at = int(unequal[0])
            found.append(
                f"tokens differ at {unequal.size} of {n} steps (step {a.steps[at]}: {a.tokens[at]:.0f} and "
                f"{b.tokens[at]:.0f}): other batches or other padding"
            )
        else:
            checked.append("the same tokens at every step")
    _check_first_loss(a, b, reruns, found, checked, result)
    result.numbers["checked"] = checked
    return found


def _check_rates(a: RunLog, b: RunLog, found: list[str], checked: list[str], result: Comparison) -> None:
    x, y = a.learning_rate, b.learning_rate
    if x is None or y is None:
        result.notes.append("The learning rate is not in both logs: its schedule was not compared.")
        return
    slack = 1e-5 * float(np.max(np.abs(x)))
    if np.allclose(x, y, rtol=0, atol=slack):
        checked.append("the same learning rates")
    elif np.allclose(x[1:], y[:-1], rtol=0, atol=slack) or np.allclose(x[:-1], y[1:], rtol=0, atol=slack):
        # transformers 4 logs the rate after the scheduler's step, transformers 5 the one that was used.
        checked.append("the same learning rates, logged one step apart (as transformers 4 and 5 do)")
    else:
        at = int(np.argmax(np.abs(x - y)))
        found.append(f"learning rates differ (step {a.steps[at]}: {x[at]:.4g} and {y[at]:.4g})")


def _check_first_loss(
    a: RunLog, b: RunLog, reruns: Sequence[RunLog], found: list[str], checked: list[str], result: Comparison
) -> None:
    """Before the first update all arms are the same model, so the first batch must cost them the same."""
    shared, shift = _same_batches(a, b)
    result.numbers["shared_batches"] = shared
    if shift:
        found.append(f"the batches of {b.name} come {abs(shift)} steps {'later' if shift > 0 else 'earlier'}")
    if a.stride > 1:
        result.notes.append("Losses are means over several steps, so the loss before the first update is not known.")
        if shared is False:
            found.append("the losses follow different batches (no shared batch difficulty)")
        return
    first, second = float(a.loss[0]), float(b.loss[0])
    noise = max([abs(float(r.loss[0]) - first) for r in reruns], default=0.0)
    resolution = max(a.resolution(), b.resolution())
    gap, scale = abs(first - second), max(abs(first), abs(second), FLOAT32_EPS)
    result.numbers["first_loss"] = [first, second]
    text = f"losses of the first batch, before any update, {first:.4f} and {second:.4f}"
    if a.grad_norm is not None and b.grad_norm is not None:
        result.numbers["first_grad_norm"] = [float(a.grad_norm[0]), float(b.grad_norm[0])]
        text += f", gradient norms {a.grad_norm[0]:.4g} and {b.grad_norm[0]:.4g}"
    if gap <= max(3 * noise, FIRST_LOSS_SURE * scale, resolution):
        checked.append(text)
        if shared is False:
            result.notes.append(
                "The first batch agrees, but later losses share no batch difficulty: look at the order."
            )
    elif gap > FIRST_LOSS_REFUSED * scale:
        found.append(f"{text}: not the same labels, data or base model, so their losses say nothing about each other")
    elif shared:
        checked.append(f"{text} (near), and the same batch difficulty later")
    else:
        found.append(f"{text}, and no shared batch difficulty later: not the same batches")


def _same_batches(a: RunLog, b: RunLog) -> tuple[bool | None, int]:
    """Whether both follow the same batches (None: cannot be told), and by how many steps one is shifted."""
    if a.loss.size < 30:
        return None, 0
    found = curves.lag_correlation(a.loss, b.loss)
    strongest = float(np.max(np.abs(found.values)))
    if found.peak and strongest > 0.5 and strongest > 2 * abs(found.zero.estimate):
        return False, found.peak
    if found.zero.low > 0.3:
        return True, 0
    return (False, 0) if found.zero.high < 0.5 else (None, 0)


# -- 2. the same training? --------------------------------------------------------------------------------------------


def _training(a: RunLog, b: RunLog, reruns: Sequence[RunLog], first_update: int, result: Comparison) -> None:
    """Loss and (where both log the same quantity) gradient norm, just after the first update and at the end."""
    n = a.steps.size
    early = int(np.searchsorted(a.steps, first_update, side="right"))
    if n - early < 5:
        raise GRITError(
            f"the first update is at step {first_update} of {a.steps[-1]}: at least 5 losses must follow it"
        )
    names = ["loss"] + (["grad_norm"] if _same_quantity(a, b, reruns) else [])
    windows = {"early": early} | ({"late": n - curves.WINDOW} if n >= early + 3 * curves.WINDOW else {})
    floors: dict[str, NoiseFloor] = {}
    found: dict[str, Difference] = {}
    alpha = curves.ALPHA / (len(names) * len(windows))
    for name in names:
        series, other = _values(a, name), _values(b, name)
        again = [_values(r, name) for r in reruns if getattr(r, name) is not None]
        resolution = max(_resolution(log, name) for log in (a, b, *reruns) if getattr(log, name) is not None)
        scale, numeric = (None, curves.NUMERIC_FLOOR) if name == "loss" else (1.0, curves.NUMERIC_FLOOR_LOG_NORM)
        floor = curves.noise_floor(series, again, resolution, start=early, scale=scale, numeric=numeric)
        for window, start in windows.items():
            floors[f"{name} {window}"] = floor
            found[f"{name} {window}"] = curves.paired_difference(
                series, other, a.steps, floor, start=start, alpha=alpha
            )
    # How far noise drifts by the end of a run is unknown without a rerun: then only the early window may convict.
    measured = floors["loss early"].measured
    decisive = {k: d for k, d in found.items() if measured or k.endswith("early")}
    different = [k for k, d in decisive.items() if d.verdict == "different"]
    if different:
        result.answer("training", "different", f"{_where(different[0], found)}: {found[different[0]].reason}")
    elif all(d.verdict == "same" for d in found.values()):
        result.answer("training", "same", f"{_where('loss early', found)}: {found['loss early'].reason}")
    else:
        open_ = next(k for k, d in found.items() if d.verdict != "same")
        result.answer("training", "inconclusive", f"{_where(open_, found)}: {_undecided(found[open_])}")
    result.numbers["difference"] = {k: d.to_dict() for k, d in found.items()}
    result.numbers["floor"] = {k: asdict(f) for k, f in floors.items()}
    result.numbers["max_abs_difference"] = float(np.max(np.abs(a.loss - b.loss)))
    result.numbers["onset_ratio"] = curves.onset_ratio(a.loss, b.loss, early)
    result.curves["band"] = curves.MARGIN * floors["loss early"].rms
    if not measured:
        result.notes.append(
            "No rerun was given: the noise floor is assumed. `--rerun` with the reference trained again."
        )


def _values(log: RunLog, name: str) -> np.typing.NDArray[np.float64]:
    """Gradient norms by their logarithm: their noise is multiplicative and comes in spikes."""
    values: np.typing.NDArray[np.float64] = getattr(log, name)
    return values if name == "loss" else np.log(np.maximum(values, FLOAT32_EPS))


def _resolution(log: RunLog, name: str) -> float:
    if name == "loss":
        return log.resolution(name)
    return log.resolution(name) / max(float(np.median(getattr(log, name))), FLOAT32_EPS)


def _same_quantity(a: RunLog, b: RunLog, reruns: Sequence[RunLog]) -> bool:
    """Before the first update equal batches have equal gradient norms, unless one arm logs another quantity."""
    if a.grad_norm is None or b.grad_norm is None or a.stride > 1:
        return False
    noise = max([abs(float(r.grad_norm[0] - a.grad_norm[0])) for r in reruns if r.grad_norm is not None], default=0.0)
    gap = abs(float(a.grad_norm[0] - b.grad_norm[0]))
    return gap <= max(3 * noise, 5 * FIRST_LOSS_SURE * abs(float(a.grad_norm[0])))


def _where(key: str, found: Mapping[str, Difference]) -> str:
    name, _ = key.split()
    first, last = found[key].window
    return f"{'loss' if name == 'loss' else 'log gradient norm'}, steps {first}-{last}"


def _undecided(difference: Difference) -> str:
    if difference.verdict == "inconclusive":
        return difference.reason
    return f"{difference.reason}, but how far noise alone drifts by then takes a rerun to know"


# -- 3. decorrelated? -------------------------------------------------------------------------------------------------


def _decorrelation(a: RunLog, b: RunLog, references: Sequence[RunLog], result: Comparison) -> None:
    if a.loss.size < 30:
        result.reasons["decorrelated"] = f"{a.loss.size} losses are too few; 30 are needed"
        return
    found = curves.lag_correlation(a.loss, b.loss, [r.loss for r in references])
    zero = found.zero
    if zero.low > 0.3:
        verdict, what = "shared batches", "the curves move together, as runs on the same batches do"
    elif not zero.excludes(0.0):
        verdict, what = "no shared batches", "no correlation beyond chance is left"
    else:
        verdict, what = "unclear", "some correlation is left"
    if references:
        # Freed of the batches' difficulty, a correlation is no longer about the batches.
        verdict = {"shared batches": "correlated", "no shared batches": "decorrelated"}.get(verdict, verdict)
        what = {"correlated": "the curves share more than their batches", "decorrelated": what}.get(verdict, what)
    interval = f"r = {zero.estimate:.3f} [{zero.low:.3f}, {zero.high:.3f}]"
    result.answer("decorrelated", verdict, f"{interval} at lag 0 after removing {found.removed}: {what}")
    together, chance = curves.extrema_synchrony(a.loss, b.loss)
    result.numbers["correlation"] = {
        "raw": float(np.corrcoef(a.loss, b.loss)[0, 1]) if np.ptp(a.loss) and np.ptp(b.loss) else None,
        "zero": zero,
        "peak_lag": found.peak,
        "shift_null": found.shift_null,
        "effective_n": effective_sample_size(a.loss, b.loss),
        "extrema_together": together,
        "extrema_by_chance": chance,
    }
    result.curves["correlation"] = found
    result.notes.append(CAVEAT)


# -- 4. better? -------------------------------------------------------------------------------------------------------


def outcome(log: RunLog) -> dict[str, float]:
    """What one run achieved, lower being better: final loss (mean of the last tenth) and mean loss (area by step)."""
    last = max(round(FINAL_SHARE * log.loss.size), 5)
    return {"final loss": float(log.loss[-last:].mean()), "mean loss": float(log.loss.mean())}


def _better(a: RunLog, b: RunLog, result: Comparison) -> None:
    difference = b.loss - a.loss
    last = max(round(FINAL_SHARE * difference.size), 5)
    gaps = {"final loss": series_mean(difference[-last:]), "mean loss": series_mean(difference)}
    result.numbers["outcome"] = {a.name: outcome(a), b.name: outcome(b), "difference": gaps}
    final = gaps["final loss"]
    if not difference.any():
        result.answer("better", "neither", "both logs are identical")
        return
    text = (
        f"final loss {b.name} - {a.name} = {final.estimate:+.4g} [{final.low:+.4g}, {final.high:+.4g}] on these batches"
    )
    result.answer("better", "inconclusive", f"{text}; {ONE_SEED}")


def series_mean(difference: np.typing.NDArray[np.float64], confidence: float = 0.95) -> Interval:
    """Mean of an autocorrelated series, its t interval on the effective sample size."""
    size = max(effective_sample_size(difference), 2.0)
    plain = t_interval(difference, confidence)
    critical = t_critical(size - 1, confidence)
    half = critical * float(difference.std(ddof=1)) / np.sqrt(size)
    method = f"t {confidence:.0%}, effective n {size:.0f}"
    return Interval(plain.estimate, plain.estimate - half, plain.estimate + half, plain.n, method)


def correlation_of(result: Comparison) -> LagCorrelation | None:
    """The correlation by lag behind question 3, where it was asked."""
    found = result.curves.get("correlation")
    return found if isinstance(found, LagCorrelation) else None
