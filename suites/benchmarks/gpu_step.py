"""What GRIT costs on a GPU: ratios of steps that take turns in one process, peak memory, inversions, waiting.

    python suites/benchmarks/gpu_step.py FOLDER [--deadline 1500] [--stacks unsloth,peft] [--shapes 8b,8l,1b]

FOLDER receives random NF4 weights of each shape, unless they are there: `8b` is `random:llama-3-8b`; `8l` are 8 of its
32 layers with a small vocabulary, where a round takes a quarter of the time, so that the interval is narrower; `1b` is
`random:llama-1b`. Every stack runs in a process of its own (Unsloth
patches what it finds imported), one line per cell. The time until the deadline (seconds) is shared out: more of it
means narrower intervals, and what does not fit is named as skipped. The results are lines of JSON in
$OUT/gpu_cost.jsonl (or in FOLDER), and the table comes last. Without a GPU the same cells run on a tiny random Llama: a
test of this script, no result.

The step ratio is of seconds on the clock. The device ratio is of the kernels' own time, summed over streams, without
copies: it does not depend on how fast or noisy the host is.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import subprocess
import sys
import time
import traceback
from pathlib import Path
from typing import Any, NamedTuple

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

from gpu_table import line, table

from grit_impl.cost.bench import StepBench, forget_grit, in_turn, ledger_blocks, ratios
from grit_impl.cost.measure import adamw

SPECS = {"8b": "random:llama-3-8b", "8l": "random:llama-3-8b-8-layers", "1b": "random:llama-1b"}
KEEP_FOR_TABLE = 10.0
LEAST_SECONDS = {"8b": 60.0, "8l": 20.0, "1b": 20.0}
"""By shape: a cell is not begun with less, or with less than twice that where the ledger is measured too."""


class Cell(NamedTuple):
    """One measurement: rank, tokens per sequence, checkpointing, its share of the time, and if the ledger's too."""

    shape: str
    rank: int
    length: int
    checkpointing: bool
    share: float = 1.0
    ledger: bool = False


# The most important first: what does not fit before the deadline is left out.
CELLS = {
    "unsloth": (
        Cell("8b", 16, 2048, True, 3, ledger=True),
        Cell("8b", 16, 512, True, 1.5),
        Cell("8b", 64, 512, True),
        Cell("8b", 16, 512, False),
        Cell("8b", 8, 512, True),
        Cell("8b", 64, 2048, True),
        Cell("8l", 16, 2048, True, 1.5, ledger=True),
        Cell("8l", 16, 512, True, 1.5, ledger=True),
        Cell("8l", 64, 2048, True, 0.5),
    ),
    "peft": (
        Cell("8b", 64, 512, True),
        Cell("8b", 16, 512, False),
        Cell("8b", 8, 512, True),
        Cell("8b", 16, 2048, True),
        Cell("8b", 16, 512, True, 2, ledger=True),
        Cell("8l", 16, 2048, True, 1, ledger=True),
        Cell("8l", 16, 512, True, 1),
        Cell("1b", 16, 512, True, 0.5),
        Cell("1b", 8, 512, True, 0.5),
        Cell("1b", 64, 512, True, 0.5),
        Cell("1b", 16, 512, False, 0.5),
        Cell("1b", 16, 2048, True, 0.5),
    ),
}


