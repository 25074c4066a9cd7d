"""The sweep itself: order, failures, budget, and what survives being killed."""

from __future__ import annotations

import dataclasses
import json
import multiprocessing
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from importlib import import_module
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from grit_impl.sweep.plan import load_plan
from grit_impl.sweep.scheduler import Sweep
from grit_impl.sweep.store import Store, choose_trial

Work = Callable[..., dict[str, Any]]


def _orders(work: Work, **orders: Any) -> None:
    (Path(sys.modules[work.__module__].__file__ or "").parent / "orders").write_text(json.dumps(orders))


def _log(work: Work) -> list[str]:
    return (Path(sys.modules[work.__module__].__file__ or "").parent / "log").read_text().split()


def test_everything_runs_once_with_the_tuned_settings(plan_file: Path, fake_work: Work, tmp_path: Path) -> None:
    """Evaluation waits for its arm's last trial and uses the best; a second pass has nothing to do."""
    _orders(fake_work, slow=("tuning/choose/eigenbasis/0", 1.0))
    plan = load_plan(plan_file)
    with Store(tmp_path / "sweep.db") as store:
        assert Sweep(plan, store, jobs=2, device="cpu", work=fake_work).run() == 0
        assert len(_log(fake_work)) == 26
        for arm, lr in (("adamw", 0.005), ("eigenbasis", 0.006)):
            rows = store.runs(phase="evaluation", arm=arm)
            assert len(rows) == 6
            assert {row["settings"]["lr"] for row in rows} == {lr}
        assert all(row["seconds"] > 0 for row in store.runs())
        again = Sweep(plan, store, jobs=2, device="cpu", work=fake_work)
        assert (again.run(), again.finished, len(_log(fake_work))) == (0, 26, 26)


