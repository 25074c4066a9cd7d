"""Processes of arms: what is kept, what is refused, and what an arm's exit status means."""

from __future__ import annotations

import json
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch

from grit_impl.errors import GRITError
from grit_impl.imports import closure
from grit_impl.recipes import train
from grit_impl.recipes.arms import FIRST, TOKEN_FILE, RunSpec
from grit_impl.recipes.tokens import read_tokens
from grit_impl.recipes.unsloth import compiled_layers
from grit_impl.record import sha256_file
from grit_impl.runs import execute
from grit_impl.runs.execute import finished, run_arms, spec_fingerprint
from grit_impl.runs.first import disagreement

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
    assert arms("fine", RunSpec("pure", training=execute_training(steps=100))).complete
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


def test_unfinished_run_of_another_spec_is_moved_aside(arms, tmp_path):
    """Oracle: the checkpoint of a run with other settings is neither continued from nor lost."""
    arms("1")
    checkpoint = tmp_path / "pure-seed3407" / "checkpoints" / "checkpoint-50"
    checkpoint.mkdir(parents=True)
    assert arms("fine", RunSpec("pure", training=execute_training(steps=100))).complete
    assert not checkpoint.exists()
    assert len(list(tmp_path.glob("pure-seed3407.unfinished-*/checkpoints/checkpoint-50"))) == 1


def test_incomplete_record_is_not_finished(tmp_path):
    """Oracle: a folder without COMPLETE, and one whose COMPLETE is of another fingerprint."""
    (tmp_path / "run.json").write_text(json.dumps({"arm": "pure"}))
    assert finished(tmp_path, None) is None
    (tmp_path / "COMPLETE").write_text("abc\n")
    assert finished(tmp_path, "def") is None
    assert finished(tmp_path, "abc") is not None


@pytest.mark.parametrize(
    ("stage", "modules"),
    [
        ("train", ("recipes.tokens", "recipes.formats", "gguf.chat", "ledger.recorder", "method.manager")),
        ("export", ("gguf.modelfile", "export.writer")),
        ("evaluate", ("gguf.gotemplate", "gguf.metadata", "gguf.modelfile", "evaluate.scoring")),
        ("cost", ("cost.measure", "recipes.train")),
    ],
)
def test_what_determines_a_result_is_in_its_stages_fingerprint(stage, modules):
    """Oracle: named by hand. Templates and parameters of a model file, and its metadata, are part of every answer."""
    assert {f"grit_impl.{module}" for module in modules} <= set(closure(*execute._STAGES[stage]))


class TestOneSetOfTokens:
    """Every arm of a session reads the same file."""

    def test_arms_get_the_same_file_and_its_hash(self, arms, tmp_path):
        """Oracle: the bytes in both folders, and the hash in both specs."""
        arms("fine")
        found = run_arms([RunSpec("pure"), RunSpec("baseline")], tmp_path, jobs=1, progress=lambda *_: None)
        files = [record.path / TOKEN_FILE for record in found.values()]
        specs = [json.loads((record.path / "spec.json").read_text())["spec"] for record in found.values()]
        assert len({file.read_bytes() for file in files}) == 1
        assert {spec["tokens"] for spec in specs} == {sha256_file(files[0])}

    def test_other_tokens_are_another_run(self):
        """Oracle: the fingerprint."""
        assert spec_fingerprint(RunSpec("pure", tokens="a")) != spec_fingerprint(RunSpec("pure", tokens="b"))

    def test_no_arm_may_tokenise_with_a_changed_tokenizer(self, tmp_path):
        """Oracle: Unsloth's run without tokens that were made before it was imported is refused."""
        with pytest.raises(GRITError, match="Unsloth changes tokenizers"):
            train._tokens(RunSpec("hybrid"), tmp_path, True)


FIRST_BATCH = {"loss": 2.5, "gradient_norm": 1.25, "batch": "abc"}


