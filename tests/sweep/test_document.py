"""The document says what the results say."""

from __future__ import annotations

from pathlib import Path

import pytest

from grit_impl.sweep.report import BEGIN, END, markdown
from grit_impl.sweep.store import Store

ROOT = Path(__file__).resolve().parents[2]
RESULTS = [path for name in ("tiny", "40m") if (path := ROOT / "fixtures" / f"sweep_{name}.db").is_file()]


@pytest.mark.skipif(not RESULTS, reason="needs fixtures/sweep_tiny.db; found none")
def test_the_results_section_is_the_report_of_the_results() -> None:
    """Section 7 is generated: nobody edits it, and a change of the analysis shows."""
    block = (ROOT / "docs/grit-vs-lora.md").read_text().split(BEGIN)[1].split(END)[0]
    assert block.strip() == markdown([Store(path) for path in RESULTS]).strip()
