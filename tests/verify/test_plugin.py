"""The pytest plugin, seen from outside: outcomes, exit status, tables, files, and the same under xdist."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from xml.etree import ElementTree as ET

import pytest

import grit_impl
from grit_impl.verify.claims import catalogue
from grit_impl.verify.store.database import Database

pytest_plugins = ["pytester"]
ROOT = Path(__file__).parents[2]
# Packages that take long to import.
HEAVY = {"torch", "transformers", "peft", "trl", "datasets", "pandas", "scipy", "matplotlib", "numpy"}
CONFTEST = """
import pytest
from grit_impl.verify.claims import Claim, Evidence, Judgement, Metric
from grit_impl.verify.options import Options

class Verdict:
    def __init__(self, cause, effective):
        self.cause, self.effective, self.summary, self.numbers = cause, effective, "planted", {"cosine": 0.5}

@pytest.fixture(scope="session")
def evidence(grit_options):
    return Evidence(grit_options, verdicts={"pure": Verdict("effective", True), "hybrid": Verdict("starved", False)},
                    missing={"baseline": "needs a GPU, found none"}, failed={"hybrid_late": "ended with status 1"})

def claim(name, verdict, gates=True):
    metric = Metric("gap", 1.5, float("-inf"), float("nan"), "points", 7, "by hand", "pure")
    return Claim(name, "It holds.", ("verdict:pure",), "Because.",
                 lambda e: Judgement(verdict, "as asked", (metric,), {"k": 1}, 99), gates)
"""
TESTS = """
from conftest import claim

def test_supported(judge): judge("gradients.pure-effective")
def test_refuted(judge): judge("gradients.hybrid-effective")
def test_missing(judge): judge("gradients.baseline-unmodified")
def test_inconclusive(judge): judge(claim("own.inconclusive", "inconclusive"))
def test_hypothesis_refuted(judge): judge(claim("own.hypothesis", "refuted", gates=False))
def test_hypothesis_open(judge): judge(claim("own.open", "inconclusive", gates=False))
def test_without_claim(): pass
"""


INI = "[pytest]\npythonpath = .\ngrit_short_names = true\n"


@pytest.fixture
def project(pytester, monkeypatch):
    """A project with the suite above; `run` runs pytest in it, in a process of its own."""
    pytester.makeconftest(CONFTEST)
    pytester.makepyfile(test_it=TESTS)
    monkeypatch.setenv("PYTHONPATH", str(Path(grit_impl.__file__).parent.parent))
    monkeypatch.setenv("PYTEST_DISABLE_PLUGIN_AUTOLOAD", "1")  # other packages' plugins take seconds to import
    plugin = ["-p", "grit_impl.verify.plugin"]
    base = ["-p", "no:cacheprovider", "--rootdir", str(pytester.path), "--import-mode=prepend"]
    pytester.makefile(".ini", pytest=INI)

    def run(*arguments: str) -> pytest.RunResult:
        return pytester.runpytest_subprocess(*plugin, *base, *arguments)

    pytester.run_grit, pytester.base = run, base
    return pytester


def test_verdicts_become_outcomes(project):
    """Oracle: refuted gate fails; open gate and open hypothesis skip; refuted hypothesis is an expected failure."""
    result = project.run_grit()
    result.assert_outcomes(passed=2, failed=1, skipped=3, xfailed=1)
    assert result.ret == 1
    result.stdout.fnmatch_lines(
        [
            "*= claims =*",
            "*not exercised  gate  gradients.baseline-unmodified * needs a GPU, found none*",
            "*supported  gate  gradients.pure-effective * effective: planted*",
            "*refuted  gate  gradients.hybrid-effective * starved: planted*",
            "*refuted  hyp.  own.hypothesis * as asked*",
            "6 claims: 1 supported, 2 refuted, 2 inconclusive, 1 not exercised",
            "report: reports/index.html",
        ]
    )


def test_strict_claims_fail_what_is_open(project):
    """Oracle: only gating claims are affected."""
    project.run_grit("--strict-claims").assert_outcomes(passed=2, failed=3, skipped=1, xfailed=1)


def test_hypotheses_gate_on_request(project):
    """Oracle: the refuted hypothesis fails, the open one still skips."""
    project.run_grit("--gate-hypotheses").assert_outcomes(passed=2, failed=2, skipped=3)


def test_what_broke_fails_without_being_asked(project):
    """Oracle: an arm that crashed is no skip."""
    project.makepyfile(test_it='def test_broke(judge): judge("gradients.hybrid-late-caught")')
    result = project.run_grit()
    result.assert_outcomes(failed=1)
    result.stdout.fnmatch_lines(["*ended with status 1*"])


def test_selection_and_last_failed(project):
    """Oracle: pytest's own -k and --lf choose among claims."""
    project.run_grit("-k", "refuted and not hypothesis", "-p", "cacheprovider").assert_outcomes(failed=1, deselected=6)
    project.run_grit("--lf", "-p", "cacheprovider").assert_outcomes(failed=1)


