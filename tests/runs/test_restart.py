"""`grit train`, killed and started again with something changed: nothing is lost, and what changed is named."""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from grit_impl import cli
from grit_impl.errors import GRITError, RunFailed
from grit_impl.recipes import train as recipe
from grit_impl.recipes.arms import RunSpec, TrainingSettings
from grit_impl.recipes.bases import TINY
from grit_impl.record import RunRecord, fingerprint, sha256_file
from grit_impl.runs.restart import differences, set_aside

STEPS = 60
GIVEN = {"--steps": STEPS, "--save-every": 4, "--batch-size": 1, "--accumulation": 1, "--rank": 4, "--seed": 7}


def tree(folder: Path) -> dict[str, str]:
    """Every file below a folder and its content."""
    return {str(f.relative_to(folder)): sha256_file(f) for f in sorted(folder.rglob("*")) if f.is_file()}


class Killed:
    """A run that was killed by SIGKILL in its middle, and what it was started with."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.base = shutil.copytree(TINY, folder / "base")
        self.data = folder / "data.jsonl"
        rows = [{"prompt": f"{n}?", "completion": f" {n}."} for n in range(80)]
        self.data.write_text("".join(json.dumps(row) + "\n" for row in rows))
        self.options = {**GIVEN, "--dataset": self.data, "--base-model": self.base, "--out": folder / "run"}
        with open(folder / "out.txt", "wb") as log:
            process = subprocess.Popen(self.command(), stdout=log, stderr=log, start_new_session=True)
        deadline = time.monotonic() + 120
        steps = folder / "run" / "steps.jsonl"
        while not (steps.is_file() and steps.read_bytes().count(b"\n") >= 10):
            assert process.poll() is None, (folder / "out.txt").read_text()
            assert time.monotonic() < deadline
            time.sleep(0.02)
        os.killpg(process.pid, signal.SIGKILL)
        process.wait()
        assert not (folder / "run" / "COMPLETE").exists()
        shutil.copytree(folder / "run", folder / "snapshot")

    def arguments(self, changes: dict[str, Any]) -> list[str]:
        given = {**self.options, **changes}
        pairs = [(name, values if isinstance(values, tuple) else (values,)) for name, values in given.items()]
        return ["train", *(str(part) for name, values in pairs for value in values for part in (name, value))]

    def command(self, **changes: Any) -> list[str]:
        return [sys.executable, "-m", "grit_impl.cli", *self.arguments(changes)]


@pytest.fixture(scope="module")
def killed(tmp_path_factory: pytest.TempPathFactory) -> Killed:
    """One killed run for the whole table."""
    return Killed(tmp_path_factory.mktemp("killed"))


def restarted(killed: Killed, changes: dict[str, Any]) -> str:
    """What `grit train` says in the killed run's folder with these options changed."""
    with pytest.raises(GRITError) as caught:
        cli.cli.main(killed.arguments(changes), standalone_mode=False)
    assert "\n" not in str(caught.value)
    return str(caught.value)


CHANGES = {
    "steps": ({"--steps": STEPS + 1}, f"--max-steps {STEPS} there, {STEPS + 1} asked"),
    "fewer-steps": ({"--steps": 5}, f"--max-steps {STEPS} there, 5 asked"),
    "seed": ({"--seed": 8}, "--seed 7 there, 8 asked"),
    "data": ({"--dataset": "aqi"}, "there, aqi asked"),
    "rank": ({"--rank": 8}, "--lora-r 4 there, 8 asked"),
    "base": ({"--base-model": "tiny"}, "--base-model"),
    "precision": ({"--precision": "bf16"}, "--precision fp32 there, bf16 asked"),
    "learning-rate": ({"--lr": 1e-3}, "--learning-rate 0.0002 there, 0.001 asked"),
    "batch-size": ({"--batch-size": 2}, "--per-device-train-batch-size 1 there, 2 asked"),
    "accumulation": ({"--accumulation": 2}, "--gradient-accumulation-steps 1 there, 2 asked"),
    "max-length": ({"--max-length": 64}, "--max-length 2048 there, 64 asked"),
    "arm": ({"--arm": "baseline"}, "--arm pure there, baseline asked"),
    "grit": ({"--set": "kfac_damping=0.5"}, "--set kfac_damping="),
    "several": ({"--seed": 1, "--rank": 2, "--steps": 3}, "--seed 7 there, 1 asked; --max-steps"),
}


@pytest.mark.slow
@pytest.mark.parametrize("finished", [False, True], ids=["unfinished", "finished"])
@pytest.mark.parametrize("what", CHANGES)
def test_another_option_is_named_and_nothing_is_lost(killed: Killed, what: str, finished: bool) -> None:
    """Oracle: the option that was changed, and every byte of the run's folder."""
    changes, named = CHANGES[what]
    mark = killed.folder / "run" / "COMPLETE"
    try:
        if finished:
            mark.write_text(json.loads((killed.folder / "run" / "spec.json").read_text())["fingerprint"])
        before = tree(killed.folder / "run")
        said = restarted(killed, changes)
        assert named in said
        assert ("a finished run" if finished else "an unfinished run") in said
        assert "--fresh" in said
        assert tree(killed.folder / "run") == before
    finally:
        mark.unlink(missing_ok=True)


