"""Gradient ledgers written by hand: ten steps, and four tensors (A and B of two layers) unless told otherwise."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from grit_impl.ledger.chain import CHECKS, Breach
from grit_impl.ledger.findings import facts
from grit_impl.ledger.verdict import judge_ledger

STEPS = 10
NAMES = [f"layers.{layer}.q_proj.lora_{side}.default.weight" for layer in (0, 1) for side in "AB"]
Rows = list[dict[str, Any]]
PLAIN = {"raw": 1.0, "entry": 1.0, "update": 0.1, "update_exact": 0.1, "update_raw": 0.1, "replay": 1e-6}
# A gradient that GRIT turned and the optimizer consumed.
BENT = {"mods": 1, "turns": 1, "turn": 0.3, "turn_written": 0.3, "update_turn": 0.2, "by": "GRIT"}


def ledger(
    tensor: Callable[[int, str], dict[str, Any]] = lambda step, name: {},
    step: Callable[[int], dict[str, Any]] = lambda step: {},
    report: dict[str, Any] | None = None,
    steps: int = STEPS,
    names: list[str] = NAMES,
) -> Rows:
    """Rows of a plain run, changed by `tensor` and `step`, with the preconditioner's own report at the end."""
    rows: Rows = [{"kind": "run", "tensors": len(names)}]
    for number in range(1, steps + 1):
        rows.append({"kind": "step", "step": number, "held": len(names), "lr": [0.0, 1e-3], **step(number)})
        for name in names:
            digest = f"{name}@"
            hashes = {"hash_raw": digest + f"g{number}", "hash_entry": digest + f"e{number}"}
            hashes |= {"hash_before": digest + f"{number}", "hash_after": digest + f"{number + 1}"}
            rows.append({"kind": "tensor", "step": number, "name": name, **PLAIN, **hashes, **tensor(number, name)})
    return rows + ([{"kind": "factors", "step": steps, **report}] if report else [])


def bent(**changes: Any) -> Rows:
    """All gradients turned and consumed, but for the changes."""
    return ledger(lambda step, name: {**BENT, **changes})


def some(n: int, fields: dict[str, Any], other: dict[str, Any] | None = None) -> Rows:
    """`fields` in the first n of the 40 tensor rows, `other` in the rest."""
    return ledger(lambda step, name: fields if 4 * (step - 1) + NAMES.index(name) < n else other or {})


SHARED = {"only-one-factor": "only-some-layers"}
"""Causes that a check of another name answers with."""


def find(cause: str, rows: Rows) -> Breach | None:
    """What one check alone says; for the two verdicts without a breach, what the whole chain says."""
    if cause in ("effective", "no-modifier"):
        verdict = judge_ledger(rows)
        numbers = {"by": verdict.numbers["by"]} if "by" in verdict.numbers else {}
        return Breach(verdict.summary, None, numbers) if verdict.cause == cause else None
    check = next(c for c in CHECKS if c.cause == SHARED.get(cause, cause))
    found = check.find(facts(rows))
    return found if found is None or cause not in SHARED or found.cause == cause else None


def statuses(**counts: int) -> dict[str, Any]:
    return {"statuses": {name.replace("_", "-"): n for name, n in counts.items()}}


Case = tuple[str, Rows, str | None, dict[str, Any]]
"""The check asked, the ledger, the sentence it answers (None: it does not answer), and its numbers."""
