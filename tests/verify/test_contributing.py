"""The recipes of CONTRIBUTING.md, run word for word."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import pytest

from grit_impl.recipes import arms, datasets
from grit_impl.statistics import decision
from grit_impl.verify.claims import base
from grit_impl.zoo import faults as zoo_faults

TEXT = (Path(__file__).parents[2] / "CONTRIBUTING.md").read_text()
RECIPES = re.findall(r"```python\n(.*?)```", TEXT, re.DOTALL)
MOST_LINES = 15


def run(word: str, module: Any, **names: Any) -> dict[str, Any]:
    """The recipe that contains a word, run as if it stood in this module; returns its names."""
    (recipe,) = [text for text in RECIPES if word in text]
    namespace = {**vars(module), **names}
    exec(compile(f"from __future__ import annotations\n{recipe}", "CONTRIBUTING.md", "exec"), namespace)
    return namespace


@pytest.mark.parametrize("recipe", RECIPES, ids=["claim", "arm", "fault", "data-set"])
def test_recipes_are_short(recipe):
    """Oracle: under 15 lines of code each."""
    assert len([line for line in recipe.splitlines() if line.strip()]) < MOST_LINES


def test_claim(make_evidence):
    """Oracle: the hand-written record trained for 60 seconds."""
    asked = []
    names = run("QUICK", base, **vars(decision))
    names["test_quick"](asked.append)
    judgement = names["QUICK"].judge(make_evidence())
    assert asked == [names["QUICK"]]
    assert (judgement.verdict, judgement.summary) == ("supported", "trained in 60.00 s")


def test_arm(monkeypatch):
    """Oracle: found by its name."""
    monkeypatch.setattr(arms, "ARMS", dict(arms.ARMS))
    run("hybrid_end", arms)
    assert arms.find_arm("hybrid_end").moment == "on_step_end"


def test_fault(monkeypatch):
    """Oracle: the cause that the recipe names."""
    from grit_impl.zoo.matrix import run_case

    monkeypatch.setattr(zoo_faults, "FAULTS", [])
    run("_late_and_halved", zoo_faults)
    (case,) = zoo_faults.FAULTS
    assert run_case(case, "loop", "adamw", 0).cause == "modified-too-late"


def test_data_set(monkeypatch, tmp_path):
    """Oracle: a file with these columns becomes prompt and completion."""
    monkeypatch.setattr(datasets, "SCHEMAS", dict(datasets.SCHEMAS))
    run("_riddles", datasets)
    (tmp_path / "riddles.csv").write_text("riddle,solution\nWhat has keys?,A piano\n")
    (row,) = datasets.load_instructions(str(tmp_path / "riddles.csv"), "train", 1, 0)
    assert "What has keys?" in row["prompt"]
    assert row["completion"].strip() == "A piano"
