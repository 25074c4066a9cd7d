"""Training logs of any origin, read into one shape. What a path is gets found by looking, not by flags.

Read are: run records of this project; TensorBoard event files; `trainer_state.json` of transformers 4 (loss rounded to
4 decimals, learning rate logged after the scheduler's step) and 5 (neither), and so of Unsloth and axolotl;
`trainer_log.jsonl` of LLaMA-Factory; `metrics.csv` of Lightning; wandb's CSV exports, `FILE::RUN` for one of several
runs; MLflow's run folders and metric files; CSV and JSON lines with recognisable columns. A log that cannot support a
comparison raises `GRITError`; none is repaired in silence.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from grit_impl.curves import events, tables
from grit_impl.curves.names import FEWEST_LOSSES, existing, is_sideline, listed, words
from grit_impl.curves.numbers import show
from grit_impl.errors import GRITError
from grit_impl.record import RunRecord
from grit_impl.tables import Row, Table

Floats = NDArray[np.float64]
Rows = list[dict[str, float]]

SERIES = ("loss", "grad_norm", "learning_rate", "tokens")
FLOAT32_EPS = float(np.finfo(np.float32).eps)


@dataclass(frozen=True)
class RunLog:
    """One run's curves.

    Attributes:
        name: Short name for tables and legends.
        path: Where it was read.
        kind: "record", "tensorboard", "trainer_state", "mlflow", "csv" or "jsonl".
        steps: Optimizer steps (N,), strictly increasing with one stride.
        loss: Training loss of each (N,), finite.
        grad_norm: Gradient norm (N,), or None if it was not logged at every step.
        learning_rate: Learning rate (N,), or None.
        tokens: Real tokens per step (N,), or None.
        meta: What else the log says (seed, arm, base model, versions), possibly empty.
        notes: What a reader must know about how the log was read.
        clock: When the run began or logged its first value, in the log's own unit; None where it does not say.
    """

    name: str
    path: Path
    kind: str
    steps: NDArray[np.int64]
    loss: Floats
    grad_norm: Floats | None = None
    learning_rate: Floats | None = None
    tokens: Floats | None = None
    meta: Mapping[str, Any] = field(default_factory=dict)
    notes: Sequence[str] = ()
    clock: float | None = None

    @property
    def stride(self) -> int:
        """Steps between two entries (`logging_steps`); each entry is then a mean over that many steps."""
        return int(self.steps[1] - self.steps[0])

    @property
    def seed(self) -> int | None:
        """The run's seed, if the log knows it."""
        value = self.meta.get("seed")
        return int(value) if isinstance(value, int | float) else None

    def resolution(self, series: str = "loss") -> float:
        """The step between two representable logged values: 1e-4 where transformers 4 rounded, else that of float32."""
        values = getattr(self, series)
        if values is None:
            raise GRITError(f"{self.path}: no {series} in this log")
        scale = float(np.max(np.abs(values)))
        for digits in range(2, 7):
            # Event files hold rounded values as float32, so a rounded value is only near its decimal.
            if np.allclose(values, np.round(values, digits), rtol=0, atol=2 * FLOAT32_EPS * scale):
                return max(10.0**-digits, FLOAT32_EPS * scale)
        return FLOAT32_EPS * scale


def read_log(path: str | Path, *, until: int | None = None, name: str | None = None, loss: str | None = None) -> RunLog:
    """Read one run.

    Args:
        path: A file, or a folder that holds exactly one run (its trainer_state.json, event files or run record).
            `FILE::RUN` names one of several runs in a table.
        until: Ignore everything after this step: how to use the sound part of a damaged or longer log.
        name: Name for tables; by default the arm's, the run's or the folder's.
        loss: The column, tag or metric of the training loss, where its name is not a usual one.

    Raises:
        GRITError: nothing there, several runs, a restarted log, missing steps, a loss that is NaN or infinite, a
            truncated or corrupt file, or fewer than 8 entries.
    """
    source, run = existing(path)
    try:
        kind, files = _find(source)
        if kind == "record":
            return from_record(RunRecord(files[0].parent), until=until, name=name)
        table, damage = _read(kind, files, source), None
    except events.DamagedEvents as error:
        table, damage = error.table, error
    except OSError as error:
        raise GRITError(f"{source}: cannot be read ({error.strerror or error})") from error
    if damage is not None:
        kind = "tensorboard"
        _only_until(table, until, loss, damage)
    table, found = tables.one_run(table, run, loss)
    rows = _rows(table, loss, until)
    stem = source.stem if source.is_file() and kind in ("csv", "jsonl") else ""
    folder = source if source.is_dir() else source.parent
    name = name or found or stem or folder.resolve().name
    axis = tables.axis(table) if kind == "csv" else ""
    return _build(rows, source, kind, name, until, table.meta, notes=table.notes, clock=table.clock, axis=axis)


