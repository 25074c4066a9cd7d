"""The store: what went in comes out, at any moment, also after kill -9, and from several processes."""

from __future__ import annotations

import dataclasses
import math
import os
import random
import signal
import sqlite3
import subprocess
import sys
import time
from contextlib import closing

import pytest

from grit_impl.errors import GRITError
from grit_impl.verify.claims import Claim, Evidence, Judgement, Metric
from grit_impl.verify.store import database as store
from grit_impl.verify.store import schema
from grit_impl.verify.store.database import Database, JudgedClaim, Session

SESSION = Session("2026-01-01T00:00:00+00:00", "2026-01-01T00:10:00+00:00", "abc", {"steps": 200}, {"torch": "2.13.0"})
PLAN_COLUMNS = ["model_name", "aqi_accuracy", "delta_aqi", "inference_speed", "delta_speed", "timestamp"]


def claim(name: str = "test.it") -> Claim:
    return Claim(name, "It holds.", ("record:pure",), "Because.", lambda _: Judgement("supported", "yes"))


def judged(*metrics: Metric) -> list[JudgedClaim]:
    return [JudgedClaim(claim(), Judgement("supported", "yes", metrics, {"a": 1}, needed=7), "t.py::test")]


VALUES = [0.0, -1.5, 1e-300, math.pi, math.inf, -math.inf, math.nan]


@pytest.mark.parametrize("value", VALUES)
def test_numbers_round_trip(tmp_path, value):
    """Oracle: the value itself, bit for bit, NaN and infinities included; an absent bound stays absent."""
    with Database(tmp_path / "results.db") as db:
        session = db.add(SESSION, judged(Metric("m", value, value, None, "s", 3, "by hand", "pure")))
    with Database(tmp_path / "results.db", readonly=True) as db:
        (metric,) = db.judged(session)["test.it"].metrics
    assert repr(metric) == repr(Metric("m", value, value, None, "s", 3, "by hand", "pure"))


def test_judgements_round_trip(tmp_path, make_evidence, claims):
    """Oracle: the judgements of the whole catalogue on sound evidence."""
    evidence = make_evidence()
    everything = [JudgedClaim(each, each.judge(evidence), f"t::{each.id}") for each in claims]
    with Database(tmp_path / "results.db") as db:
        session = db.add(SESSION, everything, evidence)
        found = db.judged(session)
    expected = {each.claim.id: each.judgement for each in everything}
    assert {k: repr(v.metrics) for k, v in found.items()} == {k: repr(v.metrics) for k, v in expected.items()}
    assert {k: (v.verdict, v.summary, v.needed) for k, v in found.items()} == {
        k: (v.verdict, v.summary, v.needed) for k, v in expected.items()
    }


def test_tables_hold_the_evidence(tmp_path, make_evidence):
    """Oracle: counts and values of the hand-written evidence; the plan's columns come first, in its order."""
    evidence = make_evidence()
    with Database(tmp_path / "results.db") as db:
        db.add(SESSION, judged(), evidence)
        db.add(SESSION, judged(), evidence)  # reused runs are stored once, sessions twice
        assert [row[1] for row in db.query("PRAGMA table_info(evaluation_results)")][:6] == PLAN_COLUMNS
        rows = {row["model_name"]: row for row in db.query("SELECT * FROM evaluation_results WHERE session_id = 2")}
        assert rows["base"]["aqi_accuracy"] == 25.0
        assert rows["base"]["delta_aqi"] is None
        assert rows["pure"]["delta_aqi"] == pytest.approx(36.0)
        assert rows["pure"]["inference_speed"] == pytest.approx(900.5, abs=1)
        assert abs(rows["pure"]["delta_speed"]) < 1
        counts = {
            name: db.query(f"SELECT count(*) FROM {name}")[0][0] for name in ("runs", "series", "items", "artifacts")
        }
        assert counts["runs"] == 6
        assert counts["series"] == 6 * 40 * 6
        assert counts["items"] == 2 * 5 * 400
        assert counts["artifacts"] == 2 * (6 + 6 + 5)
        (loss,) = db.query(
            "SELECT value FROM series JOIN runs ON id = run_id WHERE arm = 'pure' AND name = 'loss' AND step = 3"
        )
        assert loss["value"] == evidence.records["pure"].steps[2]["loss"]


