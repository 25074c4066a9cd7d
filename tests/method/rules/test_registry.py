"""Which update rules there are, known before they are imported."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

from grit_impl.config import UPDATE_RULES, GRITConfig, update_rules
from grit_impl.errors import GRITError
from grit_impl.imports import closure
from grit_impl.method import rules
from grit_impl.method.rules.base import WholeStep, rule


def test_names_are_known_without_torch() -> None:
    """Oracle: the registry, once all rules are imported. Names are read off the source in a process without torch."""
    program = "import sys; from grit_impl.config import *; print(*update_rules(), 'torch' in sys.modules)"
    found = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True).stdout.split()
    assert found == [*sorted(UPDATE_RULES), "False"]
    assert {"precondition", "eigenbasis", "trust_region"} <= set(found)


def test_a_rule_from_elsewhere_is_accepted_once_registered(monkeypatch: pytest.MonkeyPatch) -> None:
    """Before, its name is refused, and the message lists what there is."""
    with pytest.raises(GRITError, match="choose one of eigenbasis"):
        GRITConfig(update_rule="nothing")
    monkeypatch.setitem(UPDATE_RULES, "nothing", None)
    made = rule("nothing")(type("Nothing", (WholeStep,), {}))
    assert rules.rule_class(GRITConfig(update_rule="nothing").update_rule) is made
    assert "nothing" in update_rules()


def test_every_rule_counts_in_a_fingerprint() -> None:
    """Oracle: the folder. Rules are imported by going through it; a run made with another rule is stale."""
    folder = Path(rules.__file__).parent
    counted = {path for path in closure("grit_impl.recipes.train").values() if path.parent == folder}
    assert counted == set(folder.glob("*.py"))
