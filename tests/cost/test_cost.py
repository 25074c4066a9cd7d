"""The logic behind the tables of cost: intervals, verdicts, exponents, turns, and where the table goes."""

from __future__ import annotations

import importlib.util
import math
import os
import random
import subprocess
import sys
import types
from pathlib import Path
from typing import Any

import pytest
import torch

from grit_impl.config import GRITConfig
from grit_impl.cost.bench import (
    SETTLED,
    Figure,
    StepBench,
    exponent,
    in_turn,
    misses,
    ratios,
    render,
    spread,
    write_section,
)
from grit_impl.errors import GRITError
from grit_impl.recipes.bases import load_base
from grit_impl.recipes.lora import LoRASettings, add_lora

ROOT = Path(__file__).resolve().parents[2]


def test_the_interval_is_the_published_one() -> None:
    """Oracle: tables of order-statistic intervals for the median: ranks (2, 9) for n = 10, (6, 15) for n = 20."""
    for n, low, high in ((6, 1, 6), (10, 2, 9), (20, 6, 15)):
        found = spread([float(i) for i in range(1, n + 1)])
        assert (found.low, found.high) == (low, high)
        assert found.median == (n + 1) / 2


def test_the_interval_covers() -> None:
    """At least 95% of samples of a skewed distribution have its true median inside: 400 samples, 3 sd allowed."""
    random.seed(1)
    hits = 0
    for _ in range(400):
        found = spread([random.expovariate(1) for _ in range(12)])
        hits += found.low <= math.log(2) <= found.high
    assert hits / 400 > 0.95 - 3 * math.sqrt(0.95 * 0.05 / 400)


def test_a_target_is_missed_by_more_than_the_spread_only() -> None:
    """Three verdicts, by where the interval lies."""
    for values, verdict in (
        ([1.0] * 6, "met"),
        ([1.0, 1.2, 1.2, 1.2, 1.2, 1.3], "within the spread"),
        ([1.2] * 6, "MISSED"),
    ):
        assert Figure("x", spread(values), 1.1).verdict == verdict
        assert misses(spread(values), 1.1) == (verdict == "MISSED")
    assert Figure("x", spread([9.0])).verdict == "-"


def test_exponents_of_powers() -> None:
    """Oracle: seconds that are a power of the size, times a factor of the round that cancels."""
    sizes = [1, 2, 4, 8]
    seconds = [[3.0 * size**1.5 * drift for drift in (1, 2, 0.5)] for size in sizes]
    found = exponent(sizes, seconds)
    assert found.median == pytest.approx(1.5)
    assert found.low == pytest.approx(found.high)
    # Exactly 0 where nothing grows: a rounding error above it would miss a target of 0.
    assert exponent([2, 4, 8], [[115360.0]] * 3).low == 0


@pytest.fixture
def memory(monkeypatch: pytest.MonkeyPatch) -> Any:
    """(step, first, checkpoint) -> peaks of a bench on a GPU that counts what it is told.

    Bytes at the peak of a step by whether GRIT is on, of GRIT's first `SETTLED` steps, and of GRIT's checkpoint.
    """

    def measure(step: dict[bool, int], first: int, checkpoint: int) -> dict[bool, int]:
        peak, taken = [0], []

        def reach(value: int) -> None:
            peak[0] = max(peak[0], value)

        class Optimizer:
            def __init__(self, value: int) -> None:
                self.value = value

            def state_dict(self) -> None:
                reach(self.value)

        bench: Any = StepBench.__new__(StepBench)
        bench.device = torch.device("cuda")
        bench.inner, bench.grit_optimizer = Optimizer(0), Optimizer(checkpoint)
        bench.config, bench.manager = GRITConfig(), types.SimpleNamespace(step=SETTLED)

        def one(*, grit: bool) -> None:
            taken.append(grit)
            reach(first if grit and taken.count(True) <= SETTLED else step[grit])

        bench.step = one
        monkeypatch.setattr(torch.cuda, "empty_cache", lambda: None)
        monkeypatch.setattr(torch.cuda, "reset_peak_memory_stats", lambda: peak.clear() or peak.append(0))
        monkeypatch.setattr(torch.cuda, "max_memory_allocated", lambda: peak[0])
        return bench.peaks()

    return measure


def test_peaks_are_of_settled_steps_and_of_a_checkpoint(memory: Any) -> None:
    """Oracle: by hand. The comparison in GRIT's first steps is none of it; a checkpoint that takes more is."""
    assert memory({False: 600, True: 601}, first=900, checkpoint=500) == {False: 600, True: 601}
    assert memory({False: 600, True: 601}, first=600, checkpoint=640) == {False: 600, True: 640}