class TestFirstBatch:
    """Arms that do not train the same thing are stopped."""

    @pytest.mark.parametrize(
        ("precision", "changes", "message"),
        [
            ("fp32", {}, None),
            ("fp32", {"loss": 2.5 * (1 + 5e-5), "gradient_norm": 1.25 * (1 + 5e-4)}, None),
            ("fp32", {"loss": 2.5 * (1 + 2e-4)}, "first batch has loss 2.5 and 2.5005"),
            ("fp32", {"gradient_norm": 1.25 * (1 + 2e-3)}, "first batch has gradient_norm 1.25 and 1.2525"),
            ("bf16", {"loss": 2.5 * (1 + 2e-3), "gradient_norm": 1.25 * 1.02}, None),
            # SmolLM2-135M on an H200, the same tokens under Unsloth's kernels and under peft's modules.
            ("bf16", {"loss": 2.5 * 3.34949 / 3.33412}, None),
            ("bf16", {"loss": 2.5 * 1.03}, "bf16 explains 0.02"),
            ("bf16", {"gradient_norm": 1.25 * 1.15}, "bf16 explains 0.1"),
            ("bf16", {"loss": float("nan")}, "first batch has loss 2.5 and nan"),
            ("bf16", {"batch": "abd"}, "were given other tokens"),
        ],
    )
    def test_only_rounding_is_let_pass(self, precision, changes, message):
        """Oracle: differences on both sides of what a precision explains; the line names both arms and both numbers."""
        found = disagreement([("baseline", FIRST_BATCH), ("pure", {**FIRST_BATCH, **changes})], precision)
        if message is None:
            assert found is None
        else:
            assert message in found
            assert found.startswith("baseline and pure")
            assert "\n" not in found

    def test_the_others_are_stopped_and_no_more_begin(self, monkeypatch, tmp_path):
        """Oracle: two real processes; one would run for a minute, a third would leave a record."""
        real, started = subprocess.Popen, []

        def popen(command, **options):
            if "grit_impl.runs.execute" not in command:
                return real(command, **options)
            started.append(Path(command[-1]).name)
            loss = 2.6 if "hybrid" in started[-1] else 2.5
            code = "import json, pathlib, sys, time; path = pathlib.Path(sys.argv[1]) / 'first.json'\n"
            code += (
                f"path.write_text(json.dumps({{'loss': {loss}, 'gradient_norm': 1.0, 'batch': 'a'}})); time.sleep(60)"
            )
            return real([sys.executable, "-c", code, command[-1]], **options)

        monkeypatch.setattr(execute.subprocess, "Popen", popen)
        specs = [RunSpec(arm) for arm in ("baseline", "hybrid", "pure")]
        before = time.monotonic()
        with pytest.raises(GRITError, match="baseline and hybrid do not train the same thing"):
            run_arms(specs, tmp_path, jobs=2, progress=lambda *_: None)
        assert time.monotonic() - before < 30
        assert started == ["baseline-seed3407", "hybrid-seed3407"]

    @pytest.mark.slow
    def test_real_arms_note_the_same_before_any_update(self, tmp_path):
        """Oracle: loss and gradient of plain LoRA, computed here without a trainer from the session's tokens."""
        once = execute_training(steps=1, batch_size=2, accumulation=2)  # so that the first batch is all there is
        specs = [RunSpec(arm, training=once, grit=None if arm == "baseline" else {}) for arm in ("baseline", "pure")]
        records = run_arms(specs, tmp_path, jobs=1, progress=lambda *_: None)
        model, _ = train.build_model(specs[0], use_unsloth=False)
        tokens = read_tokens(records["pure"].path / TOKEN_FILE, records["pure"].run["config"]["tokens"])
        loss = model(**tokens.collate(list(tokens.dataset()))).loss
        loss.backward()
        gradients = [p.grad for p in model.parameters() if p.grad is not None]
        for record in records.values():
            noted = json.loads((record.path / FIRST).read_text())
            assert noted["loss"] == pytest.approx(float(loss), rel=1e-6)
            assert noted["gradient_norm"] == pytest.approx(float(torch.nn.utils.get_total_norm(gradients)), rel=1e-5)
