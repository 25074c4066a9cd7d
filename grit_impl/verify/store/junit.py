"""`junit.xml`, made from the evidence: what CI servers read.

The schemas in use contradict each other (Jenkins' xunit plugin, the Ant schema that GitHub actions check against, the
older Jenkins one). What all of them accept: no properties in a test case, so a claim's numbers stand in its suite's
properties as `<claim>.<name>`; skip reasons as text; suites carry every attribute that any of them requires. pytest's
own `--junitxml`, which has the numbers as well, is refused by the older Jenkins schema for every skipped test, has one
suite for all families, and is only there where it was asked for.
"""

from __future__ import annotations

import re
from collections import defaultdict
from collections.abc import Iterable
from dataclasses import dataclass
from xml.etree import ElementTree as ET

from grit_impl.verify.store.database import JudgedClaim, Session

_FORBIDDEN = re.compile("[^\t\n\r\x20-\ud7ff\ue000-\ufffd\U00010000-\U0010ffff]")


@dataclass(frozen=True, slots=True)
class TestOutcome:
    """How one test ended.

    Attributes:
        node_id: pytest's.
        outcome: `passed`, `failed`, `error` or `skipped`.
        seconds: Of setup, call and teardown.
        message: One line: why it failed or was skipped.
        detail: The traceback, if there is one.
    """

    __test__ = False

    node_id: str
    outcome: str
    seconds: float = 0.0
    message: str = ""
    detail: str = ""


def junit_xml(session: Session, outcomes: Iterable[TestOutcome], judged: Iterable[JudgedClaim]) -> str:
    """The document, one suite per family of claims or test file, in an order that does not depend on the run."""
    claims = defaultdict(list)
    for each in judged:
        claims[each.node_id].append(each)
    suites: dict[str, list[TestOutcome]] = defaultdict(list)
    for outcome in outcomes:
        found = claims.get(outcome.node_id)
        file = outcome.node_id.partition("::")[0].removesuffix(".py").replace("/", ".")
        suites[f"claims.{found[0].claim.family}" if found else file].append(outcome)
    root = ET.Element("testsuites")
    for number, name in enumerate(sorted(suites)):
        rows = sorted(suites[name], key=lambda row: row.node_id)
        _suite(root, number, name, rows, [each for row in rows for each in claims.get(row.node_id, ())], session)
    ET.indent(root)
    return '<?xml version="1.0" encoding="utf-8"?>\n' + ET.tostring(root, encoding="unicode") + "\n"


def _suite(
    root: ET.Element,
    number: int,
    name: str,
    rows: list[TestOutcome],
    judged: list[JudgedClaim],
    session: Session,
) -> None:
    counts = {kind: sum(row.outcome == kind for row in rows) for kind in ("failed", "error", "skipped")}
    suite = ET.SubElement(
        root,
        "testsuite",
        {
            "name": name,
            "package": name,
            "id": str(number),
            "tests": str(len(rows)),
            "failures": str(counts["failed"]),
            "errors": str(counts["error"]),
            "skipped": str(counts["skipped"]),
            "time": f"{sum(row.seconds for row in rows):.3f}",
            "timestamp": session.started[:19],
            "hostname": "localhost",
        },
    )
    properties = ET.SubElement(suite, "properties")
    for key, value in _properties(judged, session):
        ET.SubElement(properties, "property", {"name": _clean(key), "value": _clean(value)})
    for row in rows:
        _case(suite, row)
    ET.SubElement(suite, "system-out")
    ET.SubElement(suite, "system-err")


def _properties(judged: list[JudgedClaim], session: Session) -> Iterable[tuple[str, str]]:
    yield "git_commit", session.git_commit or "unknown"
    for each in judged:
        prefix, judgement = each.claim.id, each.judgement
        yield f"{prefix}.verdict", judgement.verdict
        yield f"{prefix}.gates", str(each.claim.gates).lower()
        if judgement.metrics:
            first = judgement.metrics[0]
            for key in ("name", "estimate", "low", "high", "unit", "n"):
                value = getattr(first, key)
                yield f"{prefix}.{key}", "" if value is None else str(value)
        if judgement.needed is not None:
            yield f"{prefix}.needed_n", str(judgement.needed)


def _case(suite: ET.Element, row: TestOutcome) -> None:
    file, _, test = row.node_id.partition("::")
    case = ET.SubElement(
        suite,
        "testcase",
        {
            "classname": _clean(file.removesuffix(".py").replace("/", ".")),
            "name": _clean(" ".join(test.split()) or file),
            "time": f"{row.seconds:.3f}",
        },
    )
    if row.outcome in ("failed", "error"):
        kind = "failure" if row.outcome == "failed" else "error"
        element = ET.SubElement(case, kind, {"type": kind, "message": _clean(row.message)})
        element.text = _clean(row.detail or row.message)
    elif row.outcome == "skipped":
        ET.SubElement(case, "skipped").text = _clean(row.message)


def _clean(text: str) -> str:
    """XML 1.0 has no control characters, and no lone surrogates."""
    return _FORBIDDEN.sub("\N{REPLACEMENT CHARACTER}", text)