def from_record(record: RunRecord, *, until: int | None = None, name: str | None = None) -> RunLog:
    """The curves of a run record."""
    meta = {key: record.run.get(key) for key in ("arm", "seed", "base_model", "steps", "versions")}
    rows: Rows = []
    for line, row in enumerate(record.steps, 1):
        found = {}
        for series in ("step", *SERIES):
            if series in row:
                try:
                    value = tables.number(row[series])
                except GRITError as error:
                    raise GRITError(f"{record.path}: steps.jsonl, line {line}: {series} is {error}") from None
                found[series] = float("nan") if value is None else value
        rows.append(found)
    known = {k: v for k, v in meta.items() if v is not None}
    spent = [row["seconds"] for row in record.steps if isinstance(row.get("seconds"), float)]
    clock = float(sum(spent)) if spent else None
    return _build(rows, record.path, "record", name or record.arm, until, known, clock=clock)


def same_values(a: RunLog, b: RunLog) -> bool:
    """Whether two logs hold the same numbers, to the rounding of float32, at the same steps."""
    if a.steps.shape != b.steps.shape or (a.steps != b.steps).any():
        return False
    pairs = [(getattr(a, series), getattr(b, series)) for series in ("loss", "grad_norm")]
    return all(x is None or y is None or bool(np.allclose(x, y, rtol=2 * FLOAT32_EPS, atol=0)) for x, y in pairs)


def is_copy(a: RunLog, b: RunLog) -> bool:
    """Whether two logs are one run: the same numbers, and no clock that says otherwise."""
    clocks = a.clock is not None and b.clock is not None and a.kind == b.kind
    return same_values(a, b) and not (clocks and a.clock != b.clock)


# -- looking ----------------------------------------------------------------------------------------------------------


def _find(source: Path) -> tuple[str, list[Path]]:
    """Which reader, and which files: the most direct first, so that a checkpoint never shadows the full log."""
    if source.is_file():
        return _kind_of_file(source), [source]
    if (source / "run.json").is_file() and (source / "steps.jsonl").is_file():
        return "record", [source / "run.json"]
    if (source / "trainer_state.json").is_file():
        return "trainer_state", [source / "trainer_state.json"]
    if (source / "metrics").is_dir() and (source / "meta.yaml").is_file():
        return "mlflow", [source]
    folders: dict[Path, list[Path]] = {}
    for file in sorted(source.rglob("*tfevents*")):
        if file.is_file() and not file.name.endswith(".profile-empty"):
            folders.setdefault(file.parent, []).append(file)
    # The SummaryWriter of torch puts hyperparameters into a subfolder with its own, scalar-free event file.
    roots = [source] if source in folders else [f for f in folders if f.parent not in folders]
    if len(roots) == 1:
        return "tensorboard", folders[roots[0]]
    if roots:
        raise _several(source, roots, "TensorBoard runs")
    direct = [source / name for name in ("trainer_log.jsonl", "metrics.csv") if (source / name).is_file()]
    if direct:
        return _kind_of_file(direct[0]), direct[:1]
    states = sorted(source.glob("checkpoint-*/trainer_state.json"), key=lambda p: _number(p.parent.name))
    if states:
        return "trainer_state", states[-1:]
    found = [p for p in sorted(source.iterdir()) if p.suffix.lower() in (".csv", ".tsv", ".jsonl")]
    if len(found) == 1:
        return _kind_of_file(found[0]), found
    if found:
        raise _several(source, found, "tables")
    deeper = sorted(source.rglob("metrics.csv"))
    if len(deeper) == 1:
        return "csv", deeper
    if deeper:
        raise _several(source, [p.parent for p in deeper], "runs of Lightning")
    tracked = sorted(p.parent for p in source.rglob("metrics") if p.is_dir() and (p.parent / "meta.yaml").is_file())
    if len(tracked) == 1:
        return "mlflow", tracked
    if tracked:
        raise _several(source, tracked, "runs of MLflow")
    if not any(source.iterdir()):
        raise GRITError(f"{source}: the folder is empty; name a run's folder or log file")
    raise GRITError(
        f"{source}: no training log found; looked for a run record, trainer_state.json, *tfevents*, trainer_log.jsonl, "
        "metrics.csv, MLflow's metrics, one CSV or JSONL"
    )


def _several(source: Path, found: Sequence[Path], what: str) -> GRITError:
    names = listed([str(f.relative_to(source)) for f in found], 4)
    return GRITError(f"{source}: holds {len(found)} {what} ({names}); name one of them, e.g. {found[0]}")


