"""Real sessions of the speed gate on the embedded server, among models of which all but one are the base.

    python suites/benchmarks/speed_sessions.py --sessions 10 --busy 2 --out sessions.jsonl

Each session measures the base, two more copies of it, the copy that the gate makes for itself, and the base with a
larger number type (float32), and decides the gates. No gate may accuse a copy; the larger one is slower, and is to be
found. One line per session goes to standard output, with the machine's load, and its rates to the file.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tempfile
import time
from pathlib import Path

from grit_impl.evaluate.gates import decide
from grit_impl.evaluate.results import Evaluation
from grit_impl.evaluate.speed import Schedule, copy_of, measure
from grit_impl.export import export_merged, write_modelfile
from grit_impl.serve.client import Endpoint
from grit_impl.serve.server import EmbeddedOllama

BASE = Path(__file__).parents[2] / "fixtures" / "tiny_llama"
EQUAL = ("baseline", "pure")
BOUND = -10.0
BUSY = "import time; end = time.monotonic() + 900\nwhile time.monotonic() < end: sum(range(10000))"


def session(models: dict[str, Path], room: int, seconds: float, seed: int) -> tuple[Evaluation, str]:
    """One measurement in a server of its own, and why it ended."""
    names = {label: label for label in models}
    schedule = Schedule(seconds=seconds)
    with EmbeddedOllama(models, most=room) as server, Endpoint(server.url) as endpoint:
        details = {label: endpoint.details(label) for label in models}
        with copy_of(endpoint, "base") as copy:
            rows, why = measure(
                endpoint, {**names, **copy}, "Say it.", base="base", schedule=schedule, tokens=64, seed=seed
            )
    return Evaluation(names, [], rows, {"speed": {"looks": schedule.looks}, "details": details}), why


def main() -> None:
    """Run the sessions."""
    parser = argparse.ArgumentParser()
    parser.add_argument("--sessions", type=int, default=10)
    parser.add_argument("--busy", type=int, default=0, help="processes that keep a core busy meanwhile")
    parser.add_argument("--room", type=int, default=8, help="models that the server keeps")
    parser.add_argument("--seconds", type=float, default=300.0, help="budget of a session")
    parser.add_argument("--out", type=Path, required=True)
    given = parser.parse_args()
    busy = [subprocess.Popen([sys.executable, "-c", BUSY]) for _ in range(given.busy)]
    try:
        with tempfile.TemporaryDirectory() as scratch:
            files = {}
            for label, kind in [("base", "q8_0"), ("larger", "f32")]:
                export_merged(BASE, None, Path(scratch) / f"{label}.gguf", kind)
                files[label] = write_modelfile(Path(scratch) / f"{label}.gguf", Path(scratch) / f"{label}.Modelfile")
            models = {"base": files["base"], **dict.fromkeys(EQUAL, files["base"]), "larger": files["larger"]}
            for number in range(given.sessions):
                start = time.monotonic()
                evaluation, why = session(models, given.room, given.seconds, number)
                verdicts = {label: decide(evaluation, "delta_speed", label, BOUND) for label in (*EQUAL, "larger")}
                told = {label: judged.verdict for label, judged in verdicts.items()}
                row = {
                    "session": number, "busy": given.busy, "room": given.room, "load": os.getloadavg()[0], "why": why,
                    "rounds": len({each["round"] for each in evaluation.speed}), "seconds": time.monotonic() - start,
                    "verdicts": told, "summaries": {label: judged.summary for label, judged in verdicts.items()},
                }  # fmt: skip
                with open(given.out, "a", encoding="utf-8") as out:
                    out.write(json.dumps({**row, "rows": evaluation.speed}) + "\n")
                found = ", ".join(f"{label} {verdict}" for label, verdict in told.items())
                print(
                    f"{number}: {found}; {row['rounds']} rounds, {why}, {row['seconds']:.0f} s, load {row['load']:.1f}",
                    flush=True,
                )
    finally:
        for process in busy:
            process.kill()


if __name__ == "__main__":
    main()