@pytest.mark.parametrize("fresh", [False, True])
def test_a_fresh_process_can_load_what_bitsandbytes_has_quantised(
    fresh: bool, plan_file: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The warm server hides bitsandbytes, which asks the GPU when imported. Oracle: the run's own `sys.modules`."""
    name = f"asks_{fresh}"
    asks = "def work(job, settings, device):\n    import sys\n    raise ValueError('bitsandbytes' in sys.modules)\n"
    (tmp_path / f"{name}.py").write_text(asks)
    monkeypatch.syspath_prepend(tmp_path)
    whole = load_plan(plan_file)
    one = dataclasses.replace(whole, trials={"adamw": whole.trials["adamw"][:1]}, ablations=(), evaluation_seeds=())
    with Store(tmp_path / "sweep.db") as store:
        Sweep(one.only(tasks=["choose"]), store, jobs=1, device="cpu", fresh=fresh, work=import_module(name).work).run()
        assert {row["error"] for row in store.runs()} == {f"ValueError: {not fresh}"}


def test_runs_are_spread_over_the_gpus(
    plan_file: Path, fake_work: Work, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """With two cards and two runs at a time, each card has a run; the CPU has no card."""
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "0,1")
    # The real one looks for a GPU that works.
    monkeypatch.setattr("grit_impl.sweep.scheduler._context", lambda _: multiprocessing.get_context("forkserver"))
    cards = Path(sys.modules[fake_work.__module__].__file__ or "").parent / "cards"
    for device in ("cuda", "cpu"):
        with Store(tmp_path / device / "sweep.db") as store:
            assert Sweep(load_plan(plan_file), store, jobs=2, device=device, work=fake_work).run() == 0
        used = cards.read_text().split()
        cards.unlink()
        assert {"0", "1"} & set(used) == ({"0", "1"} if device == "cuda" else set())
        if device == "cuda":  # runs of equal length take turns, or nearly so
            assert min(used.count("0"), used.count("1")) >= len(used) // 4


@pytest.mark.parametrize(("order", "error"), [("raise", "ValueError: asked to fail"), ("die", "exit status 7")])
def test_a_run_that_fails_is_recorded_and_the_rest_goes_on(
    plan_file: Path, fake_work: Work, tmp_path: Path, order: str, error: str
) -> None:
    """An exception, or a process that dies without a word; with retry it is run again."""
    name = "evaluation/choose/adamw/11"
    _orders(fake_work, **{order: name})
    plan = load_plan(plan_file)
    with Store(tmp_path / "sweep.db") as store:
        assert Sweep(plan, store, jobs=2, device="cpu", work=fake_work).run() == 0
        (failed,) = store.runs(status="failed")
        assert (failed["task"], failed["arm"], failed["seed"], failed["loss"]) == ("choose", "adamw", 11, None)
        assert error in failed["error"]
        assert len(store.runs(status="done")) == 25
        _orders(fake_work)
        Sweep(plan, store, jobs=2, device="cpu", work=fake_work, retry=True).run()
        assert len(store.runs(status="done")) == 26


def test_the_budget_ends_the_sweep_and_the_next_pass_continues(
    plan_file: Path, fake_work: Work, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What was finished stays as it was; only what is missing is run. The clock moves on by a second with each run that
    ends, two runs never do in time, and they are ended."""
    _orders(fake_work, slow=("tuning/convert/adamw/0", 600.0))
    plan = load_plan(plan_file)
    clock = [0]
    with Store(tmp_path / "sweep.db") as store, monkeypatch.context() as patch:
        patch.setattr("grit_impl.sweep.scheduler.time", SimpleNamespace(monotonic=lambda: clock[0]))
        sweep = Sweep(
            plan, store, jobs=3, device="cpu", work=fake_work, budget=5.5,
            progress=lambda done, total, line: clock.__setitem__(0, done),
        )  # fmt: skip
        began = time.monotonic()
        missing = sweep.run()
        assert time.monotonic() - began < 600  # nobody waited for the slow run
        assert _log(fake_work).count("tuning/convert/adamw/0") == 2
        assert not multiprocessing.active_children()
        patch.undo()
        before = {row["key"]: row for row in store.runs()}
        assert 6 <= len(before) == 26 - missing <= 8
        _orders(fake_work)
        assert Sweep(plan, store, jobs=2, device="cpu", work=fake_work).run() == 0
        after = {row["key"]: row for row in store.runs()}
        assert len(after) == 26
        assert all(after[key] == row for key, row in before.items())


def test_a_killed_sweep_keeps_what_was_finished(plan_file: Path, fake_work: Work, tmp_path: Path) -> None:
    """Kill -9 of the controlling process: the file opens, finished runs are in it, the next pass completes them."""
    _orders(fake_work, sleep=0.2)
    module = sys.modules[fake_work.__module__]
    script = f"""
import sys; sys.path.insert(0, {str(Path(module.__file__ or "").parent)!r})
from pathlib import Path
from {module.__name__} import work
from grit_impl.sweep.plan import load_plan
from grit_impl.sweep.scheduler import Sweep
from grit_impl.sweep.store import Store
Sweep(load_plan({str(plan_file)!r}), Store(Path({str(tmp_path / "sweep.db")!r})), jobs=1, device="cpu", work=work).run()
"""
    process = subprocess.Popen([sys.executable, "-c", script])
    with Store(tmp_path / "sweep.db") as store:
        deadline = time.monotonic() + 60
        while len(store.statuses()) < 4 and time.monotonic() < deadline:
            time.sleep(0.05)
        os.kill(process.pid, signal.SIGKILL)
        process.wait()
        kept = store.runs()
        assert 4 <= len(kept) < 26
        _orders(fake_work)
        assert Sweep(load_plan(plan_file), store, jobs=2, device="cpu", work=fake_work).run() == 0
        after = {row["key"]: row for row in store.runs()}
        assert len(after) == 26
        assert all(after[row["key"]] == row for row in kept)


def test_the_tuning_rule() -> None:
    """Lowest mean over the seeds; a trial of which one run diverged is out; no trial left: None."""

    def row(trial: int, loss: float | None) -> dict[str, Any]:
        return {"trial": trial, "loss": loss, "status": "diverged" if loss is None else "done"}

    assert choose_trial([row(0, 1.0), row(0, 3.0), row(1, 1.9), row(1, 1.9)]) == 1
    assert choose_trial([row(0, 0.1), row(0, None), row(1, 5.0)]) == 1
    assert choose_trial([row(0, None)]) is None
    assert choose_trial([]) is None
