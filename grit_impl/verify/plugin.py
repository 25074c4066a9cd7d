"""pytest plugin: claims as tests.

    @pytest.mark.parametrize("claim", family("gradients"))
    def test_gradients(judge, claim):
        judge(claim)

Whatever these tests will ask for is trained and evaluated at once. A test that names its claims only in its body
(`judge("gradients.pure-effective")`) gets what they need when it runs, or with the rest if it is marked with their ids:
`@pytest.mark.claim("gradients.pure-effective")`.

A gating claim that is refuted fails its test; one that is inconclusive or not exercised skips it with the reason, or
fails it under `--strict-claims`. A hypothesis that is refuted is an expected failure. Bad input ends the session with
one line and exit status 2.
"""

from __future__ import annotations

from argparse import ArgumentError
from collections.abc import Callable, Generator, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import Field, fields, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest

from grit_impl.errors import GRITError
from grit_impl.settings import flag, shown
from grit_impl.verify.options import Options

if TYPE_CHECKING:
    from grit_impl.verify.claims import Claim, Evidence, Judgement
    from grit_impl.verify.results import Results

BAD_INPUT = 2
"""Exit status of a session that was asked for something impossible."""
_options = pytest.StashKey[Options]()
_judged = pytest.StashKey[list[dict[str, Any]]]()
_error = pytest.StashKey[str]()
_evidence = pytest.StashKey["Evidence"]()
Judge = Callable[..., "Judgement"]


def pytest_addoption(parser: pytest.Parser) -> None:
    """Every option's default in the configuration file, as `grit_<name>`."""
    for each in fields(Options):
        if isinstance(each.default, bool):
            parser.addini(f"grit_{each.name}", _help(each), type="bool", default=each.default)
        else:
            parser.addini(f"grit_{each.name}", _help(each), default=str(each.default))
    parser.addini("grit_short_names", "options without the prefix, too, as --seed for --grit-seed", "bool", False)


@pytest.hookimpl(trylast=True)
def pytest_load_initial_conftests(early_config: pytest.Config, parser: pytest.Parser) -> None:
    """Every option as `--grit-<name>`; where `grit_short_names` is set, without the prefix, too, if the name is free.

    This late, because whoever came second with a name would end pytest.
    """
    names = bool(early_config.getini("grit_short_names"))
    group = parser.getgroup("grit", "GRIT verification")
    for each in fields(Options):
        attributes: dict[str, Any] = {"action": "store_true"}
        if not isinstance(each.default, bool):
            attributes = {"metavar": each.name.rpartition("_")[2].upper()}
        attributes |= {"default": None, "dest": f"grit_{each.name}", "help": _help(each)}
        long = flag(f"grit_{each.name}")
        try:
            group.addoption(*([flag(each.name)] if names else []), long, **attributes)
        except (ValueError, ArgumentError):
            group.addoption(long, **attributes)


def _help(option: Field[Any]) -> str:
    text = str(option.metadata["help"]).replace("%", "%%")
    return text if isinstance(option.default, bool) else f"{text} (default: {shown(option)})"


def pytest_configure(config: pytest.Config) -> None:
    """Read the options once; what cannot be read ends pytest here, before anything is collected."""
    config.addinivalue_line("markers", "verify: judges a claim on evidence; trains and evaluates what it needs")
    config.addinivalue_line("markers", "claim(*ids): the claims that the test judges, where no parameter names them")
    config.addinivalue_line("markers", "gpu: needs a CUDA GPU")
    # A conftest.py's `pytest_plugins` comes too late for command-line options; the configuration file's still count.
    given = {each.name: config.getoption(f"grit_{each.name}", default=None) for each in fields(Options)}
    texts = {name: config.getini(f"grit_{name}") if value is None else value for name, value in given.items()}
    try:
        options = Options.parse(texts)
    except GRITError as error:
        pytest.exit(str(error), returncode=BAD_INPUT)
    if not options.reports_dir.is_absolute():
        # Relative to the project, not to the folder pytest happens to be started in.
        options = replace(options, reports_dir=config.rootpath / options.reports_dir)
    config.stash[_options] = options
    if not hasattr(config, "workerinput"):
        from grit_impl.verify.results import Results

        config.pluginmanager.register(_Controller(config, Results(options)), "grit-controller")