@pytest.mark.slow
@pytest.mark.parametrize("what", ["rows", "weights"])
def test_a_file_with_other_content_is_named(killed: Killed, what: str) -> None:
    """Oracle: the same path, one row or one weight changed."""
    path = killed.data if what == "rows" else killed.base / "model.safetensors"
    content, before = path.read_bytes(), tree(killed.folder / "run")
    try:
        if what == "rows":
            path.write_bytes(content.replace(b'"0?"', b'"O?"'))
        else:
            tensors = load_file(path)
            next(iter(tensors.values())).view(-1)[0] += 1
            save_file(tensors, path, metadata={"format": "pt"})
        assert f"other content of {path.name}" in restarted(killed, {})
        assert tree(killed.folder / "run") == before
    finally:
        path.write_bytes(content)


@pytest.mark.slow
def test_fresh_moves_the_run_aside(killed: Killed) -> None:
    """Oracle: every byte of the killed run, under the name that is said; the new run is whole. Twice, two names."""
    before = tree(killed.folder / "run")
    for _ in range(2):
        done = subprocess.run([*killed.command(**{"--steps": 2}), "--fresh"], capture_output=True, text=True)
        assert done.returncode == 0, done.stderr
        assert len(RunRecord(killed.folder / "run").steps) == 2
    asides = [path for path in killed.folder.glob("run.*") if path.is_dir()]
    assert len(asides) == 2
    assert before in [tree(path) for path in asides]
    assert all(str(path) in done.stdout or tree(path) == before for path in asides)
    shutil.rmtree(killed.folder / "run")
    shutil.copytree(killed.folder / "snapshot", killed.folder / "run")


@pytest.mark.slow
def test_the_same_options_continue(killed: Killed) -> None:
    """Oracle: the steps of the killed run up to its last checkpoint are the record's, whose numbers nothing else has;
    how often a run is saved may change."""
    shutil.rmtree(killed.folder / "run")
    shutil.copytree(killed.folder / "snapshot", killed.folder / "run")
    earlier = {row["step"]: row for row in RunRecord(killed.folder / "snapshot").steps}
    (checkpoint,) = (killed.folder / "snapshot" / "checkpoints").glob("checkpoint-*/trainer_state.json")
    saved = int(checkpoint.parent.name.rpartition("-")[2])
    done = subprocess.run(killed.command(**{"--save-every": 50}), capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr
    record = RunRecord(killed.folder / "run")
    assert record.run["resumed_from"] == saved
    assert [row["step"] for row in record.steps] == list(range(1, STEPS + 1))
    assert [row for row in record.steps if row["step"] <= saved] == [earlier[n] for n in range(1, saved + 1)]


def test_a_checkpoint_that_was_being_written_is_passed_over(tmp_path: Path) -> None:
    """Oracle: the state is written last, so a checkpoint without a whole one is not whole."""
    for step in (4, 8, 12):
        (tmp_path / f"checkpoint-{step}").mkdir()
    assert recipe._last_checkpoint(tmp_path) is None
    (tmp_path / "checkpoint-4" / "trainer_state.json").write_text('{"global_step": 4}')
    (tmp_path / "checkpoint-8" / "trainer_state.json").write_text('{"global_st')
    assert recipe._last_checkpoint(tmp_path) == tmp_path / "checkpoint-4"
    assert recipe._last_checkpoint(tmp_path / "nowhere") is None


def test_what_is_moved_aside_has_a_name_of_its_own(tmp_path: Path) -> None:
    """Oracle: three runs of one fingerprint, all there; a folder without any step is no run worth keeping."""
    for number in range(3):
        (tmp_path / "run").mkdir()
        (tmp_path / "run" / "COMPLETE").write_text("abcdefghij\n")
        (tmp_path / "run" / "which").write_text(str(number))
        set_aside(tmp_path / "run")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["run.abcdefgh", "run.abcdefgh.2", "run.abcdefgh.3"]
    assert [(tmp_path / "run.abcdefgh.3" / "which").read_text()] == ["2"]
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / "log.txt").write_text("error: no such base")
    assert set_aside(tmp_path / "run") is None


