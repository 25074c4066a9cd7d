"""A report as it is written, for the tests of its text and of its page in a browser."""

from __future__ import annotations

import json

import pytest

from grit_impl.cost.performance import write_performance
from grit_impl.verify.claims import Metric
from grit_impl.verify.report import write_report
from grit_impl.verify.results import Results
from grit_impl.verify.store.database import JudgedClaim, Session
from grit_impl.verify.store.history import Change, Changes, ItemChange

FAULTS = {
    "summary": {
        "confusion": {"starved": {"starved": 9, "not-ready": 1}, "overwritten": {"overwritten": 8}},
        "named": 17,
        "fault_runs": 18,
        "flagged": 0,
        "sound_runs": 7,
    }
}


@pytest.fixture
def written(make_evidence, claims, performance, tmp_path):
    """A full report of sound evidence, with changes, the fault zoo's matrix and what benchmarks left."""
    evidence = make_evidence()
    folder = tmp_path / "reports"
    (folder / "fault_matrix.json").write_text(json.dumps(FAULTS))
    write_performance(folder, performance)
    session = Session(
        "2026-01-01T00:00:00+00:00",
        "2026-01-01T00:10:00+00:00",
        "abc1234",
        Results(evidence.options).options.to_dict(),
        {},
    )
    judged = [JudgedClaim(claim, claim.judge(evidence), f"t.py::{claim.id}") for claim in claims]
    row = Change("evaluation.pure-delta-aqi", "supported, 30 points", "supported, 36 points", "6 points [1, 11]")
    item = ItemChange("pure", "aqi", 12, 3, Metric("accuracy", 4.5, 0.9, 8.1, "points", 200), 0.035)
    write_report(folder, session, judged, evidence, Changes("baseline (session 1)", (row,), (item,)))
    return folder, judged