@pytest.mark.parametrize(
    "arguments", [["-p", "no:randomly"], ["-p", "xdist", "-n", "auto"], ["-m", "verify"]], ids=" ".join
)
def test_ways_to_run(project, arguments):
    """Oracle: the same outcomes however pytest is started; with `-m` those of the marked tests."""
    if "xdist" in arguments:
        pytest.importorskip("xdist")
    marked = "import pytest\n" + TESTS.replace("def test_supported", "@pytest.mark.verify\ndef test_supported")
    project.makepyfile(test_it=marked)
    selected = (
        {"passed": 1, "deselected": 6} if "-m" in arguments else {"passed": 2, "failed": 1, "skipped": 3, "xfailed": 1}
    )
    project.run_grit(*arguments).assert_outcomes(**selected)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--min-delta-aqi", "abc"], "--min-delta-aqi takes a number between -100 and 100, not 'abc'"),
        (["--min-retention=120"], "--min-retention takes a percentage between 0 and 100, not '120'"),
        (["--steps", "0"], "--steps takes a whole number of at least 1, not '0'"),
    ],
)
def test_bad_option_is_one_line_and_status_2(project, arguments, message):
    """Oracle: one line, no traceback, nothing written."""
    result = project.run_grit(*arguments)
    assert result.ret == 2
    text = result.stdout.str() + result.stderr.str()
    assert message in text
    assert "Traceback" not in text
    assert not (project.path / "reports").exists()


def test_bad_option_in_the_configuration_file(project):
    """Oracle: the same line for a default that was set in pytest.ini."""
    project.makefile(".ini", pytest="[pytest]\npythonpath = .\ngrit_min_delta_aqi = much\n")
    result = project.run_grit()
    assert result.ret == 2
    result.stderr.fnmatch_lines(["*--min-delta-aqi takes a number between -100 and 100, not 'much'"])


def test_options_of_the_configuration_file(project):
    """Oracle: thresholds and folder from the file; the command line wins."""
    project.makefile(".ini", pytest=INI + "grit_strict_claims = true\ngrit_reports_dir = out\n")
    project.run_grit().assert_outcomes(passed=2, failed=3, skipped=1, xfailed=1)
    assert (project.path / "out" / "results.db").is_file()
    project.run_grit("--reports-dir", "elsewhere")
    assert (project.path / "elsewhere" / "results.db").is_file()


@pytest.mark.parametrize("distributed", [[], ["-p", "xdist", "-n", "2"]], ids=["one-process", "xdist"])
def test_bad_input_while_collecting_evidence(project, distributed):
    """Oracle: bad input found late ends the session: its line, status 2, no results."""
    if distributed:
        pytest.importorskip("xdist")
    project.makeconftest(
        CONFTEST
        + """
from grit_impl.errors import GRITError

class Bad(Evidence):
    def gather(self, requires):
        raise GRITError("unknown base model 'nope'; use tiny")

@pytest.fixture(scope="session")
def evidence(grit_options):
    return Bad(grit_options)
"""
    )
    result = project.run_grit(*distributed)
    assert result.ret == 2
    result.stdout.fnmatch_lines(["error: unknown base model 'nope'; use tiny"])
    assert not (project.path / "reports" / "results.db").exists()


def test_files_are_the_same_under_xdist(project):
    """Oracle: database, JUnit XML and page of one process, against those of three, but for times."""
    pytest.importorskip("xdist")
    project.run_grit("--reports-dir", "one")
    project.run_grit("--reports-dir", "many", "-p", "xdist", "-n", "3").assert_outcomes(
        passed=2, failed=1, skipped=3, xfailed=1
    )

    def rows(folder: str) -> list[str]:
        with Database(project.path / folder / "results.db", readonly=True) as db:
            return [repr(pair) for pair in db.judged(1).items()]

    def xml(folder: str) -> list[tuple[str, dict[str, str], str]]:
        tree = ET.parse(project.path / folder / "junit.xml")
        moving = ("time", "timestamp")
        return [
            (each.tag, {k: v for k, v in each.attrib.items() if k not in moving}, each.text or "")
            for each in tree.iter()
        ]

    assert rows("one") == rows("many")
    assert len(rows("one")) == 6
    assert xml("one") == xml("many")


