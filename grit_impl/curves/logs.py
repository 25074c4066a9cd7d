"""Training logs of any origin, read into one shape. What a path is gets found by looking, not by flags.

Read are: run records of this project; TensorBoard event files, in the scalar encoding (`simple_value`: torch and
tensorboardX) and the tensor encoding (TensorFlow 2, and what TensorBoard migrates to); `trainer_state.json` of
transformers 4 (loss rounded to 4 decimals, learning rate logged after the scheduler's step) and 5 (neither); CSV and
JSON lines with recognisable columns. A log that cannot support a comparison raises `GRITError`; none is repaired in
silence.
"""

from __future__ import annotations

import csv
import json
import re
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from grit_impl.errors import GRITError
from grit_impl.record import RunRecord

Floats = NDArray[np.float64]
Rows = list[dict[str, float]]

COLUMNS = {
    "step": ("step", "steps", "global_step", "trainer/global_step", "iteration", "iter"),
    "loss": ("loss", "training loss", "training_loss", "train_loss", "value"),
    "grad_norm": ("grad_norm", "gradient_norm", "grad norm", "gradient norm", "gradnorm"),
    "learning_rate": ("learning_rate", "lr", "learning rate"),
    "tokens": ("tokens",),
}
"""Names under which each series is found, after lower-casing and dropping a `train/` or `run - ` prefix."""
FEWEST_LOSSES = 8
"""Fewer say nothing about each other."""
SERIES = ("loss", "grad_norm", "learning_rate", "tokens")
FLOAT32_EPS = float(np.finfo(np.float32).eps)


