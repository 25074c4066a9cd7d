"""The figures of a session, their table, and where it goes."""

from __future__ import annotations

import os
import platform
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from grit_impl.cost.bench import Figure, Growth, Spread, render, write_section
from grit_impl.cost.performance import Performance, write_performance
from grit_impl.machine import git_commit, versions
from grit_impl.verify.options import Options
from grit_impl.verify.results import now

DOCUMENT = Path(__file__).parents[2] / "docs" / "measurements" / "performance.md"
FIGURES: list[Figure] = []


def pytest_addoption(parser: pytest.Parser) -> None:
    """`--write-performance`, given by make bench."""
    parser.getgroup("grit").addoption(
        "--write-performance",
        action="store_true",
        help="write the table of benchmarks to docs/measurements/performance.md (default: no)",
    )


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Nothing else may share the cores."""
    for item in items:
        if Path(__file__).parent in item.path.parents:
            item.add_marker("alone")
            item.add_marker("bench")


@pytest.fixture(scope="session", autouse=True)
def _one_thread() -> Iterator[None]:
    """Two threads on a machine with two cores measure its scheduler."""
    import torch

    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.fixture(scope="session", autouse=True)
def _kept(grit_options: Options) -> Iterator[None]:
    """The figures in the reports folder, where the report finds them."""
    yield
    if FIGURES:
        kept = Performance(now(), _machine(), versions(), git_commit(DOCUMENT.parent), FIGURES)
        write_performance(grit_options.reports_dir, kept)


@pytest.fixture
def judge() -> Callable[..., None]:
    """(name, measured, target) -> a line of the table; fails where the target is missed by more than the spread."""

    def tell(name: str, measured: Spread, target: float | None = None, growth: Growth | None = None) -> None:
        figure = Figure(name, measured, target, growth)
        FIGURES.append(figure)
        assert figure.verdict != "MISSED", f"{name}: {measured}, target at most {target}"

    return tell


@pytest.hookimpl(trylast=True)
def pytest_terminal_summary(terminalreporter: Any, config: pytest.Config) -> None:
    """The table."""
    if not FIGURES:
        return
    table = render(FIGURES)
    terminalreporter.write_line("\n" + table)
    if config.getoption("--write-performance", False):
        found = ", ".join(
            f"{name} {version}"
            for name, version in versions().items()
            if name in ("python", "torch", "transformers", "peft")
        )
        machine = f"{_machine()}; {found}; commit {git_commit(DOCUMENT.parent)}."
        write_section(DOCUMENT, "cpu", f"{machine} Command: `make bench`.\n\n{table}")


def _machine() -> str:
    return f"{_processor()}, {os.cpu_count()} cores, one thread"


def _processor() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        return platform.processor() or platform.machine()
    return next((line.split(":")[1].strip() for line in lines if line.startswith("model name")), platform.machine())