def test_own_junitxml_carries_the_numbers(project):
    """Oracle: verdict, estimate and interval as properties of pytest's own XML, and no warning under -W error."""
    result = project.run_grit("--junitxml=x.xml", "-k", "inconclusive or supported", "-W", "error")
    assert result.ret == 0
    cases = {case.get("name"): case for case in ET.parse(project.path / "x.xml").iter("testcase")}
    found = {p.get("name"): p.get("value") for p in cases["test_inconclusive"].iter("property")}
    assert found == {
        "claim": "own.inconclusive",
        "verdict": "inconclusive",
        "metric": "gap",
        "estimate": "1.5",
        "low": "-inf",
        "high": "nan",
    }


def test_full_disk_is_one_line_and_status_2(project):
    """Oracle: a reports folder that is a file: one line, status 2."""
    (project.path / "blocked").write_text("")
    result = project.run_grit("--reports-dir", "blocked/reports")
    assert result.ret == 2
    result.stdout.fnmatch_lines(["error: cannot *blocked/reports*"])
    assert "Traceback" not in result.stdout.str() + result.stderr.str()


def test_require_gpu(project):
    """Oracle: a gpu test that is skipped is a failure under --require-gpu, and visible without it."""
    project.makepyfile(
        test_it="""
import pytest
@pytest.mark.gpu
def test_gpu(): pytest.skip("needs a GPU, found none")
def test_other(): pass
"""
    )
    visible = project.run_grit("-m", "gpu")
    visible.stdout.fnmatch_lines(["gpu: none of 1 tests marked gpu ran"])
    assert visible.ret == 0
    required = project.run_grit("-m", "gpu", "--require-gpu")
    required.stdout.fnmatch_lines(["--require-gpu: no test marked gpu ran"])
    assert required.ret == 1
    assert project.run_grit("-k", "nothing", "--require-gpu").ret not in (0, 2)


def test_other_projects_are_left_alone(project):
    """Oracle: without a judged claim nothing is written and nothing is shown."""
    result = project.run_grit("-k", "without_claim")
    assert result.ret == 0
    assert "claims" not in result.stdout.str().split("test session starts")[1]
    assert not (project.path / "reports").exists()


def test_skip_census(project):
    """Oracle: three tests skipped for two reasons."""
    project.makepyfile(
        test_it=TESTS
        + """
import pytest
@pytest.mark.parametrize("n", [1, 2])
def test_a(n): pytest.skip("needs a GPU, found none")
def test_b(): pytest.skip("needs Ollama, found none")
"""
    )
    project.run_grit().stdout.fnmatch_lines(
        ["other tests skipped: 3", "  2 x needs a GPU, found none", "  1 x needs Ollama, found none"]
    )


OWN_OPTIONS = """
def pytest_addoption(parser):
    group = parser.getgroup("other")
    group.addoption("--seed", default="of the other", help="their seed")
    group.addoption("--steps", action="store_true", help="their steps")

def pytest_configure(config):
    assert config.getoption("--seed") in ("of the other", "7")
"""


@pytest.mark.parametrize("where", ["plugin-before", "plugin-after", "conftest"])
def test_options_of_others_come_first(project, where):
    """Oracle: a plugin, or a conftest.py, that has --seed and --steps keeps them; ours are then --grit-seed, ..."""
    project.makepyfile(
        test_it="def test_it(judge, grit_options): assert (grit_options.seed, grit_options.steps) == (5, 9)"
    )
    others = []
    if where == "conftest":
        project.makeconftest(CONFTEST + OWN_OPTIONS)
    else:
        project.makepyfile(other=OWN_OPTIONS)
        others = ["-p", "other"]
    ours = ["-p", "grit_impl.verify.plugin"]
    both = [*others, *ours] if where == "plugin-before" else [*ours, *others]
    options = ["--seed", "7", "--steps", "--grit-seed", "5", "--grit-steps", "9", "--min-delta-aqi", "1"]
    project.syspathinsert()
    result = project.runpytest_subprocess(*both, *project.base, *options)
    result.assert_outcomes(passed=1)
    text = project.runpytest_subprocess(*both, *project.base, "--help").stdout.str()
    assert "their seed" in text
    assert "--grit-seed" in text
    assert "--min-delta-aqi" in text


def test_named_by_a_conftest(project):
    """Oracle: `pytest_plugins` in a conftest.py: options of the configuration file count, claims are judged."""
    project.makefile(".ini", pytest="[pytest]\npythonpath = .\ngrit_seed = 5\n")
    project.makeconftest('pytest_plugins = ["grit_impl.verify.plugin"]\n' + CONFTEST)
    body = "    judge('gradients.pure-effective')\n    assert grit_options.seed == 5\n"
    project.makepyfile(test_it=f"def test_it(judge, grit_options):\n{body}")
    project.runpytest_subprocess(*project.base).assert_outcomes(passed=1)