def main() -> int:
    """Make the weights, run each stack in a process, print the table."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("folder", type=Path)
    parser.add_argument("--deadline", type=float, default=1500, help="seconds for everything (default 1500)")
    parser.add_argument("--stacks", default="unsloth,peft", help="of unsloth and peft (default both)")
    parser.add_argument("--shapes", default="8b,8l,1b", help="of 8b, 8l and 1b (default all)")
    parser.add_argument("--child", help=argparse.SUPPRESS)
    parser.add_argument("--ends", type=float, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.child:
        return child(options)
    ends = time.time() + options.deadline
    out = Path(os.environ.get("OUT", str(options.folder))) / "gpu_cost.jsonl"
    out.parent.mkdir(parents=True, exist_ok=True)
    out.unlink(missing_ok=True)
    stacks, shapes = options.stacks.split(","), options.shapes.split(",")
    if has_cuda():
        for shape in shapes:
            run(
                [sys.executable, "-m", "grit_impl.recipes.random_base", SPECS[shape], str(options.folder / shape)], ends
            )
            say(f"weights of {SPECS[shape]}: ready")
    else:
        say("no GPU: the cells run on a tiny random Llama on the CPU; this tests the script and measures nothing")
    # What is left is shared out, so that one stack cannot use up the other's time.
    for i, stack in enumerate(stacks):
        stop = time.time() + (ends - KEEP_FOR_TABLE - time.time()) / (len(stacks) - i)
        arguments = ["--child", stack, "--ends", str(stop), "--shapes", options.shapes]
        run([sys.executable, __file__, str(options.folder), *arguments], stop + KEEP_FOR_TABLE)
    rows = [json.loads(line) for line in out.read_text().splitlines()] if out.exists() else []
    print(table(rows), flush=True)
    wanted = sum(cell.shape in shapes for stack in stacks for cell in CELLS[stack])
    return 0 if len(rows) == wanted and "MISSED" not in table(rows) else 1


def run(command: list[str], ends: float) -> None:
    """A process that ends when its time does; a failure is told and the rest goes on."""
    environment = {
        **os.environ,
        "PYTHONPATH": os.pathsep.join(p for p in (*sys.path[:1], os.getenv("PYTHONPATH")) if p),
    }
    try:
        subprocess.run(command, env=environment, timeout=max(1.0, ends - time.time()), check=True)
    except (subprocess.CalledProcessError, subprocess.TimeoutExpired) as error:
        say(f"stopped: {error}")


def say(text: str) -> None:
    """A line of progress, at once."""
    print(f"[{time.strftime('%H:%M:%S')}] {text}", flush=True)


def has_cuda() -> bool:
    """Asked without importing torch, so that Unsloth can still come first."""
    from grit_impl.machine import has_gpu

    return has_gpu()


def child(options: argparse.Namespace) -> int:
    """All cells of one stack."""
    out = Path(os.environ.get("OUT", str(options.folder))) / "gpu_cost.jsonl"
    stack, model, loaded = options.child, None, ""
    cells = [cell for cell in CELLS[stack] if cell.shape in options.shapes.split(",")]
    for i, cell in enumerate(cells):
        name = f"{stack} {cell.shape} r={cell.rank} tokens=2x{cell.length}x4 checkpointing={cell.checkpointing}"
        left = options.ends - time.time()
        if left < (LEAST_SECONDS[cell.shape] * (1 + cell.ledger) if has_cuda() else 5):
            say(f"SKIPPED {name}: {left:.0f} s left")
            continue
        try:
            if cell.shape != loaded:
                model = None
                model = load(stack, options.folder, cell.shape)
                loaded = cell.shape
                say(f"{stack} {cell.shape}: loaded")
            set_rank(model, cell.rank)
            set_checkpointing(model, cell.checkpointing)
            left = options.ends - time.time()
            seconds = left * cell.share / sum(each.share for each in cells[i:])
            row = {"stack": stack, **cell._asdict(), **measure(model, cell, seconds)}
        except Exception as error:  # one cell must not cost the others
            traceback.print_exc()
            say(f"FAILED {name}: {type(error).__name__}: {error}")
            continue
        finally:  # the next cell's plain steps and their memory know nothing of this one
            forget_grit(model)
        with out.open("a") as file:
            file.write(json.dumps(row) + "\n")
        say(f"{name}: {line(row)}")
    return 0


def load(stack: str, folder: Path, shape: str) -> Any:
    """The base model with LoRA on all projections."""
    from grit_impl.cost import measure

    if has_cuda():
        # Every cell would compile the layers anew, with GRIT and without; gpu_blocks.py measures compiled ones.
        os.environ.setdefault("UNSLOTH_BLOCK_COMPILE", "0")
        return measure.load(str(folder / shape), stack)
    model = measure.load("random:tiny", "peft")
    model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
    return model


def set_rank(model: Any, rank: int) -> None:
    """Replace the adapter by one of this rank; the base and what is patched around it stay."""
    from peft import LoraConfig

    (old,) = model.peft_config
    if model.peft_config[old].r == rank:
        return
    previous = model.peft_config[old]
    config = LoraConfig(
        r=rank, lora_alpha=rank, target_modules=previous.target_modules, task_type="CAUSAL_LM", bias="none"
    )
    model.add_adapter(f"r{rank}", config)
    model.set_adapter(f"r{rank}")
    model.delete_adapter(old)


def set_checkpointing(model: Any, on: bool) -> None:
    """Switch it in all modules that know of it, as `for_training` of Unsloth does."""
    for module in model.modules():
        if hasattr(module, "gradient_checkpointing"):
            module.gradient_checkpointing = on


def measure(model: Any, cell: Cell, seconds: float) -> dict[str, Any]:
    """One cell: memory first (before GRIT has any), what needs no rounds, then steps in turn for the time that is left.

    Args:
        model: On its stack, with adapters of the cell's rank.
        cell: What to measure.
        seconds: For all of it. Without a GPU: four.
    """
    import torch

    cuda = torch.cuda.is_available()
    ends = time.perf_counter() + (seconds if cuda else 4)
    bench = StepBench(model, adamw, length=cell.length if cuda else 16, autocast=cuda)
    peaks = {grit: value / 2**30 if cuda else float("nan") for grit, value in bench.peaks().items()}
    result: dict[str, Any] = preconditioning(bench)
    kernels = device_time(bench) if cuda else None
    left = ends - time.perf_counter()
    arms = {"plain": lambda: bench.step(grit=False), "grit": lambda: bench.step(grit=True)}
    times = in_turn(arms, rounds=1000, seconds=max(2.0, left * (0.6 if cell.ledger else 1.0)), warm_up=0)
    if cell.ledger:
        result |= ledger_cost(bench, ends - time.perf_counter())
    report = bench.manager.factor_report()
    bench.inner.zero_grad()
    return {
        "gpu": torch.cuda.get_device_name() if cuda else None,
        "torch": torch.__version__,
        "layers": len(bench.manager.layers),
        "plain_seconds": statistics.median(times["plain"]),
        "grit_seconds": statistics.median(times["grit"]),
        "ratios": [round(v, 5) for v in ratios(times["grit"], times["plain"])],
        "kernels_ms": kernels,
        "device_ratio": None if kernels is None else sum(kernels["grit"]) / sum(kernels["plain"]),
        "plain_peak_gib": peaks[False],
        "grit_peak_gib": peaks[True],
        "memory_ratio": peaks[True] / peaks[False],
        **result,
        "ready": report["statuses"].get("ready", 0),
        "completeness_error": report["completeness_error"],
    }


def device_time(bench: StepBench) -> dict[str, list[float]]:
    """Milliseconds of all kernels of a step: two steps of each kind, in turn."""
    found: dict[str, list[float]] = {"plain": [], "grit": []}
    for _ in range(2):
        found["plain"].append(kernel_ms(lambda: bench.step(grit=False)))
        found["grit"].append(kernel_ms(lambda: bench.step(grit=True)))
    return found


def preconditioning(bench: StepBench) -> dict[str, Any]:
    """The inversion of all factors, one `precondition`, and whether it waits for the device."""
    import torch

    def elapsed(work: Any) -> float:
        """Milliseconds on the device (on the CPU: of the host)."""
        if bench.device.type != "cuda":
            began = time.perf_counter()
            work()
            return (time.perf_counter() - began) * 1e3
        start, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
        torch.cuda.synchronize()
        start.record()
        work()
        end.record()
        torch.cuda.synchronize()
        return start.elapsed_time(end)

    factors = bench.manager.factors
    inversions = [elapsed(factors.invert) for _ in range(21)][1:]
    device_ms = kernel_ms(factors.invert) if bench.device.type == "cuda" else None
    bench.manager.attach()
    result: dict[str, Any] = {
        "factors": 2 * len(bench.manager.layers),
        "invert_ms": statistics.median(inversions),
        "invert_device_ms": device_ms,
    }
    waits = {}
    bench.backward()
    bench.wait()
    began = time.perf_counter()
    bench.manager.precondition()
    result["precondition_host_ms"] = (time.perf_counter() - began) * 1e3
    bench.inner.zero_grad()
    if bench.device.type == "cuda":
        bench.manager.step = 4  # an inversion is due
        bench.backward()
        torch.cuda.set_sync_debug_mode("error")
        try:
            bench.manager.precondition()
            waits["debug mode"] = "none"
        except RuntimeError as error:
            waits["debug mode"] = str(error).splitlines()[0]
        finally:
            torch.cuda.set_sync_debug_mode("default")
        bench.inner.zero_grad()
        waits |= profiled(bench)
    return {**result, "waits": waits}


def kernel_ms(work: Any) -> float:
    """Milliseconds that the device computes, without the host's launches."""
    import torch
    from torch.profiler import ProfilerActivity, profile

    with profile(activities=[ProfilerActivity.CUDA]) as watched:
        work()
        torch.cuda.synchronize()
    events = watched.profiler.kineto_results.events()
    device = (e for e in events if e.device_type() == torch.autograd.DeviceType.CUDA)
    return sum(e.duration_ns() for e in device if not e.name().startswith(("Memcpy", "Memset"))) / 1e6


