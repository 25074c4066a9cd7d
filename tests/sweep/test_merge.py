"""A sweep that several machines share: parts by seed or task, brought together afterwards."""

from __future__ import annotations

import dataclasses
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from click.testing import CliRunner

from grit_impl.errors import GRITError
from grit_impl.sweep.commands import sweep, take_tuning
from grit_impl.sweep.plan import Plan, load_plan
from grit_impl.sweep.scheduler import Sweep
from grit_impl.sweep.store import Store

Work = Callable[..., dict[str, Any]]


def run(plan: Plan, folder: Path, work: Work, whole: Plan) -> None:
    """What `grit sweep run --seed` does, with work that costs nothing."""
    with Store(folder / "sweep.db") as store:
        assert Sweep(plan, store, jobs=2, device="cpu", work=work).run() == 0
        store.set_meta(plan=dataclasses.asdict(whole))


def rows(folder: Path) -> dict[str, Any]:
    """Losses by key."""
    with Store(folder / "sweep.db") as store:
        return {row["key"]: row["loss"] for row in store.runs()}


def test_parts_make_the_whole(plan_file: Path, fake_work: Work, tmp_path: Path) -> None:
    """Oracle: the sweep that one machine made. Tuned once, the seeds on two machines, one of them on both."""
    plan = load_plan(plan_file)
    run(plan, tmp_path / "whole", fake_work, plan)
    run(dataclasses.replace(plan, evaluation_seeds=(), ablations=()), tmp_path / "a", fake_work, plan)
    shutil.copytree(tmp_path / "a", tmp_path / "b")
    run(plan.only(seeds=[10, 11]), tmp_path / "a", fake_work, plan)
    run(plan.only(seeds=[11, 12]), tmp_path / "b", fake_work, plan)
    assert rows(tmp_path / "a") != rows(tmp_path / "whole")
    result = CliRunner().invoke(sweep, ["merge", str(tmp_path / "a"), str(tmp_path / "b")])
    assert result.exit_code == 0, result.output
    assert "4 runs added" in result.output
    assert rows(tmp_path / "a") == rows(tmp_path / "whole")


def test_what_is_there_stays_and_failures_are_filled(plan_file: Path, fake_work: Work, tmp_path: Path) -> None:
    """Oracle: losses planted in the one, a failure planted in the other."""
    plan = load_plan(plan_file)
    run(plan, tmp_path / "a", fake_work, plan)
    shutil.copytree(tmp_path / "a", tmp_path / "b")
    first, second = sorted(rows(tmp_path / "a"))[:2]
    with Store(tmp_path / "a" / "sweep.db") as store, store._db:
        store._db.execute("UPDATE runs SET loss = 77 WHERE key = ?", [first])
        store._db.execute("UPDATE runs SET status = 'failed', loss = NULL WHERE key = ?", [second])
    CliRunner().invoke(sweep, ["merge", str(tmp_path / "a"), str(tmp_path / "b")], catch_exceptions=False)
    assert rows(tmp_path / "a")[first] == 77
    assert rows(tmp_path / "a")[second] == rows(tmp_path / "b")[second]


def test_a_part_of_a_plan_by_name(plan_file: Path) -> None:
    """Oracle: counting. Seed 12 has no ablation; an unknown seed or task is named with the known ones."""
    plan = load_plan(plan_file)
    part = plan.only(["convert"], [12])
    assert {(job.task, job.seed) for job in part.jobs() if job.phase == "evaluation" and job.method != "none"} == {
        ("convert", 12)
    }
    assert not any(job.phase == "ablation" for job in part.jobs())
    assert {job.key for job in part.jobs()} < {job.key for job in plan.jobs()}
    with pytest.raises(GRITError, match="no seed after tuning 13: choose one of 10, 11, 12"):
        plan.only(seeds=[13])
    assert list(plan.only(seeds=[10, 10]).jobs()) == list(plan.only(seeds=[10]).jobs())


def test_ablations_with_seeds_of_their_own_are_run(plan_text: str, tmp_path: Path) -> None:
    """Oracle: counting. Nothing selected: every job of the plan; their seed alone: two arms."""
    path = tmp_path / "own.toml"
    path.write_text(plan_text.replace("seeds = [10, 11]\nchanges", "seeds = [20]\nchanges"))
    plan = load_plan(path)
    assert [job.key for job in plan.only().jobs()] == [job.key for job in plan.jobs()]
    own = [job for job in plan.only(seeds=[20]).jobs() if job.phase == "ablation"]
    assert {(job.arm, job.seed) for job in own} == {("adamw", 20), ("eigenbasis", 20)}


