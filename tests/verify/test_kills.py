"""`make verify`, killed 50 times at random moments, loses no finished arm and leaves no file that cannot be read.

    python -m pytest tests/verify/test_kills.py -m nightly

What is killed is the command of `make verify` with its whole process group, by SIGKILL, at seeded random moments of
three phases: 20 times while arms train and are exported, 15 times while the models are evaluated, 15 times while
database, JUnit and report are written.
"""

from __future__ import annotations

import gzip
import json
import os
import random
import shutil
import signal
import sqlite3
import subprocess
import sys
import time
from contextlib import closing
from pathlib import Path
from xml.etree import ElementTree as ET

import pytest

from grit_impl.record import RunRecord, sha256_file

ROOT = Path(__file__).parents[2]
STEPS = 8
ARMS = ("baseline", "rerun", "pure", "hybrid", "hybrid_late", "recommended")
# Kills, and the seconds after the phase began within which each falls.
TRAINING, EVALUATING, WRITING = (20, 2.0, 14.0), (15, 4.0, 24.0), (15, 0.0, 2.5)
PATIENCE = 300.0


class Verification:
    """`make verify` in a copy of the project, so that nothing else changes what its results are made from."""

    def __init__(self, folder: Path) -> None:
        self.project, self.reports = folder / "project", folder / "reports"
        for name in ("grit_impl", "suites", "fixtures"):
            shutil.copytree(ROOT / name, self.project / name, ignore=shutil.ignore_patterns("__pycache__"))
        for name in ("conftest.py", "pyproject.toml"):
            shutil.copy(ROOT / name, self.project)
        self.random = random.Random(3407)
        self.arms: dict[str, tuple[str, int, str]] = {}
        self.sessions = 0

    def start(self) -> subprocess.Popen[bytes]:
        """The command of `make verify`, in a process group of its own."""
        command = [sys.executable, "-m", "pytest", "suites", "-m", "verify and not gpu", "-p", "no:cacheprovider", "-q"]
        command += ["--steps", str(STEPS), "--reports-dir", str(self.reports)]
        environment = {**os.environ, "PYTHONPATH": str(self.project), "OMP_NUM_THREADS": "1"}
        with open(self.project / "log.txt", "ab") as log:
            return subprocess.Popen(
                command, cwd=self.project, env=environment, stdout=log, stderr=log, start_new_session=True
            )

    def complete(self) -> int:
        """Let it run to its end; returns its exit status."""
        return self.start().wait(PATIENCE)

    def kill(self, moment: tuple[int, float, float], began: float | None = None) -> None:
        """Start it, kill it in the given phase, and look at what it left."""
        process = self.start()
        if began is not None:
            self._await_writing(process, began)
        time.sleep(self.random.uniform(*moment[1:]))
        os.killpg(process.pid, signal.SIGKILL)
        process.wait()
        self.look()

    def _await_writing(self, process: subprocess.Popen[bytes], before: float) -> None:
        """Return when SQLite opens its journal, or has already written."""
        journal, database = self.reports / "results.db-journal", self.reports / "results.db"
        deadline = time.monotonic() + PATIENCE
        while not journal.exists() and database.stat().st_mtime <= before and process.poll() is None:
            assert time.monotonic() < deadline
            time.sleep(0.005)

    def look(self) -> None:
        """Assert that what was finished is there, unchanged, and that everything can be read."""
        for name, known in self.arms.items():
            assert self._finished(name) == known, f"{name} was lost or made again"
        for arm in ARMS:
            if (found := self._finished(arm)) is not None:
                self.arms[arm] = found
        for path in self.reports.rglob("*"):
            if path.is_file() and not path.name.startswith("."):
                self._read(path)

    def _finished(self, arm: str) -> tuple[str, int, str] | None:
        record = RunRecord(self.reports / "runs" / f"{arm}-seed3407")
        if not record.complete:
            return None
        mark = record.path / "COMPLETE"
        assert [row["step"] for row in record.steps] == list(range(1, STEPS + 1))
        weights = sha256_file(record.adapter / "adapter_model.safetensors")
        return mark.read_text(), mark.stat().st_mtime_ns, weights

    def _read(self, path: Path) -> None:
        unfinished = "runs" in path.parts and not (self.reports / "runs" / path.parts[-2] / "COMPLETE").exists()
        if path.suffix == ".json":
            value = json.loads(path.read_text())
            if path.name == "export.json":
                assert sha256_file(value["path"]) == value["sha256"]
        elif path.name == "steps.jsonl" and unfinished:
            _ = RunRecord(path.parent).steps
        elif path.suffix == ".jsonl":
            # Appended to: the last line of a killed process may be half, and is written again.
            for line in path.read_text().split("\n")[:-1]:
                json.loads(line)
        elif path.name == "ledger.jsonl.gz":
            with gzip.open(path, "rt") as handle:
                assert {json.loads(line)["kind"] for line in handle} >= {"run", "step", "tensor"}
        elif path.suffix == ".xml":
            ET.parse(path)
        elif path.suffix == ".html":
            assert path.read_text().rstrip().endswith("</html>")
        elif path.suffix == ".db":
            with closing(sqlite3.connect(path, timeout=30)) as connection:
                assert connection.execute("PRAGMA integrity_check").fetchone() == ("ok",)
                tables = [row[0] for row in connection.execute("SELECT name FROM sqlite_master WHERE type = 'table'")]
                sessions = connection.execute("SELECT count(*) FROM sessions").fetchone()[0] if tables else 0
            assert sessions >= self.sessions
            self.sessions = sessions


@pytest.fixture(scope="module")
def verification(tmp_path_factory: pytest.TempPathFactory) -> Verification:
    """One folder, killed again and again."""
    return Verification(tmp_path_factory.mktemp("kills"))


@pytest.mark.nightly
@pytest.mark.slow
def test_killed_while_training(verification: Verification) -> None:
    """Oracle: what was finished before a kill has the same bytes and the same time after it, and everything is read."""
    for _ in range(TRAINING[0]):
        verification.kill(TRAINING)
        if len(verification.arms) == len(ARMS):
            shutil.rmtree(verification.reports / "runs")
            verification.arms = {}
    assert verification.complete() in (0, 1)
    verification.look()
    assert set(verification.arms) == set(ARMS)


@pytest.mark.nightly
@pytest.mark.slow
def test_killed_while_evaluating(verification: Verification) -> None:
    """Oracle: the same; answers that were written stay, and the evaluation ends in spite of it."""
    if not verification.arms:
        assert verification.complete() in (0, 1)
        verification.look()
    for _ in range(EVALUATING[0]):
        for done in (verification.reports / "evaluation").glob("*/evaluation.json"):
            shutil.rmtree(done.parent)
        verification.kill(EVALUATING)
    assert verification.complete() in (0, 1)
    verification.look()
    assert list((verification.reports / "evaluation").glob("*/evaluation.json"))


@pytest.mark.nightly
@pytest.mark.slow
def test_killed_while_writing(verification: Verification) -> None:
    """Oracle: the same; sessions that were committed stay, and the next one is added."""
    if not verification.arms:
        assert verification.complete() in (0, 1)
        verification.look()
    for _ in range(WRITING[0]):
        verification.kill(WRITING, (verification.reports / "results.db").stat().st_mtime)
    before = verification.sessions
    assert verification.complete() in (0, 1)
    verification.look()
    assert verification.sessions == before + 1
    assert not list(verification.reports.glob("results.db-journal"))
