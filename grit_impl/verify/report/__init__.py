"""The report: `index.html`, one page without network, and `grit_evaluation.md` for a pull request."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from grit_impl.record import write_atomic
from grit_impl.verify.claims import Evidence
from grit_impl.verify.store.database import JudgedClaim, Session


def write_report(
    folder: Path, session: Session, judged: Sequence[JudgedClaim], evidence: Evidence, changes: Any = None
) -> Path:
    """Write both files into `folder`; returns the page's path.

    Args:
        folder: The reports folder.
        session: When, on what, with which options.
        judged: Claims in the order of the report.
        evidence: What figures and the metrics table are drawn from.
        changes: `history.Changes` against an earlier session, or None.

    Raises:
        GRITError: a file cannot be written; the old one stays.
    """
    from grit_impl.verify.report.page import render_html, render_markdown

    write_atomic(folder / "grit_evaluation.md", render_markdown(session, judged, evidence, folder, changes))
    return write_atomic(folder / "index.html", render_html(session, judged, evidence, folder, changes))
