"""`results.db`: everything a verification found, in one SQLite file that any program reads.

One process writes (under pytest-xdist the controller). A session is one transaction in SQLite's rollback journal with
full synchronisation, so that a process killed at any point leaves either the whole session or nothing of it.
"""

from __future__ import annotations

import json
import math
import os
import sqlite3
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from grit_impl.errors import GRITError
from grit_impl.record import RunRecord, sha256_file
from grit_impl.verify.claims import Claim, Evidence, Judgement, Metric
from grit_impl.verify.store.schema import MIGRATIONS

SCHEMA_VERSION = len(MIGRATIONS)
BUSY_SECONDS = 30.0
"""How long to wait for another program's lock: write-ahead logging alone does not prevent 'database is locked'."""


@dataclass(frozen=True, slots=True)
class JudgedClaim:
    """A claim, its judgement and the test that asked for it."""

    claim: Claim
    judgement: Judgement
    node_id: str = ""


@dataclass(frozen=True, slots=True)
class Session:
    """One verification.

    Attributes:
        started: ISO 8601, UTC.
        finished: ISO 8601, UTC.
        git_commit: Of the project that was verified; None outside a repository.
        options: The options as JSON values.
        environment: Versions and machine.
        exit_status: pytest's.
    """

    started: str
    finished: str
    git_commit: str | None
    options: Mapping[str, Any]
    environment: Mapping[str, str]
    exit_status: int = 0