@pytest.mark.parametrize("frequency", [1, 5])
def test_peaks_are_of_a_step_that_inverts(frequency: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """Oracle: GRIT's own count, of its last step and of all; a checkpoint then finds no spectrum unsolved."""
    monkeypatch.setattr("grit_impl.cost.bench.SETTLED", 1)
    base, _ = load_base("random:tiny")
    config = GRITConfig(kfac_update_freq=frequency, kfac_min_samples=1)
    bench = StepBench(add_lora(base, LoRASettings(r=4, alpha=4), 0), torch.optim.AdamW, length=8, config=config)
    assert bench.peaks() == {False: 0, True: 0}
    assert bench.manager.step == (2 if frequency == 1 else 5)
    assert [row["step"] for row in bench.manager.spectrum_history()] == ([1, 2] if frequency == 1 else [5])
    assert bench.peaks(grit=False) == {False: 0}


def test_arms_take_turns_and_the_warm_up_does_not_count() -> None:
    """Order alternates, so that neither arm always comes first."""
    order: list[str] = []

    def arm(name: str) -> float:
        order.append(name)
        return float(len(order))

    taken = in_turn({"a": lambda: arm("a"), "b": lambda: arm("b")}, 3, warm_up=1)
    assert "".join(order) in ("abbaabba", "baabbaab")
    assert [len(v) for v in taken.values()] == [3, 3]
    assert min(taken["a"] + taken["b"]) == 3.0


def test_ratios_are_of_blocks() -> None:
    """What happens once per block is in each ratio; an unfinished block is left out."""
    assert ratios([1, 1, 4, 2, 2, 8, 9], [1, 1, 1, 2, 2, 2, 1], block=3) == [2.0, 2.0]


def test_a_budget_ends_the_rounds(monkeypatch: pytest.MonkeyPatch) -> None:
    """Two rounds at least, then until the seconds are over."""
    now = iter(float(i) for i in range(100))
    monkeypatch.setattr("time.perf_counter", lambda: next(now))
    assert len(in_turn({"a": lambda: 1.0}, 50, seconds=3.5, warm_up=0)["a"]) < 8


def test_the_table_replaces_its_section_only(tmp_path) -> None:
    """Before and after it everything stays; a document without the section is refused by name."""
    document = tmp_path / "performance.md"
    document.write_text("head\n<!-- cpu -->\nold\n<!-- /cpu -->\ntail\n")
    table = render([Figure("step", spread([1.05] * 6), 1.1)])
    write_section(document, "cpu", table)
    write_section(document, "cpu", table)
    text = document.read_text()
    assert text.startswith("head\n<!-- cpu -->\n| what |")
    assert text.endswith("<!-- /cpu -->\ntail\n")
    assert text.count("| step | 1.050 [1.050, 1.050] | 6 | at most 1.1 | met |") == 1
    assert "old" not in text
    with pytest.raises(GRITError, match=r"performance\.md has no section <!-- gpu -->"):
        write_section(document, "gpu", table)


def test_a_gpu_cell_is_met_only_where_its_interval_is() -> None:
    """Below the target, around it, above it: three verdicts. A small shape is told, or all but its memory judged."""
    path = ROOT / "suites/benchmarks/gpu_table.py"
    found = importlib.util.spec_from_file_location("gpu_table", path)
    assert found is not None
    assert found.loader is not None
    gpu_table = importlib.util.module_from_spec(found)
    found.loader.exec_module(gpu_table)
    row = {
        "stack": "peft", "shape": "8b", "rank": 16, "length": 512, "checkpointing": True, "gpu": "some",
        "plain_seconds": 1.0, "device_ratio": 1.02, "memory_ratio": 1.0, "plain_peak_gib": 6.0,
        "invert_ms": 2.0, "invert_device_ms": 0.1,
    }  # fmt: skip
    verdicts = (
        ([1.01] * 6, "met"),
        ([0.9] * 3 + [1.2] * 3, "open: step"),
        ([1.2] * 6, "MISSED: step"),
        ([1.2] * 5, "open: step"),
        ([1.01] * 5, "open: step"),
    )
    for ratios_, verdict in verdicts:
        assert gpu_table.table([{**row, "ratios": ratios_}]).endswith(f"| {verdict} |")
    ledger = gpu_table.table([{**row, "ratios": [1.01] * 6, "ledger_ratios": [0.9, 1.3]}])
    assert ledger.endswith("| open: ledger |")
    assert gpu_table.table([{**row, "shape": "1b", "ratios": [1.2] * 6}]).endswith("| - |")
    heavy = {**row, "ratios": [1.01] * 6, "memory_ratio": 1.02}
    assert gpu_table.table([heavy]).endswith("| MISSED: memory |")
    assert gpu_table.table([{**heavy, "shape": "8l"}]).endswith("| met |")


def blocks(*arguments: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, str(ROOT / "suites" / "benchmarks" / "gpu_blocks.py"), *arguments]
    no_gpu = {**os.environ, "CUDA_VISIBLE_DEVICES": ""}
    return subprocess.run(command, capture_output=True, text=True, check=False, timeout=300, env=no_gpu)


@pytest.mark.slow
def test_two_processes_take_turns() -> None:
    """The script that compares with Unsloth's compiled layers, without a GPU: four ratios, and what ends it."""
    ran = blocks(str(ROOT / "fixtures" / "tiny_llama"), "--seconds", "0.1", "--lengths", "16")
    assert ran.returncode == 0, ran.stderr
    head, seen, *rows = ran.stdout.splitlines()
    assert head == "peft, 16 tokens per sequence, 0 compiled layers, 2 rounds"
    assert seen.count("of 28 layers") == 2
    assert [row.split("step")[0].split() for row in rows] == [
        ["compiled", "grit", "over", "compiled"],
        ["grit", "over", "compiled"],
        ["grit", "over", "plain"],
        ["plain", "over", "compiled"],
    ]  # fmt: skip
    ran = blocks("no such folder")
    assert ran.returncode == 1
    assert "error: unknown base model 'no such folder'" in ran.stderr
    assert ran.stderr.splitlines()[-1] == "the process with UNSLOTH_BLOCK_COMPILE=1 ended with status 1"