@pytest.hookimpl(wrapper=True)
def pytest_runtest_makereport(item: pytest.Item) -> Generator[None, Any, Any]:
    """Send judgements along with the test's report: under xdist that is all that reaches the controller."""
    report = yield
    if report.when == "call" or item.stash.get(_error, None):
        report.grit_judged = item.stash.get(_judged, [])
        report.grit_error = item.stash.get(_error, None)
    return report


@pytest.fixture(scope="session")
def grit_options(pytestconfig: pytest.Config) -> Options:
    """The options of this session."""
    return pytestconfig.stash[_options]


@pytest.fixture(scope="session")
def evidence(request: pytest.FixtureRequest, grit_options: Options) -> Evidence:
    """Evidence that trains, exports and evaluates what a claim needs. Override it to judge your own runs."""
    from grit_impl.runs.progress import ProgressLine
    from grit_impl.verify.claims import TRAINER, catalogue
    from grit_impl.verify.evidence.live import LiveEvidence

    found = LiveEvidence(grit_options, progress=ProgressLine())
    request.config.stash[_evidence] = found
    # Everything that the selected tests will ask for, at once: arms train side by side, models answer interleaved.
    named = {name for item in request.session.items for name in claims_named(item)}
    with _uncaptured(request.config):
        found.gather({need for name in named for need in catalogue()[name].requires} - {TRAINER})
    return found


@pytest.fixture
def judge(request: pytest.FixtureRequest) -> Judge:
    """Judge a claim, by id or given as a `Claim`: `judge("gradients.pure-effective")`.

    A second argument says what to judge it on: evidence, a gradient ledger, or the ledger's verdict (of an arm named
    `trainer`). Without it the `evidence` fixture is used.
    """
    node: pytest.Item = request.node
    options = request.config.stash[_options]

    def decide(claim: str | Claim, subject: Any = None) -> Judgement:
        from grit_impl.verify.claims import find

        found = find(claim)
        try:
            source = request.getfixturevalue("evidence") if subject is None else as_evidence(subject, options)
            with _uncaptured(request.config):
                source = source.gather(found.requires)
            judgement = found.judge(source)
        except GRITError as error:
            node.stash[_error] = str(error)
            pytest.fail(str(error), pytrace=False)
        node.stash.setdefault(_judged, []).append(
            {
                "id": found.id,
                "statement": found.statement,
                "requires": list(found.requires),
                "rationale": found.rationale,
                "gates": found.gates,
                "live": subject is None,
                "evaluation": str(getattr(source.evaluation, "path", None) or ""),
                "judgement": judgement.to_dict(),
            }
        )
        node.user_properties.extend(properties(found, judgement))
        _conclude(found, judgement, options)
        return judgement

    return decide


@pytest.fixture
def gradient_ledger(tmp_path: Path) -> Callable[..., AbstractContextManager[Any]]:
    """`with gradient_ledger(model) as ledger: trainer.train()` records what happens to the LoRA gradients."""
    from grit_impl.ledger.recorder import gradient_ledger as record

    def open_ledger(model: Any, path: Path | None = None, **options: Any) -> AbstractContextManager[Any]:
        return record(model, path or tmp_path / "ledger.jsonl.gz", **options)

    return open_ledger


def claims_named(item: pytest.Item) -> set[str]:
    """The claims that a test is known to judge before it runs: its parameters, or the ids of its marker `claim`."""
    from grit_impl.verify.claims import catalogue

    parameters = getattr(getattr(item, "callspec", None), "params", {}).values()
    marked = (name for marker in item.iter_markers("claim") for name in marker.args)
    return {value for value in (*parameters, *marked) if isinstance(value, str)} & catalogue().keys()


def as_evidence(subject: Any, options: Options) -> Evidence:
    """Evidence from what a test has in hand: evidence, a verdict, or a ledger (an object or its file)."""
    from grit_impl.verify.claims import Evidence

    if isinstance(subject, Evidence):
        return subject
    if not hasattr(subject, "cause"):
        from grit_impl.ledger.verdict import judge_ledger

        subject = judge_ledger(subject)
    return Evidence(options, verdicts={"trainer": subject})


def properties(claim: Claim, judgement: Judgement) -> list[tuple[str, object]]:
    """What a claim leaves in `--junitxml`: verdict, the decisive number and its interval."""
    rows: list[tuple[str, object]] = [("claim", claim.id), ("verdict", judgement.verdict)]
    if judgement.metrics:
        first = judgement.metrics[0]
        rows += [("metric", first.name), ("estimate", first.estimate)]
        rows += [(end, value) for end in ("low", "high") if (value := getattr(first, end)) is not None]
    return rows


