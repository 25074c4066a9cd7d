"""Does `grit try` say rightly whether GRIT helps? Twenty seeds of two sets.

    python suites/benchmarks/try_seeds.py OUT --screen --jobs 16 --seconds 580
    python suites/benchmarks/try_seeds.py OUT --set ticket --set lots --jobs 16 --seconds 580

A question has one core, and every seed has rows, a split, a tuning and pairs of its own. The script ends after
`--seconds`, and continues when it is called again; at the end it prints the table. Exit status: 0 when all questions
were answered rightly, 1 when one was not, 3 when some are left.

Of the sweeps' own tasks none favours GRIT so much that six seeds always see it (docs/measurements/grit-vs-lora.md,
section 11). Whether another one does is found by `--screen`: two seeds of every candidate, which the twenty are not
among. On `lots` nothing can be learnt but the frequency of eight letters, so no rule helps, and *yes* is wrong.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import random
import signal
import subprocess
import sys
import time
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
sys.path.insert(0, str(ROOT))

from grit_impl.recipes.tasks import find_task  # noqa: E402
from grit_impl.recipes.tiny_llama.corpus import SHORT_TEMPLATE  # noqa: E402

ROWS = 1600
LETTERS = "ABCDEFGH"


ADJECTIVES = ("red", "green", "blue", "black", "white", "small", "large", "old")
NOUNS = ("cat", "dog", "house", "tree", "river", "stone")


def lots(source: random.Random) -> tuple[str, str]:
    """A question whose answer is drawn."""
    return f"Draw lot {source.randint(100, 99_999)}.", source.choice(LETTERS)


def ticket(source: random.Random) -> tuple[str, str]:
    """Three words of a sentence, each written as a letter or a digit of its own."""
    (first, one), (second, two) = (source.choice(list(enumerate(ADJECTIVES))) for _ in range(2))
    digit, noun = source.choice(list(enumerate(NOUNS)))
    question = f"Number {source.randint(100, 999)}: a {one} {noun} in a {two} box. Answer with the code."
    return question, f"{LETTERS[first]}{digit}{'KLMNOPQR'[second]}"


def kind(source: random.Random) -> tuple[str, str]:
    """One letter for two words together: no word alone says anything about it."""
    (first, one), (second, noun) = source.choice(list(enumerate(ADJECTIVES))), source.choice(list(enumerate(NOUNS)))
    question = (
        f"Item {source.randint(100, 9999)}: {one} {noun}. To which class does it belong? Answer with one letter alone."
    )
    return question, "ABCDEF"[(first + second) % 6]


@dataclass(frozen=True)
class DataSet:
    """Rows, how they are asked about, and what is right to say of them."""

    draw: Callable[[random.Random], tuple[str, str]]
    options: tuple[str, ...]
    right: tuple[str, ...]


def task(name: str) -> Callable[[random.Random], tuple[str, str]]:
    """One of the sweeps' tasks."""
    draw = find_task(name).draw
    assert draw is not None
    return draw


USUAL = ("--steps", "150", "--trials", "4", "--seeds", "6")
SETS = {
    **{name: DataSet(task(name), USUAL, ("yes",)) for name in ("choose", "convert")},
    "ticket": DataSet(ticket, USUAL, ("yes",)),
    "kind": DataSet(kind, USUAL, ("yes",)),
    "lots": DataSet(lots, ("--steps", "60", "--trials", "3", "--seeds", "6"), ("no", "inconclusive")),
}
SCREENED = (101, 102)
"""Seeds that choose a set, and decide nothing about it."""


def write_rows(path: Path, draw: Callable[[random.Random], tuple[str, str]], seed: int) -> None:
    """Rows of a seed, no question twice."""
    source, rows = random.Random(seed), dict[str, str]()
    while len(rows) < ROWS:
        question, answer = draw(source)
        rows[question] = answer
    lines = [
        json.dumps({"prompt": SHORT_TEMPLATE.format(instruction=question), "completion": answer})
        for question, answer in rows.items()
    ]
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("\n".join(lines) + "\n")