@dataclass(frozen=True)
class RunLog:
    """One run's curves.

    Attributes:
        name: Short name for tables and legends.
        path: Where it was read.
        kind: "record", "tensorboard", "trainer_state", "csv" or "jsonl".
        steps: Optimizer steps (N,), strictly increasing with one stride.
        loss: Training loss of each (N,), finite.
        grad_norm: Gradient norm (N,), or None if it was not logged at every step.
        learning_rate: Learning rate (N,), or None.
        tokens: Real tokens per step (N,), or None.
        meta: What else the log says (seed, arm, base model, versions), possibly empty.
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


def read_log(path: str | Path, *, until: int | None = None, name: str | None = None) -> RunLog:
    """Read one run.

    Args:
        path: A file, or a folder that holds exactly one run (its trainer_state.json, event files or run record).
        until: Ignore everything after this step: how to use the sound part of a damaged or longer log.
        name: Name for tables; by default the arm's or the folder's.

    Raises:
        GRITError: nothing there, several runs, a restarted log, missing steps, a loss that is NaN or infinite, a
            truncated or corrupt file, or fewer than 8 entries.
    """
    source = Path(path)
    if not source.exists():
        raise GRITError(f"{source}: no such file or folder")
    kind, files = _find(source)
    if kind == "record":
        return from_record(RunRecord(files[0].parent), until=until, name=name)
    meta: dict[str, Any] = {}
    rows = _READERS[kind](files, until, meta)
    stem = source.stem if source.is_file() and kind in ("csv", "jsonl") else ""
    folder = source if source.is_dir() else source.parent
    return _build(rows, source, kind, name or stem or folder.resolve().name, until, meta)


def from_record(record: RunRecord, *, until: int | None = None, name: str | None = None) -> RunLog:
    """The curves of a run record."""
    meta = {key: record.run.get(key) for key in ("arm", "seed", "base_model", "steps", "versions")}
    rows = [_canonical(row) for row in record.steps]
    return _build(
        rows, record.path, "record", name or record.arm, until, {k: v for k, v in meta.items() if v is not None}
    )


# -- looking ----------------------------------------------------------------------------------------------------------


def _find(source: Path) -> tuple[str, list[Path]]:
    """Which reader, and which files: the most direct first, so that a checkpoint never shadows the full log."""
    if source.is_file():
        return _kind_of_file(source), [source]
    if (source / "run.json").is_file() and (source / "steps.jsonl").is_file():
        return "record", [source / "run.json"]
    if (source / "trainer_state.json").is_file():
        return "trainer_state", [source / "trainer_state.json"]
    events: dict[Path, list[Path]] = {}
    for file in sorted(source.rglob("*tfevents*")):
        if file.is_file() and not file.name.endswith(".profile-empty"):
            events.setdefault(file.parent, []).append(file)
    # The SummaryWriter of torch puts hyperparameters into a subfolder with its own, scalar-free event file.
    folders = [source] if source in events else [f for f in events if f.parent not in events]
    if len(folders) == 1:
        return "tensorboard", events[folders[0]]
    if len(folders) > 1:
        listed = ", ".join(str(f.relative_to(source)) for f in folders[:4])
        raise GRITError(f"{source}: holds {len(folders)} TensorBoard runs ({listed}, ...); name one of them")
    states = sorted(source.glob("checkpoint-*/trainer_state.json"), key=lambda p: _number(p.parent.name))
    if states:
        return "trainer_state", states[-1:]
    tables = [p for p in sorted(source.iterdir()) if p.suffix.lower() in (".csv", ".tsv", ".jsonl")]
    if len(tables) == 1:
        return _kind_of_file(tables[0]), tables
    if not any(source.iterdir()):
        raise GRITError(f"{source}: the folder is empty; name a run's folder or log file")
    raise GRITError(
        f"{source}: no training log found; looked for a run record, trainer_state.json, *tfevents*, one CSV or JSONL"
    )


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
    raise GRITError(
        f"{file}: unknown kind of log; expected *tfevents*, trainer_state.json, .csv, .jsonl or a run record"
    )


# -- readers: each returns canonical rows in file order ---------------------------------------------------------------


def _canonical(row: Mapping[str, Any]) -> dict[str, float]:
    """The known series of a row under their own names; values that are no numbers are left out, null becomes NaN."""
    found: dict[str, float] = {}
    for key, value in row.items():
        plain = str(key).strip().lower().removeprefix("train/")
        plain = plain.rsplit(" - ", 1)[-1].removeprefix("train/")
        for canonical, names in COLUMNS.items():
            if plain in names and canonical not in found:
                try:
                    found[canonical] = float("nan") if value is None else float(value)
                except (TypeError, ValueError):
                    if str(value).strip():
                        raise GRITError(f"{key} is {value!r}, not a number") from None
    return found


def _read_events(files: list[Path], until: int | None, meta: dict[str, Any]) -> Rows:
    from tensorboard.compat.proto import event_pb2  # type: ignore[import-untyped]
    from tensorboard.compat.tensorflow_stub import errors  # type: ignore[import-untyped]
    from tensorboard.compat.tensorflow_stub.pywrap_tensorflow import PyRecordReader_New  # type: ignore[import-untyped]
    from tensorboard.util import tensor_util  # type: ignore[import-untyped]

    rows: Rows = []
    for file in sorted(files, key=lambda f: f.name):
        if file.stat().st_size == 0:
            raise GRITError(f"{file}: the event file is empty; the run wrote nothing, or it was copied while open")
        losses: Rows = []
        others: dict[str, dict[float, float]] = {}
        reader = PyRecordReader_New(str(file))
        while True:
            try:
                reader.GetNext()
                event = event_pb2.Event.FromString(reader.record())
            except errors.OutOfRangeError:
                break
            except (errors.DataLossError, ValueError, TypeError) as error:
                last = int(losses[-1]["step"]) if losses else 0
                if until is not None and last >= until:
                    break
                remedy = f"after step {last}; `--until {last - 1}` reads what is whole" if last else "at its beginning"
                raise GRITError(f"{file}: truncated or corrupt event file, {remedy}") from error
            for value in event.summary.value:
                encoding, number = value.WhichOneof("value"), None
                if encoding == "tensor":
                    array = tensor_util.make_ndarray(value.tensor)
                    if array.dtype.kind in "fiu" and array.size == 1:
                        number = float(array.reshape(-1)[0])
                    elif value.tag.startswith("args"):
                        _note_arguments(array, meta)
                elif encoding == "simple_value":
                    number = float(value.simple_value)
                # `train/train_loss` is the mean over the run that transformers logs at the end, not a step's loss.
                if number is None or value.tag.endswith("train_loss"):
                    continue
                for series, found in _canonical({value.tag: number}).items():
                    if series == "loss":
                        losses.append({"step": float(event.step), "loss": found})
                    else:
                        others.setdefault(series, {})[float(event.step)] = found
        for row in losses:
            row.update({name: column[row["step"]] for name, column in others.items() if row["step"] in column})
        rows += losses
    return rows


def _note_arguments(array: Any, meta: dict[str, Any]) -> None:
    try:
        arguments = json.loads(bytes(array.reshape(-1)[0]))
        meta.setdefault("seed", arguments.get("seed"))
    except (ValueError, AttributeError, IndexError, TypeError):
        return  # text that is not the Trainer's arguments tells us nothing, and need not


def _read_trainer_state(files: list[Path], until: int | None, meta: dict[str, Any]) -> Rows:
    file = files[0]
    try:
        state = json.loads(file.read_text())
        history = state["log_history"]
        # eval rows have no "loss"; the summary row at the end has "train_loss", the mean over the run.
        rows = [_canonical(row) for row in history if "loss" in row]
    except (OSError, UnicodeDecodeError, json.JSONDecodeError) as error:
        raise GRITError(f"{file}: truncated or not JSON ({error})") from error
    except (KeyError, TypeError, AttributeError):
        raise GRITError(f"{file}: no log_history in it, so it is no trainer_state.json of a Trainer") from None
    except GRITError as error:
        raise GRITError(f"{file}: {error}") from None
    return rows


def _read_csv(files: list[Path], until: int | None, meta: dict[str, Any]) -> Rows:
    file = files[0]
    try:
        text = file.read_text(encoding="utf-8-sig")
    except (OSError, UnicodeDecodeError) as error:
        raise GRITError(f"{file}: cannot be read as text ({error})") from error
    header = text.split("\n", 1)[0]
    delimiter = max(",;\t", key=header.count)
    reader = csv.DictReader(text.splitlines(), delimiter=delimiter)
    columns = list(reader.fieldnames or [])
    if "loss" not in _canonical(dict.fromkeys(columns)):
        raise GRITError(f"{file}: no loss column; found {', '.join(columns) or 'nothing'}; name it 'loss'")
    return _number_rows(file, reader, lambda row: row)


def _read_jsonl(files: list[Path], until: int | None, meta: dict[str, Any]) -> Rows:
    file = files[0]
    try:
        lines = [line for line in file.read_text().splitlines() if line.strip()]
    except (OSError, UnicodeDecodeError) as error:
        raise GRITError(f"{file}: cannot be read as text ({error})") from error
    return _number_rows(file, lines, json.loads)


def _number_rows(file: Path, items: Iterable[Any], parse: Callable[[Any], Any]) -> Rows:
    """Rows that carry a loss; without a step column they are counted from 1."""
    rows: Rows = []
    for line, item in enumerate(items, 1):
        try:
            row = _canonical(parse(item))
        except (ValueError, AttributeError) as error:
            cause = str(error) if isinstance(error, GRITError) else "not a JSON object: truncated or corrupt"
            raise GRITError(f"{file}, data line {line}: {cause}") from None
        if "loss" in row:
            rows.append({"step": float(len(rows) + 1), **row})
    return rows


_READERS: dict[str, Callable[[list[Path], int | None, dict[str, Any]], Rows]] = {
    "tensorboard": _read_events,
    "trainer_state": _read_trainer_state,
    "csv": _read_csv,
    "jsonl": _read_jsonl,
}

# -- checking ---------------------------------------------------------------------------------------------------------


def _restarted(path: Path, before: int, after: int) -> GRITError:
    return GRITError(f"{path}: restarted log: step {after} follows step {before}; name the file of one attempt")


def _build(rows: Rows, path: Path, kind: str, name: str, until: int | None, meta: Mapping[str, Any]) -> RunLog:
    kept = [r for r in rows if "loss" in r and "step" in r and (until is None or r["step"] <= until)]
    if len(kept) < FEWEST_LOSSES:
        raise GRITError(f"{path}: {len(kept)} training losses found; a comparison needs at least {FEWEST_LOSSES}")
    steps = np.array([r["step"] for r in kept])
    if not np.isfinite(steps).all():
        raise GRITError(f"{path}: entry {int(np.argmin(np.isfinite(steps))) + 1} has no step number")
    gaps = np.diff(steps)
    if (gaps <= 0).any():
        at = int(np.argmax(gaps <= 0))
        raise _restarted(path, int(steps[at]), int(steps[at + 1]))
    stride = float(np.median(gaps))
    if stride > 1 and steps[0] == 1 and gaps[0] == stride - 1:
        # logging_first_step adds an entry that is no mean over `stride` steps.
        kept, steps, gaps = kept[1:], steps[1:], gaps[1:]
    if (gaps[:-1] != stride).any() or gaps[-1] > stride:
        at = int(np.argmax(gaps != stride))
        raise GRITError(
            f"{path}: missing steps: {int(steps[at])} is followed by {int(steps[at + 1])} every {int(stride)}; "
            f"`--until {int(steps[at])}` compares what comes before"
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
        before = f"; `--until {int(steps[at - 1])}` compares what comes before" if at >= 8 else ""
        raise GRITError(f"{path}: the loss is {what} at step {int(steps[at])}: this run diverged{before}")
    optional = {k: v if np.isfinite(v).all() else None for k, v in columns.items() if k != "loss"}
    return RunLog(name, path, kind, steps.astype(np.int64), loss, meta=dict(meta), **optional)
