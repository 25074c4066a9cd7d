"""docs/field-cases.md names tests that exist, and enough reports."""

from __future__ import annotations

import re
from pathlib import Path

TEXT = (Path(__file__).parents[1] / "docs" / "field-cases.md").read_text()


def test_every_test_that_is_named_exists() -> None:
    """Oracle: the test files; a name without a file belongs to the file named before it."""
    files = {path.name: path.read_text() for path in Path(__file__).parent.rglob("test_*.py")}
    file = ""
    for name, test in re.findall(r"`(?:tests/)?(?:\w+/)?(test_\w+\.py)?(?:::(test_\w+))?(?:\[[^`]*)?`", TEXT):
        file = name or file
        assert file in files
        assert not test or f"def {test}(" in files[file], f"{file}::{test}"


def test_there_are_thirty_reports() -> None:
    """Oracle: what was asked for; each is a repository and a number, once."""
    found = re.findall(r"[\w.-]+/[\w.-]+#\d+", TEXT)
    assert len(found) >= 30
    assert len(set(found)) == len(found)