def _number(name: str) -> int:
    digits = re.findall(r"\d+", name)
    return int(digits[-1]) if digits else -1


def _kind_of_file(file: Path) -> str:
    if "tfevents" in file.name:
        return "tensorboard"
    suffix = file.suffix.lower()
    if file.name == "run.json":
        return "record"
    if suffix == ".json":
        return "trainer_state"
    if suffix in (".jsonl", ".ndjson"):
        return "jsonl"
    if suffix in (".csv", ".tsv", ".txt"):
        return "csv"
    if "metrics" in (parent.name for parent in file.resolve().parents):
        return "mlflow"
    hint = "; a .wandb file is wandb's own: export the run's loss chart as CSV" if suffix == ".wandb" else ""
    raise GRITError(
        f"{file}: unknown kind of log; expected *tfevents*, trainer_state.json, .csv, .jsonl, a metric file of MLflow "
        f"or a run record{hint}"
    )


def _read(kind: str, files: list[Path], source: Path) -> Table:
    if kind == "tensorboard":
        return events.read_events(files, source)
    if kind == "mlflow":
        folder = files[0] / "metrics" if files[0].is_dir() else files[0].parent
        found = [p for p in sorted(folder.rglob("*")) if p.is_file()] if files[0].is_dir() else files
        return tables.read_mlflow({p.relative_to(folder).as_posix(): p for p in found}, source, folder.parent)
    return tables.read(kind, files[0])


# -- rows of the known series -----------------------------------------------------------------------------------------


def _rows(table: Table, wanted: str | None, until: int | None) -> Rows:
    """Rows that carry a loss, completed with what other rows say of the same step."""
    column = tables.chosen(table, wanted)
    rows: Rows = []
    for cells in _loss_rows(table, column):
        row = {}
        for series, name in column.items():
            try:
                value = tables.number(cells.get(name))
            except GRITError as error:
                raise GRITError(f"{table.source}, line {cells.line}: {listed([name])} is {error}") from None
            if series == "loss":
                row[series] = float("nan") if value is None else value
            elif value is not None and np.isfinite(value):
                row[series] = value
        rows.append(row)
    if "step" not in column or (len(rows) > 1 and all(row.get("step") == 0 for row in rows)):
        what = "no step column" if "step" not in column else "every step is 0"
        table.notes.append(f"{table.source}: {what}; its {len(rows)} losses were counted from 1.")
        return [{**row, "step": float(i)} for i, row in enumerate(rows, 1)]
    times = [name for name in table.columns if words(name) in (("wall", "time"), ("timestamp",))]
    if table.clock is None and times:
        first = next((cells[times[0]] for cells in table.rows if tables.finite(cells.get(times[0]))), None)
        table.clock = tables.number(first)
    elsewhere: dict[str, dict[float, float]] = {}
    for cells in table.rows:
        step = tables.number(cells.get(column["step"])) if tables.finite(cells.get(column["step"])) else None
        for series in SERIES[1:]:
            if step is not None and series in column and tables.finite(cells.get(column[series])):
                elsewhere.setdefault(series, {})[step] = float(tables.number(cells[column[series]]) or 0.0)
    for row in rows:
        for series, values in elsewhere.items():
            if series not in row and row.get("step") in values:
                row[series] = values[row["step"]]
    last = max((row["step"] for row in rows if np.isfinite(row.get("step", np.nan))), default=np.inf)
    later = {step for series in ("grad_norm", "learning_rate") for step in elsewhere.get(series, {}) if step > last}
    if len(later) > 1 and (until is None or until > last):
        raise GRITError(
            f"{table.source}: no loss after step {int(last)} although the log goes on to step {int(max(later))}: this "
            f"run diverged, or its log was cut{_advice(rows, Path(table.source), int(last))}"
        )
    return rows


def _loss_rows(table: Table, column: Mapping[str, str]) -> list[Row]:
    """Rows with a loss, and rows that should have one: those that log nothing which no loss goes with.

    A row of a validation, of an epoch's mean or of a learning rate alone has a hole where the loss is, empty or NaN
    (what pandas writes for a hole). A diverged step has NaN there beside what every other step logs.
    """
    loss = column["loss"]
    filled = [{name for name, value in row.items() if tables.finite(value)} for row in table.rows]
    beside: set[str] = set().union(*(names for names in filled if loss in names))
    kept = []
    for row, names in zip(table.rows, filled, strict=True):
        value = row.get(loss)
        if loss not in names:
            others = {name for name in names if not is_sideline(name)}
            if others - beside or (tables.is_hole(value) and (others or loss not in row)):
                continue
        kept.append(row)
    return kept


