"""A small plan, and work that costs nothing, for tests of the scheduler."""

from __future__ import annotations

import importlib
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

PLAN = """
base = "tiny"
tasks = ["convert", "choose"]
reference = "adamw"
tuning_seeds = [0]
evaluation_seeds = [10, 11, 12]
every = 5
[common]
rank = 8
alpha = 8
steps = 10
batch_size = 4
warmup = 2
[arms.adamw]
method = "adamw"
[arms.adamw.trials]
lr = [0.001, 0.005]
[arms.eigenbasis]
method = "grit"
update_rule = "eigenbasis"
[arms.eigenbasis.trials]
lr = [0.002, 0.006]
kfac_update_freq = [1, 5]
[[ablations]]
name = "rank 4"
arms = ["adamw", "eigenbasis"]
tasks = ["convert"]
seeds = [10, 11]
changes = { rank = 4, alpha = 4 }
"""
# A run's loss depends on its settings and seed alone; what a test asks for is in the file `orders` beside it.
WORK = """
import json, os, time
from pathlib import Path

HERE = Path(__file__).parent

def work(job, settings, device):
    orders = json.loads((HERE / "orders").read_text()) if (HERE / "orders").exists() else {}
    name = f"{job['phase']}/{job['task']}/{job['arm']}/{job['seed']}"
    with open(HERE / "cards", "a") as cards:
        cards.write(os.environ.get("CUDA_VISIBLE_DEVICES", "none") + "\\n")
    with open(HERE / "log", "a") as log:
        log.write(name + "\\n")
    if orders.get("raise") == name:
        raise ValueError("asked to fail")
    if orders.get("die") == name:
        os._exit(7)
    time.sleep(orders["slow"][1] if orders.get("slow", [""])[0] == name else orders.get("sleep", 0))
    loss = 1.0 + abs(settings.get("lr", 0) - 0.006) + job["seed"] / 1000
    return {"status": "done", "loss": loss, "accuracy": 0.5, "retention": 0.1, "losses": [loss],
            "curve": [[5, 2 * loss, 0, 1], [10, loss, 0, 2]], "train_seconds": 0.1, "coverage": None,
            "step_seconds": 0.01}
"""


@pytest.fixture
def plan_text() -> str:
    """Two tasks, two arms with two trials each, three evaluation seeds, one ablation: 26 runs."""
    return PLAN


@pytest.fixture
def plan_file(tmp_path: Path) -> Path:
    """The plan as a file."""
    path = tmp_path / "small.toml"
    path.write_text(PLAN)
    return path


@pytest.fixture
def fake_work(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[..., dict[str, Any]]:
    """Work in a module of its own, so that another process can import it."""
    folder = tmp_path / "work"
    folder.mkdir()
    name = f"work_{abs(hash(tmp_path))}"
    (folder / f"{name}.py").write_text(WORK)
    monkeypatch.syspath_prepend(folder)
    module: Any = importlib.import_module(name)
    return module.work
