"""What GRIT costs on a GPU: ratios of steps that take turns in one process, peak memory, inversions, waiting.

    python suites/benchmarks/gpu_step.py FOLDER [--deadline 450] [--stacks unsloth,peft] [--shapes 8b,1b]

FOLDER receives `random:llama-3-8b` and `random:llama-1b` with NF4 weights, unless they are there. Every stack runs in
a process of its own (Unsloth patches what it finds imported), one line per cell; a cell that does not fit into its
time, or into what is left until the deadline (seconds), is named as skipped. The results are lines of JSON in
$OUT/gpu_cost.jsonl (or in FOLDER), and the table comes last. Without a GPU the same cells run on a tiny random Llama: a
test of this script, no result.
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

from grit_impl.verify.cost import TARGETS, Bench, in_turn, ledger_blocks, misses, ratios, spread

SPECS = {"8b": "random:llama-3-8b", "1b": "random:llama-1b"}
KEEP_FOR_TABLE = 10.0


class Cell(NamedTuple):
    """One measurement: rank, tokens per sequence, checkpointing, and what is done beyond the step."""

    shape: str
    rank: int
    length: int
    checkpointing: bool
    seconds: float
    extras: bool = False


# The most important first: what does not fit before the deadline is left out.
CELLS = {
    "unsloth": (
        Cell("8b", 16, 512, True, 70, True),
        Cell("8b", 16, 2048, True, 75, True),
        Cell("8b", 8, 512, True, 18),
        Cell("8b", 64, 512, True, 18),
        Cell("8b", 16, 512, False, 18),
        Cell("8b", 64, 2048, True, 25),
    ),
    "peft": (
        Cell("8b", 16, 512, True, 40, True),
        Cell("8b", 8, 512, True, 22),
        Cell("8b", 64, 512, True, 22),
        Cell("8b", 16, 512, False, 20),
        Cell("1b", 16, 512, True, 10, True),
        Cell("1b", 8, 512, True, 8),
        Cell("1b", 64, 512, True, 8),
        Cell("1b", 16, 512, False, 8),
        Cell("1b", 16, 2048, True, 12),
        Cell("8b", 16, 2048, True, 30),
    ),
}


def main() -> int:
    """Make the weights, run each stack in a process, print the table."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("folder", type=Path)
    parser.add_argument("--deadline", type=float, default=450, help="seconds for everything")
    parser.add_argument("--stacks", default="unsloth,peft")
    parser.add_argument("--shapes", default="8b,1b")
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
    return 0 if rows and not any("MISSED" in line for line in table(rows).splitlines()) else 1


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
    for cell in CELLS[stack]:
        name = f"{stack} {cell.shape} r={cell.rank} tokens=2x{cell.length}x4 checkpointing={cell.checkpointing}"
        if cell.shape not in options.shapes.split(","):
            continue
        left = options.ends - time.time()
        if left < cell.seconds:
            say(f"SKIPPED {name}: {left:.0f} s left, it may take {cell.seconds:.0f}")
            continue
        try:
            if cell.shape != loaded:
                model = None
                model = load(stack, options.folder, cell.shape)
                loaded = cell.shape
                say(f"{stack} {cell.shape}: loaded")
            set_rank(model, cell.rank)
            set_checkpointing(model, cell.checkpointing)
            row = {"stack": stack, **cell._asdict(), **measure(model, cell, options.ends)}
        except Exception as error:  # one cell must not cost the others
            traceback.print_exc()
            say(f"FAILED {name}: {type(error).__name__}: {error}")
            continue
        with out.open("a") as file:
            file.write(json.dumps(row) + "\n")
        say(f"{name}: {line(row)}")
    return 0


def load(stack: str, folder: Path, shape: str) -> Any:
    """The base model with LoRA on all projections."""
    from grit_impl.recipes.lora import LoRASettings, add_lora

    if not has_cuda():
        from grit_impl.recipes.bases import load_base

        base, _ = load_base("random:tiny")
        base.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
        return add_lora(base, LoRASettings(r=16, alpha=16), 3407)
    if stack == "unsloth":
        from grit_impl.recipes.arms import TrainingSettings
        from grit_impl.recipes.unsloth import load_unsloth

        settings = TrainingSettings(precision="bf16", gradient_checkpointing=True, max_length=2048)
        return load_unsloth(str(folder / shape), LoRASettings(r=16, alpha=16), settings, 3407)[0]
    from peft import prepare_model_for_kbit_training

    from grit_impl.recipes.bases import load_base

    base, _ = load_base(str(folder / shape))
    base = prepare_model_for_kbit_training(
        base, use_gradient_checkpointing=True, gradient_checkpointing_kwargs={"use_reentrant": False}
    )
    return add_lora(base, LoRASettings(r=16, alpha=16), 3407)


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


def optimizer(parameters: list[Any]) -> Any:
    """8-bit AdamW on a GPU."""
    import torch

    if not parameters[0].is_cuda:
        return torch.optim.AdamW(parameters, lr=1e-5)
    from bitsandbytes.optim import AdamW8bit

    return AdamW8bit(parameters, lr=1e-5)


