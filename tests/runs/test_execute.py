"""Processes of arms: what is kept, what is refused, and what an arm's exit status means."""

from __future__ import annotations

import ast
import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from grit_impl.errors import GRITError
from grit_impl.recipes.arms import RunSpec
from grit_impl.recipes.unsloth import compiled_layers
from grit_impl.runs import execute
from grit_impl.runs.execute import finished, run_arms, spec_fingerprint

# Stands in for `python -m grit_impl.runs.execute`: leaves a record, or ends as it is told.
ARM = """
import json, pathlib, sys
path, outcome = pathlib.Path(sys.argv[1]), sys.argv[2]
if outcome == "fine":
    request = json.loads((path / "spec.json").read_text())
    (path / "run.json").write_text(json.dumps({"schema": 1, "arm": request["spec"]["arm"]}))
    (path / "COMPLETE").write_text(request["fingerprint"])
else:
    print("error: it is the data" if outcome == "2" else "it broke")
    sys.exit(int(outcome))
"""


@pytest.fixture
def arms(monkeypatch, tmp_path):
    """A function that runs one arm whose process ends as told; everything but the process is real."""
    real = subprocess.Popen

    def run(outcome, spec=None, folder=tmp_path):
        def popen(command, **options):
            return real([sys.executable, "-c", ARM, command[-1], outcome], **options)

        monkeypatch.setattr(execute.subprocess, "Popen", popen)
        monkeypatch.setattr(execute, "_POLL_SECONDS", 0.02)
        return run_arms([spec or RunSpec("pure")], folder, jobs=1, progress=lambda *_: None)["pure"]

    return run


def test_finished_arm_is_not_trained_again(arms, tmp_path):
    """Oracle: a second process would end with status 1."""
    assert arms("fine").complete
    assert arms("1").complete


def test_other_settings_move_the_finished_run_aside(arms, tmp_path):
    """Oracle: both records are on the disk afterwards; hours of training are never deleted."""
    first = arms("fine")
    before = (first.path / "COMPLETE").read_text()
    assert arms("fine", RunSpec("pure", seed=3407, dataset="alpaca")).complete
    kept = [path for path in tmp_path.iterdir() if path.name.startswith("pure-seed3407.")]
    assert [(path / "COMPLETE").read_text() for path in kept] == [before]


@pytest.mark.parametrize(("visible", "shares"), [("0,1", ["0", "0", "1"]), ("3", ["3", "3", "3"])])
def test_arms_are_spread_over_the_gpus(monkeypatch, tmp_path, visible, shares):
    """Three arms side by side on two cards: none stays empty; one card is left as the user named it."""
    real, given = subprocess.Popen, []

    def popen(command, env, **options):
        given.append(env["CUDA_VISIBLE_DEVICES"])
        return real([sys.executable, "-c", ARM, command[-1], "fine"], env=env, **options)

    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", visible)
    monkeypatch.setattr(execute, "spec_fingerprint", lambda spec: spec.arm)
    monkeypatch.setattr(execute.subprocess, "Popen", popen)
    specs = [RunSpec(arm) for arm in ("baseline", "hybrid", "pure")]
    assert len(run_arms(specs, tmp_path, jobs=3, progress=lambda *_: None)) == 3
    assert sorted(given) == shares


def test_saving_interval_changes_nothing(arms):
    """Oracle: how often a run is saved is no part of what it learns."""
    often = RunSpec("pure", training=execute_training(save_every=50))
    assert spec_fingerprint(often) == spec_fingerprint(RunSpec("pure", training=execute_training(save_every=0)))
    assert spec_fingerprint(often) != spec_fingerprint(RunSpec("pure", training=execute_training(steps=100)))


def test_compiled_layers_are_another_run(monkeypatch):
    """Unsloth's switch changes what a run computes; unset it is 1."""
    spec, pure, found = RunSpec("hybrid"), spec_fingerprint(RunSpec("pure")), {}
    for value in (None, "0", "1"):
        monkeypatch.delenv("UNSLOTH_BLOCK_COMPILE", raising=False)
        if value is not None:
            monkeypatch.setenv("UNSLOTH_BLOCK_COMPILE", value)
        found[value] = spec_fingerprint(spec)
    assert found[None] == found["1"] != found["0"]
    assert spec_fingerprint(RunSpec("pure")) == pure  # it never imports Unsloth


