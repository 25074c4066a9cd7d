"""Two trainings compared by their logs: four questions in order, each answered only if the one before allows it.

1. Comparable?  2. The same training, or different?  3. Decorrelated (described, never convicting)?  4. Better?
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict

import numpy as np

from grit_impl.curves import noise as curves
from grit_impl.curves.fairness import FIRST_LOSS_SURE, obstacles
from grit_impl.curves.logs import FLOAT32_EPS, RunLog, from_record
from grit_impl.curves.noise import Difference, LagCorrelation, NoiseFloor
from grit_impl.curves.numbers import show, span
from grit_impl.curves.result import CurveComparison
from grit_impl.errors import GRITError
from grit_impl.record import RunRecord
from grit_impl.statistics.intervals import Interval, t_critical, t_interval
from grit_impl.statistics.series import effective_sample_size

FINAL_SHARE = 0.1
"""Share of the run, at its end, whose mean is called the final loss."""
CAVEAT = (
    "Decorrelation describes, it never convicts: a step's loss is mostly its batch. With GRIT fully applied and the "
    "weights 66% apart, the curves still correlated at 0.998; with another data order, the same optimizer gave 0.49."
)
ONE_SEED = (
    "one seed supports no claim about optimizers: run each arm with at least 7 seeds (for p < .05 by sign flips), "
    "10 to find an effect as large as its seed-to-seed spread"
)


def compare_records(
    a: RunRecord, b: RunRecord, reruns: Sequence[RunRecord] = (), *, first_update: int = 1
) -> CurveComparison:
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
) -> CurveComparison:
    """Answer the four questions for one run of each arm.

    Args:
        a: The reference.
        b: The run in question.
        reruns: `a` trained again: the noise floor. Three or more are best.
        references: Other runs on the same batches (base model, other optimizers): the batches' difficulty.
        first_update: Step of the first update that can differ; losses from the next step on can show it.
        anyway: Go on where the comparison is not fair; the reason stays in the result.
    """
    result = CurveComparison(a.name, b.name)
    result.notes += dict.fromkeys(note for log in (a, b, *reruns, *references) for note in log.notes)
    result.curves = {"steps": a.steps, "a": a.loss, "b": b.loss, "reruns": [r.loss for r in reruns]}
    reasons = obstacles(a, b, reruns, result)
    for other in (*reruns, *references):
        if not reasons and (other.steps.size, other.stride) != (a.steps.size, a.stride):
            raise GRITError(
                f"{other.path}: {other.steps.size} losses, every {other.stride}, but {a.path} has {a.steps.size}, "
                f"every {a.stride}: a rerun or reference must be logged as A is"
            )
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


# -- 2. the same training? --------------------------------------------------------------------------------------------


def _training(a: RunLog, b: RunLog, reruns: Sequence[RunLog], first_update: int, result: CurveComparison) -> None:
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
    _answer(found, floors, result)
    result.numbers["difference"] = {k: d.to_dict() for k, d in found.items()}
    result.numbers["floor"] = {k: asdict(f) for k, f in floors.items()}
    result.numbers["max_abs_difference"] = float(np.max(np.abs(a.loss - b.loss)))
    result.numbers["onset_ratio"] = curves.onset_ratio(a.loss, b.loss, early)
    result.curves["band"] = curves.MARGIN * floors["loss early"].rms
    if not floors["loss early"].measured:
        result.notes.append(
            "No rerun was given: the noise floor is assumed. `--rerun` with the reference trained again."
        )


def _answer(found: Mapping[str, Difference], floors: Mapping[str, NoiseFloor], result: CurveComparison) -> None:
    """The verdict on the training: what is measured decides; of what is assumed, only the loss does.

    How far noise drifts by the end of a run is unknown without a rerun, so against an assumed floor only the early
    window may convict. The floor of a gradient norm is a guess where no rerun logged one (real reruns went beyond it
    three- to tenfold): it neither convicts nor keeps the loss from being called the same, and its excess is said.
    """
    counted = {k: d for k, d in found.items() if k.startswith("loss") or floors[k].measured}
    decisive = {k: d for k, d in counted.items() if floors[k].measured or k.endswith("early")}
    different = [k for k, d in decisive.items() if d.verdict == "different"]
    undecided = [k for k, d in counted.items() if d.verdict != "same"]
    if different:
        verdict, key = "different", different[0]
        reason = found[key].reason
    elif undecided:
        verdict, key = "inconclusive", max(undecided, key=lambda k: found[k].ratio.estimate)
        reason = _undecided(found[key])
    else:
        verdict, key = "same", "loss early"
        reason = found[key].reason
    text = f"{_where(key, found)}: {reason}; the floor is {floors[key].source}"
    beyond = [k for k, d in found.items() if k not in counted and d.ratio.estimate > curves.MARGIN]
    if beyond and verdict != "different":
        most = max(beyond, key=lambda k: found[k].ratio.estimate)
        text += (
            f"; {_where(most, found)}: {show(found[most].ratio.estimate)} times a floor that is only assumed, which "
            "decides nothing: a rerun would measure it"
        )
    result.answer("training", verdict, text)


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


def _decorrelation(a: RunLog, b: RunLog, references: Sequence[RunLog], result: CurveComparison) -> None:
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
    interval = f"r = {show(zero.estimate, '.3f')} {span(zero.low, zero.high, '.3f')}"
    result.answer("decorrelated", verdict, f"{interval} at lag 0 after removing {found.removed}: {what}")
    together, chance = curves.extrema_synchrony(a.loss, b.loss)
    result.numbers["correlation"] = {
        "raw": float(np.corrcoef(a.loss, b.loss)[0, 1]) if np.ptp(a.loss) and np.ptp(b.loss) else float("nan"),
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


def _better(a: RunLog, b: RunLog, result: CurveComparison) -> None:
    difference = b.loss - a.loss
    last = max(round(FINAL_SHARE * difference.size), 5)
    gaps = {"final loss": series_mean(difference[-last:]), "mean loss": series_mean(difference)}
    result.numbers["outcome"] = {a.name: outcome(a), b.name: outcome(b), "difference": gaps}
    final = gaps["final loss"]
    if not difference.any():
        result.answer("better", "neither", "both logs are identical")
        return
    gap = f"{show(final.estimate, '+.4g')} {span(final.low, final.high, '+.4g')}"
    text = f"final loss {b.name} - {a.name} = {gap} on these batches"
    result.answer("better", "inconclusive", f"{text}; {ONE_SEED}")


def series_mean(difference: np.typing.NDArray[np.float64], confidence: float = 0.95) -> Interval:
    """Mean of an autocorrelated series, its t interval on the effective sample size."""
    size = max(effective_sample_size(difference), 2.0)
    plain = t_interval(difference, confidence)
    critical = t_critical(size - 1, confidence)
    half = critical * float(difference.std(ddof=1)) / np.sqrt(size)
    method = f"t {confidence:.0%}, effective n {size:.0f}"
    return Interval(plain.estimate, plain.estimate - half, plain.estimate + half, plain.n, method)


def correlation_of(result: CurveComparison) -> LagCorrelation | None:
    """The correlation by lag behind question 3, where it was asked."""
    found = result.curves.get("correlation")
    return found if isinstance(found, LagCorrelation) else None
