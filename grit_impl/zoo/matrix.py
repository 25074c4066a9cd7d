"""The fault zoo's matrix: every fault and every sound variant, in every trainer, optimizer and seed where it exists.

    python -m grit_impl.zoo.matrix                      all of it
    python -m grit_impl.zoo.matrix --seeds 0 --trainers loop,pure --optimizers adamw

A fault is caught when its verdict is a fault, and named when it is one of the causes that the case allows. A sound
variant is flagged when its verdict is any other than its own.
"""

from __future__ import annotations

import json
import platform
import time
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Sequence
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import click

from grit_impl.errors import GRITError
from grit_impl.record import write_atomic

_KEY = ("case", "trainer", "optimizer", "seed")
TARGET = 0.95  # share of faults whose cause must be named


def runs(
    trainers: Iterable[str] | None = None,
    optimizers: Iterable[str] | None = None,
    seeds: Iterable[int] | None = None,
    cases: Iterable[str] | None = None,
) -> Iterator[tuple[str, Any, str, str, int]]:
    """All (kind, case, trainer, optimizer, seed) of a selection; None: everything that is installed.

    Raises:
        GRITError: an unknown trainer, optimizer or case.
    """
    from grit_impl.zoo import bench as zoo
    from grit_impl.zoo.catalogue import FAULTS, SOUND

    installed = zoo.optimizers()
    chosen_trainers = _known("trainer", trainers, zoo.TRAINERS)
    chosen_optimizers = _known("optimizer", optimizers, installed)
    names = _known("case", cases, [c.id for c in (*FAULTS, *SOUND)])
    for seed in zoo.SEEDS if seeds is None else list(seeds):
        for kind, group in (("fault", FAULTS), ("sound", SOUND)):
            for case in group:
                for trainer in case.trainers:
                    for optimizer in case.optimizers:
                        if trainer in chosen_trainers and optimizer in chosen_optimizers and case.id in names:
                            yield kind, case, trainer, optimizer, seed


def _known(what: str, chosen: Iterable[str] | None, known: Sequence[str]) -> Sequence[str]:
    wanted = list(known if chosen is None else chosen)
    for name in wanted:
        if name not in known:
            raise GRITError(f"unknown {what} {name!r}: choose from {', '.join(known)}")
    return wanted


def rows_of(case: Any, trainer: str, optimizer: str, seed: int) -> list[dict[str, Any]]:
    """Run one case and return its ledger."""
    from grit_impl.ledger.recorder import gradient_ledger
    from grit_impl.zoo.bench import Bench

    bench = Bench(trainer, optimizer, seed, **case.setting)
    moments = case.build(bench)
    with gradient_ledger(bench.model, **case.ledger) as ledger:
        bench.train(moments)
    return ledger.rows()


def run_case(case: Any, trainer: str, optimizer: str, seed: int) -> Any:
    """Run one case and return its verdict."""
    from grit_impl.ledger.verdict import judge_ledger

    return judge_ledger(rows_of(case, trainer, optimizer, seed))


def matrix(
    trainers: Iterable[str] | None = None,
    optimizers: Iterable[str] | None = None,
    seeds: Iterable[int] | None = None,
    cases: Iterable[str] | None = None,
    progress: Callable[[dict[str, Any]], None] | None = None,
    known: Sequence[dict[str, Any]] = (),
) -> dict[str, Any]:
    """Run a selection.

    Args:
        trainers, optimizers, seeds, cases: See `runs`.
        progress: Called with each result.
        known: Results that need not be computed again.

    Returns:
        `results` (one dictionary per run: kind, case, trainer, optimizer, seed, expected, cause, right, summary) and
        their `summary`, see `summarise`.
    """
    results = []
    started = time.perf_counter()
    done = {tuple(r[k] for k in _KEY): r for r in known}
    for kind, case, trainer, optimizer, seed in runs(trainers, optimizers, seeds, cases):
        if old := done.get((case.id, trainer, optimizer, seed)):
            results.append(old)
            if progress is not None:
                progress(old)
            continue
        verdict = run_case(case, trainer, optimizer, seed)
        expected = case.expected(optimizer)
        result = {
            "kind": kind,
            "case": case.id,
            "trainer": trainer,
            "optimizer": optimizer,
            "seed": seed,
            "expected": list(expected),
            "cause": verdict.cause,
            "right": verdict.cause in expected,
            "summary": verdict.summary,
        }
        results.append(result)
        if progress is not None:
            progress(result)
    return {
        "summary": {**summarise(results), "seconds": round(time.perf_counter() - started, 1)},
        "versions": _versions(),
        "cases": {case.id: case.text for _, case, *_ in runs(cases=cases)},
        "results": results,
    }