def test_other_projects_have_the_prefix_alone(project):
    """Oracle: pytest's own refusal of a name that nobody has."""
    project.makefile(".ini", pytest="[pytest]\npythonpath = .\n")
    project.makepyfile(test_it="def test_it(grit_options): assert grit_options.seed == 6")
    assert "unrecognized arguments: --min-delta-aqi" in project.run_grit("--min-delta-aqi", "5").stderr.str()
    project.run_grit("--grit-seed", "6").assert_outcomes(passed=1)
    text = project.run_grit("--help").stdout.str()
    assert "--grit-min-delta-aqi" in text
    assert " --min-delta-aqi" not in text


def test_long_names_are_always_there(project):
    """Oracle: the same option by both names; the later one wins, as usual."""
    project.makepyfile(
        test_it="def test_it(grit_options): assert (grit_options.seed, grit_options.strict_claims) == (6, True)"
    )
    project.run_grit("--seed", "5", "--grit-seed", "6", "--grit-strict-claims").assert_outcomes(passed=1)


def test_help_names_every_option_and_its_default(project):
    """Oracle: the user's option names."""
    text = " ".join(project.run_grit("--help").stdout.str().split())
    for words in (
        "--base-model",
        "(default: tiny)",
        "--min-delta-aqi",
        "--max-speed-loss",
        "(default: 10)",
        "--strict-claims",
    ):
        assert words in text


def test_import_is_light():
    """Oracle: importing plugin and claims loads none of the heavy packages."""
    imports = "import sys, grit_impl.verify.plugin, grit_impl.verify.claims as claims; claims.catalogue()"
    code = f"{imports}; print(sorted({HEAVY} & set(sys.modules)))"
    assert subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout == "[]\n"


LOOK = """
import atexit, json, sys

def pytest_collection_finish(session):
    from grit_impl.verify.plugin import claims_named

    claims = sorted({name for item in session.items for name in claims_named(item)})
    atexit.register(lambda: print(json.dumps({"modules": sorted(sys.modules), "claims": claims})))
"""


def test_collecting_the_claims_is_light(tmp_path):
    """Oracle: sys.modules after `pytest --collect-only suites`; of the catalogue, all but other people's trainers."""
    (tmp_path / "look.py").write_text(LOOK)
    command = [sys.executable, "-m", "pytest", "--collect-only", "-q", "suites", "-p", "look", "-p", "no:cacheprovider"]
    environment = {**os.environ, "PYTHONPATH": str(tmp_path)}
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr
    seen = json.loads(done.stdout.splitlines()[-1])
    assert HEAVY & set(seen["modules"]) == set()
    assert set(catalogue()) - set(seen["claims"]) == {"gradients.trainer-effective"}


def test_claims_known_before_a_test_runs(project):
    """Oracle: the parameter and the marker; what stands in a test's body is its own affair, and judged all the same."""
    project.makeconftest(
        CONFTEST
        + """
def pytest_collection_finish(session):
    from grit_impl.verify.plugin import claims_named

    print("KNOWN", [sorted(claims_named(item)) for item in session.items])
"""
    )
    project.makepyfile(
        test_it="""
import pytest
@pytest.mark.parametrize("claim", ["gradients.pure-effective"])
def test_parameter(judge, claim): judge(claim)
@pytest.mark.claim("gradients.pure-effective", "no.claim")
def test_marker(judge): judge("gradients.pure-effective")
def test_body(judge): judge("gradients.pure-effective")
"""
    )
    result = project.run_grit("--strict-markers")
    result.assert_outcomes(passed=3)
    assert "KNOWN [['gradients.pure-effective'], ['gradients.pure-effective'], []]" in result.stdout.str()


@pytest.mark.parametrize("distributed", [[], ["-p", "xdist", "-n", "2"]], ids=["one-process", "xdist"])
def test_a_claim_that_two_suites_name_appears_once(project, distributed):
    """Oracle: three tests pass, two of them on the same claim and evidence, one on a subject of its own."""
    if distributed:
        pytest.importorskip("xdist")
    project.makepyfile(
        test_a='def test_a(judge): judge("gradients.pure-effective")',
        test_b="""
def test_b(judge): judge("gradients.pure-effective")
def test_own(judge, evidence): judge("gradients.pure-effective", evidence)
""",
        test_it="",
    )
    result = project.run_grit(*distributed)
    result.assert_outcomes(passed=3)
    result.stdout.fnmatch_lines(["2 claims: 2 supported"])
