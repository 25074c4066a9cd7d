"""The verdict: did the optimizer consume the modified gradients, and if not, which link of the chain broke?

Everything is decided from one run. Only "identical to the baseline" takes two: `judge_pair`.
"""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np

from grit_impl.ledger.chain import CHECKS, Breach, Check
from grit_impl.ledger.chain.table import LinkRow, chain_of, not_checked, unmoved
from grit_impl.ledger.chain.words import degrees, most, number, of_all, steps_of
from grit_impl.ledger.findings import Facts, facts
from grit_impl.notebook import card

PARTLY_SEEN = "partly-seen"
UNDECIDED = ("no-steps", "update-unexplained", "no-modifier", "undecided", PARTLY_SEEN)
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
        link: The link of the chain that broke, or None.
        chain: Each link: in how many tensor-steps it held, where it broke first, and for whom.
        unchecked: What could not be seen.
        applied: What was applied to the gradients, as far as it could be told from them.
        also: Cause and sentence of what else was found broken: a consequence of the first, or another fault.
    """

    cause: str
    effective: bool | None
    summary: str
    numbers: dict[str, Any] = field(default_factory=dict)
    per_group: dict[str, dict[str, Any]] = field(default_factory=dict)
    link: str | None = None
    chain: tuple[LinkRow, ...] = ()
    unchecked: tuple[str, ...] = ()
    also: tuple[tuple[str, str], ...] = ()
    applied: tuple[str, ...] = ()

    @property
    def fault(self) -> bool:
        """Whether something is wrong: plain training and an effective modifier are both in order."""
        return self.cause not in HARMLESS

    def __str__(self) -> str:
        return f"{self.cause}: {self.summary}"

    def _repr_html_(self) -> str:
        """For a notebook: the verdict, and the chain of custody link by link."""
        rows = [(row.link, f"{row.held} of {row.seen}", row.first or "", row.who) for row in self.chain]
        return card(
            self.cause,
            self.summary,
            ("link", "held in tensor-steps", "broke first at step", "for"),
            rows,
            self.effective,
        )


def judge_ledger(ledger: Any, checks: Sequence[Check] = CHECKS) -> Verdict:
    """Name what happened.

    Args:
        ledger: A closed `GradientLedger`, the path of its file, or a run record (which knows whether it was resumed).
        checks: The ways for links to break, in order.

    Raises:
        GRITError: the file is missing or corrupt.
    """
    evidence = facts(ledger)
    verdict = _judge(evidence, checks)
    return _of_a_part(verdict, evidence) if evidence.unseen > 0 and evidence.problem is None else verdict


def _judge(f: Facts, checks: Sequence[Check]) -> Verdict:
    chain = chain_of(f)
    common: dict[str, Any] = {
        "numbers": _numbers(f),
        "per_group": _per_group(f),
        "chain": chain,
        "applied": _applied(f),
    }
    if f.problem is not None:
        text = f"Cannot say: the ledger stopped looking ({f.problem}); the training itself was left alone"
        return Verdict("undecided", None, text, **common)
    tensors = max(1, f.tensors.name.nunique())
    found = [(check, breach) for check in checks if (breach := check.find(f)) is not None]
    # What broke for most tensors, before what broke for a few; each in the order of the links. NaN spreads.
    found.sort(key=lambda pair: pair[0].cause != "non-finite" and 2 * _count(pair[1], tensors) < tensors)
    also = tuple((b.cause or c.cause, b.summary) for c, b in found[1:])
    for check, breach in found:
        cause = breach.cause or check.cause
        effective = None if cause in UNDECIDED and (breach.cause or "") != "no-steps" else False
        text = f"{'No' if effective is False else 'Cannot say'}: {breach.summary}"
        common["numbers"] = {**common["numbers"], **breach.numbers}
        who = of_all(f.tensors.name.unique() if breach.tensors is None else breach.tensors, f)
        common["chain"] = tuple(replace(r, who=r.who or who) if r.link == check.link else r for r in chain)
        return Verdict(cause, effective, text, **common, link=check.link, also=also)
    if not len(f.live):
        text = "Cannot say: of no watched tensor a gradient was seen on its way to an optimizer"
        return Verdict("undecided", None, text, **common)
    if not len(f.bent):
        return Verdict("no-modifier", None, _plain(f, chain), **common)
    unseen = tuple(not_checked(f, chain))
    common["numbers"] = {**common["numbers"], "by": most(f.bent.by)}
    return Verdict("effective", True, _yes(f, unseen), **common, unchecked=unseen)


def _applied(f: Facts) -> tuple[str, ...]:
    """By factor, what was applied most often to the tensors that were looked into."""
    out = []
    for group, rows in f.bent[f.bent.matrix.notna()].groupby("group"):
        what = most(rows.matrix)
        share = int((rows.matrix == what).sum())
        residual = rows.fit.median()
        out.append(f"{group}: {what} ({share} of {len(rows)} looked into; the fit leaves {residual:.1g})")
    return tuple(out)


def _count(breach: Breach, tensors: int) -> int:
    return tensors if breach.tensors is None else len(set(breach.tensors))


def _yes(f: Facts, unseen: Sequence[str]) -> str:
    text = f"Yes: in {steps_of(f.bent.step, f)}, {of_all(f.bent.name.unique(), f)}; "
    if f.bent.update_turn.notna().any():
        text += f"updates turned by {degrees(f.bent.update_turn)}; "
    else:
        text += f"gradients turned by {degrees(f.bent.turn)}; "
    known = f.live[f.live.hash_after.notna()]
    still = known[(known.hash_before == known.hash_after) & (known.step >= f.start)]
    if len(still) > 0.01 * len(known):
        text += f"{len(still)} of {len(known)} updates changed no bit; "
    return text + (f"not checked: {', '.join(unseen)}" if unseen else "every link was seen")


def _plain(f: Facts, chain: Sequence[LinkRow]) -> str:
    moved = next(row.held for row in chain if row.link == "moved")
    optimizer = next((s["optimizer"] for s in f.steps if s.get("optimizer")), "the optimizer")
    text = (
        f"Plain training: {optimizer} found the gradients of {number(f.live.name.nunique(), 'tensor')} as backward left"
    )
    text += f" them, in {number(len(f.steps), 'step')}, and moved the weights by them ({moved} updates seen)"
    if 2 * len(same := f.written_back) > len(f.steps):
        text += f"; {same[0]} wrote them back as they were, in {number(len(same), 'step')}: so does a preconditioner "
        text += "that no statistics reach"
    return f"{text}; not checked: {late}" if (late := unmoved(f)) else text


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
    summary = f"Cannot say: too little of the run is in its ledger to speak for it ({seen}); of that part: {verdict}"
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
        raise AssertionError(f"{verdict.summary} [{verdict.cause}; {numbers}]\n{table_text(verdict)}")
    return verdict


def table_text(verdict: Verdict) -> str:
    """The chain as a table for a terminal."""
    lines = [f"{'link':12}{'held in (tensor-steps)':>24}  {'first break':>11}  who"]
    for row in verdict.chain:
        held = f"{row.held} of {row.seen}" if row.seen else "not seen"
        first = "" if row.first is None else f"step {row.first}"
        # Every look may hold and nothing come of it, as when the optimizer divides a change out again.
        mark = (" <- the cause" if row.seen and row.held == row.seen else " <- broke") * (row.link == verdict.link)
        lines.append(f"{row.link:12}{held:>24}  {first:>11}  {row.who}{mark}".rstrip())
    return "\n".join(lines)


def describe(verdict: Verdict) -> str:
    """A verdict for a terminal: the sentence, what was applied and what else broke, and the chain."""
    lines = [verdict.summary, f"cause: {verdict.cause}" + (f" (link: {verdict.link})" if verdict.link else "")]
    lines += [f"applied: {text}" for text in verdict.applied]
    lines += [f"also: {cause}: {text}" for cause, text in verdict.also]
    lines += [f"not checked: {text}" for text in verdict.unchecked]
    return "\n".join([*lines, "", table_text(verdict)])


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
