"""Plans: what is run, in which order, and what is refused before anything runs."""

from __future__ import annotations

import dataclasses
import json
from collections import Counter
from pathlib import Path

import pytest
from click.testing import CliRunner

from grit_impl.errors import GRITError
from grit_impl.sweep.commands import sweep
from grit_impl.sweep.plan import METHODS, load_plan
from grit_impl.sweep.store import Store

PLANS = ("grit-vs-lora-tiny", "grit-vs-lora-40m")


def test_the_phases_follow_one_another_and_every_prefix_is_balanced(plan_file: Path) -> None:
    """A sweep that ends early has every arm on every task within one seed of every other."""
    jobs = list(load_plan(plan_file).jobs())
    phases = [job.phase for job in jobs]
    assert phases == sorted(phases, key=["tuning", "evaluation", "ablation"].index)
    assert len({job.key for job in jobs}) == len(jobs) == 26
    evaluated: Counter[tuple[str, str]] = Counter({job.group: 0 for job in jobs if job.method != "none"})
    for job in jobs:
        if job.phase == "evaluation" and job.method != "none":
            evaluated[job.group] += 1
            assert max(evaluated.values()) - min(evaluated.values()) <= 1


@pytest.mark.parametrize("name", PLANS)
def test_the_projects_plans_are_fair(name: str) -> None:
    """Equally many trials, eight paired seeds that no tuning saw, at least four opponents that are not GRIT."""
    plan = load_plan(name)
    assert {len(trials) for trials in plan.trials.values()} == {8}
    assert plan.evaluation_seeds == tuple(range(1000, 1008))
    assert not set(plan.tuning_seeds) & {*range(1000, 1016)}
    assert {"adamw", "loraplus", "riemannian", "rslora"} <= set(plan.methods.values())
    shared = {"lr", "warmup", "beta1", "beta2"}
    assert all(shared <= set(trial) and len(trial) <= 5 for trials in plan.trials.values() for trial in trials)
    assert plan.trials["adamw"] == plan.trials["eigenbasis"]


def test_the_order_of_precedence_is_common_arm_trial_change(plan_file: Path) -> None:
    """An ablation changes what tuning chose; tuning changes what is common."""
    plan = load_plan(plan_file)
    job = next(job for job in plan.jobs() if job.variant and job.arm == "eigenbasis")
    settings = plan.settings(job, {"lr": 0.5, "rank": 99})
    assert (settings["rank"], settings["lr"], settings["update_rule"], settings["steps"]) == (4, 0.5, "eigenbasis", 10)


@pytest.mark.parametrize(
    ("old", "new", "named"),
    [
        ("kfac_update_freq = [1, 5]", "kfac_update_freq = [1]", "eigenbasis.*differ in length"),
        ("lr = [0.001, 0.005]", "lr = [0.001]", "number of trials"),
        ("[10, 11, 12]", "[0, 11, 12]", "seed 0 is used in tuning and in evaluation"),
        ('tasks = ["convert", "choose"]', 'tasks = ["convert", "juggle"]', "unknown task 'juggle'"),
        ("kfac_update_freq", "kfac_update_frequency", "did you mean kfac_update_freq"),
        ('method = "adamw"', 'method = "sgd"', "unknown method 'sgd'"),
        ('reference = "adamw"', 'reference = "lora"', "reference 'lora' is not an arm"),
        ("rank = 8", 'rank = "8"', "rank = '8': expected int"),
        ("every = 5", "", "lacks every"),
        ("[common]", "[common", "is not TOML"),
    ],
)
def test_a_wrong_plan_is_refused_by_name(plan_text: str, tmp_path: Path, old: str, new: str, named: str) -> None:
    """One line that names the plan and what is wrong, before anything runs."""
    path = tmp_path / "wrong.toml"
    path.write_text(plan_text.replace(old, new, 1))
    with pytest.raises(GRITError, match=named):
        load_plan(path)


def test_an_unknown_plan_names_the_known_ones() -> None:
    """As for every other name."""
    with pytest.raises(GRITError, match="grit-vs-lora-tiny"):
        load_plan("grit-against-lora")


@pytest.mark.parametrize(
    ("old", "new"),
    [
        ("[10, 11, 12]", "3"),
        ("[arms.adamw.trials]\nlr = [0.001, 0.005]", "trials = [0.1]"),
        ("seeds = [10, 11]", "seeds = 3"),
    ],
)
def test_a_value_of_the_wrong_kind_is_one_line(plan_text: str, tmp_path: Path, old: str, new: str) -> None:
    """Oracle: a traceback of TypeError, AttributeError or ValueError would not be a GRITError."""
    path = tmp_path / "wrong.toml"
    path.write_text(plan_text.replace(old, new, 1))
    with pytest.raises(GRITError, match="value of the wrong kind"):
        load_plan(path)


@pytest.mark.parametrize(
    ("old", "new", "named"),
    [
        ("steps = 10", "steps = 20", "common"),
        ('base = "tiny"', 'base = "big"', "base"),
        ("tuning_seeds = [0]", "tuning_seeds = [0, 1]", "tuning_seeds"),
        ("lr = [0.002, 0.006]", "lr = [0.002, 0.009]", "arm eigenbasis"),
        ("[10, 11, 12]", "[10, 11, 12, 13]", ""),
        ('tasks = ["convert", "choose"]', 'tasks = ["convert"]', ""),
    ],
)
def test_a_folder_holds_runs_of_one_plan(plan_text: str, tmp_path: Path, old: str, new: str, named: str) -> None:
    """What finished runs share is not in their keys: a changed plan must not take them for its own."""
    out, plan = tmp_path / "out", tmp_path / "plan.toml"
    plan.write_text(plan_text.replace(old, new, 1))
    with Store(out / "sweep.db") as store:
        before = tmp_path / "before.toml"
        before.write_text(plan_text)
        store.set_meta(plan=dataclasses.asdict(load_plan(before)))
        assert load_plan(plan).changed_since(json.loads(store.meta["plan"])) == named
    if named:
        result = CliRunner().invoke(sweep, ["run", str(plan), "--out", str(out)])
        assert isinstance(result.exception, GRITError)
        assert f"another {named}: give another --out" in str(result.exception)


def test_the_real_tasks_plan_is_fair_and_listed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Oracle: the plan's own numbers. Without its rows it is refused by name; --dry lists it and runs nothing."""
    monkeypatch.chdir(tmp_path)
    with pytest.raises(GRITError, match="task data/gsm8k: the folder has no file train"):
        load_plan("real-tasks-smollm2")
    for name in ("gsm8k", "boolq", "openbookqa"):
        (tmp_path / "data" / name).mkdir(parents=True)
        for side in ("train", "test"):
            (tmp_path / "data" / name / f"{side}.jsonl").touch()
    plan = load_plan("real-tasks-smollm2")
    assert set(plan.methods.values()) == {*METHODS} - {"none"}
    assert {len(trials) for trials in plan.trials.values()} == {6}
    assert all(set(trial) == {"lr"} for trials in plan.trials.values() for trial in trials)
    assert all(set(fixed) <= {"ratio", "reg", "update_rule", "preset"} for fixed in plan.fixed.values())
    found = CliRunner().invoke(sweep, ["run", "real-tasks-smollm2", "--out", str(tmp_path / "out"), "--dry"])
    arms = len(plan.trials)
    assert f"{arms * 4 * (6 * 3 + 8) + 4} runs of 600 steps" in found.output
    assert not (tmp_path / "out").exists()
