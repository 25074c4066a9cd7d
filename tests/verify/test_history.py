"""History: what changed between two sessions, and the commands that show it."""

from __future__ import annotations

import subprocess

import pytest
from click.testing import CliRunner

from grit_impl.errors import GRITError
from grit_impl.verify.claims import Judgement, Metric
from grit_impl.verify.commands import baseline, report
from grit_impl.verify.results import Results
from grit_impl.verify.store.database import Database, JudgedClaim, Session
from grit_impl.verify.store.history import change, compare_items, compare_sessions, find_session


def judgement(verdict: str, estimate: float = 10.0, half: float | None = 2.0) -> Judgement:
    ends = (None, None) if half is None else (estimate - half, estimate + half)
    return Judgement(verdict, "as planted", (Metric("delta_aqi", estimate, *ends, "points", 100, "", "pure"),))


@pytest.mark.parametrize(
    ("then", "now", "text"),
    [
        (judgement("supported"), judgement("supported", 11.0), None),
        (judgement("supported"), judgement("supported", 14.0), "4.00 points [1.17, 6.83] (n = 100)"),
        (
            judgement("supported"),
            judgement("refuted", 10.0),
            "supported → refuted, 0 points [-2.83, 2.83] (n = 100)",
        ),
        (judgement("supported", half=None), judgement("supported", 10.5, None), None),
        (judgement("supported", half=None), judgement("supported", 12.0, None), "2.00 points"),
        (None, judgement("supported"), "not judged before"),
        (judgement("supported"), None, "no longer judged"),
        (Judgement("supported", "s"), Judgement("supported", "s"), None),
    ],
)
def test_what_counts_as_a_change(then, now, text):
    """Oracle: by hand; half-widths of 2 and 2 add to sqrt(8) = 2.83."""
    before, after = ({} if each is None else {"c": each} for each in (then, now))
    rows = compare_sessions("x", before, after).rows
    assert [row.text for row in rows] == ([] if text is None else [text])


def test_other_measurements_are_not_subtracted():
    """Oracle: a delta of another model has nothing to do with this one's."""
    assert change(Metric("delta_aqi", 1, subject="pure"), Metric("delta_aqi", 2, subject="hybrid")) is None
    assert change(Metric("delta_aqi", float("nan")), Metric("delta_aqi", 2)) is None


@pytest.mark.parametrize(("now", "worse"), [("refuted", True), ("inconclusive", False), ("supported", False)])
def test_worse_means_support_was_lost(now, worse):
    """Oracle: only a refuted, or vanished, claim that was supported."""
    assert compare_sessions("x", {"c": judgement("supported")}, {"c": judgement(now)}).worse is worse
    assert compare_sessions("x", {"c": judgement("supported")}, {}).worse is True
    for before in ("refuted", "inconclusive"):
        assert compare_sessions("x", {"c": judgement(before)}, {"c": judgement("refuted", 5.0)}).worse is False


def answered(right: int, of: int, start: int = 0) -> dict[tuple[str, str], bool]:
    return {(f"i{k}", f"question {k}"): k < right for k in range(start, of)}


def test_items_are_paired():
    """Oracle: 10 of 20 items lost, none gained: McNemar 2 / 2**10, times two for two comparisons; 19 of 20 by hand."""
    before = {("pure", "aqi"): answered(15, 20), ("pure", "knowledge"): answered(5, 9), ("base", "aqi"): answered(1, 2)}
    after = {("pure", "aqi"): answered(5, 20), ("pure", "knowledge"): answered(6, 9), ("hybrid", "aqi"): answered(1, 2)}
    aqi, knowledge = compare_items(before, after)
    assert (aqi.model, aqi.suite, aqi.gained, aqi.lost) == ("pure", "aqi", 0, 10)
    assert aqi.p == pytest.approx(2 * 2 / 2**10)
    assert (knowledge.gained, knowledge.lost, knowledge.p) == (1, 0, 1.0)
    assert aqi.difference.estimate == -50.0
    assert -80 < aqi.difference.low < -50 < aqi.difference.high < -20
    assert aqi.difference.n == 20
    assert str(aqi).startswith("pure, aqi: 0 items gained, 10 lost; -50.00 points [")


def test_only_the_same_questions_are_paired():
    """Oracle: another prompt under the same id is another item; without a common item there is nothing to say."""
    before = {("pure", "aqi"): answered(3, 6)}
    after = {("pure", "aqi"): {**answered(0, 6, 3), ("i0", "another question"): False}}
    (found,) = compare_items(before, after)
    assert (found.gained, found.lost, found.difference.n) == (0, 0, 3)
    assert compare_items(before, {("pure", "aqi"): {("i0", "another question"): True}}) == ()
    assert compare_items({}, after) == ()


