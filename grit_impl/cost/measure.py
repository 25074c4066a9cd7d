"""What GRIT costs on one stack: steps with and without it take turns in one process.

Two arms that train one after the other on one card differ by the drift of the machine; here every ratio is made of two
steps that follow each other. The result is a JSON file that the claims about time and memory are judged on; every
length is kept as soon as it is measured. `execute.run_cost` starts this and watches the file.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

from grit_impl.errors import GRITError
from grit_impl.processes import end_with_parent
from grit_impl.record import write_atomic

if TYPE_CHECKING:
    from grit_impl.cost.bench import StepBench

STACKS = ("unsloth", "peft")
ROUNDS, LENGTHS = 1000, (512, 2048)
"""Rounds at most, and tokens per sequence."""
SECONDS = 90.0
"""For the rounds of each length."""


def read(target: Path) -> dict[str, Any]:
    """The figures in a file; no cells where there is none.

    Raises:
        GRITError: it is damaged, or something else.
    """
    try:
        found = json.loads(target.read_text())
        cells = found.get("cells") if isinstance(found, dict) else None
        if not (isinstance(cells, list) and all(isinstance(cell, dict) and "length" in cell for cell in cells)):
            raise ValueError("it is no measurement of cost")
    except FileNotFoundError:
        return {"cells": []}
    except OSError as error:
        raise GRITError(f"cannot read {target}: {error.strerror or error}") from error
    except ValueError as error:
        raise GRITError(f"{target} is damaged ({error}): remove it") from error
    return {**found, "cells": cells}


def complete(found: dict[str, Any], inputs: str) -> bool:
    """Whether these are the figures of all lengths, made from these inputs."""
    return found.get("inputs") == inputs and {cell["length"] for cell in found["cells"]} >= set(LENGTHS)


def measure(
    model: Any,
    length: int,
    *,
    seconds: float,
    rounds: int = ROUNDS,
    update_rule: str = "precondition",
    ledger_seconds: float = 0.0,
    tell: Callable[[], None] = lambda: None,
) -> dict[str, Any]:
    """Ratios of step times and of peak memory (bytes allocated on the GPU) with GRIT and without.

    Args:
        model: A PEFT model on its device.
        length: Tokens per sequence; two sequences, four micro-batches.
        seconds: Budget of the rounds.
        rounds: At most.
        update_rule: GRIT's. The optimizer that a rule replaces stays in memory, because the plain steps need it.
        ledger_seconds: Above 0: that long, GRIT steps with the gradient ledger and without it in turn.
        tell: Called when the rounds begin.
    """
    from grit_impl.cost.bench import forget_grit

    try:
        return {
            "length": length,
            "update_rule": update_rule,
            **_figures(bench_of(model, length, update_rule), seconds, rounds, ledger_seconds, tell),
        }
    finally:
        forget_grit(model)


def _figures(
    bench: StepBench, seconds: float, rounds: int, ledger_seconds: float, tell: Callable[[], None]
) -> dict[str, Any]:
    from grit_impl.cost.bench import in_turn, ledger_blocks, ratios
    from grit_impl.recipes.unsloth import compiled_layers

    peaks = bench.peaks()
    arms = {"plain": lambda: bench.step(grit=False), "grit": lambda: bench.step(grit=True)}
    tell()
    times = in_turn(arms, rounds, seconds=seconds, warm_up=0)
    ledger = ratios(*ledger_blocks(bench, ledger_seconds)) if ledger_seconds else []
    report = bench.manager.factor_report()
    return {
        "plain_seconds": statistics.median(times["plain"]),
        "grit_seconds": statistics.median(times["grit"]),
        "step_ratios": ratios(times["grit"], times["plain"]),
        "ledger_ratios": ledger,
        "plain_peak_bytes": peaks[False],
        "grit_peak_bytes": peaks[True],
        "layers": len(report["layers"]),
        "compiled_layers": compiled_layers(bench.model),
        "ready": report["statuses"].get("ready", 0),
        "completeness_error": report["completeness_error"],
    }


def bench_of(model: Any, length: int, update_rule: str = "precondition") -> StepBench:
    """Steps of this length, with and without GRIT; all factors are inverted at every step.

    That is an upper bound, and makes rounds alike but for every 16th, which solves the spectra on the host: about 0.1 s
    at rank 16, which a median does not show.
    """
    from grit_impl.config import GRITConfig
    from grit_impl.cost.bench import StepBench

    config = GRITConfig.from_dict({"update_rule": update_rule, "kfac_update_freq": 1})
    return StepBench(model, adamw, length=length, autocast=next(model.parameters()).is_cuda, config=config)


def adamw(parameters: list[Any]) -> Any:
    """What the arms train with: AdamW, with 8-bit moments on a GPU."""
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
        import torch._dynamo

        # Compiled layers have graphs of their own with GRIT and without; past the limit they would run uncompiled.
        torch._dynamo.config.recompile_limit = 64
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
    found, cells = read(options.target), []
    if options.inputs and found.get("inputs") == options.inputs:
        cells = found["cells"]
    elif found["cells"]:  # minutes of a GPU: moved aside, like a run of other inputs
        options.target.replace(options.target.with_suffix(f".{(found.get('inputs') or 'unknown')[:8]}.json"))

    def keep(running: dict[str, Any] | None = None) -> None:
        write_atomic(options.target, json.dumps({**head, "cells": cells, "running": running}, indent=1))

    keep()
    todo = [length for length in options.lengths if length not in {cell["length"] for cell in cells}]
    for length in todo:
        cell = measure(
            model,
            length,
            seconds=options.seconds,
            update_rule=options.update_rule,
            ledger_seconds=options.ledger_seconds,
            tell=lambda: keep({"process": os.getpid(), "since": time.time()}),
        )
        cells.append(cell)
        keep()
        print(json.dumps(cell), flush=True)


if __name__ == "__main__":
    sys.exit(main())
