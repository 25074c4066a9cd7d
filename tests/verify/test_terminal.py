"""What stands at the end of a session in the terminal."""

from __future__ import annotations

from io import StringIO
from types import SimpleNamespace

from _pytest._io import TerminalWriter

from grit_impl.statistics.decision import Judgement
from grit_impl.verify.options import Options
from grit_impl.verify.results import Results
from grit_impl.verify.terminal import LOG_WIDTH, summary


class Reporter:
    """What pytest's terminal reporter offers, written to a text."""

    isatty = False

    def __init__(self) -> None:
        self.text = StringIO()
        self._tw = TerminalWriter(self.text)
        self.write, self.write_line = self._tw.write, self._tw.line
        self.section = lambda title: self._tw.line(title)
        self.ensure_newline = lambda: None


def test_the_experiment_ends_with_the_table_of_its_models(make_evidence, claims, tmp_path):
    """Oracle: the hand-written records and answers; in CI's logs no row is wider than a line of them."""
    evidence = make_evidence()
    results = Results(Options(reports_dir=tmp_path))
    results.add(claims[0], Judgement("supported", "as written"), "test_it")
    reporter = Reporter()
    summary(reporter, results, evidence)
    shown = reporter.text.getvalue().split("\n")
    table = [line for line in shown[shown.index("models") + 1 : shown.index("claims")] if line]
    assert table[0].split() == ["base", "baseline", "hybrid", "pure", "recommended"]
    rows = {line.strip().split("  ")[0]: line for line in table}
    assert {"Training time (s)", "Final loss", "delta_AQI (points)", "Knowledge retention (%)"} <= rows.keys()
    right = evidence.evaluation.metrics["pure"].aqi_accuracy
    assert f"{right.estimate:.1f} [{right.low:.1f}, {right.high:.1f}]" in rows["AQI accuracy (%)"]
    assert max(map(len, shown)) <= LOG_WIDTH


def test_no_table_without_a_run(claims, tmp_path):
    """Oracle: a trainer's verdict alone has no arms."""
    results = Results(Options(reports_dir=tmp_path))
    results.add(claims[0], Judgement("supported", "as written"), "test_it")
    reporter = Reporter()
    summary(reporter, results, SimpleNamespace(records={}))
    assert "models" not in reporter.text.getvalue().split("\n")