class Database:
    """The results database.

    Args:
        path: The file; it is made, or brought to the current schema, when it is opened.
        readonly: Open without writing; the file must exist.

    Raises:
        GRITError: the file is missing (readonly), no database, made by a newer version, locked, or the disk is full.
    """

    def __init__(self, path: str | os.PathLike[str], *, readonly: bool = False) -> None:
        self.path = Path(path)
        if readonly and not self.path.is_file():
            raise GRITError(f"no results in {self.path}; run the verification first")
        with _one_line(self.path):
            if not readonly:
                self.path.parent.mkdir(parents=True, exist_ok=True)
            mode = "ro" if readonly else "rwc"
            self.connection = sqlite3.connect(
                f"{self.path.absolute().as_uri()}?mode={mode}", uri=True, timeout=BUSY_SECONDS, isolation_level=None
            )
            try:
                self.connection.row_factory = sqlite3.Row
                self.connection.execute("PRAGMA foreign_keys = ON")
                self.connection.execute("PRAGMA synchronous = FULL")
                self._migrate(readonly)
            except BaseException:
                self.connection.close()
                raise

    def __enter__(self) -> Database:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def close(self) -> None:
        """Close the file."""
        self.connection.close()

    def _migrate(self, readonly: bool) -> None:
        version = self.connection.execute("PRAGMA user_version").fetchone()[0]
        if version > SCHEMA_VERSION:
            raise GRITError(
                f"{self.path} has schema version {version}; this version reads up to {SCHEMA_VERSION}: upgrade"
            )
        if readonly:
            if version < SCHEMA_VERSION:
                raise GRITError(f"{self.path} has schema version {version}; run a verification to bring it up to date")
            return
        for number in range(version, SCHEMA_VERSION):
            with self._transaction():
                # Another process may have migrated while this one waited for the lock.
                if self.connection.execute("PRAGMA user_version").fetchone()[0] == number:
                    for statement in _statements(MIGRATIONS[number]):
                        self.connection.execute(statement)
                    self.connection.execute(f"PRAGMA user_version = {number + 1}")

    @contextmanager
    def _transaction(self) -> Iterator[None]:
        with _one_line(self.path):
            self.connection.execute("BEGIN IMMEDIATE")
            try:
                yield
            except BaseException:
                if self.connection.in_transaction:
                    self.connection.execute("ROLLBACK")
                raise
            self.connection.execute("COMMIT")

    def add(self, session: Session, judged: Iterable[JudgedClaim], evidence: Evidence | None = None) -> int:
        """Write a session, all of it or nothing; returns its id."""
        with self._transaction():
            cursor = self.connection.execute(
                "INSERT INTO sessions (started, finished, git_commit, options, exit_status) VALUES (?, ?, ?, ?, ?)",
                (session.started, session.finished, session.git_commit, _json(session.options), session.exit_status),
            )
            assert cursor.lastrowid is not None
            identity = cursor.lastrowid
            self._insert("environment", ((identity, key, value) for key, value in session.environment.items()))
            for each in judged:
                self._add_judged(identity, each)
            if evidence is not None:
                repeated = [record for each in evidence.seeds.values() for record in each.records.values()]
                # The first seed's runs are among both.
                for record in {each.path: each for each in [*evidence.records.values(), *repeated]}.values():
                    self._add_run(identity, record)
                self._insert("artifacts", _artifacts(identity, evidence))
                if evidence.evaluation is not None:
                    self._add_evaluation(identity, session.finished, evidence)
        return identity

    def _insert(self, table: str, rows: Iterable[tuple[Any, ...]], verb: str = "INSERT") -> None:
        for row in rows:
            marks = ", ".join("?" * len(row))
            self.connection.execute(f"{verb} INTO {table} VALUES ({marks})", [_keep(value) for value in row])

    def _add_judged(self, session: int, each: JudgedClaim) -> None:
        claim, judgement = each.claim, each.judgement
        self.connection.execute(
            "INSERT INTO claims VALUES (?, ?, ?, ?, ?) ON CONFLICT(id) DO UPDATE SET statement = excluded.statement, "
            "rationale = excluded.rationale, requires = excluded.requires, gates = excluded.gates",
            (claim.id, claim.statement, claim.rationale, _json(claim.requires), int(claim.gates)),
        )
        cursor = self.connection.execute(
            "INSERT INTO verdicts (session_id, claim_id, verdict, summary, needed_n, evidence, node_id) "
            "VALUES (?, ?, ?, ?, ?, ?, ?)",
            (
                session,
                claim.id,
                judgement.verdict,
                judgement.summary,
                judgement.needed,
                _json(judgement.evidence),
                each.node_id,
            ),
        )
        self._insert(
            "metrics",
            (
                (None, cursor.lastrowid, m.subject, m.name, m.estimate, m.low, m.high, m.method, m.n, m.unit)
                for m in judgement.metrics
            ),
        )

    def _add_run(self, session: int, record: RunRecord) -> None:
        run, steps = record.run, record.steps
        identity = f"{run['arm']}-{run.get('started')}-{str(run.get('fingerprint'))[:16]}"
        names = ("base_model", "seed", "steps", "started", "finished", "train_seconds")
        described, final = (run.get(name) for name in names), steps[-1]["loss"] if steps else None
        columns = (identity, run["arm"], *described, record.peak_memory_bytes, final, run.get("fingerprint"))
        self._insert("runs", [(*columns, str(record.path), _json(run))], "INSERT OR IGNORE")
        self._insert("session_runs", [(session, identity)])
        series = (
            (identity, name, row["step"], value)
            for row in steps
            for name, value in row.items()
            if name != "step" and isinstance(value, int | float)
        )
        self._insert("series", series, "INSERT OR IGNORE")

    def _add_evaluation(self, session: int, timestamp: str, evidence: Evidence) -> None:
        from grit_impl.verify.claims.measures import measured

        names = ("aqi_accuracy", "delta_aqi", "tokens_per_second", "delta_speed")
        for model in evidence.evaluation.models:
            values = [measured(evidence, model, name).estimate for name in names]
            # The plan's columns hold NULL where nothing was measured: the base has no difference to itself.
            known = [None if math.isnan(value) else value for value in values]
            self._insert("evaluation_results", [(model, *known, timestamp, session)])
        self._insert("items", (_item(session, row) for row in evidence.evaluation.answers), "INSERT OR REPLACE")
        for seed, each in evidence.seeds.items():
            if each.evaluation is not evidence.evaluation:
                answers = (row for row in each.evaluation.answers if row["label"] in each.records)
                named = ({**row, "label": f"{row['label']}-seed{seed}"} for row in answers)
                self._insert("items", (_item(session, row) for row in named), "INSERT OR REPLACE")

    def sessions(self) -> list[sqlite3.Row]:
        """All sessions, oldest first."""
        return self.query("SELECT * FROM sessions ORDER BY id")

    def judged(self, session: int) -> dict[str, Judgement]:
        """The judgements of a session by claim."""
        found = {}
        for row in self.query("SELECT * FROM verdicts WHERE session_id = ? ORDER BY id", session):
            metrics = tuple(
                Metric(
                    m["name"],
                    number(m["estimate"], math.nan),
                    number(m["low"]),
                    number(m["high"]),
                    m["unit"],
                    m["n"],
                    m["method"],
                    m["subject"],
                )
                for m in self.query("SELECT * FROM metrics WHERE verdict_id = ? ORDER BY id", row["id"])
            )
            found[row["claim_id"]] = Judgement(
                row["verdict"], row["summary"], metrics, json.loads(row["evidence"]), row["needed_n"]
            )
        return found

    def answers(self, session: int) -> dict[tuple[str, str], dict[tuple[str, str], bool]]:
        """By (model, suite), whether each item, known by id and prompt, was answered correctly."""
        found: dict[tuple[str, str], dict[tuple[str, str], bool]] = {}
        for row in self.query("SELECT * FROM items WHERE session_id = ? AND correct IS NOT NULL", session):
            known = found.setdefault((row["model"], row["suite"]), {})
            known[row["item_id"], row["prompt"] or ""] = bool(row["correct"])
        return found

    def label(self, session: int, label: str) -> None:
        """Give a session a label, taking it from the one that had it."""
        with self._transaction():
            self.connection.execute("UPDATE sessions SET label = NULL WHERE label = ?", (label,))
            self.connection.execute("UPDATE sessions SET label = ? WHERE id = ?", (label, session))

    def query(self, sql: str, *parameters: Any) -> list[sqlite3.Row]:
        """Rows of a SELECT; see `grit_impl.verify.store.schema` for the questions people ask."""
        with _one_line(self.path):
            return self.connection.execute(sql, parameters).fetchall()


