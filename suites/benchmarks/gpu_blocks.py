"""Hybrid GRIT against Unsloth as it comes, which compiles each decoder layer as one region.

    python suites/benchmarks/gpu_blocks.py FOLDER [--seconds 120] [--lengths 512 2048]

FOLDER is a base model (`python -m grit_impl.recipes.random_base random:llama-3-8b FOLDER` writes one). GRIT has to
switch those regions off, and Unsloth reads the switch when it is imported: so two processes on one GPU take steps in
turn, one with `UNSLOTH_BLOCK_COMPILE=1` and without GRIT, the other with 0, without GRIT and with it. The table has
ratios of neighbouring steps with their intervals, and peaks of allocated memory. Without a GPU the processes take
plain peft steps of a tiny model: a test of this script, no result.
"""

from __future__ import annotations

import argparse
import os
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from multiprocessing import get_context
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

from grit_impl.errors import GRITError
from grit_impl.verify.cost import in_turn, ratios, spread

PAIRS = (("grit", "compiled"), ("grit", "plain"), ("plain", "compiled"))


def work(pipe: Connection, folder: str, stack: str, blocks: str) -> None:
    """A process with one model: answers a length with its peaks, and whether GRIT is on with the seconds of a step."""
    os.environ["UNSLOTH_BLOCK_COMPILE"] = blocks
    from grit_impl.verify.cost import forget_grit
    from grit_impl.verify.cost_run import bench_of, load

    try:
        model, bench = load(folder, stack), None
    except GRITError as error:
        sys.exit(f"error: {error}")
    while (asked := pipe.recv()) is not None:
        if isinstance(asked, bool):
            pipe.send(bench.step(grit=asked))
            continue
        forget_grit(model)
        bench = bench_of(model, asked)
        pipe.send(bench.peaks(grit=blocks == "0"))


@contextmanager
def worker(folder: str, stack: str, blocks: str) -> Iterator[Callable[[Any], Any]]:
    """A function that asks such a process; the process ends with the block."""
    context = get_context("spawn")
    here, there = context.Pipe()
    process = context.Process(target=work, args=(there, folder, stack, blocks), daemon=True)
    process.start()
    there.close()

    def ask(what: Any) -> Any:
        try:
            here.send(what)
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
            peaks = {"compiled": compiled(length)[False]}
            peaks["plain"], peaks["grit"] = (fused_peaks := fused(length))[False], fused_peaks[True]
            arms = {
                "compiled": lambda: compiled(False),
                "plain": lambda: fused(False),
                "grit": lambda: fused(True),
            }
            times = in_turn(arms, 1000, seconds=options.seconds)
            print(f"{stack}, {length} tokens per sequence, {len(times['grit'])} rounds", flush=True)
            for over, under in PAIRS:
                memory = f"{peaks[over] / peaks[under]:.4f} of {peaks[under] / 2**30:.2f} GiB" if peaks[under] else "-"
                seconds = spread(times[under]).median
                step = spread(ratios(times[over], times[under]))
                print(f"  {over:>5} over {under:<8}  step {step} of {seconds:.3f} s  memory {memory}", flush=True)
    return 0


if __name__ == "__main__":
    sys.exit(main())
