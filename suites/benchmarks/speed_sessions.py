"""Real sessions of the speed gate on the embedded server, among models of which all but one are the base.

    python suites/benchmarks/speed_sessions.py --out sessions.jsonl --sessions 20 --busy 0 2 --limit 120

Each session measures the base, two more copies of it, the copy that the gate makes for itself, and the base with so
much text in its template that it is 15% slower (a deeper context), and decides the gates. No gate may accuse a copy;
the slower one is to be found. Sessions run one after another; everything is pinned to two cores, with the busy
processes, if there are any, and what other processes used meanwhile is recorded. Sessions that are in the file
already are not run again, so an interrupted or timed-out run continues; the table of all comes last. Exit status 1 if
a copy was accused, or fewer than 95% of the slower models were found.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import math
import os
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np

from grit_impl.evaluate.gates import decide
from grit_impl.evaluate.results import Evaluation
from grit_impl.evaluate.speed import BABBLE, Schedule, copy_of, measure
from grit_impl.export import export_merged, write_modelfile
from grit_impl.gguf.modelfile import TEMPLATES
from grit_impl.serve.client import Endpoint
from grit_impl.serve.server import EmbeddedOllama

BASE = Path(__file__).parents[2] / "fixtures" / "tiny_llama"
EQUAL = ("baseline", "pure")
BOUND = -10.0
SLOWER = 0.15
WORDS = range(20, 120, 4)
"""Lengths of the text that is tried."""
BUSY = "import os; parent = os.getppid()\nwhile os.getppid() == parent: sum(range(10000))"
TICKS = os.sysconf("SC_CLK_TCK")


def pin(count: int) -> list[int]:
    """Keep this process and all that it starts on so many cores, no two of them halves of one; their numbers."""
    chosen: dict[str, int] = {}
    for core in sorted(os.sched_getaffinity(0)):
        siblings = Path(f"/sys/devices/system/cpu/cpu{core}/topology/thread_siblings_list")
        chosen.setdefault(siblings.read_text() if siblings.is_file() else str(core), core)
    cores = list(chosen.values())[:count]
    os.sched_setaffinity(0, cores)
    return cores


def used() -> tuple[float, float]:
    """Seconds of work that all processes of this machine have done, and of these this one and those it has ended."""
    everyone = [int(value) for value in Path("/proc/stat").read_text().split("\n", 1)[0].split()[1:9]]
    return (sum(everyone) - everyone[3] - everyone[4]) / TICKS, sum(os.times()[:4])


@contextlib.contextmanager
def busy(count: int) -> Iterator[None]:
    """So many processes that never wait."""
    processes = [subprocess.Popen([sys.executable, "-c", BUSY]) for _ in range(count)]
    try:
        yield
    finally:
        for process in processes:
            process.kill()
            process.wait()


def deeper(gguf: Path, folder: Path, words: int) -> Path:
    """A Modelfile whose template puts a text before every prompt."""
    return write_modelfile(gguf, folder / f"deeper-{words}.Modelfile", "air " * words + TEMPLATES["alpaca"])


def calibrate(gguf: Path, folder: Path) -> int:
    """Words of a text that makes the base 15% slower: by a line through the time per token, which words add to.

    The first length that looks slow enough would be one that chance made slow: 32 words measured so were 10% slower.
    """
    files = {str(words): deeper(gguf, folder, words) for words in (0, *WORDS)}
    best = dict.fromkeys(files, 0.0)
    with EmbeddedOllama(files, most=len(files)) as server, Endpoint(server.url) as endpoint:
        for number in range(20):
            for name in files:
                reply = endpoint.generate(name, "Say it.", {**BABBLE, "num_predict": 64, "seed": number})
                best[name] = max(best[name], reply.tokens_per_second if reply.eval_count == 64 else 0.0)
    lengths = [int(name) for name in files if best[name]]
    slope, start = np.polyfit(lengths, [1 / best[str(words)] for words in lengths], 1)
    return min(math.ceil(start * (1 / (1 - SLOWER) - 1) / slope), WORDS[-1]) if slope > 0 else WORDS[-1]


def session(models: dict[str, Path], room: int, seconds: float, seed: int) -> tuple[Evaluation, str]:
    """One measurement in a server of its own, and why it ended."""
    names = {label: label for label in models}
    schedule = Schedule(seconds=seconds, max_speed_loss=-BOUND)
    with EmbeddedOllama(models, most=room) as server, Endpoint(server.url) as endpoint:
        details = {label: endpoint.details(label) for label in models}
        with copy_of(endpoint, "base") as copy:
            rows, why = measure(
                endpoint, {**names, **copy}, "Say it.", base="base", schedule=schedule, tokens=64, seed=seed
            )
    return Evaluation(names, [], rows, {"speed": {"looks": schedule.looks}, "details": details}), why


def one(models: dict[str, Path], number: int, given: dict[str, Any]) -> dict[str, Any]:
    """A session and its verdicts, with what else the machine did."""
    start, load, before = time.monotonic(), os.getloadavg()[0], used()
    with busy(given["busy"]):
        evaluation, why = session(models, given["room"], given["seconds"], number)
    seconds, after = time.monotonic() - start, used()
    judged = {label: decide(evaluation, "delta_speed", label, BOUND) for label in (*EQUAL, "deeper")}
    others = (after[0] - before[0]) - (after[1] - before[1])
    slower = evaluation.delta_speed("deeper")
    return {
        "session": number, **given, "load": load, "others": round(max(0.0, others) / seconds, 3), "why": why,
        "took": round(seconds, 1), "rounds": len({row["round"] for row in evaluation.speed}),
        "slower": slower and slower.estimate, "verdicts": {label: each.verdict for label, each in judged.items()},
        "summaries": {label: each.summary for label, each in judged.items()}, "rows": evaluation.speed,
    }  # fmt: skip


def table(rows: list[dict[str, Any]]) -> bool:
    """Print what the sessions found, by condition; whether all is as it should be."""
    print("| busy | sessions | copies accused | cleared | slower found | really slower by | others used | took |")
    print("|---|---|---|---|---|---|---|---|")
    good = True
    for count in dict.fromkeys(row["busy"] for row in rows):
        mine = [row for row in rows if row["busy"] == count]
        copies = [row["verdicts"][label] for row in mine for label in EQUAL]
        found = [row["verdicts"]["deeper"] for row in mine].count("refuted")
        slower = statistics.median(-row["slower"] for row in mine if row["slower"] is not None)
        others, took = (sorted(row[name] for row in mine) for name in ("others", "took"))
        print(
            f"| {count} | {len(mine)} | {copies.count('refuted')} of {len(copies)} | {copies.count('supported')} "
            f"| {found} | {slower:.1f}% | {others[0]:.2f}-{others[-1]:.2f} cores | {took[0]:.0f}-{took[-1]:.0f} s |"
        )
        good = good and "refuted" not in copies and found >= 0.95 * len(mine)
    return good


def main() -> None:
    """Run the sessions."""
    parser = argparse.ArgumentParser()
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--sessions", type=int, default=20, help="of each condition")
    parser.add_argument(
        "--first", type=int, default=0, help="number of the first, its seed: where many run side by side"
    )
    parser.add_argument("--busy", type=int, nargs="+", default=[0, 2], help="processes that keep a core busy meanwhile")
    parser.add_argument("--room", type=int, default=8, help="models that the server keeps")
    parser.add_argument("--seconds", type=float, default=300.0, help="budget of a session")
    parser.add_argument("--cores", type=int, default=2, help="cores that everything is pinned to")
    parser.add_argument("--limit", type=float, default=1e9, help="minutes after which no session begins")
    given = parser.parse_args()
    end = time.monotonic() + 60 * given.limit
    cores = pin(given.cores)
    rows = [json.loads(line) for line in given.out.read_text().splitlines()] if given.out.exists() else []
    with tempfile.TemporaryDirectory() as scratch:
        folder, gguf = Path(scratch), Path(scratch) / "base.gguf"
        export_merged(BASE, None, gguf, "q8_0")
        base = write_modelfile(gguf, folder / "base.Modelfile")
        words = rows[0]["words"] if rows else calibrate(gguf, folder)
        models = {"base": base, **dict.fromkeys(EQUAL, base), "deeper": deeper(gguf, folder, words)}
        print(
            f"pinned to cores {cores} of {os.cpu_count()}; {words} words before the slower model's prompts", flush=True
        )
        for count in given.busy:
            how = {"busy": count, "room": given.room, "seconds": given.seconds, "cores": len(cores), "words": words}
            for number in range(given.first, given.first + given.sessions):
                there = any(how.items() <= row.items() and row["session"] == number for row in rows)
                if there or time.monotonic() > end:
                    continue
                row = one(models, number, how)
                rows.append(row)
                with open(given.out, "a", encoding="utf-8") as out:
                    out.write(json.dumps(row) + "\n")
                verdicts = ", ".join(f"{label} {verdict}" for label, verdict in row["verdicts"].items())
                print(
                    f"{count} busy, {number}: {verdicts}; {row['rounds']} rounds, {row['why']}, {row['took']:.0f} s, "
                    f"others {row['others']:.2f} cores, load {row['load']:.1f}",
                    flush=True,
                )
    sys.exit(0 if rows and table(rows) else 1)


if __name__ == "__main__":
    main()