def _conclude(claim: Claim, judgement: Judgement, options: Options) -> None:
    """End the test as the verdict asks."""
    gates = claim.gates or options.gate_hypotheses
    text = f"{claim.id} {judgement.verdict}: {judgement.summary}"
    match judgement.verdict:
        case "supported":
            return
        case "refuted" if gates:
            pytest.fail(text, pytrace=False)
        case "refuted":
            pytest.xfail(text)
        case _ if judgement.evidence.get("broken") or (gates and options.strict_claims):
            pytest.fail(text, pytrace=False)
        case _:
            pytest.skip(text)


class _Controller:
    """Lives in the one process that writes: collects reports, writes the results, shows the table."""

    def __init__(self, config: pytest.Config, results: Results) -> None:
        self.config = config
        self.results = results
        self.error: str | None = None
        self.gpu_ran = 0
        self.gpu_seen = 0
        self.reported: Evidence | None = None
        self.live: set[str] = set()
        self.evaluation = ""

    @pytest.hookimpl(tryfirst=True)
    def pytest_runtest_logreport(self, report: pytest.TestReport) -> None:
        from grit_impl.verify.claims import Claim, Judgement
        from grit_impl.verify.terminal import outcome_of

        for each in getattr(report, "grit_judged", None) or ():
            known = {name: each[name] for name in ("id", "statement", "rationale", "gates")}
            claim = Claim(**known, requires=tuple(each["requires"]), decide=_decided_elsewhere)
            judgement = Judgement.from_dict(each["judgement"])
            self.results.add(claim, judgement, report.nodeid, live=each["live"])
            if each["live"] and judgement.verdict != "not exercised":
                self.live |= set(claim.requires)
                self.evaluation = self.evaluation or each["evaluation"]
        before = self.results.outcomes.get(report.nodeid)
        self.results.outcomes[report.nodeid] = outcome_of(report, before)
        if "gpu" in report.keywords:
            self.gpu_seen += report.when == "setup"
            self.gpu_ran += report.when == "call" and not report.skipped
        if getattr(report, "grit_error", None) and self.error is None:
            self.error = str(report.grit_error)
            self._stop(self.error)

    def _stop(self, reason: str) -> None:
        session = self.config.pluginmanager.getplugin("session")
        distributed = self.config.pluginmanager.getplugin("dsession")
        for target in (session, distributed):
            if target is not None:
                target.shouldstop = reason

    @pytest.hookimpl(tryfirst=True)
    def pytest_sessionfinish(self, session: pytest.Session, exitstatus: int) -> None:
        if self.error is not None:
            session.exitstatus = BAD_INPUT
        elif self.config.stash[_options].require_gpu and not self.gpu_ran:
            session.exitstatus = pytest.ExitCode.TESTS_FAILED
        if not self.results.judged:
            return
        try:
            evidence = self._evidence()
            self.results.write(evidence, int(session.exitstatus))
            self.reported = evidence
        except GRITError as error:
            self.error = str(error)
            session.exitstatus = BAD_INPUT

    def _evidence(self) -> Evidence:
        """The evidence that tests used: this process's own, or, under xdist, found again in the reports folder."""
        from grit_impl.verify.evidence.stored import stored_evidence

        found = self.config.stash.get(_evidence, None)
        if found is not None:
            return found
        evaluation = Path(self.evaluation) if self.evaluation else None
        return stored_evidence(self.config.stash[_options], self.live, evaluation)

    def pytest_terminal_summary(self, terminalreporter: pytest.TerminalReporter) -> None:
        from grit_impl.verify.terminal import summary

        summary(terminalreporter, self.results, self.reported)
        if self.gpu_seen and not self.gpu_ran:
            terminalreporter.write_line(f"gpu: none of {self.gpu_seen} tests marked gpu ran", yellow=True)
        if self.config.stash[_options].require_gpu and not self.gpu_ran:
            terminalreporter.write_line("--require-gpu: no test marked gpu ran", red=True)
        if self.error is not None:
            terminalreporter.write_line(f"error: {self.error}", red=True)


def _decided_elsewhere(_: Evidence) -> Judgement:
    raise AssertionError("this claim was judged in its test's process")


@contextmanager
def _uncaptured(config: pytest.Config) -> Iterator[None]:
    """Let progress reach the terminal."""
    capture = config.pluginmanager.getplugin("capturemanager")
    with capture.global_and_fixture_disabled() if capture else nullcontext():
        yield
