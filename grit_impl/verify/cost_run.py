"""What GRIT costs on one stack: steps with and without it take turns in one process.

Two arms that train one after the other on one card differ by the drift of the machine; here every ratio is made of two
steps that follow each other. The result is a JSON file that the claims about time and memory are judged on; every
length is kept as soon as it is measured. This module is both sides: `run_cost` starts `python -m
grit_impl.verify.cost_run` and watches its file. The parent imports no torch.
"""

from __future__ import annotations

import argparse
import json
import statistics
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from grit_impl.errors import GRITError, RunFailed
from grit_impl.record import write_atomic
from grit_impl.verify.processes import end_with_parent, last_line

STACKS = ("unsloth", "peft")
ROUNDS, LENGTHS = 1000, (512, 2048)
"""Rounds at most, and tokens per sequence."""
SECONDS = 90.0
"""For the rounds of each length."""
SETTLED = 2
_POLL_SECONDS = 0.5


def run_cost(
    base: str, stack: str, target: Path, *, seconds: float, inputs: str, progress: Callable[[str, int, int], None]
) -> dict[str, Any]:
    """Measure one stack in a process of its own; lengths that an interrupted measurement finished are kept.

    Args:
        base: Folder of the base model.
        stack: `unsloth` or `peft`.
        target: The JSON file; what the process prints goes beside it.
        seconds: For the rounds of each length.
        inputs: Fingerprint of what the figures depend on: other figures are measured anew.
        progress: Told about seconds of rounds.

    Returns:
        The content of the file.

    Raises:
        RunFailed: the process ended with an error.
    """
    label, log = f"measuring the cost on {stack}, seconds", target.with_suffix(".log")
    target.parent.mkdir(parents=True, exist_ok=True)
    command = [sys.executable, "-m", "grit_impl.verify.cost_run", base, stack, str(target)]
    command += ["--seconds", str(seconds), "--inputs", inputs]
    with open(log, "wb") as sink:
        process = subprocess.Popen(command, stdout=sink, stderr=subprocess.STDOUT)
    try:
        while (status := process.poll()) is None:
            progress(label, round(_seconds_done(read(target), seconds, inputs)), round(len(LENGTHS) * seconds))
            time.sleep(_POLL_SECONDS)
    finally:
        process.terminate()
        process.wait()
    found = read(target)
    if status or not complete(found, inputs):
        raise RunFailed(f"{last_line(log)} (see {log})")
    progress(label, round(len(LENGTHS) * seconds), round(len(LENGTHS) * seconds))
    return found


def read(target: Path) -> dict[str, Any]:
    """The figures in a file; no cells where there is none.

    Raises:
        GRITError: it is damaged, or something else.
    """
    if not target.is_file():
        return {"cells": []}
    try:
        found = json.loads(target.read_text())
        return {**found, "cells": [{**cell, "length": cell["length"]} for cell in found["cells"]]}
    except (ValueError, KeyError, TypeError) as error:
        raise GRITError(f"{target} is damaged ({error}): remove it") from error


def complete(found: dict[str, Any], inputs: str) -> bool:
    """Whether these are the figures of all lengths, made from these inputs."""
    return found.get("inputs") == inputs and {cell["length"] for cell in found["cells"]} >= set(LENGTHS)


def _seconds_done(found: dict[str, Any], seconds: float, inputs: str) -> float:
    if found.get("inputs") != inputs:  # of an earlier measurement, until the process replaces it
        return 0.0
    return len(found["cells"]) * seconds + min(float(found.get("running", 0)), seconds)


