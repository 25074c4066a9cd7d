"""JUnit XML: the rules that the schemas of its consumers have in common, and its content."""

from __future__ import annotations

import re
from pathlib import Path
from xml.etree import ElementTree as ET

import pytest

from grit_impl.verify.claims import Claim, Judgement, Metric
from grit_impl.verify.store.database import JudgedClaim, Session
from grit_impl.verify.store.junit import TestOutcome, junit_xml

SESSION = Session("2026-01-01T00:00:00+00:00", "2026-01-01T00:10:00+00:00", None, {}, {})
NASTY = 'a\x00b\x1b[31m <&> \ud800 "quoted"\nnext'

# What junit-10.xsd (Jenkins' xunit plugin), JUnit.xsd (Ant) and jenkins-junit.xsd (JUnit's own) all accept.
REQUIRED = {"name", "package", "id", "timestamp", "hostname", "tests", "failures", "errors", "skipped", "time"}
CHILDREN = {
    "testsuites": ["testsuite"],
    "testsuite": ["properties", "testcase", "system-out", "system-err"],
    "properties": ["property"],
    "testcase": ["skipped", "error", "failure"],
}
ATTRIBUTES = {
    "testsuites": set(),
    "testsuite": REQUIRED,
    "properties": set(),
    "property": {"name", "value"},
    "testcase": {"name", "classname", "time"},
    "skipped": set(),
    "error": {"type", "message"},
    "failure": {"type", "message"},
    "system-out": set(),
    "system-err": set(),
}


@pytest.fixture
def document():
    claim = Claim("own.it", "It holds.", ("record:pure",), "Because.", lambda _: Judgement("supported", ""))
    metric = Metric("gap", 1.5, float("-inf"), float("nan"), "points", 7)
    judged = [JudgedClaim(claim, Judgement("inconclusive", "?", (metric,), needed=99), "suites/a/test_a.py::test_it")]
    outcomes = [
        TestOutcome("suites/a/test_a.py::test_it", "skipped", 0.1234567, NASTY),
        TestOutcome("suites/b/test_b.py::test_z[x y]", "failed", 1.0, NASTY, NASTY),
        TestOutcome("suites/b/test_b.py::test_b", "error", 1.0, "broke", "trace"),
        TestOutcome("suites/b/test_b.py::test_a", "passed", 12345.678),
    ]
    return junit_xml(SESSION, outcomes, judged), junit_xml(SESSION, reversed(outcomes), judged)


def test_structure_is_what_all_consumers_accept(document):
    """Oracle: elements, their order, attributes and formats that three schemas agree on (each required one present)."""
    root = ET.fromstring(document[0])
    assert root.tag == "testsuites"
    for element in root.iter():
        assert set(element.attrib) == ATTRIBUTES[element.tag]
        order = [CHILDREN[element.tag].index(child.tag) for child in element]
        assert order == sorted(order)
    for number, suite in enumerate(root):
        assert [child.tag for child in suite][:1] == ["properties"]
        assert [child.tag for child in suite][-2:] == ["system-out", "system-err"]
        assert len(suite.find("properties")) >= 1
        assert suite.get("id") == str(number)
        assert re.fullmatch(r"\d{4}-\d\d-\d\dT\d\d:\d\d:\d\d", suite.get("timestamp"))
        assert re.fullmatch(r"\d+\.\d{3}", suite.get("time"))
        cases = suite.findall("testcase")
        counted = {"tests": len(cases)} | {
            plural: sum(case.find(tag) is not None for case in cases)
            for plural, tag in (("failures", "failure"), ("errors", "error"), ("skipped", "skipped"))
        }
        assert {name: int(suite.get(name)) for name in counted} == counted
        for case in cases:
            assert case.get("name") == " ".join(case.get("name").split())


@pytest.mark.parametrize(
    "schema", sorted((Path(__file__).parent / "schemas").glob("*.xsd")), ids=lambda path: path.stem
)
def test_schemas_of_jenkins_accept_it(document, schema):
    """Oracle: Jenkins' own schemas (both MIT): of its xunit plugin, and of its older JUnit importer."""
    xmlschema = pytest.importorskip("xmlschema")
    assert [str(error) for error in xmlschema.XMLSchema(schema).iter_errors(document[0])] == []


def test_claims_carry_verdict_estimate_and_interval(document):
    """Oracle: the claim's numbers, as properties of its family's suite."""
    suite = next(s for s in ET.fromstring(document[0]) if s.get("name") == "claims.own")
    assert {p.get("name"): p.get("value") for p in suite.iter("property")} == {
        "git_commit": "unknown",
        "own.it.verdict": "inconclusive",
        "own.it.gates": "true",
        "own.it.name": "gap",
        "own.it.estimate": "1.5",
        "own.it.low": "-inf",
        "own.it.high": "nan",
        "own.it.unit": "points",
        "own.it.n": "7",
        "own.it.needed_n": "99",
    }


def test_order_does_not_depend_on_the_run(document):
    """Oracle: the same outcomes in reverse order."""
    assert document[0] == document[1]


def test_text_that_xml_cannot_hold(document):
    """Oracle: control characters and lone surrogates are replaced, the rest survives."""
    failure = next(ET.fromstring(document[0].encode()).iter("failure"))
    assert failure.text == 'a\ufffdb\ufffd[31m <&> \ufffd "quoted"\nnext'
