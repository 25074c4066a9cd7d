"""A sweep's results in one SQLite file: a row per run, written by the controlling process only."""

from __future__ import annotations

import json
import sqlite3
from collections.abc import Collection, Mapping
from pathlib import Path
from types import TracebackType
from typing import Any, Self

from grit_impl.errors import GRITError
from grit_impl.sweep.plan import PlannedRun

SCHEMA = 1
FINISHED = ("done", "diverged")
_TABLES = """
CREATE TABLE IF NOT EXISTS meta (key TEXT PRIMARY KEY, value TEXT NOT NULL);
CREATE TABLE IF NOT EXISTS runs (
    key TEXT PRIMARY KEY,
    phase TEXT NOT NULL, base TEXT NOT NULL, task TEXT NOT NULL, arm TEXT NOT NULL, method TEXT NOT NULL,
    variant TEXT NOT NULL, trial INTEGER, seed INTEGER NOT NULL,
    settings TEXT NOT NULL,   -- JSON, resolved
    status TEXT NOT NULL,     -- done, diverged, failed
    error TEXT,               -- of a failed run
    loss REAL, accuracy REAL, retention REAL,
    step_seconds REAL, train_seconds REAL, coverage REAL,
    seconds REAL,             -- of the whole process, what the run cost
    device TEXT NOT NULL,
    curve TEXT NOT NULL,      -- JSON: [step, loss, accuracy, training seconds] per evaluation
    losses TEXT NOT NULL      -- JSON: training loss, means of 5 steps
);
"""
_MEASURES = ("loss", "accuracy", "retention", "step_seconds", "train_seconds", "coverage")


class Store:
    """The file `sweep.db` of a sweep's folder.

    Args:
        path: The file; made if it is not there.

    Raises:
        GRITError: it cannot be opened, or is no sweep's.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            self._db = sqlite3.connect(path, timeout=30)
            self._db.row_factory = sqlite3.Row
            self._db.executescript(_TABLES)
        except (OSError, sqlite3.Error) as error:
            raise GRITError(f"cannot open sweep results {path}: {error}") from error
        found = self.meta.get("schema")
        if found is None:
            self.set_meta(schema=SCHEMA)  # a file that is only read stays as it is
        elif int(found) > SCHEMA:
            raise GRITError(f"{path} has schema {found}; this version reads up to {SCHEMA}: upgrade")

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._db.close()

    @property
    def meta(self) -> dict[str, str]:
        """What was written with `set_meta`."""
        return {row["key"]: row["value"] for row in self._db.execute("SELECT * FROM meta")}

    def set_meta(self, **values: Any) -> None:
        """Keep values (texts as they are, the rest as JSON) under their names."""
        rows = [(key, value if isinstance(value, str) else json.dumps(value)) for key, value in values.items()]
        with self._db:
            self._db.executemany("INSERT OR REPLACE INTO meta VALUES (?, ?)", rows)

    def add(self, job: PlannedRun, settings: Mapping[str, Any], result: Mapping[str, Any], device: str) -> None:
        """Write one run; a run of the same key is replaced."""
        row: dict[str, Any] = {
            "key": job.key,
            **{name: getattr(job, name) for name in ("phase", "base", "task", "arm", "method", "variant", "trial")},
            "seed": job.seed,
            "settings": json.dumps(dict(settings), sort_keys=True),
            "status": result["status"],
            "error": result.get("error"),
            **{name: result.get(name) for name in _MEASURES},
            "seconds": result.get("seconds"),
            "device": device,
            "curve": json.dumps([[round(x, 6) for x in point] for point in result.get("curve", ())]),
            "losses": json.dumps(result.get("losses", ())),
        }
        with self._db:
            self._db.execute(
                f"INSERT OR REPLACE INTO runs ({', '.join(row)}) VALUES ({', '.join('?' * len(row))})",
                tuple(row.values()),
            )

    def take(self, other: Store, wanted: Collection[str] | None = None) -> int:
        """Copy the finished runs of another file that this one has not finished.

        Args:
            other: The other file.
            wanted: Keys of the runs to copy, of a plan that the caller has looked at. Default: all.

        Returns:
            How many there were.

        Raises:
            GRITError: they are not of one sweep: an arm was tuned to other settings, or this one's plan lacks a task
                or an arm. Nothing is written.
        """
        columns = [row["name"] for row in self._db.execute("PRAGMA table_info(runs)")]
        done = {key for key, status in self.statuses().items() if status in FINISHED}
        theirs = {key for key, status in other.statuses().items() if status in FINISHED}
        new = (theirs if wanted is None else theirs & set(wanted)) - done
        self._require_one_sweep(other, new, None if wanted is not None else json.loads(self.meta["plan"]))
        found = other._db.execute(f"SELECT {', '.join(columns)} FROM runs")
        rows = [tuple(row) for row in found if row["key"] in new]
        with self._db:
            self._db.executemany(f"INSERT OR REPLACE INTO runs VALUES ({', '.join('?' * len(columns))})", rows)
        return len(rows)

    def _require_one_sweep(self, other: Store, new: set[str], plan: dict[str, Any] | None) -> None:
        """What an arm's runs after tuning share is not in their keys: the settings of the trial that was chosen."""
        settings: dict[tuple[Any, ...], Any] = {}
        tuned = set()
        for row in self.runs():
            if row["phase"] != "tuning" and row["status"] in FINISHED:
                settings[tuple(row[name] for name in ("phase", "task", "arm", "variant"))] = row["settings"]
                tuned.add((row["task"], row["arm"]))
        for row in other.runs():
            if row["key"] not in new:
                continue
            task, arm = row["task"], row["arm"]
            if plan and (task not in plan["tasks"] or (row["method"] != "none" and arm not in plan["methods"])):
                raise GRITError(f"its plan has no arm {arm!r} on task {task!r}")
            group = tuple(row[name] for name in ("phase", "task", "arm", "variant"))
            if settings.get(group, row["settings"]) != row["settings"]:
                raise GRITError(f"arm {arm!r} on {task!r} was tuned to other settings")
            if row["phase"] == "tuning" and (task, arm) in tuned:
                raise GRITError(f"a tuning trial of arm {arm!r} on {task!r} would come after what was chosen from them")

    def statuses(self) -> dict[str, str]:
        """Status of every run by key."""
        return {row["key"]: row["status"] for row in self._db.execute("SELECT key, status FROM runs")}

    def runs(self, **where: Any) -> list[dict[str, Any]]:
        """Rows with these values, in a fixed order; `settings`, `curve` and `losses` parsed."""
        condition = " AND ".join(f"{name} = ?" for name in where) or "1"
        query = f"SELECT * FROM runs WHERE {condition} ORDER BY phase, task, arm, variant, trial, seed"
        rows = [dict(row) for row in self._db.execute(query, tuple(where.values()))]
        for row in rows:
            for name in ("settings", "curve", "losses"):
                row[name] = json.loads(row[name])
        return rows


def choose_trial(rows: list[dict[str, Any]]) -> int | None:
    """The fixed rule of tuning: the trial with the lowest mean validation loss over the tuning seeds.

    A trial with a run that diverged or failed is out; the first of equals wins.

    Args:
        rows: The finished tuning runs of one task and arm.

    Returns:
        The trial; None if none is left.
    """
    losses: dict[int, list[float]] = {}
    for row in rows:
        losses.setdefault(row["trial"], []).append(row["loss"] if row["status"] == "done" else float("inf"))
    means = {trial: sum(values) / len(values) for trial, values in sorted(losses.items())}
    best = min(means, key=lambda trial: means[trial], default=None)
    return best if best is not None and means[best] < float("inf") else None
