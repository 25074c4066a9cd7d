"""The verdict: did the optimizer consume the modified gradients, and if not, why?

`judge_ledger` asks a list of detectors, in the order in which causes exclude each other; the first that answers names
the cause. Everything is decided from one run. Only "identical to the baseline" takes two: `judge_pair`.
"""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np

from grit_impl.ledger.detectors import DETECTORS, PARTLY_SEEN, UNDECIDED, Detector
from grit_impl.ledger.findings import Facts, facts

HARMLESS = ("effective", "no-modifier")
MOST_UNSEEN = 0.5
"""Share of a run's steps that may be missing from its ledger (a killed run's) if it is to speak for the run."""


@dataclass(frozen=True)
class Verdict:
    """What happened to the gradients of a run.

    Attributes:
        cause: A short name; `CAUSES` explains each.
        effective: Whether a modified gradient reached the optimizer and changed the direction of its updates; None: it
            cannot be said.
        summary: One sentence for people.
        numbers: The evidence behind it.
        per_group: The same quantities for the A and the B factors.
    """

    cause: str
    effective: bool | None
    summary: str
    numbers: dict[str, Any] = field(default_factory=dict)
    per_group: dict[str, dict[str, Any]] = field(default_factory=dict)

    @property
    def fault(self) -> bool:
        """Whether something is wrong: plain training and an effective modifier are both in order."""
        return self.cause not in HARMLESS

    def __str__(self) -> str:
        return f"{self.cause}: {self.summary}"


def judge_ledger(ledger: Any, detectors: Sequence[Detector] = DETECTORS) -> Verdict:
    """Name what happened.

    Args:
        ledger: A closed `GradientLedger`, the path of its file, or a run record (which knows whether it was resumed).
        detectors: The decision order.

    Raises:
        GRITError: the file is missing or corrupt.
    """
    evidence = facts(ledger)
    verdict = _first(evidence, detectors)
    return _of_a_part(verdict, evidence) if evidence.unseen else verdict


def _first(f: Facts, detectors: Sequence[Detector]) -> Verdict:
    common = _numbers(f)
    for detector in detectors:
        finding = detector.find(f)
        if finding is not None:
            cause = finding.cause or detector.cause
            effective = True if cause == "effective" else None if cause in UNDECIDED else False
            return Verdict(cause, effective, finding.summary, {**common, **finding.numbers}, _per_group(f))
    return Verdict("undecided", None, "no detector recognised what happened", common, _per_group(f))


def _of_a_part(verdict: Verdict, f: Facts) -> Verdict:
    """The verdict on a run of which the ledger saw only a part: a fault is a fault, its absence may be chance."""
    last = f.unseen + len(f.steps)
    # Steps that follow one another keep their distance from their place in the list.
    runs = itertools.groupby(enumerate(step["step"] for step in f.steps), lambda pair: pair[1] - pair[0])
    parts = [[number for _, number in run] for _, run in runs]
    seen = f"steps {' and '.join(f'{part[0]} to {part[-1]}' for part in parts) or 'none'} seen; the run was resumed"
    if parts and parts[-1][0] > 1:
        seen += f" after step {parts[-1][0] - 1}"
    numbers = {**verdict.numbers, "unseen_steps": f.unseen}
    fault = verdict.cause not in (*HARMLESS, *UNDECIDED)
    if fault or f.unseen <= MOST_UNSEEN * last:
        return replace(verdict, summary=f"{verdict.summary} ({seen})", numbers=numbers)
    summary = f"too little of the run is in its ledger to speak for it ({seen}); of that part: {verdict}"
    return replace(verdict, cause=PARTLY_SEEN, effective=None, summary=summary, numbers=numbers)


