"""The document says what the results say."""

from __future__ import annotations

from pathlib import Path

import pytest

from grit_impl.sweep.report import markdown, marks
from grit_impl.sweep.store import Store

ROOT = Path(__file__).resolve().parents[2]
RESULTS = [path for name in ("tiny", "40m") if (path := ROOT / "fixtures" / f"sweep_{name}.db").is_file()]


@pytest.mark.skipif(not RESULTS, reason="needs fixtures/sweep_tiny.db; found none")
def test_the_results_section_is_the_report_of_the_results() -> None:
    """Section 7 is generated: nobody edits it, and a change of the analysis shows."""
    assert _block("sweep") == markdown([Store(path) for path in RESULTS]).strip()


def test_the_replication_is_the_report_of_its_results() -> None:
    """Section 10, the same way."""
    assert _block("replication") == markdown([Store(ROOT / "fixtures/sweep_tiny_replication.db")]).strip()


def _block(name: str) -> str:
    begin, end = marks(name)
    return (ROOT / "docs/measurements/grit-vs-lora.md").read_text().split(begin)[1].split(end)[0].strip()