def test_parts_that_were_tuned_apart_are_refused(plan_file: Path, fake_work: Work, tmp_path: Path) -> None:
    """Oracle: the settings planted. A part whose arm chose another trial, or whose tuning would still be added to."""
    plan = load_plan(plan_file)
    run(plan.only(seeds=[10]), tmp_path / "a", fake_work, plan)
    run(plan.only(seeds=[11]), tmp_path / "b", fake_work, plan)
    before = rows(tmp_path / "a")
    with Store(tmp_path / "b" / "sweep.db") as store, store._db:
        store._db.execute("UPDATE runs SET settings = '{}' WHERE phase = 'evaluation' AND arm = 'adamw'")
    result = CliRunner().invoke(sweep, ["merge", str(tmp_path / "a"), str(tmp_path / "b")])
    assert "arm 'adamw' on 'choose' was tuned to other settings" in str(result.exception)
    assert rows(tmp_path / "a") == before
    with Store(tmp_path / "a" / "sweep.db") as store, store._db:
        store._db.execute(
            "UPDATE runs SET status = 'failed' WHERE phase = 'tuning' AND arm = 'eigenbasis' AND trial = 0"
        )
    with Store(tmp_path / "b" / "sweep.db") as store, store._db:
        store._db.execute("DELETE FROM runs WHERE phase != 'tuning'")
    result = CliRunner().invoke(sweep, ["merge", str(tmp_path / "a"), str(tmp_path / "b")])
    assert "a tuning trial of arm 'eigenbasis'" in str(result.exception)


def test_a_task_that_the_plan_lacks_is_refused(plan_file: Path, fake_work: Work, tmp_path: Path) -> None:
    """Oracle: a report would never show such runs."""
    plan = load_plan(plan_file)
    part = plan.only(["choose"])
    run(part, tmp_path / "a", fake_work, part)
    run(plan, tmp_path / "b", fake_work, plan)
    result = CliRunner().invoke(sweep, ["merge", str(tmp_path / "a"), str(tmp_path / "b")])
    assert "no arm 'adamw' on task 'convert'" in str(result.exception)


def test_another_plan_is_refused(plan_file: Path, fake_work: Work, tmp_path: Path) -> None:
    """Oracle: one clear line, and nothing is written."""
    plan = load_plan(plan_file)
    run(plan, tmp_path / "a", fake_work, plan)
    run(plan, tmp_path / "b", fake_work, dataclasses.replace(plan, common={**plan.common, "steps": 11}))
    (tmp_path / "c").mkdir()
    for other, said in (("b", "a plan with another common"), ("c", "is not there")):
        result = CliRunner().invoke(sweep, ["merge", str(tmp_path / "a"), str(tmp_path / other)])
        assert isinstance(result.exception, GRITError)
        assert said in str(result.exception)


def test_a_replication_takes_the_tuning_of_another_sweep(plan_file: Path, fake_work: Work, tmp_path: Path) -> None:
    """Oracle: the settings that the first sweep chose. One arm fewer, other seeds; nothing but tuning is taken."""
    plan = load_plan(plan_file)
    run(plan, tmp_path / "first", fake_work, plan)
    again = dataclasses.replace(plan, evaluation_seeds=(20, 21), ablations=())
    with Store(tmp_path / "again" / "sweep.db") as store, Store(tmp_path / "first" / "sweep.db") as first:
        first.set_meta(git_commit="abc")
        assert take_tuning(store, again, tmp_path / "first") == 8
        assert take_tuning(store, again, tmp_path / "first") == 0
        assert {row["phase"] for row in store.runs()} == {"tuning"}
        assert Sweep(again, store, jobs=2, device="cpu", work=fake_work).run() == 0
        assert {row["seed"] for row in store.runs(phase="evaluation", method="grit")} == {20, 21}
        for arm in ("adamw", "eigenbasis"):
            (chosen,), (ours,) = (
                {str(row["settings"]) for row in each.runs(phase="evaluation", task="convert", arm=arm)}
                for each in (first, store)
            )
            assert ours == chosen
        assert store.meta["tuned_by"] == "abc"
    other = dataclasses.replace(plan, common={**plan.common, "steps": 11})
    with Store(tmp_path / "other.db") as store:
        with pytest.raises(GRITError, match="runs of a plan with another common"):
            take_tuning(store, other, tmp_path / "first")
        with pytest.raises(GRITError, match="has no tuning run of this plan"):
            take_tuning(store, dataclasses.replace(plan, tasks=("extract",)), tmp_path / "first")
        assert not {"plan", "tuned_by"} & store.meta.keys()  # what was refused leaves nothing behind