def profiled(bench: StepBench) -> dict[str, Any]:
    """Calls that make the host wait: inside `precondition`, and in the passes with and without GRIT's hooks."""
    import torch
    from torch.profiler import ProfilerActivity, profile

    accumulation, bench.accumulation = bench.accumulation, 1

    def calls(work: Any) -> dict[str, int]:
        with profile(activities=[ProfilerActivity.CPU, ProfilerActivity.CUDA]) as watched:
            work()
        found: dict[str, int] = {}
        for event in watched.profiler.kineto_results.events():
            if "Synchronize" in event.name() or "DtoH" in event.name():
                found[event.name()] = found.get(event.name(), 0) + 1
        # The profiler itself waits for the device at its end.
        return {k: v for k, v in sorted(found.items()) if k != "cudaDeviceSynchronize"}

    result: dict[str, Any] = {}
    for grit in (False, True):
        bench.manager.attach() if grit else bench.manager.detach()
        bench.inner.zero_grad()
        result["passes with GRIT" if grit else "passes without"] = calls(bench.backward)
    torch.cuda.synchronize()
    result["precondition"] = calls(bench.manager.precondition)
    bench.inner.zero_grad()
    bench.accumulation = accumulation
    return result


def ledger_cost(bench: StepBench, seconds: float) -> dict[str, Any]:
    """GRIT steps with the ledger over GRIT steps without: one ratio per pair of blocks, whose steps share a drift."""
    with_, without = ledger_blocks(bench, seconds, steps=8)
    return {
        "ledger_ratios": [round(v, 5) for v in ratios(with_, without, block=8)],
        "ledger_seconds": statistics.median(with_),
    }


if __name__ == "__main__":
    sys.exit(main())