def measure(model: Any, cell: Cell, ends: float) -> dict[str, Any]:
    """One cell: memory first (before GRIT has any), then steps in turn, then what else was asked."""
    import torch

    cuda = torch.cuda.is_available()
    began = time.perf_counter()
    bench = Bench(model, optimizer, length=cell.length if cuda else 16, autocast=cuda)
    peaks, first = {}, {}
    for grit in (False, True):
        first[grit] = bench.step(grit=grit)
        if grit:  # the second step compares statistics and gradients once
            bench.step(grit=True)
        if cuda:
            torch.cuda.empty_cache()
            torch.cuda.reset_peak_memory_stats()
        bench.step(grit=grit)
        peaks[grit] = torch.cuda.max_memory_allocated() / 2**30 if cuda else float("nan")
    budget = min(cell.seconds if cuda else 4, ends - time.time()) * (0.45 if cell.extras else 0.8) - (
        time.perf_counter() - began
    )
    arms = {"plain": lambda: bench.step(grit=False), "grit": lambda: bench.step(grit=True)}
    times = in_turn(arms, rounds=60, seconds=max(2.0, budget), warm_up=0)
    values = ratios(times["grit"], times["plain"])
    result: dict[str, Any] = {
        "gpu": torch.cuda.get_device_name() if cuda else None,
        "torch": torch.__version__,
        "layers": len(bench.manager.layers),
        "plain_seconds": statistics.median(times["plain"]),
        "grit_seconds": statistics.median(times["grit"]),
        "ratios": [round(v, 5) for v in values],
        "ratio_of_sums": sum(times["grit"]) / sum(times["plain"]),
        "plain_peak_gib": peaks[False],
        "grit_peak_gib": peaks[True],
        "memory_ratio": peaks[True] / peaks[False],
    }
    result |= preconditioning(bench)
    if cell.extras:
        result |= ledger_cost(bench, min(ends - time.time(), cell.seconds * 0.45 if cuda else 4))
    report = bench.manager.factor_report()
    result |= {"ready": report["statuses"].get("ready", 0), "completeness_error": report["completeness_error"]}
    bench.manager.detach()
    bench.inner.zero_grad()
    return result


def preconditioning(bench: Bench) -> dict[str, Any]:
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
    return sum(e.duration_ns() for e in events if e.device_type() == torch.autograd.DeviceType.CUDA) / 1e6


def profiled(bench: Bench) -> dict[str, Any]:
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


def ledger_cost(bench: Bench, seconds: float) -> dict[str, Any]:
    """GRIT steps with the ledger over GRIT steps without."""
    with_, without = ledger_blocks(bench, seconds, steps=8)
    return {
        "ledger_ratios": [round(v, 5) for v in ratios(with_, without)],
        "ledger_seconds": statistics.median(with_),
    }


def line(row: dict[str, Any]) -> str:
    """One cell in one line."""
    text = (
        f"{row['plain_seconds']:.3f} s -> {row['grit_seconds']:.3f} s, x {spread(row['ratios'])} "
        f"(n={len(row['ratios'])}), memory x {row['memory_ratio']:.4f} of {row['plain_peak_gib']:.2f} GiB, "
        f"{row['factors']} inversions {row['invert_ms']:.2f} ms, {row['ready']}/{row['layers']} ready, "
        f"waits {row['waits']}"
    )
    return text + (f", ledger x {spread(row['ledger_ratios'])}" if "ledger_ratios" in row else "")


def table(rows: list[dict[str, Any]]) -> str:
    """Markdown: every target stands beside its measurement."""
    lines = [
        "| stack | shape | r | tokens | checkpointing | step, plain | step ratio | memory ratio | inversions, ms "
        "(device) | ledger | targets |",
        "|---|---|---|---|---|---|---|---|---|---|---|",
    ]
    for row in rows:
        step, judged = spread(row["ratios"]), row["shape"] == "8b" and row["gpu"]
        ledger = spread(row["ledger_ratios"]) if "ledger_ratios" in row else None
        device = "-" if row["invert_device_ms"] is None else f"{row['invert_device_ms']:.2f}"
        missed = [
            name
            for name, bad in (
                ("step", misses(step, TARGETS["gpu step"])),
                ("memory", row["memory_ratio"] > TARGETS["gpu memory"]),
                ("inversions", (row["invert_device_ms"] or row["invert_ms"]) > TARGETS["inversion of 448 factors, ms"]),
                ("ledger", ledger is not None and misses(ledger, TARGETS["ledger"])),
            )
            if bad
        ]
        open_ = [
            name
            for name, found, target in (("step", step, "gpu step"), ("ledger", ledger, "ledger"))
            if found is not None and found.high > TARGETS[target]
        ]
        verdict = "MISSED: " + ", ".join(missed) if missed else "open: " + ", ".join(open_) if open_ else "met"
        verdict = verdict if judged else "-"
        lines.append(
            f"| {row['stack']} | {row['shape']} | {row['rank']} | 2 x {row['length']} x 4 | "
            f"{'on' if row['checkpointing'] else 'off'} | {row['plain_seconds']:.3f} s | {step} | "
            f"{row['memory_ratio']:.4f} | {row['invert_ms']:.2f} ({device}) | {ledger or '-'} | {verdict} |"
        )
    return "\n".join(lines)


if __name__ == "__main__":
    sys.exit(main())