def measure(
    model: Any,
    length: int,
    *,
    seconds: float,
    rounds: int = ROUNDS,
    update_rule: str = "precondition",
    ledger_seconds: float = 0.0,
    tell: Callable[[float], None] = lambda seconds: None,
) -> dict[str, Any]:
    """Ratios of step times and of peak memory (bytes allocated on the GPU) with GRIT and without.

    Args:
        model: A PEFT model on its device.
        length: Tokens per sequence; two sequences, four micro-batches.
        seconds: Budget of the rounds.
        rounds: At most.
        update_rule: GRIT's. The optimizer that a rule replaces stays in memory, because the plain steps need it.
        ledger_seconds: Above 0: that long, GRIT steps with the gradient ledger and without it in turn.
        tell: Called between two steps with the seconds that the rounds have taken.
    """
    import torch

    from grit_impl.config import GRITConfig
    from grit_impl.verify.cost import Bench, in_turn, ledger_blocks, ratios

    cuda = next(model.parameters()).is_cuda
    # All factors are inverted at every step: an upper bound, and every round alike.
    config = GRITConfig.from_dict({"update_rule": update_rule, "kfac_update_freq": 1})
    bench = Bench(model, _optimizer, length=length, autocast=cuda, config=config)
    peaks = {}
    for grit in (False, True):
        for _ in range(SETTLED):  # kernels are compiled, and the statistics checked once
            bench.step(grit=grit)
        if cuda:
            torch.cuda.empty_cache()
            torch.cuda.reset_peak_memory_stats()
        bench.step(grit=grit)
        peaks[grit] = torch.cuda.max_memory_allocated() if cuda else 0
    began = time.perf_counter()

    def step(grit: bool) -> float:
        tell(time.perf_counter() - began)
        return bench.step(grit=grit)

    arms = {"plain": lambda: step(False), "grit": lambda: step(True)}
    times = in_turn(arms, rounds, seconds=seconds, warm_up=0)
    ledger = ratios(*ledger_blocks(bench, ledger_seconds)) if ledger_seconds else []
    report = bench.manager.factor_report()
    bench.manager.detach()
    return {
        "length": length,
        "update_rule": update_rule,
        "plain_seconds": statistics.median(times["plain"]),
        "grit_seconds": statistics.median(times["grit"]),
        "step_ratios": ratios(times["grit"], times["plain"]),
        "ledger_ratios": ledger,
        "plain_peak_bytes": peaks[False],
        "grit_peak_bytes": peaks[True],
        "layers": len(bench.manager.layers),
        "ready": report["statuses"].get("ready", 0),
        "completeness_error": report["completeness_error"],
    }


def _optimizer(parameters: list[Any]) -> Any:
    import torch

    if not parameters[0].is_cuda:
        return torch.optim.AdamW(parameters, lr=1e-5)
    from bitsandbytes.optim import AdamW8bit  # type: ignore[import-not-found]

    return AdamW8bit(parameters, lr=1e-5)


def load(folder: str, stack: str) -> Any:
    """The base with LoRA on all projections, as the arms of that stack load it."""
    from grit_impl.recipes.arms import RunSpec, default_training

    if stack == "unsloth":
        from grit_impl.recipes.unsloth import import_unsloth

        import_unsloth()
    import torch

    from grit_impl.recipes.train import build_model

    arm = "hybrid" if stack == "unsloth" else "pure"
    spec = RunSpec(arm, folder, training=default_training(folder, cuda=torch.cuda.is_available()))
    model, _ = build_model(spec, stack == "unsloth")
    if not torch.cuda.is_available():
        model.cpu()
    elif stack == "peft":
        model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
    return model


def main() -> int:
    """Entry of the process: folder, stack, target."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("folder", help="base model")
    parser.add_argument("stack", choices=STACKS)
    parser.add_argument("target", type=Path, help="JSON file to write")
    parser.add_argument("--lengths", type=int, nargs="+", default=LENGTHS, help="tokens per sequence")
    parser.add_argument("--seconds", type=float, default=SECONDS, help="for the rounds of each length")
    parser.add_argument("--update-rule", default="precondition", help="GRIT's (default precondition)")
    parser.add_argument("--ledger-seconds", type=float, default=0.0, help="for steps with the ledger (default: none)")
    parser.add_argument("--inputs", default="", help="fingerprint that lets a later call go on from the file")
    options = parser.parse_args()
    if options.inputs:
        end_with_parent()  # two measurements at once would disturb each other
    try:
        _fill(options)
    except GRITError as error:
        print(f"error: {error}", flush=True)
        return 2
    return 0


def _fill(options: argparse.Namespace) -> None:
    """Measure what the file lacks."""
    model = load(options.folder, options.stack)
    import torch  # after Unsloth, which sets the allocator's options when it is imported

    gpu = torch.cuda.get_device_name() if torch.cuda.is_available() else None
    head = {"stack": options.stack, "gpu": gpu, "inputs": options.inputs}
    found = read(options.target) if options.inputs else {}
    cells: list[dict[str, Any]] = []
    if head.items() <= found.items():
        cells = found["cells"]
    elif found.get("cells"):  # minutes of a GPU: moved aside, like a run of other inputs
        options.target.replace(options.target.with_suffix(f".{(found.get('inputs') or 'unknown')[:8]}.json"))
    written = 0.0

    def keep(running: float = 0.0) -> None:
        nonlocal written
        if not running or time.monotonic() - written > 1:
            write_atomic(options.target, json.dumps({**head, "cells": cells, "running": running}, indent=1))
            written = time.monotonic()

    todo = [length for length in options.lengths if length not in {cell["length"] for cell in cells}]
    keep()
    for length in todo:
        cell = measure(
            model,
            length,
            seconds=options.seconds,
            update_rule=options.update_rule,
            ledger_seconds=options.ledger_seconds,
            tell=keep,
        )
        cells.append(cell)
        keep()
        print(json.dumps(cell), flush=True)


if __name__ == "__main__":
    sys.exit(main())
