"""What a verification leaves in its reports folder, written when the session ends, by one process."""

from __future__ import annotations

import platform
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from datetime import UTC, datetime
from importlib import metadata
from pathlib import Path

from grit_impl.machine import git_commit, versions
from grit_impl.record import write_atomic
from grit_impl.verify.claims import Claim, Evidence, Judgement, catalogue
from grit_impl.verify.options import Options
from grit_impl.verify.store.database import Database, JudgedClaim, Session
from grit_impl.verify.store.junit import TestOutcome, junit_xml


def now() -> str:
    """The time, ISO 8601 in UTC."""
    return datetime.now(UTC).isoformat(timespec="seconds")


def environment() -> dict[str, str]:
    """What the session ran with and on, without importing any of it."""
    here = {"pytest": metadata.version("pytest"), "platform": platform.platform(), "machine": platform.machine()}
    return {**versions(), **here}


@dataclass
class Results:
    """Collects what tests report and writes it: database, JUnit XML, HTML and Markdown.

    Attributes:
        options: Of the session.
        started: ISO 8601, UTC.
        judged: What was judged, by claim and, where a test brought its own subject, by test.
        outcomes: How tests ended, by node id.
    """

    options: Options
    started: str = field(default_factory=now)
    judged: dict[tuple[str, str], JudgedClaim] = field(default_factory=dict)
    outcomes: dict[str, TestOutcome] = field(default_factory=dict)

    def add(self, claim: Claim, judgement: Judgement, node_id: str, *, live: bool = False) -> None:
        """Remember a judgement; a test that runs again (a rerun, a retry) replaces its own.

        On the session's own evidence (`live`) a claim is one, however many suites name it: the first test by name keeps
        it, whoever ran first.
        """
        key = (claim.id, "" if live else node_id)
        if key not in self.judged or node_id <= self.judged[key].node_id:
            self.judged[key] = JudgedClaim(claim, judgement, node_id)

    def ordered(self) -> list[JudgedClaim]:
        """Judged claims in the catalogue's order, so that a report does not depend on who ran first."""
        place = {name: number for number, name in enumerate(catalogue())}
        judged = self.judged.values()
        return sorted(judged, key=lambda each: (place.get(each.claim.id, len(place)), each.claim.id, each.node_id))

    @property
    def report(self) -> Path:
        """The page that a person opens."""
        return self.options.reports_dir / "index.html"

    def write(self, evidence: Evidence, exit_status: int) -> None:
        """Write `results.db`, `junit.xml`, `index.html` and `grit_evaluation.md`.

        Raises:
            GRITError: a file cannot be written; none of them is ever left half-written.
        """
        from grit_impl.verify.report import write_report

        folder = self.options.reports_dir
        session = Session(self.started, now(), git_commit(), self.options.to_dict(), environment(), exit_status)
        judged = self.ordered()
        with Database(folder / "results.db") as store:
            store.add(session, judged, evidence)
        write_atomic(folder / "junit.xml", junit_xml(session, self.outcomes.values(), judged))
        write_report(folder, session, judged, evidence)


def census(outcomes: Iterable[TestOutcome]) -> Mapping[str, int]:
    """How many tests were skipped, by reason, most frequent first."""
    counts: dict[str, int] = {}
    for outcome in outcomes:
        if outcome.outcome == "skipped":
            counts[outcome.message] = counts.get(outcome.message, 0) + 1
    return dict(sorted(counts.items(), key=lambda pair: (-pair[1], pair[0])))