def test_documented_queries_run(tmp_path, make_evidence, claims):
    """Oracle: the queries in the schema's own documentation give rows on a full database, and so does every view."""
    evidence = make_evidence()
    everything = [JudgedClaim(each, each.judge(evidence)) for each in claims]
    with Database(tmp_path / "results.db") as db:
        db.add(SESSION, everything, evidence)
        documented = schema.__doc__.partition("Questions people ask:")[2]
        queries = [text for text in documented.split(";") if "SELECT" in text]
        assert len(queries) == 4
        for query in queries[:3]:
            assert db.query(query)
        assert db.query(queries[3]) == []  # items are nested: pure answers all that the baseline does
        for (view,) in db.query("SELECT name FROM sqlite_master WHERE type = 'view'"):
            assert db.query(f"SELECT * FROM {view}")


def test_failed_write_leaves_nothing(tmp_path):
    """Oracle: the rows before; the second claim of the session cannot be stored (its verdict is not one of four)."""
    path = tmp_path / "results.db"
    bad = JudgedClaim(claim("test.bad"), Judgement("maybe", "?"))  # type: ignore[arg-type]
    with Database(path) as db:
        db.add(SESSION, judged())
        with pytest.raises(GRITError, match="CHECK constraint"):
            db.add(SESSION, [*judged(), bad])
        assert len(db.sessions()) == 1
        assert len(db.query("SELECT * FROM verdicts")) == 1


def test_label_moves(tmp_path):
    """Oracle: a label names one session at a time."""
    with Database(tmp_path / "results.db") as db:
        first, second = db.add(SESSION, judged()), db.add(SESSION, judged())
        db.label(first, "baseline")
        db.label(second, "baseline")
        assert [row["label"] for row in db.sessions()] == [None, "baseline"]


def test_not_a_database(tmp_path):
    """Oracle: one line that names the file."""
    path = tmp_path / "results.db"
    path.write_bytes(b"not a database, but long enough to look like one" * 40)
    with pytest.raises(GRITError, match=r"results\.db: file is not a database"):
        Database(path)


def test_newer_schema_is_refused(tmp_path):
    """Oracle: a file of a later version must not be written by an earlier one."""
    path = tmp_path / "results.db"
    Database(path).close()
    with closing(sqlite3.connect(path)) as connection:
        connection.execute(f"PRAGMA user_version = {store.SCHEMA_VERSION + 1}")
        connection.commit()
    with pytest.raises(GRITError, match="upgrade"):
        Database(path)


def test_migration_keeps_rows(tmp_path, monkeypatch):
    """Oracle: a session written before a migration is still there after it, and the migration ran once."""
    path = tmp_path / "results.db"
    with Database(path) as db:
        db.add(SESSION, judged())
    more = (*schema.MIGRATIONS, "CREATE TABLE extra (a); INSERT INTO extra VALUES (1);")
    monkeypatch.setattr(store, "MIGRATIONS", more)
    monkeypatch.setattr(store, "SCHEMA_VERSION", len(more))
    for _ in range(2):
        with Database(path) as db:
            assert len(db.sessions()) == 1
            assert [row[0] for row in db.query("SELECT a FROM extra")] == [1]
            assert db.query("PRAGMA user_version")[0][0] == len(more)


def test_broken_migration_changes_nothing(tmp_path, monkeypatch):
    """Oracle: the old version, when the second statement of a migration fails."""
    path = tmp_path / "results.db"
    Database(path).close()
    monkeypatch.setattr(
        store, "MIGRATIONS", (*schema.MIGRATIONS, "CREATE TABLE extra (a); INSERT INTO nowhere VALUES (1);")
    )
    monkeypatch.setattr(store, "SCHEMA_VERSION", 2)
    with pytest.raises(GRITError, match="nowhere"):
        Database(path)
    with closing(sqlite3.connect(path)) as connection:
        assert connection.execute("PRAGMA user_version").fetchone() == (1,)
        assert not connection.execute("SELECT * FROM sqlite_master WHERE name = 'extra'").fetchall()