def _only_until(table: Table, until: int | None, loss: str | None, damage: GRITError) -> None:
    """Accept a damaged log that is whole to the step that was asked for, else say to which step it is."""
    try:
        rows = _rows(tables.one_run(table, None, loss)[0], loss, None) if table.rows else []
    except GRITError:
        rows = []
    last = int(rows[-1]["step"]) if rows else 0
    if until is not None and last >= until:
        return
    where = f", after step {last}" if last else ", at its beginning"
    raise GRITError(f"{damage}{where}{_advice(rows, Path(table.source), last - 1)}") from damage


def _advice(rows: Rows, path: Path, until: int) -> str:
    """The remedy `--until`, where it leaves a log that can be read."""
    try:
        _build(rows, path, "", "", until, {}, advise=False)
    except GRITError:
        return ""
    return f"; `--until {until}` compares what comes before"


# -- checking ---------------------------------------------------------------------------------------------------------


def _build(
    rows: Rows,
    path: Path,
    kind: str,
    name: str,
    until: int | None,
    meta: Mapping[str, Any],
    *,
    notes: Sequence[str] = (),
    clock: float | None = None,
    advise: bool = True,
    axis: str = "",
) -> RunLog:
    def remedy(step: float) -> str:
        return _advice(rows, path, int(step)) if advise else ""

    unplaced = [i for i, r in enumerate(rows, 1) if "loss" in r and not np.isfinite(r.get("step", np.nan))]
    if unplaced:
        raise GRITError(f"{path}: entry {unplaced[0]} has no step number")
    kept = [r for r in rows if "loss" in r and (until is None or r["step"] <= until)]
    if len(kept) < FEWEST_LOSSES:
        raise GRITError(f"{path}: {len(kept)} training losses found; a comparison needs at least {FEWEST_LOSSES}")
    steps = np.array([r["step"] for r in kept])
    if (steps != np.round(steps)).any() or np.abs(steps).max() > 2**53:
        at = int(np.argmax((steps != np.round(steps)) | (np.abs(steps) > 2**53)))
        raise GRITError(f"{path}: entry {at + 1}: {show(steps[at], 'g')} is no step number")
    gaps = np.diff(steps)
    if (gaps <= 0).any():
        at = int(np.argmax(gaps <= 0))
        before, after = int(steps[at]), int(steps[at + 1])
        several = "; name the file of one attempt" if path.is_dir() and kind == "tensorboard" else ""
        raise GRITError(f"{path}: restarted log: step {after} follows step {before}{several}{remedy(after - 1)}")
    stride = float(np.median(gaps))
    if stride > 1 and steps[0] == 1 and gaps[0] == stride - 1:
        # logging_first_step adds an entry that is no mean over `stride` steps.
        kept, steps, gaps = kept[1:], steps[1:], gaps[1:]
    if (gaps[:-1] != stride).any() or gaps[-1] > stride:
        at = int(np.argmax(gaps != stride))
        raise GRITError(
            f"{path}: missing steps: {show(steps[at], 'g')} is followed by {show(steps[at + 1], 'g')}, every "
            f"{show(stride, 'g')} otherwise{axis}{remedy(steps[at])}"
        )
    if gaps[-1] != stride:
        # The Trainer also logs the very last step, over fewer steps than the others.
        kept, steps = kept[:-1], steps[:-1]
    columns = {key: np.array([r.get(key, np.nan) for r in kept]) for key in SERIES}
    loss, norms = columns["loss"], columns["grad_norm"]
    hidden = (loss == 0) & ~np.isfinite(norms) if np.isfinite(norms).any() else np.zeros(loss.size, bool)
    bad = ~np.isfinite(loss) | hidden
    if bad.any():
        at = int(np.argmax(bad))
        what = "0.0 with a NaN gradient norm (how transformers logs a NaN loss)" if hidden[at] else str(loss[at])
        raise GRITError(
            f"{path}: the loss is {what} at step {int(steps[at])}: this run diverged"
            f"{remedy(steps[at - 1]) if at else ''}"
        )
    known = [series for series in SERIES[1:] if np.isfinite(columns[series]).any()]
    partly = [series for series in known if not np.isfinite(columns[series]).all()]
    for series in partly:
        at = int(np.argmin(np.isfinite(columns[series])))
        text = f"{path}: no finite {series.replace('_', ' ')} at step {int(steps[at])}: it was not compared."
        notes = [*notes, text]
    optional = {series: columns[series] if series in known and series not in partly else None for series in SERIES[1:]}
    return RunLog(
        name, path, kind, steps.astype(np.int64), loss, meta=dict(meta), notes=tuple(notes), clock=clock, **optional
    )
