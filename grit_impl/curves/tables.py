"""Tables of logged values, and the one run in them that is meant.

A table may hold several runs: wandb's chart export has columns `run - metric` with companions `__MIN` and `__MAX`, a
data frame may have a column that names the run. A cell that is missing or empty is a hole.
"""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Mapping
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

from grit_impl.curves.names import is_series, listed, pick, words
from grit_impl.errors import GRITError
from grit_impl.tables import Row, Table, brief, read_delimited, read_json, read_json_lines, read_with

COMPANIONS = ("__MIN", "__MAX")
"""wandb's extremes of the values that one row of its export stands for."""
WANDB = {"_step", "_runtime", "_timestamp"}
"""Columns of wandb's own in a run's history."""
_NUMBER = re.compile(r"[+-]?(\d+\.?\d*|\.\d+)([eE][+-]?\d+)?", re.ASCII)
_NOT_FINITE = {"nan", "-nan", "inf", "+inf", "-inf", "infinity", "+infinity", "-infinity"}
_HOLES = {"", "na", "n/a", "null", "none"}
_RUN_COLUMNS = {words(n) for n in ("run", "run_id", "run_name", "run_uuid")}
_TAG_COLUMNS = {words(n) for n in ("tag", "key", "metric", "metric_name")}


def is_hole(value: Any) -> bool:
    """Whether a cell holds nothing."""
    return value is None or (isinstance(value, str) and value.strip().lower() in _HOLES)


def number(value: Any) -> float | None:
    """A cell as a number, None for a hole.

    Raises:
        GRITError: the cell holds anything else.
    """
    if is_hole(value):
        return None
    if isinstance(value, str):
        text = value.strip(" \t\r\n")
        if _NUMBER.fullmatch(text) or text.lower() in _NOT_FINITE:
            return float(text)
        if re.fullmatch(r"[+-]?\d+,\d+", text):
            raise GRITError(f"{value!r}, with a decimal comma: export it with decimal points")
    elif isinstance(value, int | float) and not isinstance(value, bool):
        return float(value) if abs(value) < 1e308 or not isinstance(value, int) else math.inf
    raise GRITError(f"{brief(value)}, not a number")


def finite(value: Any) -> bool:
    """Whether a cell holds a finite number."""
    try:
        found = number(value)
    except GRITError:
        return False
    return found is not None and math.isfinite(found)


# -- readers ----------------------------------------------------------------------------------------------------------


def read(kind: str, file: Path) -> Table:
    """A log in one file: "csv", "jsonl", or "trainer_state" (of a Trainer, or its `log_history` alone)."""
    readers: dict[str, Callable[[Path, bytes], Table]] = {
        "csv": partial(read_delimited, known=lambda name: is_series(name.rsplit(" - ", 1)[-1])),
        "jsonl": read_json_lines,
        "trainer_state": partial(read_json, inside="log_history"),
    }
    return read_with(readers[kind], file)


def read_mlflow(files: Mapping[str, Path], path: Path, run: Path) -> Table:
    """Metric files (`timestamp value step`), by metric, of the MLflow run in folder `run`; `path` is for messages."""
    table = Table(str(path), [])
    wanted = {name: file for name, file in files.items() if is_series(name)} or dict(files)
    for name, file in wanted.items():
        width = 0  # versions before steps wrote two cells, but no version writes both
        for line, text in enumerate(read_with(_text, file).split("\n"), 1):
            if not text.strip():
                continue
            cells = text.strip(" \t\r").split(" ")  # not what else Unicode takes for space
            try:
                width = width or len(cells)
                broken = width not in (2, 3) or len(cells) != width or any(cell != cell.strip() for cell in cells)
                if broken or number(cells[0]) is None or number(cells[1]) is None:
                    raise GRITError("expected `timestamp value step`")
                step = number(cells[2]) if len(cells) == 3 else 0.0
            except GRITError as error:
                raise GRITError(f"{file}, line {line}: {error}: truncated or corrupt") from None
            clock = float(cells[0])
            table.clock = clock if table.clock is None else min(table.clock, clock)
            table.rows.append(Row({"step": step, name: cells[1]}, path, line))
    seed = run / "params" / "seed"
    if seed.is_file() and finite(text := read_with(_text, seed)):
        table.meta["seed"] = int(float(text))
    return table


def _text(_: Path, data: bytes) -> str:
    return data.decode("utf-8-sig")


# -- the run that is meant --------------------------------------------------------------------------------------------


