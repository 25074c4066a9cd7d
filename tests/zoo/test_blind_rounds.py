"""Every case of the blind rounds so far: what they had missed at first contact stays mended."""

from __future__ import annotations

import importlib
import json
from pathlib import Path

import pytest

pytestmark = pytest.mark.slow
FIXTURES = Path(__file__).parents[2] / "fixtures"
ROUNDS = json.loads((FIXTURES / "blind_rounds.json").read_text())["rounds"]
NAMES = [(each["round"], row["name"]) for each in ROUNDS for row in each["rows"]]


@pytest.mark.parametrize(("number", "name"), NAMES, ids=[f"{number}-{name}" for number, name in NAMES])
def test_case(number: int, name: str) -> None:
    """Oracle: what the case's author expected, before the first run."""
    blind = importlib.import_module("blind")
    case = next(case for case in importlib.import_module(f"blind_round{number}").CASES if case.name == name)
    row = blind.run_case(case)
    said = f"{row['cause']} ({row['said_link']}): {row['summary']}"
    assert row["right"], f"{said}; expected {row['causes']}, {row['link']}"


def test_all_cases_are_here() -> None:
    """Oracle: the cases themselves."""
    for each in ROUNDS:
        cases = importlib.import_module(f"blind_round{each['round']}").CASES
        assert [case.name for case in cases] == [row["name"] for row in each["rows"]]