def test_compiled_layers_are_counted():
    """As Unsloth notes on its layers: the passes that went well, and mode 0 for one that it has given up."""
    model = torch.nn.Sequential(*[torch.nn.Identity() for _ in range(4)])
    assert compiled_layers(model) == 0
    for layer, (checked, mode) in zip(model, ((3, 1), (2, 2), (2, 0)), strict=False):
        vars(layer).update(_unsloth_block_checked=checked, _unsloth_block_mode=mode)
    assert compiled_layers(model) == 2


def execute_training(**options):
    """Training settings with these fields."""
    from grit_impl.recipes.arms import TrainingSettings

    return TrainingSettings(**options)


def test_foreign_folder_is_refused(arms, tmp_path):
    """Oracle: a folder with a user's file keeps it."""
    mine = tmp_path / "pure-seed3407" / "thesis.tex"
    mine.parent.mkdir()
    mine.write_text("years of work")
    with pytest.raises(GRITError, match="holds files but no run record"):
        arms("fine")
    assert mine.read_text() == "years of work"


def test_status_2_is_bad_input_and_1_is_a_finding(arms):
    """Oracle: the arm's own last line, raised or returned."""
    with pytest.raises(GRITError, match="it is the data"):
        arms("2")
    reason = arms("1")
    assert "status 1" in reason
    assert "it broke" in reason


def test_unfinished_run_of_the_same_spec_is_continued(arms, tmp_path):
    """Oracle: a checkpoint planted beside the spec of a killed run is still there when the next process starts."""
    arms("1")
    checkpoint = tmp_path / "pure-seed3407" / "checkpoints" / "checkpoint-50"
    checkpoint.mkdir(parents=True)
    assert arms("fine").complete
    assert checkpoint.is_dir()


def test_unfinished_run_of_another_spec_is_discarded(arms, tmp_path):
    """Oracle: the checkpoint of a run with another data set must not be continued from."""
    arms("1")
    checkpoint = tmp_path / "pure-seed3407" / "checkpoints" / "checkpoint-50"
    checkpoint.mkdir(parents=True)
    assert arms("fine", RunSpec("pure", dataset="alpaca")).complete
    assert not checkpoint.exists()


def test_incomplete_record_is_not_finished(tmp_path):
    """Oracle: a folder without COMPLETE, and one whose COMPLETE is of another fingerprint."""
    (tmp_path / "run.json").write_text(json.dumps({"arm": "pure"}))
    assert finished(tmp_path, None) is None
    (tmp_path / "COMPLETE").write_text("abc\n")
    assert finished(tmp_path, "def") is None
    assert finished(tmp_path, "abc") is not None


def imported(*modules):
    """Files of this project that these modules import, and what those import, wherever the import stands."""
    root, todo, found = Path(execute.__file__).parents[2], [*modules], set()
    while todo:
        path = root / todo.pop().replace(".", "/")
        file = next((f for f in (path.with_suffix(".py"), path / "__init__.py") if f.is_file()), None)
        if file is None or file in found:
            continue
        found.add(file)
        for node in ast.walk(ast.parse(file.read_text())):
            if isinstance(node, ast.ImportFrom) and (node.module or "").startswith("grit_impl"):
                todo += [node.module, *(f"{node.module}.{name.name}" for name in node.names)]
    return found


@pytest.mark.parametrize(
    ("stage", "modules"),
    [
        ("train", ("recipes.train", "verify.ledger", "verify.probe_run")),
        ("cost", ("verify.cost_run",)),
    ],
)
def test_whatever_a_stage_imports_is_in_its_fingerprint(stage, modules):
    """Oracle: the import statements. A module that is left out could change and its old results would still count."""
    root = Path(execute.__file__).parents[1]
    needed = imported(*(f"grit_impl.{module}" for module in modules)) - {root / "verify" / "__init__.py"}
    assert {f.relative_to(root).as_posix() for f in needed} - counted(stage) == set()


def test_what_makes_a_prompt_is_in_the_evaluations_fingerprint():
    """Oracle: templates and parameters of a model file, and its metadata, are part of every answer."""
    assert {f"export/{name}.py" for name in ("gotemplate", "metadata", "modelfile")} <= counted("evaluate")


def counted(stage):
    """Files whose content a stage's fingerprint depends on."""
    root = Path(execute.__file__).parents[1]
    return {f.relative_to(root).as_posix() for pattern in execute._SOURCES[stage] for f in root.glob(pattern)}
