"""The scripted Ollama and the breaking proxy, as fixtures."""

from __future__ import annotations

import pytest
from fakes import chaos, fake_ollama, seeded

__all__ = ["chaos", "fake_ollama", "seeded"]


def pytest_terminal_summary(terminalreporter: pytest.TerminalReporter, config: pytest.Config) -> None:
    """The rows as a table, where another server was asked; of one that differs, what it answered instead."""
    if not config.getoption("--ollama-url", default=None):
        return
    from conformance import ROWS, STEPS

    for outcome, said in (("passed", "as Ollama"), ("failed", "DIFFERS"), ("error", "NOT ASKED")):
        for report in terminalreporter.stats.get(outcome, []):
            name = report.nodeid.partition("[")[2].removesuffix("]")
            if name in ROWS:
                row = ROWS[name]
                told = f"{row.method} {row.path}: {row.status}, {row.check.words}"
            elif name in STEPS:
                told = " ".join(str(STEPS[name][0].__doc__).split())
            else:
                continue
            terminalreporter.write_line(f"{said:10} {name:29} {told[:110]}")
            if outcome != "passed":
                instead = getattr(report.longrepr, "reprcrash", None)
                terminalreporter.write_line(f"{'':10} {' '.join(str(instead and instead.message).split())[:200]}")