def assert_effective(ledger: Any, *, allow: Sequence[str] = ()) -> Verdict:
    """Raise `AssertionError` with the cause and its numbers unless modified gradients shaped the updates.

    Args:
        ledger: What `judge_ledger` takes.
        allow: Causes that are accepted as well.
    """
    verdict = judge_ledger(ledger)
    if not (verdict.effective or verdict.cause in allow):
        numbers = ", ".join(f"{k} = {v}" for k, v in verdict.numbers.items())
        raise AssertionError(f"the modified gradients had no effect: {verdict} [{numbers}]")
    return verdict


def judge_pair(ledger: Any, baseline: Any) -> Verdict:
    """Compare a run with its baseline, tensor by tensor and step by step; both as `judge_ledger` takes them.

    Returns:
        `identical-to-baseline` (parameters bit-equal after every common step), `same-within-rounding`,
        `different-data` (the raw gradients differ before any update), or `differs` (with the first step).
    """
    left, right = facts(ledger), facts(baseline)
    columns = ["step", "name", "raw", "update", "hash_raw", "hash_after"]
    both = left.tensors[columns].merge(right.tensors[columns], on=["step", "name"], suffixes=("", "_b"))
    numbers: dict[str, Any] = {"rows": len(both), "steps": int(both.step.nunique())}
    if not len(both):
        return Verdict("nothing-in-common", None, "the two ledgers share no step and tensor", numbers)
    first = both[both.step == both.step.min()]
    start = _difference(first.raw, first.raw_b)
    equal = both.hash_after == both.hash_after_b
    raw, update = _difference(both.raw, both.raw_b), _difference(both["update"], both["update_b"])
    numbers |= {"first_raw": start, "raw": raw, "update": update, "bit_equal": float(equal.mean())}
    if equal.all():
        text = f"every parameter is bit-equal to the baseline's after each of {numbers['steps']} steps"
        return Verdict("identical-to-baseline", False, text, numbers)
    if start > 1e-2:
        text = f"the first gradients differ by {start:.1%} before any update: other data, labels or initial weights"
        return Verdict("different-data", None, text, numbers)
    if raw < 1e-3 and update < 1e-3:
        text = f"gradients and updates agree with the baseline's to {max(raw, update):.1e}"
        return Verdict("same-within-rounding", False, text, numbers)
    numbers["onset"] = int(both[~equal].step.min())
    text = f"updates differ from the baseline's by {update:.1%}, from step {numbers['onset']}"
    return Verdict("differs", True, text, numbers)


def _difference(a: Any, b: Any) -> float:
    scale = np.maximum(np.abs(a), np.abs(b))
    relative = np.abs(a - b)[scale > 0] / scale[scale > 0]
    return float(relative.mean()) if len(relative) else 0.0


def _numbers(f: Facts) -> dict[str, Any]:
    live, bent = f.live, f.bent
    numbers: dict[str, Any] = {
        "steps": len(f.steps),
        "tensors": int(live.name.nunique()),
        "active_steps": int(bent.step.nunique()),
        "share_modified": round(f.share(bent, live), 4),
        "statuses": f.statuses or None,
        "order": max((s["order"] for s in f.steps if "order" in s), key=len, default=None),
    }
    for key, column in (("turn", "turn"), ("update_turn", "update_turn"), ("replay", "replay")):
        values = (bent if key != "replay" else live)[column].dropna()
        if len(values):
            numbers[key] = float(f"{values.median():.4g}")
    return {k: v for k, v in numbers.items() if v is not None}


def _per_group(f: Facts) -> dict[str, dict[str, Any]]:
    groups = {}
    for group, rows in f.live.groupby("group"):
        bent = rows[rows.bent]
        values = {
            "tensors": int(rows.name.nunique()),
            "share_modified": f.share(bent, rows),
            "turn": bent.turn.median(),
            "update_turn": bent.update_turn.median(),
            "condition": bent.condition.median(),
            "identity_distance": bent.identity.median(),
        }
        groups[str(group)] = {k: v if k == "tensors" else float(f"{v:.4g}") for k, v in values.items() if v == v}
    return groups
