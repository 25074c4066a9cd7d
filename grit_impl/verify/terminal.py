"""What a verification shows at its end: a line per claim, what was skipped and why, and where the report is."""

from __future__ import annotations

import os
from typing import TYPE_CHECKING

from grit_impl.verify.claims import OUTCOMES, Outcome
from grit_impl.verify.results import Results, census
from grit_impl.verify.store.junit import TestOutcome

if TYPE_CHECKING:
    import pytest

    from grit_impl.verify.claims import Evidence

COLOURS: dict[Outcome, str] = {
    "supported": "green",
    "refuted": "red",
    "inconclusive": "yellow",
    "not exercised": "yellow",
}
MOST_REASONS = 12
LOG_WIDTH = 200
"""Columns of a line in a file or a CI log, which has no width of its own."""


def outcome_of(report: pytest.TestReport, before: TestOutcome | None) -> TestOutcome:
    """How a test stands after one more of its phases (setup, call, teardown)."""
    seconds = (before.seconds if before else 0.0) + report.duration
    if before is not None and before.outcome in ("failed", "error", "skipped") and not report.failed:
        return TestOutcome(before.node_id, before.outcome, seconds, before.message, before.detail)
    if report.passed:
        return TestOutcome(report.nodeid, "passed", seconds)
    if report.skipped:
        return TestOutcome(report.nodeid, "skipped", seconds, _reason(report))
    detail = str(report.longrepr)  # without the worker's name, which longreprtext adds under xdist
    crash = getattr(report.longrepr, "reprcrash", None)
    message = str(getattr(crash, "message", None) or detail or "failed").strip().splitlines()[0]
    return TestOutcome(report.nodeid, "failed" if report.when == "call" else "error", seconds, message, detail)


def _reason(report: pytest.TestReport) -> str:
    if hasattr(report, "wasxfail"):
        return str(report.wasxfail).removeprefix("reason: ") or "expected to fail"
    if isinstance(report.longrepr, tuple):
        return str(report.longrepr[2]).removeprefix("Skipped: ")
    return str(report.longrepr)


def _models(evidence: Evidence, width: int) -> str:
    """The report's table of models, `width` columns wide."""
    from rich import box
    from rich.console import Console
    from rich.table import Table

    from grit_impl.verify.report.content import metrics_table

    names, rows = metrics_table(evidence)
    table = Table("", box=box.SIMPLE_HEAD, pad_edge=False)
    for name in names:
        table.add_column(name, justify="right")
    for label, cells in rows:
        table.add_row(label, *(f"{cell.value} {cell.interval}".strip() for cell in cells))
    console = Console(width=width, color_system=None)
    with console.capture() as shown:
        console.print(table)
    return "\n".join(line.rstrip() for line in shown.get().rstrip("\n").split("\n"))


def summary(reporter: pytest.TerminalReporter, results: Results, evidence: Evidence | None) -> None:
    """Write the models' figures, the table of claims, the skip census and the report's path.

    Args:
        reporter: Pytest's.
        results: Of the session; nothing is written if no claim was judged.
        evidence: What the report was made of; None: there is no report.
    """
    judged = results.ordered()
    if not judged:
        return
    reporter.ensure_newline()  # or the first write_line breaks its line in two
    room = max(reporter._tw.fullwidth, 80) if reporter.isatty else LOG_WIDTH
    if evidence is not None and evidence.records:
        reporter.section("models")
        reporter.write_line(_models(evidence, room))
    reporter.section("claims")
    width = max(len(each.claim.id) for each in judged)
    for each in judged:
        verdict = each.judgement.verdict
        colour = {COLOURS[verdict]: True} if each.claim.gates or verdict != "refuted" else {"cyan": True}
        kind = "gate" if each.claim.gates else "hyp."
        line = f"  {kind}  {each.claim.id:<{width}}  "
        reporter.write(f"{verdict:>13}", bold=True, **colour)
        space = room - 13 - len(line)
        text = " ".join(each.judgement.summary.split())
        reporter.write_line(line + (text if len(text) <= space else text[: space - 1] + "…"))
    counts = {outcome: sum(each.judgement.verdict == outcome for each in judged) for outcome in OUTCOMES}
    reporter.write_line("")
    reporter.write_line(f"{len(judged)} claims: " + ", ".join(f"{n} {name}" for name, n in counts.items() if n))
    tests = {each.node_id for each in judged}
    reasons = census(each for each in results.outcomes.values() if each.node_id not in tests)
    if reasons:
        reporter.write_line(f"other tests skipped: {sum(reasons.values())}")
        for reason, n in list(reasons.items())[:MOST_REASONS]:
            text = f"  {n} x {reason}"
            reporter.write_line(text if len(text) <= room else text[: room - 1] + "…")
        if len(reasons) > MOST_REASONS:
            reporter.write_line(f"  and {len(reasons) - MOST_REASONS} other reasons (-rs shows all)")
    if evidence is not None:
        reporter.write_line(f"report: {os.path.relpath(results.report)}", bold=True)