def number(value: Any, absent: Any = None) -> Any:
    """A number as it was stored: 'NaN' is NaN again, NULL is `absent`."""
    return absent if value is None else float(value)


def _keep(value: Any) -> Any:
    return "NaN" if isinstance(value, float) and math.isnan(value) else value


def _json(value: Any) -> str:
    return json.dumps(value, sort_keys=True, default=str)


def _item(session: int, row: Mapping[str, Any]) -> tuple[Any, ...]:
    seconds = row["eval_duration"] / 1e9 if row.get("eval_duration") is not None else None
    right = row.get("correct")
    identity = (session, row["label"], row["suite"], str(row["item"]))
    return (
        *identity,
        row.get("prompt"),
        row.get("answer"),
        _json(row.get("scores")),
        None if right is None else int(right),
        row.get("eval_count"),
        seconds,
    )


def _artifacts(session: int, evidence: Evidence) -> Iterator[tuple[Any, ...]]:
    files: dict[Path, tuple[str, str]] = {}
    for arm, record in evidence.records.items():
        for path in (record.ledger, *sorted(record.adapter.glob("*.safetensors"))):
            if path.is_file():
                files[path] = (arm, "ledger" if path == record.ledger else "adapter")
    for model, export in evidence.exports.items():
        if Path(export["path"]).is_file():
            files[Path(export["path"])] = (model, "gguf")
    folder = getattr(evidence.evaluation, "path", None)
    if folder is not None and (folder / "evaluation.json").is_file():
        files[folder / "evaluation.json"] = ("all", "evaluation")
    for path, (subject, kind) in files.items():
        yield session, subject, kind, str(path), sha256_file(path), path.stat().st_size


def _statements(script: str) -> Iterator[str]:
    """The statements of a script; `executescript` would commit the transaction that they belong to."""
    statement = ""
    for piece in script.split(";")[:-1]:
        statement += piece + ";"
        if sqlite3.complete_statement(statement):
            yield statement
            statement = ""


@contextmanager
def _one_line(path: Path) -> Iterator[None]:
    try:
        yield
    except (sqlite3.Error, OSError) as error:
        hint = "; another program holds it open" if "locked" in str(error) else ""
        raise GRITError(f"cannot use {path}: {error}{hint}") from error
