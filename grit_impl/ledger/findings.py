"""A ledger's rows as tables, and the quantities that the chain looks at."""

from __future__ import annotations

import math
import os
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import pandas as pd  # type: ignore[import-untyped]

from grit_impl.errors import GRITError
from grit_impl.ledger.rows import FLAG, NUMBER, TENSOR, TEXT, read_rows
from grit_impl.ledger.timeline import SCALER, TURN
from grit_impl.record import RunRecord

AWAY = 1.1
"""1 - cos from which on a gradient points away from the raw one; a preconditioner is positive and stays below 1."""

MIXED, OTHERWISE = 1e-3, 0.1
"""Residuals below which a gradient is a mix of others, each taken by one number, and from which on it is none. Rows
have five digits, and matrices of preconditioners leave 0.3 and more."""


@dataclass
class Facts:
    """What one ledger says.

    Attributes:
        run: The header row.
        steps: The step rows.
        tensors: One row per step and tensor (a missing number is NaN, a missing text None), with the columns
            `group` ("A", "B" or "other"), `layer`, `live` (held by an optimizer, gradient finite and not zero), `bent`
            (live, and the gradient at the optimizer's entry has another direction than the raw one).
        report: The preconditioner's last own report, or None.
        unseen: Optimizer steps of the run that are not in this ledger: a run that was killed may have lost what its
            ledger saw. Steps are numbered like the run's.
        problem: What went wrong in the ledger, or None.
        weights: Name -> hash of the tensor when the ledger was closed.
        kept: Name -> what was left of the way of the steps then, and its cosine with what was taken back.
        vectors: Names of tensors that no matrix can turn (DoRA's magnitudes, biases).
        sizes: Name -> elements.
        tied: Name -> how many names the tensor has, where it has several.
    """

    run: dict[str, Any]
    steps: list[dict[str, Any]]
    tensors: pd.DataFrame
    report: dict[str, Any] | None
    unseen: int = 0
    problem: str | None = None
    weights: dict[str, str] | None = None
    kept: dict[str, tuple[float, float]] = field(default_factory=dict)

    def __post_init__(self) -> None:
        t, known = self.tensors, self.run["tensors"]
        known = known if isinstance(known, list) else []
        self.vectors = {x["name"] for x in known if math.prod(x["shape"]) == max(x["shape"], default=1)}
        self.sizes = {x["name"]: math.prod(x["shape"]) for x in known}
        self.tied = {x["name"]: int(x["names"]) for x in known if x.get("names")}
        self.live, self.bent = t[t.live], t[t.bent]
        self.touched = t[t.live & (t.mods > 0)]

    @property
    def statuses(self) -> dict[str, int]:
        """Factor status -> layers, from the report."""
        return dict(self.report.get("statuses", {})) if self.report else {}

    @property
    def modifier_known(self) -> bool:
        """Whether a preconditioner is there: it reports on itself, its statistics are kept, or it writes what it read.

        Hooks alone do not tell: reading is not modifying.
        """
        written = bool(self.most("hooked_modules")) and 2 * len(self.written_back) > len(self.steps)
        return self.report is not None or written or self.most("matrices") >= max(2, self.tensors.layer.nunique() / 2)

    @property
    def written_back(self) -> list[str]:
        """Who wrote gradients as they were before the optimizer ran: the first of each step in which somebody did."""
        events = ([e for e in s.get("events", ()) if e["phase"] == "before"] for s in self.steps)
        found = (next((str(e["who"]) for e in step if e["changed"] == 0), "") for step in events)
        return [who for who in found if who]

    @property
    def turned_in_vain(self) -> bool:
        """Whether somebody turned gradients at the wrong moment, or for a while."""
        t = self.tensors
        return bool(t.late.notna().any() or t.micro.notna().any() or (t.turn_written > TURN).any())

    @property
    def idle(self) -> set[str]:
        """Tensors that only an optimizer holds which never stepped."""
        held = set(self.tensors[~self.tensors.unheld].name)
        return {name for s in self.steps for name in s.get("idle") or ()} - held

    @property
    def start(self) -> float:
        """The first step with a turned gradient; infinite where there is none."""
        return float(self.bent.step.min()) if len(self.bent) else float("inf")

    def total(self, key: str) -> int:
        """Sum of a step fact over the run."""
        return int(sum(s.get(key) or 0 for s in self.steps))

    def most(self, key: str) -> Any:
        """The largest value of a step fact; 0 for none."""
        return max((s.get(key) or 0 for s in self.steps), default=0)

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
    problem = next((r["text"] for r in rows if r["kind"] == "problem"), None)
    hashes = next((r["weights"] for r in reversed(rows) if r.get("weights")), None)
    weights = {t["name"]: h for t, h in zip(rows[0]["tensors"], hashes, strict=True)} if hashes else None
    report = reports[-1] if reports else None
    end: list[list[Any]] = next((r["kept"] for r in reversed(rows) if r["kind"] == "end" and r.get("kept")), [])
    kept = {t["name"]: (float(a), float(b)) for t, (a, b) in zip(rows[0]["tensors"], end, strict=True)} if end else {}
    return Facts(rows[0], steps, _derive(tensors, steps), report, unseen, problem, weights, kept)