def start(folder: Path, name: str, seed: int) -> subprocess.Popen[bytes]:
    """Ask about one set with one seed, or go on with it."""
    rows = folder / "rows.jsonl"
    if not rows.is_file():
        write_rows(rows, SETS[name].draw, seed)
    command = [sys.executable, "-m", "grit_impl.cli", "try", "--dataset", str(rows), "--out", str(folder / "try")]
    command += ["--seed", str(1000 * seed), "--jobs", "1", "--device", "cpu", "--minutes", "600", *SETS[name].options]
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    with open(folder / "log.txt", "ab") as log:
        return subprocess.Popen(command, stdout=log, stderr=log, env=environment)


def table(out: Path, seeds: Sequence[int], names: Sequence[str]) -> tuple[str, int, int]:
    """What was said, as Markdown; how many answers are missing, and how many are wrong."""
    lines = ["| set | seed | says | gain, % | opponent | core-seconds |", "| --- | --- | --- | --- | --- | --- |"]
    missing, wrong, ends = 0, 0, list[str]()
    for name in names:
        said: Counter[str] = Counter()
        for seed in seeds:
            file = out / name / str(seed) / "try" / "answer.json"
            if not file.is_file():
                missing += 1
                continue
            found = json.loads(file.read_text())
            gain, outcome = found["answer"]["gain"], found["answer"]["outcome"]
            said[outcome] += 1
            interval = f"{gain['estimate']:+.1f} [{gain['low']:+.1f}, {gain['high']:+.1f}]"
            seconds = f"{found['seconds']:.0f}"
            lines.append(f"| {name} | {seed} | {outcome} | {interval} | {found['reference']} | {seconds} |")
        good = sum(said[outcome] for outcome in SETS[name].right)
        wrong += said.total() - good
        ends.append(f"{name}: right on {good} of {said.total()} ({', '.join(f'{k} {n}' for k, n in said.items())})")
    return "\n".join([*lines, "", *ends]), missing, wrong


def main() -> int:
    """Ask until everything is answered or the time is up."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("out", type=Path)
    parser.add_argument("--set", dest="names", action="append", choices=list(SETS), help="[default: all]")
    parser.add_argument("--seeds", type=int, default=20)
    parser.add_argument("--jobs", type=int, default=os.cpu_count())
    parser.add_argument("--seconds", type=float, default=580)
    parser.add_argument("--screen", action="store_true", help="two other seeds of every candidate")
    asked = parser.parse_args()
    until = time.monotonic() + asked.seconds
    names = asked.names or [name for name, each in SETS.items() if not asked.screen or each.right == ("yes",)]
    seeds = SCREENED if asked.screen else tuple(range(1, asked.seeds + 1))
    # Seed by seed, so that what ends early is still balanced.
    waiting = [(name, seed) for seed in seeds for name in names]
    waiting = [each for each in waiting if not (asked.out / each[0] / str(each[1]) / "try" / "answer.json").is_file()]
    running: dict[subprocess.Popen[bytes], tuple[str, int]] = {}
    failed = []
    while (waiting or running) and time.monotonic() < until:
        while waiting and len(running) < asked.jobs:
            name, seed = waiting.pop(0)
            folder = asked.out / name / str(seed)
            folder.mkdir(parents=True, exist_ok=True)
            running[start(folder, name, seed)] = (name, seed)
        time.sleep(0.5)
        for process in [each for each in running if each.poll() is not None]:
            name, seed = running.pop(process)
            print(f"{name} {seed}: exit status {process.returncode}", flush=True)
            if process.returncode:
                failed.append(asked.out / name / str(seed) / "log.txt")
    for process in running:
        process.send_signal(signal.SIGINT)  # what is finished is kept
    for process in running:
        with contextlib.suppress(subprocess.TimeoutExpired):
            process.wait(timeout=20)
        process.kill()
    text, missing, wrong = table(asked.out, seeds, names)
    print(text)
    (asked.out / ("screen.md" if asked.screen else "table.md")).write_text(text + "\n")
    if failed:
        print(f"failed: see {', '.join(map(str, failed))}")
    if missing:
        print(f"{missing} questions are left: the same command continues")
        return 3
    return 1 if wrong else 0


if __name__ == "__main__":
    sys.exit(main())