@pytest.fixture
def reports(make_evidence, claims, tmp_path):
    """Two sessions in one folder: in the second, pure lost its delta_AQI."""
    folder = tmp_path / "reports"
    options = make_evidence().options.to_dict()
    for number, share in enumerate((0.61, 0.1)):
        evidence = make_evidence(folder=tmp_path / str(number), right={"pure": (share, 0.86)})
        session = Session(f"2026-01-0{number + 1}T00:00:00+00:00", "x", f"{number + 1}" * 12, options, {})
        with Database(folder / "results.db") as store:
            found = [JudgedClaim(claim, claim.judge(evidence)) for claim in claims if claim.family == "evaluation"]
            store.add(session, found, evidence)
    return folder


def run(command, *arguments):
    return CliRunner().invoke(command, [str(each) for each in arguments])


def test_report_against_an_earlier_session(reports):
    """Oracle: the planted loss of pure's delta_AQI, by session number, commit and folder; nothing else changed."""
    for against in ("1", "1111111"):
        result = run(report, "--reports-dir", reports, "--against", against)
        assert result.exit_code == 0, result.output
        lines = result.output.splitlines()
        assert [line.partition(":")[0] for line in lines] == ["evaluation.pure-delta-aqi", "pure, aqi", "report"]
        assert "supported → refuted, -51.00 points" in lines[0]
        assert "0 items gained, 102 lost; -51.00 points [-" in lines[1]
    assert "supported → refuted" in (reports / "index.html").read_text()
    summary = (reports / "grit_evaluation.md").read_text()
    assert "## Against" in summary
    assert "| pure | aqi | 0 | 102 | -51.00 points [" in summary
    assert run(report, "--reports-dir", reports, "--against", "1", "--fail-if-worse").exit_code == 1
    assert run(report, "--reports-dir", reports, "--against", reports).output.startswith("no claim changed")


def test_report_of_an_earlier_session(reports):
    """Oracle: the first session's verdicts."""
    assert run(report, "--reports-dir", reports, "--session", "1").exit_code == 0
    assert "All 9 gating claims supported" in (reports / "grit_evaluation.md").read_text()


def test_baseline(reports):
    """Oracle: a session with a refuted gate needs --force; a sound one is promoted, shown and compared with."""
    refused = run(baseline, "promote", "--reports-dir", reports)
    assert isinstance(refused.exception, GRITError)
    assert "evaluation.pure-delta-aqi not supported" in str(refused.exception)
    assert isinstance(run(baseline, "show", "--reports-dir", reports).exception, GRITError)
    assert run(baseline, "promote", "--reports-dir", reports, "1").output == "session 1 is the baseline now\n"
    assert run(baseline, "show", "--reports-dir", reports).output.startswith("session 1, ")
    assert "supported → refuted" in run(report, "--reports-dir", reports, "--against", "baseline").output
    assert run(baseline, "promote", "--reports-dir", reports, "--force").output == "session 2 is the baseline now\n"
    assert "no claim changed" in run(report, "--reports-dir", reports, "--against", "baseline").output


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--against", "baseline"], "no baseline yet"),
        (["--against", "nope"], "no session 'nope'"),
        (["--session", "7"], "no session '7'"),
        (["--reports-dir", "elsewhere"], "no results in"),
    ],
)
def test_what_is_not_there_is_one_line(reports, arguments, message):
    """Oracle: an error that names what was asked for, and what there is."""
    result = run(report, "--reports-dir", reports, *arguments)
    assert isinstance(result.exception, GRITError)
    assert message in str(result.exception)
    assert "\n" not in str(result.exception)


def test_revisions_are_resolved(tmp_path):
    """Oracle: HEAD~1 of a real repository."""

    def git(*arguments):
        command = ["git", "-c", "user.name=t", "-c", "user.email=t@example.org", *arguments]
        return subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, check=True).stdout.strip()

    git("init", "-q")
    commits = []
    for number in (1, 2):
        git("commit", "-q", "--allow-empty", "-m", str(number))
        commits.append(git("rev-parse", "--short=12", "HEAD"))
    with Database(tmp_path / "results.db") as store:
        for commit in (*commits, commits[0] + "+"):
            store.add(Session("a", "b", commit, {}, {}), [])
        assert find_session(store, "HEAD", tmp_path) == 2
        assert find_session(store, "HEAD~1", tmp_path) == 3
        assert find_session(store, "2", tmp_path) == 2


def test_results_name_their_commit_and_environment(make_evidence, claims):
    """Oracle: git and the installed packages, asked here."""
    results = Results(make_evidence().options)
    for claim in claims[:3]:
        results.add(claim, Judgement("supported", "first"), "t::x")
        results.add(claim, Judgement("supported", "again"), "t::x")
    results.write(make_evidence(folder=results.options.reports_dir.parent / "other"), 0)
    with Database(results.options.reports_dir / "results.db") as store:
        (session,) = store.sessions()
        assert [each.summary for each in store.judged(1).values()] == ["again"] * 3
        names = {row["name"] for row in store.query("SELECT name FROM environment")}
    assert {"python", "torch", "pytest"} <= names
    head = subprocess.run(["git", "rev-parse", "--short=12", "HEAD"], capture_output=True, text=True).stdout.strip()
    assert (session["git_commit"] or "").removesuffix("+") == head