def _table(rows: list[dict[str, Any]]) -> pd.DataFrame:
    table = pd.DataFrame(rows, columns=["kind", *TENSOR])
    convert: dict[str, Callable[[pd.Series], pd.Series]] = {
        NUMBER: lambda column: pd.to_numeric(column, errors="coerce").astype(float),
        FLAG: lambda column: column.notna(),
        TEXT: lambda column: column.astype(object).where(column.notna(), None),
    }
    for column, (kind, _) in TENSOR.items():
        table[column] = convert[kind](table[column])
    return table


def _derive(t: pd.DataFrame, steps: list[dict[str, Any]]) -> pd.DataFrame:
    name = t.name.astype(str)
    t["group"] = np.select([name.str.contains("lora_.*A"), name.str.contains("lora_.*B")], ["A", "B"], "other")
    t["layer"] = name.str.split(".lora_").str[0]
    for column in ("turns", "mods"):
        t[column] = t[column].fillna(0)
    t["turn"] = t.turn.where(t.turn.notna() | t.entry.isna(), 0.0)
    _take_mixes_for_raw(t, steps)
    t["skipped"] = t.step.isin([s["step"] for s in steps if s.get("skipped")])
    t["live"] = (t.raw > 0) & ~t.unheld & np.isfinite(t.raw)
    t["bent"] = t.live & (t.turn > TURN) & (t.mods > 0)
    t["own"] = t.own.fillna(t.fit)
    events = ((s["step"], e) for s in steps for e in s.get("events", ()))
    unscaled = {step: float(e["factor"]) for step, e in events if e["who"] == SCALER and "factor" in e}
    t["unscaled"] = t.raw * t.step.map(unscaled).astype(float).fillna(1.0)
    t["gain"] = t.entry / t.unscaled.where(t.unscaled > 0)
    return t


def _take_mixes_for_raw(t: pd.DataFrame, steps: list[dict[str, Any]]) -> None:
    """Where a loop cleared gradients between a step's passes and then put them together, the result is no modifier's.

    The ledger takes the last pass for raw. What is a mix of all of them counts as not turned, in all tensors of a step
    in which it is so in those that were looked into; and where none was, as in most other steps of this kind.
    """
    if not len(known := t[t.passes.notna()]):
        return
    between = [
        s["step"]
        for s in steps
        if any(e["phase"] == "micro" and (e.get("gone") or e.get("zeroed")) for e in s.get("events", ()))
    ]
    of_passes = (known.groupby("step").passes.max() < MIXED).astype(float)
    mixed = t.step.isin(between) & (t.step.map(of_passes).fillna(of_passes.mean()) > 0.5)
    t.loc[mixed, ["turn", "turns", "mods"]] = 0.0
    turned = t.step.map(known.groupby("step").passed.max()) > OTHERWISE
    t.loc[mixed & ~turned, ["written", "turn_written"]] = np.nan


def update_ratio(rows: pd.DataFrame) -> float:
    """Median size of the updates, in those that the raw gradients would have made.

    NaN where most of the latter round to nothing: what is left are differences in the last bit.
    """
    known = rows[rows.update_exact.notna() & rows.update_raw.notna()]
    made = known[known.update_raw > 0]
    return float((made.update_exact / made.update_raw).median()) if 2 * len(made) > len(known) else math.nan


def lasting(rows: pd.DataFrame, bad: pd.Series, *, half: bool = True) -> list[str]:
    """Tensors for which something is so in half of their rows (if that counts), or at the end and has come to stay.

    The end is the last tenth of the rows, at least two of at least six, and at least twice the longest time that it
    was so before: what happens every twentieth step has not ended when it does not happen for nine.
    """
    if not bad.any():
        return []
    found = []
    for name, flags in bad.groupby(rows.name, sort=False):
        values = flags.to_numpy()
        if (half and 2 * values.sum() >= len(values)) or _ends(values):
            found.append(str(name))
    return found


def _ends(values: np.typing.NDArray[np.bool_]) -> bool:
    n = len(values)
    edges = np.flatnonzero(np.diff(np.concatenate([[0], values.astype(int), [0]])))
    runs = [int(b - a) for a, b in zip(edges[::2], edges[1::2], strict=True)]
    if n < 6 or not values[-1]:
        return False
    return runs[-1] >= max(2, -(-n // 10)) and runs[-1] >= 2 * max(runs[:-1], default=0)


def waiting(f: Facts) -> pd.Series:
    """Rows of A whose gradient is zero because B, which has one, is what it was when the run began: zero.

    In the same way of B where A begins with zeros.
    """
    t = f.tensors
    first = t.sort_values("step").groupby("name").hash_before.transform("first")
    still = t[(t.raw > 0) & ~t.unheld & ((t.hash_before == first) | (t.step == t.step.min()))]
    sides = {"A": "B", "B": "A"}
    waited_for = set(zip(still.layer, still.group.map(sides), still.step, strict=True))
    keys = zip(t.layer, t.group, t.step, strict=True)
    return (t.raw == 0) & pd.Series([key in waited_for for key in keys], t.index, dtype=bool)


def transitions(f: Facts) -> tuple[pd.DataFrame, pd.Series, pd.Series]:
    """Updates that were seen; which of them moved the tensor; and its hash when it was seen next."""
    rows = f.tensors[f.tensors.hash_after.notna() & ~f.tensors.unheld].sort_values(["step", "name"], kind="stable")
    later = rows.groupby("name").hash_before.shift(-1).astype(object)
    if f.weights and not f.most("stand_ins"):
        later = later.where(later.notna(), rows.name.map(f.weights))
    return rows, rows.hash_before != rows.hash_after, later
