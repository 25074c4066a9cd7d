"""The first question: are two runs comparable at all, that is, did they see the same batches with the same labels?"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from grit_impl.curves import noise as curves
from grit_impl.curves.logs import FLOAT32_EPS, RunLog
from grit_impl.curves.names import FEWEST_LOSSES
from grit_impl.curves.numbers import show
from grit_impl.curves.result import CurveComparison

FIRST_LOSS_SURE = 0.002
"""Relative gap of the loss before any update that bfloat16 rounding explains: the same weights saw the same batch."""
FIRST_LOSS_REFUSED = 0.02
"""Relative gap that no rounding explains: other labels, other data or another base."""


def obstacles(a: RunLog, b: RunLog, reruns: Sequence[RunLog], result: CurveComparison) -> list[str]:
    """Reasons why a comparison would not be fair; what was found in order goes into numbers["checked"]."""
    n, m = a.steps.size, b.steps.size
    if n != m or a.stride != b.stride:
        every = f", logged every {a.stride} and {b.stride}" if a.stride != b.stride else ""
        return [f"{n} losses against {m} (to steps {a.steps[-1]} and {b.steps[-1]}{every}){_remedy(a, b)}"]
    found, checked = [], [f"{n} losses each"]
    # One tracker counts from 0, another from 1; anything more is another part of a training.
    if abs(int(a.steps[0] - b.steps[0])) > 1:
        found.append(f"the logs begin at steps {a.steps[0]} and {b.steps[0]}")
    models = [log.meta.get("base_model") for log in (a, b)]
    if None not in models and models[0] != models[1]:
        found.append(f"base models {models[0]} and {models[1]}")
    if a.seed is not None and b.seed is not None and a.seed != b.seed:
        result.notes.append(f"Seeds differ ({a.seed} and {b.seed}): so may batches and initialisation.")
    _check_rates(a, b, found, checked, result)
    if a.tokens is not None and b.tokens is not None:
        unequal = np.flatnonzero(a.tokens != b.tokens)
        if unequal.size:
            at = int(unequal[0])
            found.append(
                f"tokens differ at {unequal.size} of {n} steps (step {a.steps[at]}: {show(a.tokens[at], '.0f')} and "
                f"{show(b.tokens[at], '.0f')}): other batches or other padding"
            )
        else:
            checked.append("the same tokens at every step")
    _check_first_loss(a, b, reruns, found, checked, result)
    result.numbers["checked"] = checked
    return found


def _remedy(a: RunLog, b: RunLog) -> str:
    """What makes logs of other lengths comparable, where anything does."""
    if a.stride != b.stride:
        return "; log both at the same interval (`logging_steps`)"
    shortest = min(a.steps[-1], b.steps[-1])
    x, y = (log.steps[log.steps <= shortest] for log in (a, b))
    if x.size < FEWEST_LOSSES or not np.array_equal(x, y):
        return ""
    return f"; `--until {shortest}` compares what both have"


def _check_rates(a: RunLog, b: RunLog, found: list[str], checked: list[str], result: CurveComparison) -> None:
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
        found.append(f"learning rates differ (step {a.steps[at]}: {show(x[at], '.4g')} and {show(y[at], '.4g')})")


def _check_first_loss(
    a: RunLog, b: RunLog, reruns: Sequence[RunLog], found: list[str], checked: list[str], result: CurveComparison
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
    text = f"losses of the first batch, before any update, {show(first, '.4f')} and {show(second, '.4f')}"
    if a.grad_norm is not None and b.grad_norm is not None:
        result.numbers["first_grad_norm"] = [float(a.grad_norm[0]), float(b.grad_norm[0])]
        text += f", gradient norms {show(a.grad_norm[0], '.4g')} and {show(b.grad_norm[0], '.4g')}"
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
