"""The recipes of CONTRIBUTING.md, run word for word. A new recipe takes a test that is called after it."""

from __future__ import annotations

import re
import sys
from pathlib import Path
from typing import Any
from unittest.mock import patch

import other_functions
import pytest
import torch
from peft import LoraConfig, get_peft_model

from grit_impl.config import UPDATE_RULES, GRITConfig
from grit_impl.export import export_merged
from grit_impl.method.capture import sites
from grit_impl.method.manager import GRITManager
from grit_impl.method.optimizer import GRITOptimizer
from grit_impl.method.rules import base
from grit_impl.recipes import arms, bases, datasets
from grit_impl.recipes.formats import find_format
from grit_impl.verify import claims
from grit_impl.verify.claims import registry, training
from grit_impl.zoo import cases as zoo_cases
from grit_impl.zoo import faults as zoo_faults
from grit_impl.zoo import sound as zoo_sound
from grit_impl.zoo.bench import tiny_model

TEXT = (Path(__file__).parents[2] / "CONTRIBUTING.md").read_text()
# By what they add: `**A data set**: ...` and the code that follows it.
RECIPES = dict(re.findall(r"^\*\*An? ([a-z ]+)\*\*.*?```python\n(.*?)```", TEXT, re.DOTALL | re.MULTILINE))
MOST_LINES = 15


def run(what: str, module: Any) -> dict[str, Any]:
    """The recipe, run as if it stood in this module; returns its names."""
    namespace = {**vars(module)}
    exec(compile(f"from __future__ import annotations\n{RECIPES[what]}", "CONTRIBUTING.md", "exec"), namespace)
    return namespace


@pytest.mark.parametrize("what", RECIPES)
def test_recipe_is_short_and_tested(what):
    """Oracle: under 15 lines of code, and a test of that name below."""
    assert len([line for line in RECIPES[what].splitlines() if line.strip()]) < MOST_LINES
    assert f"test_{what.replace(' ', '_')}" in globals()


def test_no_code_is_left_out():
    """Oracle: every block of Python in the page is one of the recipes."""
    assert TEXT.count("```python") == len(RECIPES)


def test_claim(make_evidence):
    """Oracle: the hand-written record trained for 60 seconds; the family's suite will judge the claim."""
    claims.catalogue()  # imports all families, whose claims would otherwise be forgotten with the recipe's
    with patch.dict(registry.REGISTERED):
        run("claim", training)
        assert "training.pure-quick" in claims.family("training")
        judgement = claims.find("training.pure-quick").judge(make_evidence())
    assert (judgement.verdict, judgement.summary) == ("supported", "trained in 60.00 s")


def test_arm(monkeypatch):
    """Oracle: found by its name."""
    monkeypatch.setattr(arms, "ARMS", dict(arms.ARMS))
    run("arm", arms)
    assert arms.find_arm("hybrid_end").callback(GRITConfig()).moment == "on_step_end"


def test_update_rule(monkeypatch):
    """Oracle: the gradients' signs, before the step."""
    model = tiny_model(0)
    monkeypatch.setitem(UPDATE_RULES, "sign", None)
    run("update rule", base)
    trained = [p for p in model.parameters() if p.requires_grad]
    manager = GRITManager(model, GRITConfig(update_rule="sign")).attach()
    optimizer = GRITOptimizer(torch.optim.AdamW(trained, lr=0.5, weight_decay=0.0), manager)
    ids = torch.arange(8)[None]
    model(input_ids=ids, labels=ids).loss.backward()
    expected = [p.detach() - 0.5 * p.grad.sign() for p in trained]
    optimizer.step()
    assert all(map(torch.equal, trained, expected))
    manager.detach()


def test_fused_library(monkeypatch):
    """Oracle: all tokens of both layers, and the completeness check, on a stand-in of such a library."""
    monkeypatch.setitem(sys.modules, other_functions.MODULE, other_functions)
    monkeypatch.setattr(other_functions, "LoRAPair", other_functions.LoRAPair)
    monkeypatch.setattr(sites, "SITES", list(sites.SITES))
    run("fused library", sites)
    lora = LoraConfig(r=3, target_modules=["left", "right"], init_lora_weights=False)
    model = get_peft_model(other_functions.decoder(), lora)
    model.base_model.model.fused = True
    manager = GRITManager(model, GRITConfig(kfac_min_samples=1)).attach()
    for _ in range(2):
        model.zero_grad()
        ids = torch.arange(1, 8)[None]
        model(input_ids=ids, labels=ids)["loss"].backward()
        assert manager.statistics.tokens.tolist() == [7] * 4
        manager.precondition()
    assert manager.completeness.max() < 1e-5
    manager.detach()


def test_fault(monkeypatch):
    """Oracle: the cause that the recipe names."""
    from grit_impl.zoo.matrix import run_case

    monkeypatch.setattr(zoo_cases, "FAULTS", [])
    run("fault", zoo_faults)
    (case,) = zoo_cases.FAULTS
    assert run_case(case, "loop", "adamw", 0).cause == "modified-too-late"


def test_sound_variant(monkeypatch):
    """Oracle: the verdict that the recipe allows."""
    from grit_impl.zoo.matrix import run_case

    monkeypatch.setattr(zoo_cases, "SOUND", [])
    run("sound variant", zoo_sound)
    (case,) = zoo_cases.SOUND
    assert run_case(case, "loop", "adamw", 0).cause == "effective"


def test_base(monkeypatch, tmp_path):
    """Oracle: the tiny base as a file, with the settings of the recipe, asked in the chat template of its tokenizer."""
    monkeypatch.setattr(bases, "BASES", dict(bases.BASES))
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    monkeypatch.chdir(tmp_path)
    export_merged(bases.TINY, None, tmp_path / "models" / "mine.gguf", "f32")
    run("base", bases)
    settings = arms.default_training("mine", cuda=False)
    assert (settings.steps, settings.learning_rate) == (60, 1e-3)
    assert find_format("mine").name == "chat"
    assert bases.load_base("mine", device="cpu")[0].num_parameters() == bases.load_base("tiny")[0].num_parameters()


def test_data_set(monkeypatch, tmp_path):
    """Oracle: a file with these columns becomes prompt and completion."""
    monkeypatch.setattr(datasets, "SCHEMAS", dict(datasets.SCHEMAS))
    run("data set", datasets)
    (tmp_path / "riddles.csv").write_text("riddle,solution\nWhat has keys?,A piano\n")
    (row,) = datasets.load_instructions(str(tmp_path / "riddles.csv"), "train", 1, 0)
    assert "What has keys?" in row["prompt"]
    assert row["completion"].strip() == "A piano"


def test_scorer(monkeypatch):
    """Oracle: by hand; the command line and its help know it by name."""
    from grit_impl.evaluate.scoring import registry, scorers

    monkeypatch.setattr(registry, "SCORERS", dict(registry.SCORERS))
    run("scorer", scorers)
    said = [registry.score("one-of-its-lines", {"answer": "b"}, text) for text in ("a\nb", "a b", "")]
    assert [each["correct"] for each in said] == [True, False, False]
    assert [each["unparsable"] for each in said] == [False, False, True]
