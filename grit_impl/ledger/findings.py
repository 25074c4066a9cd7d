"""A ledger's rows as tables, and the quantities that the detectors look at."""

from __future__ import annotations

import os
from dataclasses import dataclass
from typing import Any

import numpy as np
import pandas as pd  # type: ignore[import-untyped]

from grit_impl.errors import GRITError
from grit_impl.ledger.rows import read_rows
from grit_impl.ledger.timeline import SCALER, TURN
from grit_impl.record import RunRecord

_NUMBERS = ["raw", "entry", "turn", "written", "turn_written", "turns", "mods", "update", "update_exact", "update_raw"]
_NUMBERS += ["update_turn", "replay", "reaction", "fit", "condition", "identity", "twice", "stale", "step"]
_FLAGS = ("unheld", "nonfinite", "lost")
_TEXTS = ("name", "hash_raw", "hash_entry", "hash_before", "hash_after", "by", "undone_by", "micro", "late")


@dataclass
class Facts:
    """What one ledger says.

    Attributes:
        run: The header row.
        steps: The step rows.
        tensors: One row per step and tensor (a missing number is NaN, a missing text None), with the columns
            `group` ("A", "B" or "other"), `layer`, `live` (held by an optimizer, gradient not zero), `bent` (live, and
            the gradient at the optimizer's entry has another direction than the raw one).
        report: The preconditioner's last own report, or None.
        unseen: Optimizer steps of the run that are not in this ledger: a run that was killed may have lost what its
            ledger saw. Steps are numbered like the run's.
    """

    run: dict[str, Any]
    steps: list[dict[str, Any]]
    tensors: pd.DataFrame
    report: dict[str, Any] | None
    unseen: int = 0

    @property
    def live(self) -> pd.DataFrame:
        """Rows whose gradient is not zero and which an optimizer holds."""
        return self.tensors[self.tensors.live]

    @property
    def bent(self) -> pd.DataFrame:
        """Rows whose direction was changed, at the optimizer's entry."""
        return self.tensors[self.tensors.bent]

    @property
    def touched(self) -> pd.DataFrame:
        """Live rows that any modifier changed before the optimizer, if only in size."""
        return self.tensors[self.tensors.live & (self.tensors.mods > 0)]

    @property
    def statuses(self) -> dict[str, int]:
        """Factor status -> layers, from the report."""
        return dict(self.report.get("statuses", {})) if self.report else {}

    @property
    def modifier_known(self) -> bool:
        """Whether a preconditioner is attached: it reports on itself, or its hooks sit on LoRA's modules."""
        return self.report is not None or any(s.get("hooked_modules") for s in self.steps)

    def total(self, key: str) -> int:
        """Sum of a step fact over the run."""
        return int(sum(s.get(key) or 0 for s in self.steps))

    def share(self, part: pd.DataFrame, whole: pd.DataFrame) -> float:
        """len(part) / len(whole); 0 for nothing."""
        return len(part) / len(whole) if len(whole) else 0.0


def facts(source: Any) -> Facts:
    """Facts of a closed `GradientLedger`, of its rows, of a ledger file, or of a run record's ledger.

    Raises:
        GRITError: the file is missing or corrupt, or the rows are not a ledger's.
    """
    if isinstance(source, RunRecord):
        rows = read_rows(source.ledger)
        if rows[0].get("schema", 1) < 2:  # such a ledger holds what the last process saw, and numbers it from 1
            before = int(source.run.get("resumed_from") or 0)
            rows = [{**row, "step": row["step"] + before} if "step" in row else row for row in rows]
    elif isinstance(source, str | os.PathLike):
        rows = read_rows(source)
    elif isinstance(source, list):
        rows = source
    else:
        rows = source.rows()
    if not rows or rows[0].get("kind") != "run":
        raise GRITError("this is not a gradient ledger: its first row is not of kind 'run'; was the context closed?")
    tensors = _table([r for r in rows if r["kind"] == "tensor"])
    steps = [r for r in rows if r["kind"] == "step"]
    reports = [r for r in rows if r["kind"] == "factors"]
    ends = [r["step"] for r in rows if r["kind"] in ("step", "end")]
    unseen = ends[-1] - len(steps) if ends else 0
    return Facts(rows[0], steps, _derive(tensors, steps), reports[-1] if reports else None, unseen)


def _table(rows: list[dict[str, Any]]) -> pd.DataFrame:
    table = pd.DataFrame(rows, columns=["kind", *_NUMBERS, *_FLAGS, *_TEXTS])
    for column in _NUMBERS:
        table[column] = pd.to_numeric(table[column], errors="coerce").astype(float)
    for column in _FLAGS:
        table[column] = table[column].notna()
    for column in _TEXTS:
        table[column] = table[column].astype(object).where(table[column].notna(), None)
    return table


def _derive(t: pd.DataFrame, steps: list[dict[str, Any]]) -> pd.DataFrame:
    name = t.name.astype(str)
    t["group"] = np.select([name.str.contains("lora_A"), name.str.contains("lora_B")], ["A", "B"], "other")
    t["layer"] = name.str.split(".lora_").str[0]
    for column in ("turns", "mods"):
        t[column] = t[column].fillna(0)
    t["turn"] = t.turn.where(t.turn.notna() | t.entry.isna(), 0.0)
    t["live"] = (t.raw > 0) & ~t.unheld & np.isfinite(t.raw)
    t["bent"] = t.live & (t.turn > TURN) & (t.mods > 0)
    events = ((s["step"], e) for s in steps for e in s.get("events", ()))
    unscaled = {step: float(e["factor"]) for step, e in events if e["who"] == SCALER and "factor" in e}
    t["unscaled"] = t.raw * t.step.map(unscaled).astype(float).fillna(1.0)
    t["gain"] = t.entry / t.unscaled.where(t.unscaled > 0)
    return t
