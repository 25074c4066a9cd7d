"""Rows of one's own, several seeds side by side on one GPU: train, export and ask; a table with intervals at the end.

    python suites/benchmarks/gpu_seeds.py OUT --dataset gsm8k/train.jsonl --questions gsm8k/test.jsonl --seconds 560

What `pytest -m gpu --seeds 3` does with questions about the air, for other rows and for a machine that is there for
minutes: all arms of all seeds train at once, the untrained base answers meanwhile, then all models answer side by side.
It ends after `--seconds` and continues when it is called again; records and exports lie where a session puts them. The
questions have the columns `question` and `answer`, a number after the last `####` or alone.
"""

from __future__ import annotations

import argparse
import json
import shutil
import signal
import sys
import threading
import time
from dataclasses import replace
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

ARMS = ("baseline", "hybrid", "pure", "recommended")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("out", type=Path)
    parser.add_argument("--dataset", required=True)
    parser.add_argument("--questions", required=True)
    parser.add_argument("--limit", type=int, default=300)
    parser.add_argument("--tokens", type=int, default=320, help="of an answer")
    parser.add_argument("--base-model", default="smollm2")
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--seed", type=int, default=3407)
    parser.add_argument("--steps", type=int, default=None)
    parser.add_argument("--seconds", type=int, default=3600)
    asked = parser.parse_args()
    signal.signal(signal.SIGALRM, lambda *_: sys.exit("time is up; call it again"))
    signal.alarm(asked.seconds)
    from grit_impl.machine import cores
    from grit_impl.verify.evidence.live import LiveEvidence
    from grit_impl.verify.options import Options

    asked.items = questions(asked.questions, asked.limit)
    chosen = {"base_model": asked.base_model, "steps": asked.steps, "seed": asked.seed, "seeds": asked.seeds}
    evidence = LiveEvidence(Options(**chosen, reports_dir=asked.out))
    base = dict(evidence._exported("base", None))
    asking = threading.Thread(target=ask, args=(evidence, {"base": base}, asked, "answers-base", 4), daemon=True)
    asking.start()
    records = train(evidence, asked)
    exports = {"base": base}
    for name, record in records.items():
        exports[name] = dict(evidence._exported(name, record))
    asking.join()
    folder = asked.out / "answers"
    folder.mkdir(parents=True, exist_ok=True)
    if not (folder / "answers.jsonl").exists():
        shutil.copyfile(asked.out / "answers-base" / "answers.jsonl", folder / "answers.jsonl")
    ask(evidence, exports, asked, "answers", max(1, min(4, cores() // len(exports))))
    table(records, folder, asked.out / "table.json")


def questions(source: str, limit: int) -> Any:
    """Questions with numbers as answers, GSM8K's reasoning left out."""
    from grit_impl.evaluate.items import load_questions

    found, _, _ = load_questions(source, "question", "answer", scorer="numeric", limit=limit)
    items = [{**item, "answer": item["answer"].rpartition("####")[2].strip()} for item in found.items]
    return replace(found, items=items)


def train(evidence: Any, asked: argparse.Namespace) -> dict[str, Any]:
    """Run records by arm and seed; all train at the same time."""
    from grit_impl.runs.execute import run_arms, with_tokens

    folder, records, lock = asked.out / "runs", {}, threading.Lock()

    def progress(label: str, done: int, total: int) -> None:
        if done % 50 == 0:
            print(f"{time.strftime('%X')} {label} {done} of {total}", flush=True)

    def one(seed: int) -> None:
        specs = [replace(spec, dataset=asked.dataset) for spec in evidence._specs(ARMS, seed)]
        specs = [with_tokens(spec, folder) for spec in specs]
        found = run_arms(specs, folder, jobs=len(ARMS), progress=lambda *_: None)
        with lock:
            records.update({f"{arm}-seed{seed}": record for arm, record in found.items()})
        progress(f"seed {seed}", 0, 0)

    # Tokens are made once for each seed, before the threads share the folder.
    threads = [threading.Thread(target=one, args=(asked.seed + i,)) for i in range(asked.seeds)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    broken = {name: record for name, record in records.items() if isinstance(record, str)}
    if broken or len(records) < asked.seeds * len(ARMS):
        sys.exit(f"not trained: {broken}")
    return dict(sorted(records.items()))


def ask(evidence: Any, exports: dict[str, Any], asked: argparse.Namespace, folder: str, threads: int) -> None:
    """Ask these models all questions; an interrupted round goes on where it was."""
    from grit_impl.evaluate.asking import EvaluationOptions
    from grit_impl.evaluate.session import evaluate
    from grit_impl.machine import cores
    from grit_impl.serve.server import EmbeddedOllama

    how = EvaluationOptions(
        scorer="numeric",
        stop=evidence.format.stop,
        num_predict=asked.tokens,
        in_flight=max(2, min(len(exports), cores())),
        in_turn=True,
        speed_rounds=0,
        progress=False,
    )
    files = {name: Path(export["modelfile"]) for name, export in exports.items()}
    with EmbeddedOllama(files, threads=threads, most=len(files)) as server:
        evaluate(server.url, {name: name for name in files}, asked.items, None, asked.out / folder, how)
    print(f"{time.strftime('%X')} answered: {', '.join(files)}", flush=True)


def table(records: dict[str, Any], folder: Path, out: Path) -> None:
    """Print a line per model and the paired differences over seeds."""
    from grit_impl.ledger.verdict import judge_ledger
    from grit_impl.statistics.intervals import t_interval

    answers = [json.loads(line) for line in (folder / "answers.jsonl").read_text().split("\n") if line]
    rows: dict[str, dict[str, Any]] = {}
    for name in ("base", *records):
        mine = [row for row in answers if row["label"] == name]
        row: dict[str, Any] = {}
        row["right"] = 100 * sum(bool(each["correct"]) for each in mine) / max(1, len(mine))
        row["n"] = len(mine)
        if name in records:
            run = records[name].run
            losses = [step["loss"] for step in records[name].steps]
            verdict = judge_ledger(records[name])
            report = run.get("grit_report") or {}
            row |= {
                "first_loss": losses[0],
                "final_loss": sum(losses[-20:]) / 20,
                "seconds": run["train_seconds"],
                "peak_gib": (run["peak_memory_bytes"] or 0) / 2**30,
                "verdict": verdict.cause,
                "says": verdict.summary,
                "inversions": report.get("inversions"),
                "completeness": report.get("completeness"),
                "layers": verdict.numbers.get("tensors"),
            }
        rows[name] = row
    out.write_text(json.dumps(rows, indent=1, default=str))
    for name, row in rows.items():
        shown = {key: round(value, 4) if isinstance(value, float) else value for key, value in row.items()}
        print(name, {key: value for key, value in shown.items() if key not in ("says", "completeness")}, flush=True)
    seeds = sorted({name.rpartition("seed")[2] for name in records})
    for arm in ARMS[1:]:
        for key in ("right", "final_loss", "seconds"):
            gaps = [rows[f"{arm}-seed{s}"][key] - rows[f"baseline-seed{s}"][key] for s in seeds]
            print(arm, "minus baseline", key, t_interval(gaps) if len(gaps) > 1 else gaps, flush=True)


if __name__ == "__main__":
    main()