@pytest.mark.parametrize(
    ("part", "named"),
    [
        ({"source": "b"}, "other code of this project"),
        ({"versions": {"torch": "3"}}, "torch 2 there, 3 now"),
        ({"gpu": True}, "no GPU there, one now"),
        ({"contents": {"x": "2"}}, "other content of x"),
    ],
)
def test_what_a_run_depends_on_is_named(part: dict[str, Any], named: str) -> None:
    """Oracle: the part that was changed; without any note of it, that there is one."""
    depends = {"source": "a", "versions": {"torch": "2"}, "gpu": False, "contents": {"x": "1"}}
    spec = RunSpec("pure").to_dict()
    one = {"spec": spec, "depends": depends, "fingerprint": fingerprint(depends)}
    other = {"spec": spec, "depends": {**depends, **part}, "fingerprint": fingerprint({**depends, **part})}
    assert differences(one, other) == [named]
    assert differences(one, one) == []
    del one["depends"]
    assert differences(one, other) == ["the code, the libraries or the files that it was made from"]


# -- divergence -------------------------------------------------------------------------------------------------------

SMALL = RunSpec("baseline", training=TrainingSettings(steps=6, batch_size=1, accumulation=1, rank=4, save_every=2))


def test_checkpoints_of_another_run_are_not_continued(tmp_path: Path) -> None:
    """Oracle: the library's own entry refuses, too, which has no fingerprint."""
    RunRecord.create(tmp_path, arm="baseline", config=SMALL.to_dict())
    state = tmp_path / "checkpoints" / "checkpoint-2" / "trainer_state.json"
    state.parent.mkdir(parents=True)
    state.write_text('{"global_step": 2}')
    with pytest.raises(GRITError, match="holds checkpoints of a run with other options"):
        recipe.train(replace(SMALL, seed=1), tmp_path)


@pytest.mark.parametrize("arm", ["baseline", "pure"])
@pytest.mark.parametrize("lr", [1e36, float("inf")])
def test_a_diverged_run_is_not_complete(arm: str, lr: float, tmp_path: Path) -> None:
    """Oracle: such a step leaves no finite weight: the next loss is none, or GRIT refuses what it is given."""
    from grit_impl.runs.execute import run_here

    spec = replace(SMALL, arm=arm, training=replace(SMALL.training, learning_rate=lr, warmup_steps=0))
    with pytest.raises(RunFailed):
        run_here(tmp_path, spec)
    record = RunRecord(tmp_path)
    assert not record.complete
    assert not record.adapter.exists()
    assert record.run["finished"] is None


def test_nan_is_said_in_the_record(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Oracle: the base's weights are spoilt before step 4: that step is named, the checkpoint is the one before."""
    build = recipe.build_trainer

    def spoiling(*arguments: Any) -> Any:
        trainer, grit = build(*arguments)
        step = trainer.training_step

        def training_step(model: Any, *rest: Any, **more: Any) -> Any:
            if trainer.state.global_step == 3:
                with torch.no_grad():
                    next(model.parameters()).fill_(float("nan"))
            return step(model, *rest, **more)

        trainer.training_step = training_step
        return trainer, grit

    monkeypatch.setattr(recipe, "build_trainer", spoiling)
    with pytest.raises(RunFailed, match="it diverged: the loss is nan at step 4"):
        recipe.train(SMALL, tmp_path)
    record = RunRecord(tmp_path)
    assert str(record.diverged).startswith("it diverged: the loss is nan at step 4; nothing after that")
    assert [path.name for path in (tmp_path / "checkpoints").glob("checkpoint-*")] == ["checkpoint-2"]


def test_weights_count_after_the_last_loss(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Oracle: only the last update spoils the weights, so every loss is finite."""
    spec = replace(SMALL, training=replace(SMALL.training, steps=1, learning_rate=float("inf"), warmup_steps=0))
    with pytest.raises(RunFailed, match=r"it diverged: \d+ weights hold numbers that are not finite, first .*lora_"):
        recipe.train(spec, tmp_path)
    assert "weights hold" in str(RunRecord(tmp_path).diverged)


@pytest.mark.parametrize("loss", [float("nan"), float("inf"), float("-inf")])
def test_a_record_of_an_earlier_version_says_so(loss: float, tmp_path: Path) -> None:
    """Oracle: the row that was written."""
    record = RunRecord.create(tmp_path, arm="pure")
    for step, value in enumerate((1.0, loss, 0.5), 1):
        record.append_step({"step": step, "loss": value})
    assert RunRecord(tmp_path).diverged == f"it diverged: the loss is {loss} at step 2"


@pytest.mark.slow
def test_the_command_ends_with_status_1(tmp_path: Path) -> None:
    """Oracle: a learning rate that no weight survives; the last line says so."""
    command = [sys.executable, "-m", "grit_impl.cli", "train", "--arm", "baseline", "--steps", "5", "--lr", "1e36"]
    done = subprocess.run([*command, "--out", str(tmp_path / "run")], capture_output=True, text=True)
    assert done.returncode == 1
    assert "it diverged" in (done.stdout + done.stderr).strip().splitlines()[-1]
    assert "Traceback" not in done.stdout + done.stderr