def summarise(results: Sequence[dict[str, Any]]) -> dict[str, Any]:
    """Counts, shares, and the confusion matrix {expected cause: {given cause: runs}}."""
    faults = [r for r in results if r["kind"] == "fault"]
    sound = [r for r in results if r["kind"] == "sound"]
    confusion: dict[str, Counter[str]] = {}
    for r in results:
        expected = r["cause"] if r["right"] else r["expected"][0]
        confusion.setdefault(expected, Counter())[r["cause"]] += 1
    named, flagged = sum(r["right"] for r in faults), sum(not r["right"] for r in sound)
    return {
        "faults": len({r["case"] for r in faults}),
        "sound_variants": len({r["case"] for r in sound}),
        "fault_runs": len(faults),
        "sound_runs": len(sound),
        "named": named,
        "named_share": named / len(faults) if faults else None,
        "caught": sum(r["cause"] not in ("effective", "no-modifier") for r in faults),
        "flagged": flagged,
        "passed": (not faults or named >= TARGET * len(faults)) and flagged == 0,
        "confusion": {cause: dict(counts) for cause, counts in sorted(confusion.items())},
    }


def _versions() -> dict[str, str]:
    found = {"python": platform.python_version()}
    for package in ("torch", "transformers", "trl", "peft", "accelerate", "bitsandbytes"):
        try:
            found[package] = version(package)
        except PackageNotFoundError:
            found[package] = "not installed"
    return found


def text(result: dict[str, Any]) -> str:
    """The matrix for a terminal: one line per cause, what was mistaken, and the totals."""
    summary, results = result["summary"], result["results"]
    lines = [f"{'cause':28}{'runs':>6}{'right':>7}  mistaken for"]
    for cause, counts in summary["confusion"].items():
        others = ", ".join(f"{other} ({n})" for other, n in counts.items() if other != cause)
        lines.append(f"{cause:28}{sum(counts.values()):>6}{counts.get(cause, 0):>7}  {others}")
    for r in results:
        if not r["right"]:
            where = f"{r['case']} / {r['trainer']} / {r['optimizer']} / seed {r['seed']}"
            lines.append(f"  {where}: {r['cause']} instead of {' or '.join(r['expected'])}: {r['summary']}")
    if summary["fault_runs"]:
        lines.append(
            f"faults: {summary['faults']} kinds, {summary['named']} of {summary['fault_runs']} runs named rightly "
            f"({summary['named_share']:.1%}), {summary['caught']} caught"
        )
    lines.append(
        f"sound variants: {summary['sound_variants']} kinds, {summary['flagged']} of {summary['sound_runs']} runs "
        f"flagged; {summary['seconds']:.0f} s"
    )
    return "\n".join(lines)


def _command(*chosen: Sequence[Any] | None) -> str:
    names = ("--trainers", "--optimizers", "--seeds", "--cases")
    given = [f"{n} {','.join(map(str, v))}" for n, v in zip(names, chosen, strict=True) if v is not None]
    return " ".join(["python -m grit_impl.zoo.matrix", *given])


def _results(out: Path) -> list[dict[str, Any]]:
    try:
        found: list[dict[str, Any]] = json.loads(out.read_text())["results"]
        summarise(found)
    except (OSError, ValueError, LookupError, TypeError, AttributeError) as error:
        raise GRITError(f"{out} holds no results of this command ({type(error).__name__}: {error})") from None
    return found


def _split(value: str | None) -> list[str] | None:
    return None if value is None else [part for part in value.split(",") if part]


@click.command()
@click.option("--trainers", help="Comma-separated: loop, trainer, sft, hybrid, pure. [default: all]")
@click.option("--optimizers", help="Comma-separated: adamw, sgd, adamw8bit. [default: all installed]")
@click.option("--seeds", help="Comma-separated. [default: 0,1,2]")
@click.option("--cases", help="Comma-separated ids of faults and sound variants. [default: all]")
@click.option("--out", type=click.Path(dir_okay=False, path_type=Path), help="Write the results as JSON, as they come.")
@click.option("--resume", is_flag=True, help="Keep the results that --out already holds.")
def faults(
    trainers: str | None, optimizers: str | None, seeds: str | None, cases: str | None, out: Path | None, resume: bool
) -> None:
    """Run the fault zoo and print the verdicts' confusion matrix; exit status 1 below the target."""
    import torch

    torch.set_num_threads(1)
    try:
        numbers = None if seeds is None else [int(s) for s in _split(seeds) or []]
    except ValueError:
        raise GRITError(f"--seeds {seeds!r}: give whole numbers, separated by commas") from None
    chosen = (_split(trainers), _split(optimizers), numbers, _split(cases))
    total = sum(1 for _ in runs(*chosen))
    known = _results(out) if resume and out is not None and out.exists() else []
    seen: list[dict[str, Any]] = []

    with click.progressbar(length=total, label=f"{total} runs") as bar:

        def progress(one: dict[str, Any]) -> None:
            bar.update(1)
            seen.append(one)
            if out is not None and len(seen) % 20 == 0 and len(seen) > len(known):
                write_atomic(out, json.dumps({"summary": summarise(seen), "results": seen}, indent=1))

        result = matrix(*chosen, progress=progress, known=known)
    click.echo(text(result))
    if out is not None:
        write_atomic(out, json.dumps({"command": _command(*chosen), **result}, indent=1))
    if not result["summary"]["passed"]:
        raise SystemExit(1)


if __name__ == "__main__":
    try:
        faults(standalone_mode=True)
    except GRITError as error:
        click.echo(f"grit faults: {error}", err=True)
        raise SystemExit(2) from None
