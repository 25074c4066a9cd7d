"""Hybrid GRIT against Unsloth as it comes, which compiles each decoder layer as one region.

    python suites/benchmarks/gpu_blocks.py FOLDER [--seconds 120] [--lengths 512 2048]

FOLDER is a base model (`python -m grit_impl.recipes.random_base random:llama-3-8b FOLDER` writes one). Unsloth, asked
for those regions, rewrites the layers' classes for good: so two processes on one GPU take steps in turn, one with
`UNSLOTH_BLOCK_COMPILE=1`, the other with 0, each without GRIT and with it. The table has ratios of neighbouring steps
with their intervals, peaks of allocated memory, and what GRIT has seen. Without a GPU the processes take plain peft
steps of a tiny model: a test of this script, no result.
"""

from __future__ import annotations

import argparse
import os
import sys
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager, suppress
from multiprocessing import get_context
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

from grit_impl.cost.bench import forget_grit, frozen_objects, in_turn, ratios, spread
from grit_impl.errors import GRITError

PAIRS = (("compiled grit", "compiled"), ("grit", "compiled"), ("grit", "plain"), ("plain", "compiled"))


def work(pipe: Connection, folder: str, stack: str, blocks: str) -> None:
    """A process with one model.

    ("length", n) -> layers that run compiled and of how many, peaks, what GRIT has seen; ("step", grit) -> seconds.
    """
    os.environ["UNSLOTH_BLOCK_COMPILE"] = blocks
    from grit_impl.cost.measure import bench_of, load
    from grit_impl.recipes.unsloth import compiled_layers

    try:
        model = load(folder, stack)
    except GRITError as error:
        sys.exit(f"error: {error}")
    bench: Any = None
    with ExitStack() as frozen:
        while (asked := pipe.recv()) is not None:
            what, value = asked
            if what == "step":
                pipe.send(bench.step(grit=value))
                continue
            frozen.close()
            bench = None
            forget_grit(model)
            bench = bench_of(model, value)
            peaks, report = bench.peaks(), bench.manager.factor_report()
            frozen.enter_context(frozen_objects())
            error = f"{report['completeness_error']:.4f}"
            seen = f"{report['statuses'].get('ready', 0)} of {len(report['layers'])} layers, completeness error {error}"
            pipe.send(((compiled_layers(model), model.config.num_hidden_layers), peaks, seen))


@contextmanager
def worker(folder: str, stack: str, blocks: str) -> Iterator[Callable[[str, Any], Any]]:
    """A function that asks such a process; the process ends with the block."""
    context = get_context("spawn")
    here, there = context.Pipe()
    process = context.Process(target=work, args=(there, folder, stack, blocks))
    process.start()
    there.close()

    def ask(what: str, value: Any) -> Any:
        try:
            here.send((what, value))
            return here.recv()
        except (EOFError, ConnectionError):
            process.join()
            sys.exit(f"the process with UNSLOTH_BLOCK_COMPILE={blocks} ended with status {process.exitcode}")

    try:
        yield ask
    finally:
        with suppress(ConnectionError):
            here.send(None)
        process.join()


def main() -> int:
    """Measure and print the table."""
    from grit_impl.machine import has_gpu

    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", help="base model")
    parser.add_argument("--seconds", type=float, default=120.0, help="of each length's rounds (default 120)")
    parser.add_argument("--lengths", type=int, nargs="+", default=[2048, 512], help="tokens per sequence")
    options = parser.parse_args()
    stack = "unsloth" if has_gpu() else "peft"
    with worker(options.folder, stack, "1") as compiled, worker(options.folder, stack, "0") as fused:
        for length in options.lengths:
            (layers, of), alone, seen = compiled("length", length)
            (others, _), both, seen_fused = fused("length", length)
            if stack == "unsloth" and (layers != of or others):
                sys.exit(
                    f"Unsloth runs {layers} of {of} layers compiled where all were asked for, {others} where none were"
                )
            peaks = {"compiled": alone[False], "compiled grit": alone[True], "plain": both[False], "grit": both[True]}
            arms = {
                "compiled": lambda: compiled("step", False),
                "compiled grit": lambda: compiled("step", True),
                "plain": lambda: fused("step", False),
                "grit": lambda: fused("step", True),
            }
            times = in_turn(arms, 1000, seconds=options.seconds)
            rounds = len(times["grit"])
            print(f"{stack}, {length} tokens per sequence, {layers} compiled layers, {rounds} rounds", flush=True)
            print(f"  seen in compiled layers: {seen}; without: {seen_fused}", flush=True)
            for over, under in PAIRS:
                memory = f"{peaks[over] / peaks[under]:.4f} of {peaks[under] / 2**30:.2f} GiB" if peaks[under] else "-"
                seconds = spread(times[under]).median
                step = spread(ratios(times[over], times[under]))
                print(f"  {over:>13} over {under:<8}  step {step} of {seconds:.3f} s  memory {memory}", flush=True)
    return 0


if __name__ == "__main__":
    sys.exit(main())