def test_missing_database_is_named(tmp_path):
    """Oracle: reading what is not there says what to do."""
    with pytest.raises(GRITError, match="run the verification first"):
        Database(tmp_path / "results.db", readonly=True)


WRITER = """
import sys
from grit_impl.verify.claims import Claim, Judgement, Metric
from grit_impl.verify.store.database import JudgedClaim, Session, Database
claims = [JudgedClaim(Claim(f"test.c{i}", "S.", ("record:x",), "R.", None), Judgement("supported", "yes",
          tuple(Metric(f"m{k}", k) for k in range(20)))) for i in range(40)]
with Database(sys.argv[1]) as db:
    print("ready", flush=True)
    while True:
        print(db.add(Session("a", "b", None, {}, {"x": "y"}), claims), flush=True)
"""


def test_survives_kill(tmp_path):
    """Oracle: every session that was reported as written is there, whole, and SQLite finds the file intact."""
    path = tmp_path / "results.db"
    wait = random.Random(0)
    committed = 0
    for _ in range(8):
        process = subprocess.Popen([sys.executable, "-c", WRITER, str(path)], stdout=subprocess.PIPE, text=True)
        assert process.stdout is not None
        assert process.stdout.readline() == "ready\n"
        time.sleep(wait.uniform(0.01, 0.15))
        process.send_signal(signal.SIGKILL)
        numbers = process.stdout.read().split("\n")
        process.wait()
        process.stdout.close()
        committed = max([committed, *(int(text) for text in numbers if text.strip())])
        with closing(sqlite3.connect(path)) as connection:
            assert connection.execute("PRAGMA integrity_check").fetchone() == ("ok",)
            sessions = connection.execute("SELECT count(*), max(id) FROM sessions").fetchone()
            assert sessions[0] == sessions[1] >= committed
            assert connection.execute("SELECT count(*) FROM metrics").fetchone()[0] == 800 * sessions[0]
    assert committed > 0


def test_two_writers_take_turns(tmp_path):
    """Oracle: sessions of two processes that write at the same time add up, without 'database is locked'."""
    path = tmp_path / "results.db"
    script = WRITER.replace("while True", "for _ in range(5)")
    processes = [
        subprocess.Popen([sys.executable, "-c", script, str(path)], stdout=subprocess.DEVNULL) for _ in range(2)
    ]
    assert [process.wait(60) for process in processes] == [0, 0]
    with Database(path, readonly=True) as db:
        assert len(db.sessions()) == 10


@pytest.mark.skipif(os.geteuid() != 0, reason="needs root to mount a small file system, found a user")
def test_full_disk_is_one_line(tmp_path, make_evidence):
    """Oracle: a file system of 64 KiB: an error of one line, and what was committed before is intact."""
    small = tmp_path / "small"
    small.mkdir()
    mounted = subprocess.run(["mount", "-t", "tmpfs", "-o", "size=256k", "tmpfs", str(small)], capture_output=True)
    if mounted.returncode:
        pytest.skip("needs the right to mount a file system, found none")
    try:
        with Database(small / "results.db") as db:
            db.add(SESSION, judged())
            with pytest.raises(GRITError, match="disk is full") as error:
                db.add(SESSION, judged(), make_evidence())
            assert "\n" not in str(error.value)
        with closing(sqlite3.connect(small / "results.db")) as connection:
            assert connection.execute("PRAGMA integrity_check").fetchone() == ("ok",)
            assert connection.execute("SELECT count(*) FROM sessions").fetchone() == (1,)
    finally:
        subprocess.run(["umount", str(small)], check=True)


def test_evidence_without_evaluation(tmp_path, make_evidence):
    """Oracle: runs are stored when nothing was evaluated."""
    evidence = dataclasses.replace(make_evidence(), evaluation=None)
    with Database(tmp_path / "results.db") as db:
        db.add(SESSION, judged(), evidence)
        db.add(SESSION, judged(), Evidence())
        assert len(db.query("SELECT * FROM runs")) == 6
        assert db.query("SELECT * FROM evaluation_results") == []