def one_run(table: Table, run: str | None = None, loss: str | None = None) -> tuple[Table, str | None]:
    """The table with the columns of one run, named by their metric, and the run's name where the table has one.

    Raises:
        GRITError: several runs and none was named, or the named one is not there.
    """
    table = _wide(table)
    owners = {column: _owner(column) for column in table.columns}
    named = [owner for owner, metric in owners.values() if owner is not None and _is_loss(metric, loss)]
    runs = list(dict.fromkeys(named))
    if run is None:
        if len(runs) > 1:
            raise GRITError(
                f"{table.source}: holds {len(runs)} runs ({listed(runs, 4)}); "
                f"name one, e.g. '{table.source}::{runs[0]}'"
            )
        run = runs[0] if runs else None
    elif run not in runs:
        what = f"its runs are {listed(runs)}" if runs else "it has no columns per run: leave '::' and the name away"
        raise GRITError(f"{table.source}: no run named {run!r}; {what}")
    if run is None:
        return table, None
    kept = {c: metric for c, (owner, metric) in owners.items() if owner in (None, run)}
    own = {c for c, (owner, _) in owners.items() if owner == run}
    rows = [
        row.holding({kept[c]: v for c, v in row.items() if c in kept})
        for row in table.rows
        if any(not is_hole(row.get(c)) for c in own)
    ]
    notes = [*table.notes]
    extremes = [f"{c}{end}" for c in own if _is_loss(kept[c], loss) for end in COMPANIONS]
    if len(extremes) == 2 and any(_apart(row, *extremes) for row in table.rows):
        notes.append(f"{table.source}: some rows stand for several steps (__MIN and __MAX differ): export all points.")
    return replace(table, rows=rows, header=(), notes=notes, meta={**table.meta, "run": run}), run


def _is_loss(metric: str, wanted: str | None) -> bool:
    return is_series(metric, "loss") if wanted is None else words(metric) == words(wanted)


def _owner(column: str) -> tuple[str | None, str]:
    """The run that a column belongs to, and its metric; extremes belong to nobody."""
    run, dash, metric = column.rpartition(" - ")
    if column.endswith(COMPANIONS):
        return "", column
    return (run, metric) if dash else (None, column)


def _apart(row: Row, low: str, high: str) -> bool:
    return finite(row.get(low)) and finite(row.get(high)) and number(row[low]) != number(row[high])


def _wide(table: Table) -> Table:
    """A data frame with columns that name the run or the metric becomes one with columns `run - metric`."""
    columns = table.columns
    run, tag = (next((c for c in columns if words(c) in known), None) for known in (_RUN_COLUMNS, _TAG_COLUMNS))
    value = next((c for c in columns if words(c) == ("value",)), None) if tag else None
    if value is None or tag is None:
        tag = value = None
    if run is None and tag is None:
        return table
    rows = []
    for row in table.rows:
        cells = {k: v for k, v in row.items() if k not in (run, tag, value)}
        if tag is not None and value is not None and not is_hole(row.get(tag)):
            cells[str(row[tag])] = row.get(value)
        owner = None if run is None or is_hole(row.get(run)) else str(row[run])
        if owner is not None:
            cells = {k if is_series(k, "step") else f"{owner} - {k}": v for k, v in cells.items()}
        rows.append(row.holding(cells))
    return replace(table, rows=rows, header=())


def count(table: Table) -> dict[str, int]:
    """How many cells each column fills."""
    counts = dict.fromkeys(table.columns, 0)
    for row in table.rows:
        for name, value in row.items():
            counts[name] += not is_hole(value)
    return counts


def chosen(table: Table, loss: str | None = None) -> dict[str, str]:
    """The column of each series that the table has.

    Raises:
        GRITError: no column is a training loss.
    """
    counts = count(table)
    try:
        name = pick("loss", counts, loss)
    except GRITError as error:
        raise GRITError(f"{table.source}: {error}") from None
    if not counts:
        raise GRITError(f"{table.source} is empty")
    if name is None:
        raise GRITError(f"{table.source}: no loss column; found {listed(counts)}; name it with `--loss NAME`")
    others = [n for n in counts if n != name and is_series(n, "loss") and counts[n] >= 8]
    if others:
        table.notes.append(f"{table.source}: the loss is {name}; not used: {listed(others)}.")
    placed = replace(table, rows=[row for row in table.rows if not is_hole(row.get(name))])
    found = {"loss": name, "step": pick("step", count(placed))}
    found |= {series: pick(series, counts) for series in ("grad_norm", "learning_rate", "tokens")}
    return {series: column for series, column in found.items() if column is not None}


def axis(table: Table) -> str:
    """What to export instead, where steps are counted by wandb, which counts evaluations, too."""
    step = pick("step", count(table))
    by_wandb = step is not None and words(step) == ("step",) and ("run" in table.meta or WANDB & set(table.columns))
    return f"; {step} is wandb's own count: export the chart with train/global_step as its x axis" if by_wandb else ""
